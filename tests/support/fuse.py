"""A death that is arranged from outside: which crash point, and who dies there.

The test lights the fuse by writing a file; hostd, in its own process, looks at it at every `vmm.host.crash.point`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Who dies: hostd itself, every unit, or the unit that was made last.
HOSTD, UNITS, NEWEST = "hostd", "units", "newest"
VICTIMS = (HOSTD, UNITS, NEWEST)


@dataclass(frozen=True)
class Fuse:
    """Give `on_point` to `vmm.host.crash.arm`. Every label that is passed is added to `path`.seen."""

    path: Path
    kill_units: Callable[[int], object]

    def light(self, label: str, victim: str) -> None:
        """Have the victim die when hostd comes to this label next."""
        self.seen.unlink(missing_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(f"{label} {victim}")
        draft.rename(self.path)

    @property
    def seen(self) -> Path:
        """Labels that have been passed since the fuse was lit, one a line."""
        return self.path.with_suffix(".seen")

    def labels(self) -> list[str]:
        """The content of `seen`."""
        return self.seen.read_text().split() if self.seen.exists() else []

    def on_point(self, label: str) -> None:
        """Called in hostd."""
        if not self.path.exists():
            return
        with self.seen.open("a") as file:
            file.write(f"{label}\n")
        wanted, victim = self.path.read_text().split()
        if label != wanted:
            return
        self.path.unlink()
        if victim == HOSTD:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kill_units(1 if victim == NEWEST else 1_000_000)
