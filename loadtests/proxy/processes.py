"""Processes of the benchmark: started on one core, waited for, ended.

Two cores are used whatever the machine has: the proxy under test gets the first, everything else (origin, load, this
program) the second. So a proxy cannot profit from cores that its client leaves idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0


class BenchError(Exception):
    """Something that is needed is missing or does not work; the message says what."""


def cores() -> tuple[int, int]:
    """The core of the proxy and that of the rest; the same one where there is no second."""
    available = sorted(_all_cores)
    return available[0], available[-1] if len(available) < 3 else available[1]


#: As given to us, before `settle` narrows it down.
_all_cores = os.sched_getaffinity(0)


def settle() -> None:
    """Prepare this process: on the core of the rest, and with as many open files as are allowed."""
    os.sched_setaffinity(0, {cores()[1]})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str | os.PathLike[str]], *, core: int, log: Path, pipe: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process on `core` for the length of a block. pipe: its standard output can be read, else it goes to the log."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            "taskset",
            *("--cpu-list", str(core), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if pipe else output,
            stderr=output,
        )
    try:
        yield process
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


async def listening(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    """Wait until somebody accepts connections at `port`. Raises BenchError when the process ends instead."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                if process.returncode is not None:
                    break
                await asyncio.sleep(0.02)
    except TimeoutError:
        pass
    raise BenchError(f"nobody listens at port {port}: {log.read_text(errors='replace')[-1000:]}")
