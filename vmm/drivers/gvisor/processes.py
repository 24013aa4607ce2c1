"""Processes that hostd did not start itself but has to end, watch and reap.

`runsc create` leaves the sandbox and its gofer behind as orphans. They become children of hostd, a subreaper, and stay
in the process table until reaped; while they do, their control groups cannot be removed. A process is known by its pid
*and* its start time: pids are used again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

_FIELD_STATE, _FIELD_SESSION, _FIELD_STARTED = 0, 3, 19


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[_FIELD_STATE] == "Z" else int(fields[_FIELD_STARTED])


def threads(pid: int) -> list[int]:
    """A process's threads; none when it has ended."""
    with contextlib.suppress(OSError):
        return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    return []


def children(pid: int) -> Iterator[int]:
    """Of all threads of a process: orphans are given to any thread of a subreaper."""
    for thread in threads(pid):
        with contextlib.suppress(OSError):
            yield from map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())


def reap_orphans(spare: Collection[int]) -> None:
    """Reap dead children that came from elsewhere, except those in `spare`.

    Children that this process started itself share its session and are left to whoever waits for them; runsc puts
    what it leaves behind into sessions of their own.
    """
    own_session = os.getsid(0)
    for pid in children(os.getpid()):
        fields = _stat(pid)
        if fields and fields[_FIELD_STATE] == "Z" and int(fields[_FIELD_SESSION]) != own_session and pid not in spare:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def with_argument(prefix: str) -> Iterator[tuple[int, str]]:
    """Every process of the host that has an argument starting with `prefix`, and the rest of that argument."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                for argument in (entry / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                    if argument.startswith(prefix):
                        yield int(entry.name), argument.removeprefix(prefix)
                        break


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the state on; the name before it may hold anything."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None
