"""`python -m loadtests.lifecycle [CASE ...]`: measure saving, copying, pausing and waking on a server of its own.

Without names all cases run, which takes about five minutes; with --cycles also those that count losses over thousands
of moves, ten minutes more. Results go to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from loadtests import report
from loadtests.http import Connection
from loadtests.lifecycle import cases, cycles, memory, registered, traffic
from loadtests.report import Row, say
from loadtests.server import SETTINGS, Target, serve

_NO_POOL = {f"SANDGATE_POOL_{name}": "0" for name in ("READY", "READY_MAX", "SHELLS", "SHELLS_MAX")}
_MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")

Case = Callable[[Connection, Target], Awaitable[list[Row]]]

CASES: dict[str, Case] = {
    "restoring": cases.restoring,
    "waking": cases.waking,
    "forking": cases.forking,
    "traffic": traffic.visits,
}
ALONE = ("frozen", "burst", "registered")
CYCLES: dict[str, Case] = {
    "pauses": lambda api, target: cycles.pausing(api, target, 1000, hibernate=False, tell=say),
    "hibernations": lambda api, target: cycles.pausing(api, target, 300, hibernate=True, tell=say),
    "forks": lambda api, target: cycles.forking(api, target, 300, tell=say),
    "identities": lambda api, target: cycles.identities(api, target, 1000, tell=say),
}


async def measure(wanted: Sequence[str], frozen: int) -> list[Row]:
    """The named cases: most on one server, those that watch its machines from outside on one each.

    frozen: sandboxes of the case `registered`.
    """
    rows: list[Row] = []
    named = {**CASES, **CYCLES}
    if not named.keys().isdisjoint(wanted):
        async with serve(SETTINGS) as target, Connection(target.base_url, target.key) as api:
            for name in wanted:
                if name in named:
                    say(f"measuring: {name}")
                    rows += await named[name](api, target)
    if "frozen" in wanted:
        async with _alone(_NO_POOL) as (target, groups), Connection(target.base_url, target.key) as api:
            say("measuring: frozen")
            rows += await memory.frozen(api, target, groups)
    if "burst" in wanted:
        pool = {"SANDGATE_POOL_READY": "30", "SANDGATE_POOL_READY_MAX": "30", "SANDGATE_POOL_SHELLS": "0"}
        async with _alone(pool) as (target, groups):
            say("measuring: burst")
            rows += await cases.burst(target, groups, pool=30, count=100)
    if "registered" in wanted:
        async with _alone({**_NO_POOL, **registered.settings(frozen)}) as (target, groups):
            say(f"measuring: registered, {frozen}")
            rows += await registered.registered(target, groups, frozen)
    return rows


@asynccontextmanager
async def _alone(settings: Mapping[str, str]) -> AsyncIterator[tuple[Target, Path]]:
    """A server, and where the control groups of its machines are."""
    with tempfile.TemporaryDirectory(prefix="sandgate-bench-") as home:
        async with serve({**SETTINGS, **settings, "SANDGATE_HOME": home}) as target:
            # As a server names what it makes on its host: by the path of its data directory.
            instance = hashlib.sha256(str(Path(home).resolve()).encode()).hexdigest()[:8]
            yield target, _MEMORY_GROUPS / f"sandgate-{instance}"


async def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.lifecycle", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join([*CASES, *ALONE, *CYCLES]))
    parser.add_argument("--cycles", action="store_true", help="the long cases too")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="directory for the results")
    parser.add_argument("--registered", type=int, default=100, metavar="COUNT", help="sandboxes of that case")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - {*CASES, *ALONE, *CYCLES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    wanted = options.cases or [*CASES, *ALONE, *(CYCLES if options.cycles else [])]

    rows = await measure(wanted, options.registered)
    report.publish("lifecycle", rows, report.facts(SETTINGS), options.out)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
