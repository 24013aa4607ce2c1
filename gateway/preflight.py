"""What may forbid the server to start: another instance on the same data directory, ports that are taken."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gateway.children import StartError
from gateway.owners import is_running
from gateway.settings import Settings, env_name, socket_path, split_address, words

#: How long to wait for what a killed instance has left behind to end.
_REMAINS_S = 20.0


def check_ports(settings: Settings) -> None:
    """Raises StartError if another program has one of the addresses, or if they are not this machine's."""
    addresses = [(name, address) for name in settings.listeners for address in words(getattr(settings, name))]
    for name, address in addresses:
        # The plane itself looks after the files of sockets: one that a killed instance left is no hindrance.
        if socket_path(address) is not None:
            continue
        host, port = split_address(address)
        try:
            family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
                listener.listen(1)
        except OSError as error:
            raise StartError(
                f"{env_name(name)}={address}: {error.strerror or error}.\n"
                f"Stop what uses it, or choose another: {env_name(name)}={host}:{port + 1} sandgate serve"
            ) from error


@contextlib.contextmanager
def instance_lock(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the data directory. The children inherit the lock: it is free when the last of them has ended.

    Raises StartError if another instance runs, or if the remains of a killed one do not end.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + _REMAINS_S
        while not _try_lock(lock):
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            if holder.isdecimal() and is_running(int(holder)):
                raise StartError(
                    f"Another sandgate (process {holder}) serves {path.parent}.\n"
                    f"Stop it with `kill {holder}`, or give this one a data directory of its own by SANDGATE_HOME."
                )
            if time.monotonic() > until:
                raise StartError(f"Processes of a killed sandgate still hold {path}; `fuser {path}` lists them.")
            say("Waiting for the remains of a killed instance to end.")
            time.sleep(0.5)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
