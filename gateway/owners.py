"""Which process started something, and whether it still runs.

A process id alone is reused; with the start time and the boot id it is unique for good.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """One process. started: clock ticks after boot, from /proc."""

    boot_id: str
    pid: int
    started: int

    def encode(self) -> str:
        return f"{self.boot_id}:{self.pid}:{self.started}"

    @classmethod
    def decode(cls, text: str) -> Owner:
        boot_id, pid, started = text.split(":")
        return cls(boot_id, int(pid), int(started))

    def is_alive(self) -> bool:
        return self.boot_id == _boot_id() and _started(self.pid) == self.started


def current_owner() -> Owner:
    """This process."""
    return _current(os.getpid())


def is_running(pid: int) -> bool:
    """Whether a process has this id now, whoever it is."""
    return _started(pid) is not None


@functools.lru_cache(maxsize=1)
def _current(pid: int) -> Owner:
    started = _started(pid)
    if started is None:
        raise RuntimeError("/proc does not show this process")
    return Owner(_boot_id(), pid, started)


@functools.lru_cache(maxsize=1)
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """Start time of a running process; None if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, field 2, may hold spaces and brackets; what follows its last bracket is regular.
    rest = stat[stat.rindex(")") + 2 :].split()
    return None if rest[0] in {"Z", "X"} else int(rest[19])
