"""The warm pool's decisions and the placement over hosts: `native/crates/pool`, which explains both.

Everything here is pure: time comes in as seconds of a clock that does not jump, and a call takes microseconds. Pools
and units are numbers; what they stand for is the caller's affair.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from native._core import Scheduler as _Scheduler
from native._core import rank_hosts as _rank_hosts

__all__ = ["Action", "Bounds", "Claimed", "HostHealth", "HostReport", "Kind", "PoolStatus", "Scheduler", "rank_hosts"]


class Kind(enum.StrEnum):
    """What a unit is good for: booted, for a create; or created only, for a restore or a create that finds none."""

    READY = "ready"
    SHELL = "shell"


class Bounds(NamedTuple):
    """How many units of a kind are held whatever the demand: at least and at most."""

    min: int
    max: int


class Action(NamedTuple):
    """What to do now. kind: as what to make `unit` for `pool`; None to destroy it, which is out of stock already."""

    unit: int
    pool: int
    kind: Kind | None


class Claimed(NamedTuple):
    """A unit that was handed out and will not be again."""

    unit: int
    kind: Kind


class PoolStatus(NamedTuple):
    """One pool. claims: creates since the start.  misses: those that found nothing ready.  refill_s: to make one."""

    ready: int
    shells: int
    target_ready: int
    target_shells: int
    claims: int
    misses: int
    refill_s: float


class Scheduler:
    """Decides what one host holds in stock and hands it out.

    refills_max: units being made at once.  memory_mib_max: of all that is in stock and being made.
    """

    def __init__(self, *, refills_max: int, memory_mib_max: float) -> None:
        self._core = _Scheduler(refills_max, memory_mib_max)

    def set_pool(self, pool: int, *, ready: Bounds, shells: Bounds, weight_mib: tuple[float, float]) -> None:
        """Add a pool or change its bounds. weight_mib: memory of the host that a ready unit and a shell take."""
        self._core.set_pool(pool, ready, shells, weight_mib)

    def remove_pool(self, pool: int) -> None:
        """Give up a pool; `next` then says to destroy what it holds."""
        self._core.remove_pool(pool)

    def drain(self) -> None:
        """Give up every pool."""
        self._core.drain()

    def limit_memory(self, memory_mib_max: float) -> None:
        """Change the ceiling; `next` says what to destroy for it."""
        self._core.limit_memory(memory_mib_max)

    def claim(self, pool: int, now: float) -> Claimed | None:
        """Take a ready unit, else a shell. Refills are held back until `settled` is called, once for each claim."""
        claimed = self._core.claim(pool, now)
        return None if claimed is None else Claimed(claimed[0], Kind(claimed[1]))

    def claim_shell(self, pool: int, now: float) -> int | None:
        """Take a shell. `settled` is due as after `claim`."""
        return self._core.claim_shell(pool, now)

    def settled(self) -> None:
        """A claim has come to its end, well or not."""
        self._core.settled()

    def made(self, unit: int, now: float) -> bool:
        """A unit is there. False: nobody wants it any more, so destroy it."""
        return self._core.made(unit, now)

    def failed(self, unit: int, now: float) -> None:
        """A unit could not be made; its pool is tried again later, after each failure in a row twice as late."""
        self._core.failed(unit, now)

    def lost(self, unit: int) -> bool:
        """A unit has ended by itself. False when it was not in stock."""
        return self._core.lost(unit)

    def first_ready(self, pool: int, count: int) -> list[int]:
        """The units that the next claims will get."""
        return self._core.first_ready(pool, count)

    def next(self, now: float) -> Action | None:
        """What to do now; ask until it is None, and again after each report and after `wait_s`."""
        told = self._core.next(now)
        if told is None:
            return None
        verb, unit, pool, kind = told
        return Action(unit, pool, Kind(kind) if verb == "make" else None)

    def wait_s(self, now: float) -> float:
        """Seconds after which `next` may say something new although nothing was reported."""
        return self._core.wait_s(now)

    def status(self, pool: int, now: float) -> PoolStatus:
        """A pool as it is now; zeros for one that is not there."""
        return PoolStatus(*self._core.status(pool, now))

    @property
    def memory_mib(self) -> float:
        """What all that is in stock and being made weighs."""
        return self._core.memory_mib()


class HostHealth(enum.IntEnum):
    """How a host is doing. SLOW takes a machine only if no other can; DRAINING and LOST take none."""

    UP = 0
    SLOW = 1
    DRAINING = 2
    LOST = 3


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host as it last reported: what is not promised to a machine yet, and how near the wanted unit is.

    ready: units of the shape that are ready.  owner_machines: machines of the same owner, to spread them.
    """

    health: HostHealth
    cpu_free: float
    memory_free_mib: int
    memory_mib: int
    disk_free_mib: int
    machines_free: int
    has_template: bool
    ready: int = 0
    owner_machines: int = 0


def rank_hosts(
    hosts: Sequence[HostReport], *, cpu_count: float, memory_mib: int, disk_mib: int, salt: int
) -> list[int]:
    """Indexes of the hosts that can take a machine, best first: whoever is refused by one tries the next.

    salt: 64 bits that differ between machines, such as of its id; decides between equals.
    """
    facts = [
        (
            int(host.health),
            host.cpu_free,
            host.memory_free_mib,
            host.memory_mib,
            host.disk_free_mib,
            host.machines_free,
            host.has_template,
            host.ready,
            host.owner_machines,
        )
        for host in hosts
    ]
    return _rank_hosts((cpu_count, memory_mib, disk_mib), salt, facts)
