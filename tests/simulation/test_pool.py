"""The pool and the placement under load nobody could wait for: seeded runs of a simulated fleet."""

from __future__ import annotations

import random

import pytest

from native.pool import HostHealth
from tests.simulation.fleet import Fleet, SimulatedHost


def share(fleet: Fleet, outcome: str, *, after: float = 0.0) -> float:
    asked = [claim for claim in fleet.claims if claim.asked_at >= after]
    return sum(claim.outcome == outcome for claim in asked) / len(asked)


def poisson(fleet: Fleet, *, rate: float, begin: float, end: float, shape: int = 0, life_s: float = 5.0) -> None:
    at = begin + fleet.chance.expovariate(rate)
    while at < end:
        fleet.ask(at, shape=shape, life_s=life_s)
        at += fleet.chance.expovariate(rate)


def check(fleet: Fleet) -> None:
    assert fleet.problems == []
    assert fleet.most_making <= 0, "no host makes more units at once than it has cores"
    waiting = [claim.number for claim in fleet.claims if claim.outcome is None]
    assert waiting == [], "everybody is served in the end"


@pytest.mark.parametrize("seed", [1])
def test_a_hundred_thousand_claims_over_a_fleet_with_troubles(seed: int) -> None:
    chance = random.Random(seed)
    hosts = [SimulatedHost(index, cores=chance.choice([2, 4, 8]), pool_mib=2000.0) for index in range(30)]
    fleet = Fleet(seed, hosts)
    poisson(fleet, rate=90.0, begin=0.0, end=1000.0, life_s=4.0)
    poisson(fleet, rate=6.0, begin=0.0, end=1000.0, shape=1, life_s=8.0)
    for _ in range(30):
        burst_at = chance.uniform(0, 1000)
        for _ in range(chance.randrange(20, 200)):
            fleet.ask(burst_at + chance.uniform(0, 0.05), shape=chance.randrange(3))
    for host in chance.sample(hosts, 6):
        host.slowness, host.health = 10.0, HostHealth.SLOW
    for host in chance.sample(hosts, 4):
        host.fails = 0.5
    for host in chance.sample(hosts, 3):
        fleet.at(chance.uniform(100, 900), lambda host=host: fleet.lose(host))  # type: ignore[misc]
    fleet.run(1100.0)
    check(fleet)
    assert len(fleet.claims) > 95_000
    assert share(fleet, "ready") > 0.95


def test_steady_load_is_nearly_always_served_from_stock() -> None:
    fleet = Fleet(1, [SimulatedHost(0, cores=2, pool_mib=2000.0)])
    poisson(fleet, rate=3.0, begin=0.0, end=600.0)
    fleet.run(700.0)
    check(fleet)
    assert share(fleet, "ready", after=30.0) > 0.99


def test_the_second_of_two_bursts_finds_what_the_first_has_taught() -> None:
    fleet = Fleet(2, [SimulatedHost(0, cores=2, pool_mib=2000.0)])
    for begin in (10.0, 100.0):
        for number in range(25):
            fleet.ask(begin + number * 0.01, life_s=2.0)
    fleet.run(200.0)
    check(fleet)
    assert share(fleet, "ready", after=100.0) >= 0.75


def test_a_quiet_host_holds_its_least_and_no_more() -> None:
    host = SimulatedHost(0, cores=2, pool_mib=2000.0)
    fleet = Fleet(3, [host])
    for number in range(30):
        fleet.ask(5.0 + number * 0.1, life_s=1.0)
    fleet.run(7200.0)
    check(fleet)
    assert sorted(host.stock.values()) == [0, 0, 0], "two ready, one shell"


def test_claims_go_on_when_nothing_can_be_made_ahead() -> None:
    fleet = Fleet(4, [SimulatedHost(0, cores=2, pool_mib=2000.0, fails=1.0)])
    poisson(fleet, rate=2.0, begin=0.0, end=120.0)
    fleet.run(200.0)
    check(fleet)
    assert share(fleet, "cold") == 1.0


def test_a_lost_host_costs_its_machines_and_nobody_elses_wait() -> None:
    hosts = [SimulatedHost(index, cores=4, pool_mib=2000.0) for index in range(4)]
    fleet = Fleet(5, hosts)
    poisson(fleet, rate=8.0, begin=0.0, end=300.0)
    fleet.at(150.0, lambda: fleet.lose(hosts[0]))
    fleet.run(400.0)
    check(fleet)
    late = [claim for claim in fleet.claims if claim.done_at - claim.asked_at > 3.0]
    assert late == []
    assert share(fleet, "ready", after=160.0) > 0.98
