"""`python -m loadtests.baseline`: measure a server and print the table.

Without --url it starts servers of its own with the rate limit out of the way: one for each way to create a sandbox, one
for all other calls, and a pair with the `fake` driver to see what the limit costs. Results go to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests import report
from loadtests.baseline import cases
from loadtests.http import Connection
from loadtests.report import Row, say
from loadtests.server import SETTINGS, Target, serve


async def measure(target: Target) -> list[Row]:
    """Every case that needs real sandboxes."""
    rows: list[Row] = []
    async with Connection(target.base_url, target.key) as api:
        for name, case in (
            ("exec", cases.executing(api)),
            ("streams", cases.streaming(api)),
            ("GET", cases.reading(target, api)),
            ("idempotent replay", cases.replaying(api)),
        ):
            say(f"measuring: {name}")
            rows += await case
    return rows


async def measure_creates() -> list[Row]:
    """A create that finds a sandbox ready, one that finds a shell, and one that finds nothing: a server for each."""
    rows: list[Row] = []
    none = {"SANDGATE_POOL_READY_MAX": "0", "SANDGATE_POOL_SHELLS_MAX": "0"}
    for origin, pool, targets in (
        ("from the pool", {}, ("5 / 20", "15 / 50")),
        ("in a shell", {**none, "SANDGATE_POOL_SHELLS_MAX": "2", "SANDGATE_POOL_SHELLS": "2"}, ("75 / 150", "")),
        ("cold", none, ("120 / 250", "")),
    ):
        say(f"measuring: create {origin}, first command, destroy")
        async with serve({**SETTINGS, **pool}) as target, Connection(target.base_url, target.key) as api:
            rows += await cases.creating(api, origin, targets=targets)
            if pool is none:
                rows += await cases.destroying(api, target)
    return rows


async def measure_limit() -> list[Row]:
    """The cost of the rate limit, on two servers that run no machines."""
    say("measuring: rate limit")
    without = {**SETTINGS, "SANDGATE_DRIVER": "fake", "SANDGATE_RATE_LIMIT_PER_MINUTE": "0"}
    async with (
        serve({**SETTINGS, "SANDGATE_DRIVER": "fake"}) as limited,
        serve(without) as unlimited,
        Connection(limited.base_url, limited.key) as first,
        Connection(unlimited.base_url, unlimited.key) as second,
    ):
        return await cases.limiting(first, second)


async def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.baseline", description=__doc__)
    parser.add_argument("--url", help="base URL of a running server; its rate limit must be out of the way")
    parser.add_argument("--key", default=os.environ.get("SANDGATE_API_KEY"), help="API key for --url")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="directory for the results")
    options = parser.parse_args(arguments)
    if options.url and not options.key:
        parser.error("--url needs --key or SANDGATE_API_KEY")

    if options.url:
        rows = await measure(Target(options.url, options.key))
    else:
        say("starting a server")
        async with serve(SETTINGS) as target:
            rows = await measure(target)
        rows = await measure_creates() + rows + await measure_limit()

    report.publish("baseline", rows, report.facts({} if options.url else SETTINGS), options.out)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
