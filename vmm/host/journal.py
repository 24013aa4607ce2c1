"""What hostd must know after it was killed: one small file per machine, and one per snapshot.

A record is written before the step it announces. After a restart each state means:

    running, frozen   a unit to adopt if it is still there, and to bring into that state
    hibernating       hibernated if the image is complete, else frozen as before
    hibernated        an image; there is no unit
    waking            hibernated: a unit that was being restored is swept
    stopping          an end to be finished
    (no record)       a machine that was being made; whoever asked for it asks again, with the same id

A pending snapshot without a complete image was never taken. Units that no record names are swept, images too.

Files change places, so a reader finds the old record or the new one. They are not synced to disk: most of a
record describes processes, and whatever loses the page cache has ended those too. The exception is an image's owner:
that record is synced, for the image outlives the host's restart.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import orjson

from vmm.drivers.base import Placement
from vmm.types import IdleAction, MachineInfo, MachineSpec, MachineState, Origin, SnapshotInfo, StopCause

logger = logging.getLogger(__name__)


#: A record, and where the next is written that takes its place: the old one is there afterwards.
_RECORD, _SPARE = ".json", ".spare"

#: States in which nothing of the machine executes, but all of it is kept.
PAUSED = frozenset({MachineState.FROZEN, MachineState.HIBERNATING, MachineState.HIBERNATED, MachineState.WAKING})


@dataclass(slots=True)
class Record:
    """Everything about one machine that outlives the process. `token` opens its agent: the files are mode 0600.

    unit: the driver's id of what runs, None while hibernated.
    is_named: whether its guest is known to have been told who it is; if not, it is told again.
    image: what a hibernated machine wakes from, and a forked one is made from.
    snapshot: the snapshot that its memory came from at last.  restore: what its last restore was called.
    frozen_at: Unix seconds.
    """

    spec: MachineSpec
    created_at: float
    last_active_at: float
    expires_at: float | None
    idle_timeout_s: float | None
    idle_action: IdleAction = IdleAction.DESTROY
    auto_resume: bool = True
    hibernate_after_s: float | None = None
    state: MachineState = MachineState.PREPARING
    unit: str | None = None
    token: str = ""
    is_named: bool = True
    placement: Placement | None = None
    origin: Origin | None = None
    image: str | None = None
    snapshot: str | None = None
    restore: str | None = None
    frozen_at: float | None = None
    started_at: float | None = None
    stopped_at: float | None = None
    cause: StopCause | None = None
    detail: str | None = None
    boot_ms: float | None = None

    @classmethod
    def new(cls, spec: MachineSpec, now: float, image: str | None = None) -> Record:
        """Of a machine that is to be made, from an image if one is given."""
        return cls(
            spec,
            created_at=now,
            last_active_at=now,
            expires_at=spec.expires_at,
            idle_timeout_s=spec.idle_timeout_s,
            idle_action=spec.idle_action,
            auto_resume=spec.auto_resume,
            hibernate_after_s=spec.hibernate_after_s,
            snapshot=spec.snapshot,
            image=image,
        )

    @property
    def id(self) -> str:
        """The machine's id."""
        return self.spec.id

    @property
    def is_over(self) -> bool:
        """Whether the machine has ended for good."""
        return self.state in (MachineState.STOPPED, MachineState.FAILED)

    @property
    def is_paused(self) -> bool:
        """Whether it has to be woken before it can be used."""
        return self.state in PAUSED

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
            origin=self.origin,
            snapshot=self.snapshot,
            auto_resume=self.auto_resume,
            idle_action=self.idle_action,
            unit=self.unit,
        )


@dataclass(slots=True)
class SnapshotRecord:
    """A snapshot that was asked for. image: what holds it; a hibernated machine's may be shared."""

    info: SnapshotInfo
    image: str

    @property
    def id(self) -> str:
        """The snapshot's id."""
        return self.info.id


class _Named(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Named)


_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _change_places(spare: str, path: str) -> None:
    """Put one file in another's place, at one instant.

    By exchange, because ext4 begins to write a file to the disk when it is renamed over another: on a busy disk that is
    a millisecond, which nobody asked for.
    """
    names = os.fsencode(spare), os.fsencode(path)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        # There is no such file yet, or the file system cannot exchange.
        Path(spare).rename(path)


@dataclass(slots=True)
class Journal(Generic[T]):
    """The records of one type below a directory. Methods block for some 0.1 ms, `sync` for as long as a disk does."""

    directory: Path
    shape: type[T]

    def load(self) -> list[T]:
        """Read every record. One that cannot be read is dropped with a warning: its units and images will be swept."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        records = []
        for path in sorted(self.directory.iterdir()):
            if path.suffix != _RECORD:
                path.unlink()
                continue
            try:
                records.append(msgspec.convert(orjson.loads(path.read_bytes()), self.shape))
            except (OSError, orjson.JSONDecodeError, msgspec.ValidationError) as error:
                logger.warning("dropping the unreadable record %s: %s", path.name, error)
                path.unlink(missing_ok=True)
        return records

    def save(self, record: T) -> None:
        """Write a record in place of the earlier one. Raises OSError."""
        spare = self._spare(record.id)
        content = orjson.dumps(record)
        # Not O_TRUNC: ext4 begins to write a file to the disk when it is closed after that, too.
        descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, len(content))
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
        _change_places(spare, self._path(record.id))

    def sync(self, record_id: str) -> None:
        """Have the disk hold a record as it was saved last. Raises OSError."""
        for path in (self._path(record_id), self.directory):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, record_id: str) -> None:
        """Forget a record."""
        for path in (self._path(record_id), self._spare(record_id)):
            Path(path).unlink(missing_ok=True)

    def _spare(self, record_id: str) -> str:
        return f"{self.directory}/{record_id}{_SPARE}"

    def _path(self, record_id: str) -> str:
        # Not a `Path`: those are made in ten times the time, and a record is saved at every step of a machine.
        return f"{self.directory}/{record_id}{_RECORD}"
