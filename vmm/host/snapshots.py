"""The catalogue of snapshots: what was asked for, how far it is, and which image holds it.

    pending(saving ─▶ hashing ─▶ publishing) ─▶ ready
        └────────────── on an error ──────────▶ error

The machine stands still while `saving` only. After a restart a pending snapshot is ready if its image is complete, and
was never asked for otherwise: whoever asked asks again, with the same id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, BinaryIO

from vmm.drivers.base import Saved
from vmm.errors import MachineError, VmmError
from vmm.host.admission import check_id
from vmm.host.crash import point
from vmm.host.images import Images
from vmm.host.journal import Journal, SnapshotRecord
from vmm.host.machine import Machine
from vmm.host.units import explain
from vmm.images.manifest import Manifest
from vmm.types import SnapshotInfo, SnapshotState, SnapshotStep

logger = logging.getLogger(__name__)

_PROGRESS = {SnapshotStep.SAVING: 0.0, SnapshotStep.HASHING: 0.5, SnapshotStep.PUBLISHING: 0.9}


class Snapshots:
    """The snapshots by id. Those that failed are kept until the next start, to say why."""

    def __init__(self, journal: Journal[SnapshotRecord], on_change: Callable[[SnapshotInfo], None]) -> None:
        self._journal = journal
        self._on_change = on_change
        self._records: dict[str, SnapshotRecord] = {}
        self._takings: dict[str, asyncio.Task[SnapshotInfo]] = {}
        self.images: Images

    async def load(self) -> None:
        """Read what an earlier process wrote."""
        for record in await asyncio.to_thread(self._journal.load):
            if record.info.state is SnapshotState.PENDING and self.images.has(record.image):
                self._records[record.id] = record
                self._finish(record.id, record.image)
            elif record.info.state is SnapshotState.READY and self.images.has(record.image):
                self._records[record.id] = record
            else:
                logger.warning("snapshot %s was not completed", record.id)
                self._journal.remove(record.id)

    async def create(self, snapshot_id: str, machine: Machine) -> SnapshotInfo:
        """Take a snapshot, or return the one with this id. Returns once it is ready. Raises MachineError."""
        known = self._records.get(snapshot_id)
        if known is not None and known.info.state is SnapshotState.READY:
            return known.info
        taking = self._takings.get(snapshot_id)
        if taking is None:
            taking = asyncio.create_task(self._take(snapshot_id, machine), name=f"snapshot {snapshot_id}")
            self._takings[snapshot_id] = taking
            taking.add_done_callback(lambda _: self._takings.pop(snapshot_id, None))
        return await asyncio.shield(taking)

    def find(self, snapshot_id: str) -> SnapshotRecord:
        """A snapshot by id. Raises MachineError(`snapshot_not_found`)."""
        record = self._records.get(snapshot_id)
        if record is None:
            raise MachineError("snapshot_not_found", f"there is no snapshot {snapshot_id[:64]!r}")
        return record

    def find_ready(self, snapshot_id: str) -> SnapshotRecord:
        """A snapshot to restore machines from. Raises MachineError(`snapshot_not_found`) until it is ready."""
        record = self.find(snapshot_id)
        if record.info.state is not SnapshotState.READY:
            raise MachineError("snapshot_not_found", f"snapshot {snapshot_id} is not ready", detail=record.info.detail)
        return record

    def infos(self) -> list[SnapshotInfo]:
        """Every snapshot."""
        return [record.info for record in self._records.values()]

    def names(self, image: str) -> bool:
        """Whether an image belongs to a snapshot."""
        return any(record.image == image for record in self._records.values())

    async def delete(self, snapshot_id: str) -> bool:
        """Delete a snapshot; returns whether it was there. Raises MachineError(`in_use`)."""
        record = self._records.get(snapshot_id)
        if record is None:
            return False
        if snapshot_id in self._takings or self.images.is_open(record.image):
            raise MachineError("in_use", f"snapshot {snapshot_id} is in use")
        del self._records[snapshot_id]
        self._journal.remove(snapshot_id)
        point("snapshot.forgotten")
        await self.images.release(record.image)
        return True

    @asynccontextmanager
    async def exported(self, snapshot_id: str) -> AsyncIterator[tuple[SnapshotInfo, BinaryIO]]:
        """A snapshot as one file, to be read from a pipe. Raises MachineError, also after a part of it was read."""
        record = self.find_ready(snapshot_id)
        async with self.images.exported(record.image) as file:
            yield record.info, file

    @asynccontextmanager
    async def imported(self, snapshot_id: str) -> AsyncIterator[BinaryIO]:
        """Add a snapshot that is written into the pipe meanwhile. Raises MachineError; then nothing is left of it."""
        check_id(snapshot_id)
        if snapshot_id in self._records or snapshot_id in self._takings:
            raise MachineError("in_use", f"there is a snapshot {snapshot_id} already")
        async with self.images.imported(snapshot_id) as file:
            yield file
        self._keep(SnapshotRecord(_described(self.images.manifest(snapshot_id)), snapshot_id))
        self._finish(snapshot_id, snapshot_id)
        await asyncio.to_thread(self._journal.sync, snapshot_id)

    async def _take(self, snapshot_id: str, machine: Machine) -> SnapshotInfo:
        info = _pending(snapshot_id, machine)
        self._note(SnapshotRecord(info, snapshot_id))
        point("snapshot.written")
        try:
            capture = await machine.save(snapshot_id)
            record = SnapshotRecord(replace(info, detail=capture.detail), capture.image)
            if capture.saved is None:
                self._note(record)
            else:
                self._note(_measured(record, capture.saved))
                await self.images.publish(snapshot_id, capture.saved, capture.record, self._on_step(snapshot_id))
        except VmmError as error:
            self._note(_failed(self._records[snapshot_id], explain(error)))
            raise
        except BaseException:
            self._note(_failed(self._records[snapshot_id], "the host service failed"))
            raise
        self._finish(snapshot_id, capture.image)
        point("snapshot.ready")
        await asyncio.to_thread(self._journal.sync, snapshot_id)
        return self._records[snapshot_id].info

    def _on_step(self, snapshot_id: str) -> Callable[[SnapshotStep], None]:
        def on_step(step: SnapshotStep) -> None:
            record = self._records[snapshot_id]
            self._keep(replace(record, info=replace(record.info, step=step, progress=_PROGRESS[step])))

        return on_step

    def _finish(self, snapshot_id: str, image: str) -> None:
        record = self._records[snapshot_id]
        size_bytes, stored_bytes = self.images.sizes(image)
        info = replace(
            record.info,
            state=SnapshotState.READY,
            step=None,
            progress=1.0,
            ready_at=time.time(),
            size_bytes=size_bytes,
            stored_bytes=stored_bytes,
        )
        self._note(replace(record, info=info))

    def _note(self, record: SnapshotRecord) -> None:
        """Write a record, then tell of it."""
        try:
            self._journal.save(record)
        except OSError as error:
            if record.info.state is not SnapshotState.ERROR:
                raise MachineError("driver_failed", "the journal cannot be written", detail=str(error)) from error
            logger.warning("snapshot %s: its failure cannot be written: %s", record.id, error)
        self._keep(record)

    def _keep(self, record: SnapshotRecord) -> None:
        self._records[record.id] = record
        self._on_change(record.info)


def _pending(snapshot_id: str, machine: Machine) -> SnapshotInfo:
    record = machine.record
    return SnapshotInfo(
        id=snapshot_id,
        machine=record.id,
        state=SnapshotState.PENDING,
        template=record.spec.template,
        cpu_count=record.spec.cpu_count,
        memory_mib=record.spec.memory_mib,
        disk_mib=record.spec.disk_mib,
        created_at=time.time(),
        parent=record.snapshot,
        step=SnapshotStep.SAVING,
    )


def _described(manifest: Manifest) -> SnapshotInfo:
    """An imported one: nothing is known of its machine but what its manifest says."""
    return SnapshotInfo(
        id=manifest.id,
        machine="",
        state=SnapshotState.PENDING,
        template=manifest.shape.template,
        cpu_count=manifest.shape.cpu_count,
        memory_mib=manifest.shape.memory_mib,
        disk_mib=manifest.shape.disk_mib,
        created_at=manifest.created_at,
    )


def _measured(record: SnapshotRecord, saved: Saved) -> SnapshotRecord:
    info = replace(record.info, size_bytes=saved.size_bytes, pause_ms=saved.pause_s * 1000, step=SnapshotStep.HASHING)
    return replace(record, info=replace(info, progress=_PROGRESS[SnapshotStep.HASHING]))


def _failed(record: SnapshotRecord, why: str) -> SnapshotRecord:
    info: dict[str, Any] = {"state": SnapshotState.ERROR, "detail": why, "step": None}
    return replace(record, info=replace(record.info, **info))
