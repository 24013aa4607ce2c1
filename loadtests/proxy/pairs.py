"""Runs a case's subjects in turn, A B, B A, …, so that whatever else the machine does hits all of them.

Ratios are taken within a round, between runs that are seconds apart, and only then is the median of the rounds taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.proxy import loadgen
from loadtests.proxy.cases import HOSTS_ASKED, Bar, Case, Subject
from loadtests.proxy.peers import TOOLS, Endpoint, Site

Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often. rate: an open loop of so many requests a second, for cases of HTTP."""

    pairs: int
    seconds: float
    warm_up_s: float
    lock: Path | None
    rate: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its range and its median absolute deviation."""

    median: float
    least: float
    most: float
    mad: float


@dataclass(frozen=True, slots=True)
class Judged:
    """A bar with what came out. met is none when a subject was missing."""

    bar: Bar
    value: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class Result:
    """A case with every run of each subject, in the order of the rounds."""

    case: Case
    runs: dict[str, list[Run]]
    missing: Sequence[str]

    def spread(self, subject: str, figure: Callable[[Run], float | None]) -> Spread | None:
        return spread([value for run in self.runs.get(subject, ()) if (value := figure(run)) is not None])

    def ratio(self, subject: str, against: str, figure: Callable[[Run], float | None]) -> Spread | None:
        """The ratios within the rounds."""
        rounds = zip(self.runs.get(subject, ()), self.runs.get(against, ()), strict=False)
        pairs = [(figure(ours), figure(theirs)) for ours, theirs in rounds]
        return spread([ours / theirs for ours, theirs in pairs if ours is not None and theirs])

    def judge(self, bar: Bar) -> Judged:
        figure = figure_of(bar.quantity, self.case)
        of = self.spread(bar.subject, figure)
        value: float | None = None
        if bar.quantity == "failures":
            value = sum(failures(run) for run in self.runs[bar.subject]) if self.runs.get(bar.subject) else None
        elif bar.against is None:
            value = of.median if of else None
        elif bar.is_difference:
            base = self.spread(bar.against, figure)
            value = of.median - base.median if of and base else None
        else:
            ratio = self.ratio(bar.subject, bar.against, figure)
            value = ratio.median if ratio else None
        if value is None:
            return Judged(bar, None, None)
        is_enough = bar.at_least is None or value >= bar.at_least
        return Judged(bar, value, is_enough and (bar.at_most is None or value <= bar.at_most))

    def as_json(self) -> dict[str, Any]:
        bars = [asdict(judged) for judged in map(self.judge, self.case.bars)]
        about = {"name": self.case.name, "about": self.case.about, "arguments": list(self.case.arguments)}
        return {**about, "unit": self.case.unit, "runs": self.runs, "missing": list(self.missing), "bars": bars}


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return Spread(median, min(values), max(values), mad)


def amount(case: Case, run: Run) -> float:
    """What a run got done, in the case's unit."""
    return float(run["bytes"] / 1e6 if case.unit == "megabytes" else run["requests"])


def failures(run: Run) -> int:
    return int(sum(run["failures"].values()))


def figure_of(quantity: str, case: Case) -> Callable[[Run], float | None]:
    """How to read a figure off a run: per processor second of the proxy, per second, or microseconds."""

    def read(run: Run) -> float | None:
        if quantity == "per_core":
            return amount(case, run) / run["proxy_cpu_s"] if run["proxy_cpu_s"] else None
        if quantity == "rate":
            return amount(case, run) / float(run["seconds"])
        if quantity == "failures":
            return float(failures(run))
        if quantity == "kib_each":
            return float(run["kib_each"])
        return float(run["latency_us"][quantity])

    return read


async def compare(case: Case, sites: Callable[[int], Site], plan: Plan, say: Callable[[str], None]) -> Result:
    """Start all subjects, run them in turn, and stop them. sites: a site with so many routes."""
    present = [subject for subject in case.subjects if subject.tool is None or TOOLS[subject.tool].is_present()]
    missing = [subject.label for subject in case.subjects if subject not in present]
    runs: dict[str, list[Run]] = {subject.label: [] for subject in present}
    async with contextlib.AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        if not case.is_held:
            for each in present:
                endpoints[each.label] = await stack.enter_async_context(each.start(sites(each.routes)))
        for number in range(plan.pairs):
            async with _locked(plan.lock):
                for subject in present if number % 2 == 0 else reversed(present):
                    site = sites(subject.routes)
                    if case.is_held:
                        async with subject.start(site) as fresh:
                            run = await _run(case, subject, site, fresh, plan)
                    else:
                        run = await _run(case, subject, site, endpoints[subject.label], plan)
                    runs[subject.label].append(run)
                    say(f"  {number + 1}/{plan.pairs} {subject.label}: {_line(case, run)}")
    return Result(case, runs, missing)


async def _run(case: Case, subject: Subject, site: Site, endpoint: Endpoint, plan: Plan) -> Run:
    step = max(1, len(site.slugs) // HOSTS_ASKED)
    names = [case.host] if case.host else [site.host(slug) for slug in site.slugs[::step][:HOSTS_ASKED]]
    hosts = site.directory / "hosts"
    hosts.write_text("".join(f"{name}:{endpoint.port}\n" for name in names))
    arguments = [*case.arguments, *subject.arguments]
    arguments += ["--connect", f"127.0.0.1:{endpoint.port}", "--hosts", str(hosts)]
    arguments += ["--seconds", str(0 if case.is_held else plan.seconds), "--warm-up-s", str(plan.warm_up_s)]
    for header in case.headers:
        # A handshake says "Connection: Upgrade" itself.
        if case.arguments[0] == "http" or not header.startswith("Connection:"):
            arguments += ["--header", header]
    if case.is_tls and site.certificate is not None:
        arguments += ["--tls-ca", str(site.certificate)]
    if plan.rate is not None and case.arguments[0] == "http" and "--rate" not in case.arguments:
        arguments += ["--rate", str(plan.rate)]
    arguments += ["--aside-pid", str(site.origin.pid)]
    if endpoint.pid is not None:
        arguments += ["--proxy-pid", str(endpoint.pid)]
    background = subject.background(site, endpoint) if subject.background else contextlib.nullcontext({})
    async with background as figures:
        if case.is_held:
            return await _hold(endpoint, arguments)
        measured = await loadgen.load(arguments, seconds=plan.seconds + plan.warm_up_s)
        return {**measured, **figures}


async def _hold(endpoint: Endpoint, arguments: Sequence[str]) -> Run:
    """What the proxy's memory grows by, for each connection."""
    before = _resident_kib(endpoint.pid)
    async with loadgen.held(arguments) as said:
        return {"kib_each": (_resident_kib(endpoint.pid) - before) / said["ready"], **said}


def _resident_kib(pid: int | None) -> float:
    """Resident memory of a process and its children."""
    if pid is None:
        return 0.0
    status = Path(f"/proc/{pid}/status").read_text()
    own = next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(_resident_kib(int(child)) for child in children)


@contextlib.asynccontextmanager
async def _locked(path: Path | None) -> AsyncIterator[None]:
    """Alone on the machine, as far as other users of the lock go."""
    if path is None:
        yield
        return
    with path.open("ab") as file:
        await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
        yield


def _line(case: Case, run: Run) -> str:
    if case.is_held:
        return f"{run['ready']:,} connections, {run['kib_each']:.2f} KiB each"
    rate, per_core = figure_of("rate", case)(run), figure_of("per_core", case)(run)
    text = f"{rate:,.0f} {case.unit}/s"
    if per_core is not None:
        text += f", {per_core:,.0f} per core"
    if case.is_latency:
        text += f", p99 {run['latency_us']['p99'] / 1e3:.2f} ms"
    return text + (f", failures {run['failures']}" if run["failures"] else "") + f", foreign {run['foreign_cores']:.2f}"
