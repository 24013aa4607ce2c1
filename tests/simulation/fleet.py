"""A fleet in a computer's imagination: hosts with a warm pool each, claims placed on them, on a clock of its own.

Everything random comes from one seed and every event happens at its time, so a run can be repeated. What decides is the
real thing (`native.pool`); the hosts are as bad as they like: slow, full, failing to make units, suddenly gone.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from native.pool import Bounds, HostHealth, HostReport, Kind, Scheduler, rank_hosts

READY_MIB, SHELL_MIB, MACHINE_MIB = 40.0, 8.0, 1024
SHAPES = 3
_REPORT_S = 1.0
_LOOK_S = 0.5


@dataclass
class Claim:
    """A request for a machine. outcome: how it was served, None while it is under way."""

    number: int
    shape: int
    life_s: float
    asked_at: float
    tries: int = 0
    outcome: str | None = None
    done_at: float = 0.0


@dataclass
class SimulatedHost:
    """One host. slowness: multiplies what making a unit takes. fails: chance that a unit cannot be made."""

    index: int
    cores: int
    pool_mib: float
    slowness: float = 1.0
    fails: float = 0.0
    health: HostHealth = HostHealth.UP
    machines_max: int = 40
    machines: int = 0
    making: dict[int, tuple[int, Kind]] = field(default_factory=dict)
    stock: dict[int, int] = field(default_factory=dict)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(refills_max=self.cores, memory_mib_max=self.pool_mib)
        for shape in range(SHAPES):
            ready, shells = Bounds(2 if shape == 0 else 0, 30), Bounds(1 if shape == 0 else 0, 4)
            self.scheduler.set_pool(shape, ready=ready, shells=shells, weight_mib=(READY_MIB, SHELL_MIB))

    def report(self, shape: int, now: float) -> HostReport:
        free = self.machines_max - self.machines
        return HostReport(
            health=self.health,
            cpu_free=float(free),
            memory_free_mib=free * MACHINE_MIB,
            memory_mib=self.machines_max * MACHINE_MIB,
            disk_free_mib=10**6,
            machines_free=free,
            has_template=True,
            ready=self.scheduler.status(shape, now).ready,
        )


class Fleet:
    """Runs claims over hosts. `problems` is what must stay empty."""

    def __init__(self, seed: int, hosts: list[SimulatedHost]) -> None:
        self.chance = random.Random(seed)
        self.hosts = hosts
        self.now = 0.0
        self.claims: list[Claim] = []
        self.problems: list[str] = []
        self.most_making = 0
        self._used: set[tuple[int, int]] = set()
        self._reports: dict[tuple[int, int], HostReport] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._report()
        for host in hosts:
            self._look(host)

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (seconds, self._sequence, do))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = until

    def ask(self, at: float, *, shape: int = 0, life_s: float = 5.0) -> None:
        claim = Claim(len(self.claims), shape, life_s, at)
        self.claims.append(claim)
        self.at(at, lambda: self._place(claim))

    def lose(self, host: SimulatedHost) -> None:
        """Power off: its machines and units are gone, and a while later everybody knows."""
        host.machines_max = host.machines = 0
        host.making.clear()
        for unit in list(host.stock):
            host.scheduler.lost(unit)
        host.stock.clear()
        host.scheduler.drain()
        self.at(self.now + 3.0, lambda: setattr(host, "health", HostHealth.LOST))

    def _report(self) -> None:
        """Gateways decide by what hosts told a moment ago, not by what is so."""
        for host in self.hosts:
            for shape in range(SHAPES):
                self._reports[host.index, shape] = host.report(shape, self.now)
        self.at(self.now + _REPORT_S, self._report)

    def _place(self, claim: Claim) -> None:
        reports = [self._reports[host.index, claim.shape] for host in self.hosts]
        order = rank_hosts(reports, cpu_count=1.0, memory_mib=MACHINE_MIB, disk_mib=3072, salt=claim.number)
        for index in order:
            host = self.hosts[index]
            if host.machines < host.machines_max:
                # Whoever places the next one knows of this one already.
                report = self._reports[index, claim.shape]
                self._reports[index, claim.shape] = replace(
                    report,
                    ready=max(0, report.ready - 1),
                    machines_free=max(0, report.machines_free - 1),
                    memory_free_mib=max(0, report.memory_free_mib - MACHINE_MIB),
                )
                self._serve(claim, host)
                return
        claim.tries += 1
        self.at(self.now + min(0.05 * 2**claim.tries, 2.0), lambda: self._place(claim))

    def _serve(self, claim: Claim, host: SimulatedHost) -> None:
        host.machines += 1
        claimed = host.scheduler.claim(claim.shape, self.now)
        if claimed is not None:
            if host.stock.pop(claimed.unit, None) != claim.shape or (host.index, claimed.unit) in self._used:
                self.problems.append(f"claim {claim.number} got unit {claimed.unit}, which was not to be had")
            self._used.add((host.index, claimed.unit))
        kind = "cold" if claimed is None else claimed.kind.value
        takes_s = {"ready": 0.003, "shell": 0.06, "cold": 0.12}[kind] * host.slowness
        self.at(self.now + takes_s, lambda: self._served(claim, host, kind))
        self._act(host)

    def _served(self, claim: Claim, host: SimulatedHost, kind: str) -> None:
        host.scheduler.settled()
        if host.machines_max == 0:  # it was lost meanwhile: whoever asked asks again
            claim.tries += 1
            self._place(claim)
            return
        claim.outcome, claim.done_at = kind, self.now
        self.at(self.now + claim.life_s, lambda: self._ended(host))
        self._act(host)

    def _ended(self, host: SimulatedHost) -> None:
        host.machines = max(0, host.machines - 1)

    def _look(self, host: SimulatedHost) -> None:
        self._act(host)
        self.at(self.now + min(host.scheduler.wait_s(self.now), _LOOK_S), lambda: self._look(host))

    def _act(self, host: SimulatedHost) -> None:
        while (action := host.scheduler.next(self.now)) is not None:
            if action.kind is None:
                if host.stock.pop(action.unit, None) is None and host.machines_max:
                    self.problems.append(f"host {host.index} is to destroy unit {action.unit}, which it has not")
                continue
            host.making[action.unit] = action.pool, action.kind
            self.most_making = max(self.most_making, len(host.making) - host.cores)
            if host.scheduler.memory_mib > host.pool_mib:
                self.problems.append(f"host {host.index} holds {host.scheduler.memory_mib} MiB")
            takes_s = (0.2 if action.kind is Kind.READY else 0.1) * host.slowness * self.chance.uniform(0.7, 1.5)
            self.at(self.now + takes_s, lambda unit=action.unit: self._made(host, unit))  # type: ignore[misc]

    def _made(self, host: SimulatedHost, unit: int) -> None:
        if unit not in host.making:
            return
        shape, _ = host.making.pop(unit)
        if self.chance.random() < host.fails:
            host.scheduler.failed(unit, self.now)
        elif host.scheduler.made(unit, self.now):
            host.stock[unit] = shape
        self._act(host)
