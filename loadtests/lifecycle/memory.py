"""What a sandbox holds while it is idle, and while it is frozen, with and without swap."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loadtests.http import Connection
from loadtests.lifecycle.box import box, create
from loadtests.lifecycle.cases import number
from loadtests.report import Row
from loadtests.server import Target

_MANY = 30
_SWAP_MIB = 512
#: For what a create has begun to come to rest.
_SETTLED_S = 3.0
#: From a pause until the server has given the memory back, by its default setting.
_RECLAIMED_S = 14.0


async def frozen(api: Connection, target: Target, groups: Path) -> list[Row]:
    """CPU time and memory of one sandbox, running idle and then frozen, from outside; memory of one of many.

    groups: the control groups of the server's machines; nothing else may run on it.
    """
    rows = []
    async with box(api, target) as source:
        await source.run("true")
        await asyncio.sleep(_SETTLED_S)
        rows.append(number("idle sandbox, alone, resident (PSS)", pss_mib(groups), "MiB", ""))
        await source.post("pause")
        await asyncio.sleep(_RECLAIMED_S)
        before = _cpu_s(groups)
        await asyncio.sleep(10)
        rows.append(number("frozen sandbox, CPU in 10 s", (_cpu_s(groups) - before) * 1e3, "ms", "0"))
        rows.append(number("frozen sandbox, resident (PSS), no swap", pss_mib(groups), "MiB", "≤ 5"))
    with _swap():
        async with box(api, target) as source:
            await source.run("true")
            await source.post("pause")
            await asyncio.sleep(_RECLAIMED_S)
            rows.append(number("frozen sandbox, resident (PSS), swap", pss_mib(groups), "MiB", "≤ 5"))
    return rows + await _idle(api, target, groups)


async def _idle(api: Connection, target: Target, groups: Path) -> list[Row]:
    async with contextlib.AsyncExitStack() as made:
        for _ in range(_MANY):
            one = await create(api, target)
            made.push_async_callback(one.destroy)
            await one.run("true")
        await asyncio.sleep(_SETTLED_S)
        return [number(f"idle sandbox, one of {_MANY}, resident (PSS)", pss_mib(groups) / _MANY, "MiB", "≤ 12")]


@contextlib.contextmanager
def _swap() -> Iterator[None]:
    """A host with swap; none of it is left."""
    with tempfile.NamedTemporaryFile(prefix="sandgate-swap-") as file:
        # Written, as the kernel takes no file with holes.
        for _ in range(_SWAP_MIB):
            file.write(bytes(1024 * 1024))
        file.flush()
        subprocess.run(["mkswap", file.name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(["swapon", file.name], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", file.name], check=True)


def pids(groups: Path) -> set[int]:
    """All processes of a server's machines."""
    return {int(pid) for path in groups.glob("*/cgroup.procs") for pid in path.read_text().split()}


def pss_mib(groups: Path) -> float:
    """Memory of all processes, shared pages divided among those that share them."""
    kib = 0
    for pid in pids(groups):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kib += int(line.split()[1])
    return kib / 1024


def _cpu_s(groups: Path) -> float:
    """CPU time of all processes so far."""
    ticks = 0
    for pid in pids(groups):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / 100
