"""Many sandboxes frozen or hibernated on one host: what they hold, how the API answers, what a new hostd has to do.

Not for how quickly one wakes: `cases` measures that on an idle host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from loadtests import report
from loadtests.http import Connection
from loadtests.lifecycle.box import Box, create
from loadtests.lifecycle.cases import number, timed
from loadtests.lifecycle.memory import pids, pss_mib
from loadtests.report import Row
from loadtests.server import Target

#: Creates under way at a time; more only wait for one another.
_AT_ONCE = 4
_SAMPLE = 20
_ADOPTED_WITHIN_S = 300.0


def settings(count: int) -> dict[str, str]:
    """A server that may hold so many, and touches none of them by itself."""
    return {
        "SANDGATE_MACHINES_MAX": str(count + 10),
        "SANDGATE_SANDBOXES_PER_WORKSPACE": str(count + 10),
        "SANDGATE_HIBERNATE_AFTER_S": "86400",
        "SANDGATE_RECLAIM_AFTER_S": "1",
    }


async def registered(target: Target, groups: Path, count: int) -> list[Row]:
    """Freeze `count` sandboxes, hibernate a tenth of them. groups: as for `memory.frozen`."""
    ids: list[str] = []
    try:
        took, _ = await timed(lambda: _freeze(target, count, ids))
        rows = [number(f"create and freeze {count}, each", took * 1e3 / count, "ms", "")]
        # Not before: a connection that is idle while so many are made does not last.
        async with Connection(target.base_url, target.key) as api:
            made = [Box(api, target, sandbox_id) for sandbox_id in ids]
            for box in made[:: max(count // 10, 1)]:
                await box.post("pause", {"hibernate": True})
            await asyncio.sleep(5)  # for the memory of the rest to be reclaimed
            rows += _held(target, groups, count)
            rows += await _asked(api, made)
            rows += await _adopted(api, target, made)
        return rows
    finally:
        await _destroy(target, ids)


async def _freeze(target: Target, count: int, ids: list[str]) -> None:
    left = iter(range(count))

    async def some() -> None:
        async with Connection(target.base_url, target.key) as api:
            for _ in left:
                box = await create(api, target, memory_mb=256)
                ids.append(box.id)
                await box.post("pause")

    await asyncio.gather(*(some() for _ in range(_AT_ONCE)))


def _held(target: Target, groups: Path, count: int) -> list[Row]:
    """What the host spends on them."""
    machines = pids(groups)
    threads = sum(_count(f"/proc/{pid}/task") for pid in machines)
    rows = [
        number(f"{count} frozen, resident each (PSS)", pss_mib(groups) / count, "MiB", "5"),
        number(f"{count} frozen, threads each", threads / count, "", ""),
        number(f"{count} frozen, descriptors of their processes, each", _descriptors(machines) / count, "", ""),
    ]
    for name, pid in _parts(target):
        rows.append(number(f"{count} frozen, descriptors of {name}", _count(f"/proc/{pid}/fd"), "", ""))
        rows.append(number(f"{count} frozen, resident {name}", _resident_mib(pid), "MiB", ""))
    return rows


async def _asked(api: Connection, made: list[Box]) -> list[Row]:
    lists, gets, wakes = [], [], []
    for box in made[-_SAMPLE:]:
        lists.append((await timed(lambda: api.call("GET", "/sandboxes?limit=100")))[0])
        gets.append((await timed(lambda: api.call("GET", box.path)))[0])  # noqa: B023
        wakes.append((await timed(lambda: box.run("true")))[0])  # noqa: B023
        await box.post("pause")
    count = len(made)
    return [
        report.latency(f"list 100 of {count}", lists),
        report.latency(f"get one of {count}", gets),
        report.latency(f"first command in one of {count} frozen", wakes),
    ]


async def _adopted(api: Connection, target: Target, made: list[Box]) -> list[Row]:
    """Kill hostd: how long until one of the frozen answers again."""
    parts = dict(_parts(target))
    os.kill(parts["hostd"], signal.SIGKILL)
    began = time.perf_counter()
    async with asyncio.timeout(_ADOPTED_WITHIN_S):
        while not await _answers(made[-1]):
            await asyncio.sleep(0.05)
    took = time.perf_counter() - began
    await made[-1].post("pause")
    lost = 0
    for box in made:
        found = (await api.call("GET", box.path)).json()
        lost += found["state"] != "paused"
    rows = [number(f"a new hostd adopts {len(made)}, until one answers", took * 1e3, "ms", "30 000")]
    return [*rows, number(f"lost of {len(made)} after that", lost, "", "0")]


async def _answers(box: Box) -> bool:
    with contextlib.suppress(Exception):
        await box.run("true")
        return True
    return False


async def _destroy(target: Target, ids: list[str]) -> None:
    left = iter(ids)

    async def some() -> None:
        async with Connection(target.base_url, target.key) as api:
            for sandbox_id in left:
                await Box(api, target, sandbox_id).destroy()

    await asyncio.gather(*(some() for _ in range(_AT_ONCE)))


def _parts(target: Target) -> Iterator[tuple[str, int]]:
    """The server's own processes by name."""
    names = {"run-hostd": "hostd", "sandgate-plane": "the plane"}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) != target.pid:
                continue
            line = path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            for sign, name in names.items():
                if sign in line:
                    yield name, int(path.parent.name)


def _count(directory: str) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path(directory).iterdir())
    return 0


def _descriptors(machines: set[int]) -> int:
    return sum(_count(f"/proc/{pid}/fd") for pid in machines)


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
