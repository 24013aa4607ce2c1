"""The measured calls. Each case takes open connections and returns rows; targets are those of docs/performance.md.

Latencies are closed-loop: one client, the next request when the answer is complete. Rates use several connections.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from loadtests import report
from loadtests.http import Answer, Connection
from loadtests.report import Row
from loadtests.server import Target

#: No case runs longer than this, however slow the server is.
CASE_TIME_S = 30.0

STDOUT_BYTES = 256 * 1024 * 1024
#: A unit of the pool takes about half of this to make.
REFILL_TIME_S = 1.5
GET_CONNECTIONS = 16
GET_TIME_S = 5.0


async def samples(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Seconds that each of up to `count` calls took, within the time of a case."""
    durations: list[float] = []
    deadline = time.perf_counter() + CASE_TIME_S
    while len(durations) < count and time.perf_counter() < deadline:
        started = time.perf_counter()
        await call()
        durations.append(time.perf_counter() - started)
    return durations


async def create(api: Connection) -> str:
    """Make a sandbox and return its id."""
    answer = await api.call("POST", "/sandboxes", {}, expect=201)
    return str(answer.json()["id"])


async def destroy(api: Connection, sandbox_id: str) -> None:
    await api.call("DELETE", f"/sandboxes/{sandbox_id}", expect=204)


async def run(api: Connection, sandbox_id: str, body: dict[str, object]) -> Answer:
    """Run a command and insist that it worked."""
    answer = await api.call("POST", f"/sandboxes/{sandbox_id}/exec", body)
    if answer.json()["exit_code"] != 0:
        raise RuntimeError(f"the command failed: {answer.body[:300]!r}")
    return answer


@asynccontextmanager
async def sandbox(api: Connection) -> AsyncIterator[str]:
    """A sandbox for the length of a block."""
    sandbox_id = await create(api)
    try:
        yield sandbox_id
    finally:
        await destroy(api, sandbox_id)


async def creating(api: Connection, origin: str, *, targets: tuple[str, str], count: int = 15) -> list[Row]:
    """Create, the first command, destroy: the life of a sandbox, `count` times, each when the pool is full again.

    origin: what the sandboxes come from, for the rows' names. targets: for the answer and for the first command.
    """
    answered: list[float] = []
    first_command: list[float] = []
    destroyed: list[float] = []
    for _ in range(count):
        await asyncio.sleep(REFILL_TIME_S)
        started = time.perf_counter()
        sandbox_id = await create(api)
        answered.append(time.perf_counter() - started)
        await run(api, sandbox_id, {"cmd": ["true"]})
        first_command.append(time.perf_counter() - started)
        started = time.perf_counter()
        await destroy(api, sandbox_id)
        destroyed.append(time.perf_counter() - started)
    return [
        report.latency(f"create → 201, {origin}", answered, target=targets[0]),
        report.latency(f"create → first command done, {origin}", first_command, target=targets[1]),
        report.latency(f"destroy, answer, {origin}", destroyed, target="10"),
    ]


async def destroying(api: Connection, target: Target, count: int = 15) -> list[Row]:
    """From the request to destroy a sandbox until none of its processes is left. For a server without a pool."""
    gone: list[float] = []
    for _ in range(count):
        sandbox_id = await create(api)
        started = time.perf_counter()
        await destroy(api, sandbox_id)
        async with asyncio.timeout(30):
            while _sandboxes_below(target.pid):
                await asyncio.sleep(0.005)
        gone.append(time.perf_counter() - started)
    return [report.latency("destroy, no process left", gone, target="p95 500")]


def _sandboxes_below(ancestor: int | None) -> set[int]:
    """Processes of sandboxes that descend from a server on this host."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in parentheses, which may hold anything: state, parent.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(") ")[2].split()[1])
        except OSError:
            continue
    ours = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
        ours |= more
    return {pid for pid in ours if pid is not None and _command_line(pid).startswith(b"runsc-sandbox")}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def executing(api: Connection, count: int = 300) -> list[Row]:
    """A new process through the API, as an argument vector and as a shell line."""
    async with sandbox(api) as sandbox_id:
        await run(api, sandbox_id, {"cmd": ["true"]})
        vector = await samples(lambda: run(api, sandbox_id, {"cmd": ["true"]}), count)
        line = await samples(lambda: run(api, sandbox_id, {"command": "true"}), count)
    return [
        report.latency("exec, argv", vector, target="10 / 35"),
        report.latency("exec, shell line", line, target="10 / 35", note="starts a shell, which reads its profile"),
    ]


async def streaming(api: Connection, repeats: int = 3) -> list[Row]:
    """How fast a process's output and a file's content reach the client, and how soon the first byte does."""
    rates: list[float] = []
    downloads: list[float] = []
    async with sandbox(api) as sandbox_id:
        path = f"/sandboxes/{sandbox_id}/exec/stream"
        # Lines of 1 KiB, as a chatty build would print.
        command = f"yes {'x' * 1023} | head -c {STDOUT_BYTES // 4}"
        for _ in range(repeats):
            started = time.perf_counter()
            received = 0
            async for piece in api.stream("POST", path, {"command": command}):
                received += piece.count(b"x")
            rates.append(received / (time.perf_counter() - started) / 1e6)
        await run(api, sandbox_id, {"command": f"head -c {STDOUT_BYTES} /dev/zero > /tmp/zeros"})
        for _ in range(repeats):
            started = time.perf_counter()
            received = 0
            async for piece in api.stream("GET", f"/sandboxes/{sandbox_id}/fs/download?path=/tmp/zeros"):
                received += len(piece)
            downloads.append(received / (time.perf_counter() - started) / 1e6)

        first = [await _first_byte(api, path) for _ in range(50)]
    return [
        report.rate("stdout stream (SSE)", sorted(rates)[len(rates) // 2], "MB/s", repeats, target="150"),
        report.rate("file download", sorted(downloads)[len(downloads) // 2], "MB/s", repeats),
        report.latency("exec stream, first output", first, target="5"),
    ]


async def _first_byte(api: Connection, path: str) -> float:
    """Seconds until the first output of a command; the rest of the stream is read, so the connection stays usable."""
    started = time.perf_counter()
    first = None
    async for piece in api.stream("POST", path, {"cmd": ["echo", "first"]}):
        if first is None and b"first" in piece:
            first = time.perf_counter() - started
    if first is None:
        raise RuntimeError("the stream ended without the command's output")
    return first


async def reading(target: Target, api: Connection) -> list[Row]:
    """Authenticated GETs of one sandbox: latency alone, then the rate with several connections."""
    async with sandbox(api) as sandbox_id:
        path = f"/sandboxes/{sandbox_id}"
        alone = await samples(lambda: api.call("GET", path), 1000)
        deadline = time.perf_counter() + GET_TIME_S

        async def reader() -> int:
            async with Connection(target.base_url, target.key) as connection:
                count = 0
                while time.perf_counter() < deadline:
                    await connection.call("GET", path)
                    count += 1
                return count

        started = time.perf_counter()
        total = sum(await asyncio.gather(*(reader() for _ in range(GET_CONNECTIONS))))
        elapsed = time.perf_counter() - started
    return [
        report.latency("authenticated GET", alone),
        report.rate(
            "authenticated GET, 16 connections",
            total / elapsed,
            "req/s",
            total,
            target="5000 per core",
            note="client and server share the cores",
        ),
    ]


async def replaying(api: Connection, count: int = 300) -> list[Row]:
    """A create repeated with its idempotency key."""
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    first = await api.call("POST", "/sandboxes", {}, expect=201, headers=headers)
    try:

        async def replay() -> None:
            answer = await api.call("POST", "/sandboxes", {}, expect=201, headers=headers)
            if answer.body != first.body:
                raise RuntimeError("the replayed answer differs from the first")

        durations = await samples(replay, count)
    finally:
        await destroy(api, first.json()["id"])
    return [report.latency("idempotent replay", durations, target="2")]


async def limiting(limited: Connection, unlimited: Connection, count: int = 3000) -> list[Row]:
    """What the rate limit adds to a request: two servers, one without a limit, asked in turn."""
    with_limit: list[float] = []
    without: list[float] = []
    for _ in range(count):
        with_limit += await samples(lambda: limited.call("GET", "/sandboxes"), 1)
        without += await samples(lambda: unlimited.call("GET", "/sandboxes"), 1)
    base = report.percentile(sorted(without), 0.5)
    added = report.percentile(sorted(with_limit), 0.5) - base
    note = f"difference of two servers' medians; {base * 1e3:.2f} ms without a limit"
    return [Row("rate-limit check, added", "µs", count, round(added * 1e6, 1), None, None, "50", note)]
