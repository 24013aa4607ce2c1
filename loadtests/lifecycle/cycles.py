"""Thousands of pauses, hibernations, forks and restores, with a writer inside that notices every lost or torn byte."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from loadtests.http import Connection
from loadtests.lifecycle.box import Box, box, children, create
from loadtests.lifecycle.cases import ready_snapshot
from loadtests.report import Row
from loadtests.server import Target

_ADVANCE_S = 20.0
_IDENTITY = (
    "cat /etc/machine-id /proc/sys/kernel/hostname; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; "
    "hostname -I 2>/dev/null || ip -4 -o addr show eth0 | awk '{print $4}'"
)


async def advanced(what: Box, ticks: int) -> int:
    """The writer's ticks once there are more than `ticks`. Raises RuntimeError when anything was torn or lost."""
    async with asyncio.timeout(_ADVANCE_S):
        while True:
            status = await what.status()
            if status["torn"]:
                raise RuntimeError(f"sandbox {what.id}: {status}")
            if status["ticks"] > ticks:
                return status["ticks"]
            if status["ticks"] < ticks:
                raise RuntimeError(f"sandbox {what.id} went back from {ticks} to {status['ticks']}")
            await asyncio.sleep(0.01)


async def pausing(
    api: Connection, target: Target, count: int, *, hibernate: bool, tell: Callable[[str], None]
) -> list[Row]:
    """Pause and resume one sandbox, over and over."""
    name = "hibernate / restore" if hibernate else "pause / resume"
    async with box(api, target, "write") as source:
        ticks = await advanced(source, 0)
        for number in range(count):
            await source.post("pause", {"hibernate": hibernate})
            await source.post("resume")
            ticks = await advanced(source, ticks)
            if number % 100 == 99:
                tell(f"{name}: {number + 1}")
    return [_count(f"{name} cycles, lost or torn bytes", count, 0)]


async def forking(api: Connection, target: Target, count: int, *, tell: Callable[[str], None]) -> list[Row]:
    """Fork a sandbox that writes; each copy goes on from the parent's state, and so does the parent."""
    async with box(api, target, "write") as parent:
        ticks = await advanced(parent, 0)
        for number in range(count):
            (child,) = await children(parent, 1)
            await advanced(child, ticks)
            await child.destroy()
            ticks = await advanced(parent, ticks)
            if number % 50 == 49:
                tell(f"forks: {number + 1}")
    return [_count("forks, lost or torn bytes", count, 0)]


async def identities(api: Connection, target: Target, count: int, *, tell: Callable[[str], None]) -> list[Row]:
    """Restore one snapshot many times; whatever must tell copies apart is never seen twice.

    Addresses are used again once a copy is gone, so those of copies that run together are compared.
    """
    seen: Counter[str] = Counter()
    async with box(api, target) as source:
        snapshot = await ready_snapshot(source)
        for number in range(0, count, 5):
            together: Counter[str] = Counter()
            copies = [await create(api, target, snapshot_id=snapshot["id"]) for _ in range(min(5, count - number))]
            for copy in copies:
                machine_id, hostname, entropy, *rest = (await copy.run("sh", "-c", _IDENTITY)).splitlines()
                seen.update((machine_id, hostname, entropy))
                together.update(rest)
            collisions = [value for value, times in (seen + together).items() if times > 1]
            if collisions:
                raise RuntimeError(f"copies share {collisions}")
            for copy in copies:
                await copy.destroy()
            if number % 100 == 95:
                tell(f"identities: {number + 5}")
    return [_count("restores of one snapshot, shared identities", count, 0)]


def _count(name: str, count: int, found: int) -> Row:
    return Row(name, "found", count, found, None, None, "0")
