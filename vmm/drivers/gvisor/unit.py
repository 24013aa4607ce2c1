"""One sandbox as the driver knows it, and what of that survives a restart of hostd."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vmm.drivers.base import Exit, ImageFiles, Shape
from vmm.drivers.gvisor import processes
from vmm.drivers.gvisor.network import Slot
from vmm.errors import MachineError


@dataclass(slots=True)
class Unit:
    """A sandbox from its creation until it is destroyed. `ended` is set once, with its exit in `exit`."""

    pid: int
    pidfd: int
    slot_index: int
    address: str
    template_digest: str
    shape: Shape
    #: The link, until the shell is started and its sandbox has it.
    slot: Slot | None = None
    #: Held by what takes a moment and must not be disturbed: saving, freezing, reclaiming.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    exit: Exit | None = None
    is_frozen: bool = False
    #: Whether gVisor's count of open connections is right: it leaves out those that an image has brought along.
    counts_connections: bool = False
    #: Whether its kernel's threads are scheduled as on a busy host, None before anybody looked: see `turns`.
    is_urgent: bool | None = None

    def facts(self) -> dict[str, Any]:
        """What `adopted` needs to know, as JSON values."""
        return {
            "pid": self.pid,
            "started": processes.start_time(self.pid),
            "slot": self.slot_index,
            "template": self.template_digest,
            "shape": asdict(self.shape),
            "counts_connections": self.counts_connections,
        }

    @classmethod
    def adopted(cls, address: str, facts: Mapping[str, Any]) -> Self | None:
        """The unit that these facts are about, None when it has ended."""
        try:
            pid, started, slot, template = (facts[key] for key in ("pid", "started", "slot", "template"))
            shape = Shape(**facts["shape"])
        except (KeyError, TypeError):
            return None  # another version's, or another driver's
        if processes.start_time(pid) != started:
            return None
        try:
            counts = facts.get("counts_connections") is True
            return cls(pid, os.pidfd_open(pid), slot, address, template, shape, counts_connections=counts)
        except ProcessLookupError:
            return None

    def check_fits(self, image: ImageFiles, runtime: str) -> None:
        """Refuse an image that this shell cannot go on from. Raises MachineError(`snapshot_incompatible`)."""
        for name, here, there in (
            ("template", self.template_digest, image.template_digest),
            ("runtime", runtime, image.runtime),
            ("shape", self.shape, image.shape),
        ):
            if here != there:
                message = f"the snapshot was made with another {name}"
                raise MachineError("snapshot_incompatible", message, detail=f"{there}; here it is {here}")
