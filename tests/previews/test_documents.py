"""docs/previews.md lists every code, flag and metric of the plane, and no others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from native import plane_path
from tests.previews.harness import Plane

DOCUMENT = (Path(__file__).parents[2] / "docs/previews.md").read_text()


async def test_every_code_and_metric_is_documented(plane: Plane) -> None:
    text = (await plane.ask_admin("/metrics")).body.decode()
    codes = set(re.findall(r'sandgate_plane_failures_total\{code="(\w+)"\}', text))
    metrics = set(re.findall(r"^# TYPE (sandgate_plane_\w+)", text, re.MULTILINE))

    assert set(re.findall(r"^\| `(\w+)` \| \d{3} \|", DOCUMENT, re.MULTILINE)) == codes
    assert set(re.findall(r"`(sandgate_plane_\w+)`", DOCUMENT)) == metrics


def test_every_flag_is_documented_with_its_default() -> None:
    said = subprocess.run([plane_path(), "--help"], check=True, capture_output=True, text=True, timeout=10).stdout
    flags = dict(re.findall(r"(--[\w-]+)(?: <\w+>)?\n?\s+[^\n]*?(?:\[default: ([\d.]+)\])?$", said, re.MULTILINE))
    documented = dict(re.findall(r"^\| `(--[\w-]+)` \| ([\d.]*)", DOCUMENT, re.MULTILINE))

    assert flags.keys() - {"--help", "--version"} == documented.keys()
    assert {name: value for name, value in flags.items() if value} == {n: v for n, v in documented.items() if v}
