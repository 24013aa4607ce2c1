"""`python -m loadtests.claims`: create and destroy sandboxes as fast as the server does, and print the rate.

The server is one of our own with the `fake` driver, whose machines cost next to nothing, so what is measured is all the
rest: first the host service alone, over its socket, with its journal and its pool; then the same through the API, with
the database's commits, keys, routes and events. A claim counts when its answer has arrived. Each connection keeps a few
sandboxes and destroys the oldest, which is part of the load but not of the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from loadtests import report
from loadtests.baseline import cases
from loadtests.claims.hostd import HostConnection
from loadtests.http import Connection
from loadtests.report import Row
from loadtests.server import Target, serve

SETTINGS = {
    "SANDGATE_DRIVER": "fake",
    "SANDGATE_RATE_LIMIT_PER_MINUTE": "0",
    "SANDGATE_ACCESS_LOG": "false",
    "SANDGATE_LOG_LEVEL": "warning",
    "SANDGATE_SANDBOXES_PER_WORKSPACE": "100000",
    "SANDGATE_MACHINES_MAX": "100000",
    "SANDGATE_POOL_READY": "64",
    "SANDGATE_POOL_READY_MAX": "1000",
}
_KEPT = 4


class Claimer(Protocol):
    """Whoever makes and destroys sandboxes."""

    async def create(self) -> str: ...

    async def destroy(self, sandbox_id: str, /) -> None: ...


class ApiClaimer(Connection):
    """Through the API."""

    async def create(self) -> str:
        return await cases.create(self)

    async def destroy(self, sandbox_id: str) -> None:
        await cases.destroy(self, sandbox_id)


async def claiming(
    name: str,
    connect: Callable[[], AbstractAsyncContextManager[Claimer]],
    *,
    connections: int,
    seconds: float,
    target: str = "",
) -> list[Row]:
    """Claims of several connections for a while: how many a second, and how long each took."""
    took: list[float] = []
    started = time.perf_counter()

    async def client() -> None:
        kept: deque[str] = deque()
        async with connect() as claimer:
            while (asked := time.perf_counter()) < started + seconds:
                kept.append(await claimer.create())
                took.append(time.perf_counter() - asked)
                if len(kept) > _KEPT:
                    await claimer.destroy(kept.popleft())
            for sandbox_id in kept:
                await claimer.destroy(sandbox_id)

    await asyncio.gather(*(client() for _ in range(connections)))
    note = f"{connections} connections; client and server share the cores, as many are destroyed"
    return [
        report.rate(f"claims, {name}", len(took) / seconds, "/s", len(took), target=target, note=note),
        report.latency(f"claim, {name}", took),
    ]


async def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.claims", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each of the two goes on (60)")
    parser.add_argument("--connections", type=int, default=16, help="clients at once (16)")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    async with serve(SETTINGS) as server:
        hostd, api = _socket_path(server), (server.base_url, server.key)
        for name, connect, target in (
            ("host service", lambda: HostConnection(hostd), "500"),
            ("API", lambda: ApiClaimer(*api), ""),
        ):
            rows += await claiming(
                name, connect, connections=options.connections, seconds=options.seconds, target=target
            )
    print(report.markdown(rows, report.facts(SETTINGS)))


def _socket_path(server: Target) -> Path:
    if server.environment is None:
        raise RuntimeError("the host service of a server elsewhere cannot be reached")
    return Path(server.environment["SANDGATE_HOME"], "run", "hostd.sock")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
