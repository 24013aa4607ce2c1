"""What hostd must know about its machines after it was killed: one small file per machine.

A record is written before the step it announces. After a restart, `preparing` and `stopping` mean a step that may be
half done and is undone or finished; `running` means a machine to adopt if it is still there.

Files are replaced by rename, so a reader finds the old record or the new one. They are not synced to disk: a record
describes processes, and whatever loses the page cache has ended those too.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import orjson

from vmm.drivers.base import Placement
from vmm.types import MachineInfo, MachineSpec, MachineState, StopCause

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Record:
    """Everything about one machine that outlives the process. `token` opens its agent: the files are mode 0600."""

    spec: MachineSpec
    token: str
    created_at: float
    last_active_at: float
    expires_at: float | None
    idle_timeout_s: float | None
    state: MachineState = MachineState.PREPARING
    placement: Placement | None = None
    started_at: float | None = None
    stopped_at: float | None = None
    cause: StopCause | None = None
    detail: str | None = None
    boot_ms: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the machine has ended for good."""
        return self.state in (MachineState.STOPPED, MachineState.FAILED)

    def info(self) -> MachineInfo:
        """The part that clients see."""
        return MachineInfo(
            id=self.spec.id,
            template=self.spec.template,
            state=self.state,
            address=self.placement.address if self.placement and not self.is_over else None,
            created_at=self.created_at,
            started_at=self.started_at,
            stopped_at=self.stopped_at,
            cause=self.cause,
            detail=self.detail,
            boot_ms=self.boot_ms,
            expires_at=self.expires_at,
            idle_timeout_s=self.idle_timeout_s,
            last_active_at=self.last_active_at,
        )


@dataclass(slots=True)
class Journal:
    """The records below a directory. Methods block for some 0.1 ms."""

    directory: Path

    def load(self) -> list[Record]:
        """Read every record. One that cannot be read is dropped with a warning: its machine will be swept."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        records = []
        for path in sorted(self.directory.iterdir()):
            try:
                records.append(msgspec.convert(orjson.loads(path.read_bytes()), Record))
            except (OSError, orjson.JSONDecodeError, msgspec.ValidationError) as error:
                logger.warning("dropping the unreadable record %s: %s", path.name, error)
                path.unlink(missing_ok=True)
        return records

    def save(self, record: Record) -> None:
        """Write a record in place of the machine's earlier one. Raises OSError."""
        path = self._path(record.spec.id)
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(record))
        draft.rename(path)

    def remove(self, machine_id: str) -> None:
        """Forget a machine."""
        self._path(machine_id).unlink(missing_ok=True)

    def _path(self, machine_id: str) -> Path:
        return self.directory / f"{machine_id}.json"
