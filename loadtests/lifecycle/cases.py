"""How long it takes to restore, wake, fork, save, and create many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loadtests import report
from loadtests.http import Connection
from loadtests.lifecycle.box import Box, box, children, create
from loadtests.report import Row
from loadtests.server import Target

#: Between two restores: time in which the host may make another shell, as it has in a real day.
_PAUSE_S = 0.4
_MIB = 1024 * 1024


async def timed(call: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Seconds a call took, and its result."""
    started = time.perf_counter()
    result = await call()
    return time.perf_counter() - started, result


async def ready_snapshot(source: Box) -> dict[str, Any]:
    """Take a snapshot and wait until it can be used."""
    taken = await source.post("snapshots", {"comment": "bench"}, expect=202)
    async with asyncio.timeout(60):
        while taken["state"] == "pending":
            await asyncio.sleep(0.02)
            path = f"{source.path}/snapshots/{taken['id']}"
            taken = (await source.api.call("GET", path)).json()
    if taken["state"] != "ready":
        raise RuntimeError(f"no snapshot: {taken}")
    return dict(taken)


async def restoring(api: Connection, target: Target) -> list[Row]:
    """Create from a snapshot until the 201, by then the copy's agent has answered; and the pause of taking one."""
    rows: list[Row] = []
    for mib, count, bar in ((64, 20, "100"), (256, 12, "300"), (1024, 6, "1200")):
        async with box(api, target, "hold", str(mib), memory_mb=max(1024, 2 * mib)) as source:
            pauses = []
            for _ in range(10 if mib == 64 else 3):
                snapshot = await ready_snapshot(source)
                pauses.append(snapshot["pause_ms"] / 1e3)
            note = f"image {snapshot['size_bytes'] / _MIB:.0f} MiB"
            rows.append(report.latency(f"live save of {mib} MiB, pause", pauses, target="50 / 80" if mib == 64 else ""))
            durations = []
            for _ in range(count):
                await asyncio.sleep(_PAUSE_S)
                took, copy = await timed(lambda: create(api, target, snapshot_id=snapshot["id"]))  # noqa: B023
                durations.append(took)
                await copy.destroy()
            rows.append(report.latency(f"create from {mib} MiB of memory", durations, target=bar, note=note))
    return rows


async def waking(api: Connection, target: Target) -> list[Row]:
    """A preview request to a paused sandbox, on a new connection."""
    rows = []
    async with box(api, target, "hold", "16") as source:
        awake = [(await timed(source.visit))[0] for _ in range(50)]
        rows.append(report.latency("preview request, running", awake, target="2 / 10"))
        for kind, count, bar in (("frozen", 60, "3 / 20"), ("hibernated", 20, "110 / 250")):
            durations = []
            for _ in range(count):
                await source.post("pause", {"hibernate": kind == "hibernated"})
                await asyncio.sleep(0.05 if kind == "frozen" else _PAUSE_S)
                durations.append((await timed(source.visit))[0])
            rows.append(report.latency(f"preview request, {kind}", durations, target=bar))
    return rows


async def forking(api: Connection, target: Target) -> list[Row]:
    """Fork until every copy answers."""
    rows = []
    async with box(api, target, "hold", "16") as parent:
        for count, repeats, bar in ((1, 15, ""), (5, 8, "150"), (20, 4, "700")):
            durations = []
            for _ in range(repeats):
                await asyncio.sleep(_PAUSE_S * count)
                took, made = await timed(lambda: children(parent, count))  # noqa: B023
                durations.append(took)
                for child in made:
                    await child.destroy()
            rows.append(report.latency(f"fork into {count}, all answer", durations, target=bar))
    return rows


async def burst(target: Target, groups: Path, *, pool: int, count: int) -> list[Row]:
    """So many creates at once, more than the pool holds. groups: as for `memory.frozen`."""
    async with asyncio.timeout(120):
        while len(list(groups.glob("*/cgroup.procs"))) < pool:
            await asyncio.sleep(0.2)
    durations: list[float] = []
    made: list[Box] = []

    async def one() -> None:
        async with Connection(target.base_url, target.key) as api:
            took, sandbox = await timed(lambda: create(api, target))
            durations.append(took)
            made.append(sandbox)

    results = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
    failed = [repr(result) for result in results if result is not None]
    async with Connection(target.base_url, target.key) as api:
        for sandbox in made:
            await Box(api, target, sandbox.id).destroy()
    note = f"{count - len(failed)} of {count} made {failed[:1] or ''}".strip()
    return [report.latency(f"{count} creates at once, {pool} in the pool", durations, target="all", note=note)]


def number(name: str, value: float, unit: str, bar: str) -> Row:
    """A row with one figure."""
    return Row(name, unit, 1, round(value, 2), None, None, bar)
