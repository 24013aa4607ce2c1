"""The pool's facade: values cross the boundary unharmed, and placement agrees with its twin in plain Python."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from native.pool import Action, Bounds, Claimed, HostHealth, HostReport, Kind, Scheduler, rank_hosts

HOST = HostReport(
    health=HostHealth.UP,
    cpu_free=8.0,
    memory_free_mib=8192,
    memory_mib=16_384,
    disk_free_mib=100_000,
    machines_free=10,
    has_template=True,
)
_MASK = 2**64 - 1


def twin_rank(hosts: list[HostReport], *, cpu_count: float, memory_mib: int, disk_mib: int, salt: int) -> list[int]:
    def cost(index: int) -> tuple[bool, int, int, int, int]:
        host = hosts[index]
        distance = 0 if host.ready else 1 if host.has_template else 2
        used = 1.0 - (host.memory_free_mib - memory_mib) / max(host.memory_mib, 1)
        is_slow = host.health is HostHealth.SLOW
        return is_slow, distance, host.owner_machines, max(0, int(used * 8)), _mix(salt, index)

    def can_take(host: HostReport) -> bool:
        has_room = host.cpu_free >= cpu_count and host.memory_free_mib >= memory_mib and host.disk_free_mib >= disk_mib
        return host.health in (HostHealth.UP, HostHealth.SLOW) and host.machines_free > 0 and has_room

    return sorted((index for index, host in enumerate(hosts) if can_take(host)), key=cost)


def _mix(salt: int, index: int) -> int:
    bits = (salt + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


@pytest.mark.parametrize("seed", range(20))
def test_placement_agrees_with_its_twin(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        hosts = [
            HostReport(
                health=chance.choice(list(HostHealth)),
                cpu_free=chance.choice([0.5, 1.0, 4.0]),
                memory_free_mib=chance.choice([0, 1023, 1024, 4096, 16_384]),
                memory_mib=16_384,
                disk_free_mib=chance.choice([3071, 3072, 10_000]),
                machines_free=chance.choice([0, 1, 9]),
                has_template=chance.random() < 0.5,
                ready=chance.choice([0, 0, 3]),
                owner_machines=chance.choice([0, 1, 5]),
            )
            for _ in range(chance.randrange(12))
        ]
        salt = chance.getrandbits(64)
        ours = rank_hosts(hosts, cpu_count=1.0, memory_mib=1024, disk_mib=3072, salt=salt)
        assert ours == twin_rank(hosts, cpu_count=1.0, memory_mib=1024, disk_mib=3072, salt=salt)


def test_a_lost_host_is_not_named() -> None:
    hosts = [replace(HOST, health=HostHealth.LOST), HOST]
    assert rank_hosts(hosts, cpu_count=1.0, memory_mib=1024, disk_mib=3072, salt=1) == [1]


def test_a_unit_goes_from_made_to_claimed() -> None:
    scheduler = Scheduler(refills_max=2, memory_mib_max=100.0)
    scheduler.set_pool(7, ready=Bounds(1, 4), shells=Bounds(1, 1), weight_mib=(40.0, 8.0))
    assert [scheduler.next(0.0) for _ in range(3)] == [Action(1, 7, Kind.READY), Action(2, 7, Kind.SHELL), None]
    assert scheduler.made(1, 0.5)
    assert scheduler.made(2, 0.1)
    assert scheduler.memory_mib == 48.0
    assert scheduler.first_ready(7, 5) == [1]
    assert scheduler.claim(7, 1.0) == Claimed(1, Kind.READY)
    assert scheduler.claim(7, 1.0) == Claimed(2, Kind.SHELL)
    assert scheduler.claim(7, 1.0) is None
    assert scheduler.claim_shell(7, 1.0) is None
    assert scheduler.claim(99, 1.0) is None
    status = scheduler.status(7, 1.0)
    assert (status.ready, status.shells, status.claims, status.misses) == (0, 0, 3, 2)
    assert status.refill_s == pytest.approx(0.5)


def test_a_drained_scheduler_gives_up_everything() -> None:
    scheduler = Scheduler(refills_max=2, memory_mib_max=100.0)
    scheduler.set_pool(7, ready=Bounds(2, 2), shells=Bounds(0, 0), weight_mib=(40.0, 8.0))
    assert scheduler.next(0.0) == Action(1, 7, Kind.READY)
    assert scheduler.next(0.0) == Action(2, 7, Kind.READY)
    assert scheduler.made(1, 0.1)
    scheduler.drain()
    assert scheduler.next(0.2) == Action(1, 0, None)
    assert scheduler.next(0.2) is None
    assert not scheduler.made(2, 0.3)
