"""Samples become rows, rows become JSON and a Markdown table, each with the machine they were measured on."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity. Milliseconds unless `unit` says otherwise; p95 and p99 are None for a rate."""

    name: str
    unit: str
    count: int
    p50: float
    p95: float | None
    p99: float | None
    target: str = ""
    note: str = ""


def percentile(sorted_samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed (nearest rank)."""
    return sorted_samples[max(0, math.ceil(share * len(sorted_samples)) - 1)]


def latency(name: str, samples_s: Sequence[float], *, target: str = "", note: str = "", unit: str = "ms") -> Row:
    """A row of durations, given in seconds."""
    scale = {"ms": 1e3, "µs": 1e6}[unit]
    ordered = sorted(sample * scale for sample in samples_s)
    p50, p95, p99 = (round(percentile(ordered, share), 2) for share in (0.50, 0.95, 0.99))
    return Row(name, unit, len(ordered), p50, p95, p99, target, note)


def rate(name: str, value: float, unit: str, count: int, *, target: str = "", note: str = "") -> Row:
    """A row with one number per second."""
    return Row(name, unit, count, round(value, 1), None, None, target, note)


def facts(settings: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on: machine, versions, settings, revision."""
    return {
        "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sandgate": importlib.metadata.version("sandgate"),
        "revision": _output("git", "rev-parse", "--short", "HEAD"),
        "runsc": _output("runsc", "--version").partition("\n")[0],
        "rustc": _output("rustc", "--version"),
        "settings": settings,
    }


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table that docs/performance.md shows."""
    lines = ["| what | p50 | p95 | p99 | unit | n | target | note |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        p95, p99 = ("–" if value is None else f"{value:g}" for value in (row.p95, row.p99))
        lines.append(
            f"| {row.name} | {row.p50:g} | {p95} | {p99} | {row.unit} | {row.count} | {row.target} | {row.note} |"
        )
    machine = f"{about['cores']} × {about['cpu']}, {about['memory_gib']} GiB, kernel {about['kernel']}"
    versions = f"sandgate {about['sandgate']} ({about['revision']}), Python {about['python']}, {about['runsc']}"
    return "\n".join([*lines, "", f"{about['measured_at']}: {machine}; {versions}, {about['rustc']}.", ""])


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, for machines to read."""
    return {"about": about, "rows": [asdict(row) for row in rows]}


def publish(name: str, rows: Sequence[Row], about: dict[str, Any], directory: Path) -> None:
    """Write the results as JSON and Markdown, named after the measurement and its time, and print the table."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{about['measured_at'].replace(':', '')}.json"
    path.write_bytes(orjson.dumps(as_json(rows, about), option=orjson.OPT_INDENT_2))
    table = markdown(rows, about)
    path.with_suffix(".md").write_text(table)
    print(table)
    say(f"written to {path} and {path.with_suffix('.md').name}")


def say(line: str) -> None:
    """Tell whoever waits at the terminal how far it is."""
    print(line, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
