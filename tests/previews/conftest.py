"""A plane per test: it starts in a few milliseconds and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from previews.plane import PlaneClient
from tests.previews.harness import Plane, Upstream, describe, unix_upstream
from tests.previews.scripted import Hostd
from tests.support.certificates import Authority

StartPlane = Callable[..., Awaitable[Plane]]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A directory with a name short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="sg-") as name:
        yield Path(name)


@pytest.fixture
async def start_plane(run_dir: Path) -> AsyncIterator[StartPlane]:
    """Starts a plane with further flags and connects to its control socket."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*flags: str) -> Plane:
            plane = Plane(run_dir)
            await plane.start(*flags)
            stack.push_async_callback(plane.stop)
            plane.control = await stack.enter_async_context(PlaneClient(str(plane.control_socket)))
            await plane.control.wait_connected(10.0)
            return plane

        yield start


@pytest.fixture
async def plane(start_plane: StartPlane) -> Plane:
    return await start_plane()


@pytest.fixture
async def api(run_dir: Path) -> AsyncIterator[Upstream]:
    """An API that answers with what it was asked."""
    async with unix_upstream(describe, run_dir / "api.sock") as upstream:
        yield upstream


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority whose directory is still empty."""
    return Authority(tmp_path / "tls")


@pytest.fixture
async def hostd(run_dir: Path) -> AsyncIterator[Hostd]:
    hostd = Hostd()
    server = await asyncio.start_unix_server(hostd.accept, run_dir / "hostd.sock")
    yield hostd
    server.close()
    for writer in hostd.writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
