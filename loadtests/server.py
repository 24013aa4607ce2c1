"""A Sandgate server of our own to measure: a process group on free ports, with a data directory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0

#: Settings of a server to be measured. The limit is enough for everything in one minute's bucket, and still checked.
SETTINGS = {"SANDGATE_RATE_LIMIT_PER_MINUTE": "10000000", "SANDGATE_ACCESS_LOG": "false"}


@dataclass(frozen=True, slots=True)
class Target:
    """What to measure. pid and environment are None for a server that we did not start."""

    base_url: str
    key: str
    admin_url: str | None = None
    pid: int | None = None
    environment: Mapping[str, str] | None = None


class StartFailed(Exception):
    """The server ended, or was not ready in time; the message has the end of its log."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.asynccontextmanager
async def serve(settings: Mapping[str, str]) -> AsyncIterator[Target]:
    """Run `sandgate serve` until the block ends. settings: environment variables on top of ours, the home's too."""
    port, admin_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="sandgate-bench-") as scratch:
        home = settings.get("SANDGATE_HOME", scratch)
        environment = {
            **os.environ,
            "SANDGATE_HOME": home,
            "SANDGATE_LISTEN": f"127.0.0.1:{port}",
            "SANDGATE_ADMIN_LISTEN": f"127.0.0.1:{admin_port}",
            **settings,
        }
        log = Path(home, "server.log")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway", "serve", env=environment, stdout=output, stderr=output
            )
        try:
            admin_url = f"http://127.0.0.1:{admin_port}"
            await _until_ready(process, log, admin_port)
            credentials = orjson.loads(Path(home, "credentials.json").read_bytes())
            yield Target(credentials["base_url"], credentials["api_key"], admin_url, process.pid, environment)
        finally:
            await _stop(process)


async def _until_ready(process: asyncio.subprocess.Process, log: Path, admin_port: int) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _is_ready(admin_port):
                if process.returncode is not None:
                    raise StartFailed(f"the server ended with status {process.returncode}: {_tail(log)}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StartFailed(f"the server was not ready after {START_TIMEOUT_S:.0f} s: {_tail(log)}") from None


async def _is_ready(admin_port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", admin_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except ConnectionError:
        return False
    finally:
        writer.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
