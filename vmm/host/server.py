"""hostd as a whole: the lock on its data directory, the machines, the socket, and the end of all three."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vmm.drivers.base import Driver
from vmm.errors import MachineError
from vmm.host.client import Client
from vmm.host.config import HostConfig
from vmm.host.machines import Machines
from vmm.host.operations import Host

logger = logging.getLogger(__name__)


async def serve(config: HostConfig, driver: Driver, *, ready: Callable[[], None]) -> None:
    """Run hostd until cancelled, then end every machine. `ready` is called once the socket accepts.

    Raises MachineError(`driver_failed`) when the host cannot run machines or another hostd uses the data directory.
    """
    _raise_file_limit()
    with _only_one(config.home / "host"):
        machines = Machines(config, driver)
        clients: set[Client] = set()
        try:
            await machines.open()
            host = Host(machines, host_id=_host_id(config.home), version=_version(), started_at=time.time())
            boot_id = secrets.token_hex(8)
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(
                lambda: Client(host, boot_id, clients).wire, sock=_listener(config.socket_path)
            )
            ready()
            try:
                await asyncio.Event().wait()
            finally:
                server.close()
                config.socket_path.unlink(missing_ok=True)
        finally:
            await _to_the_end(machines.close())
            for client in list(clients):
                client.wire.close()


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """Finish, however often we are cancelled: a second signal must not leave half of the machines behind."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _raise_file_limit() -> None:
    """Each machine and each client takes a few descriptors; what the host allows at most is rarely the default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise MachineError("driver_failed", f"another host service uses {directory}") from error
    finally:
        os.close(lock)


def _listener(path: Path) -> socket.socket:
    """A socket that only our user can connect to, from its first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise MachineError("driver_failed", f"cannot listen on {path}", detail=str(error)) from error
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def _host_id(home: Path) -> str:
    """An id that stays with the data directory."""
    path = home / "host" / "id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    value = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    path.write_text(value + "\n")
    return value


def _version() -> str:
    try:
        return version("sandgate")
    except PackageNotFoundError:
        return "unknown"
