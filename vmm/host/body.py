"""What a machine is at the moment, and the moves from one state to the next. Called by its task alone, one by one.

    preparing ─boot─▶ running ◀─wake─ frozen
                       │  ▲   ─freeze─▶ │ ▲
                       │  │             │ └── on an error, or when it is needed again
                   save│  │restore      hibernate
                       ▼  │             ▼ │
                      image          hibernating ─▶ hibernated ─wake─▶ waking ─▶ running
                                                        ▲                │
                                                        └── on an error ─┘
    any ─end─▶ stopping ─▶ stopped(cause), failed(cause)

Each move but a thaw writes its record before it acts, and is undone when it fails or is cancelled: the machine is then
in the state that it came from. What is new is complete before the old goes: a restore prepares another unit while this
one runs on, a hibernation frees the unit once its image is published. `vmm.host.journal` says what a restart makes of
each record; `vmm.host.crash` points name the places where it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vmm.drivers.base import Driver, Exit
from vmm.errors import MachineError, VmmError
from vmm.guest import HooksRun, HookStage
from vmm.host.crash import point
from vmm.host.images import Capture, Images
from vmm.host.journal import Journal, Record, SnapshotRecord
from vmm.host.line import AgentLine
from vmm.host.names import run_hooks
from vmm.host.pool import Pool
from vmm.host.units import Unit, Units, explain, failures
from vmm.tasks import run_in_background
from vmm.types import MachineInfo, MachineState, Origin, StopCause

logger = logging.getLogger(__name__)

#: From a thaw or claim to its news, and to the hooks after it: who wanted the machine mostly has an answer by then.
_NEWS_REST_S, _HOOKS_REST_S = 0.002, 0.02


@dataclass(frozen=True, slots=True)
class Parts:
    """What all machines of a host share.

    on_change: told of every change of state.  find_snapshot: one that is ready, or MachineError.
    make_room: raises MachineError when so many bytes of memory are not there.
    """

    driver: Driver
    units: Units
    pool: Pool
    images: Images
    journal: Journal[Record]
    on_change: Callable[[MachineInfo], None]
    find_snapshot: Callable[[str], SnapshotRecord]
    make_room: Callable[[int], None]


class Body:
    """See the module. `line` is where its streams go. on_unit: called when another unit, or none, takes over."""

    def __init__(self, record: Record, parts: Parts, on_unit: Callable[[], None]) -> None:
        self.record = record
        self.unit: Unit | None = None
        self.line = AgentLine.nowhere(record.id)
        self._parts = parts
        self._on_unit = on_unit
        self._hooks: asyncio.Task[None] | None = None

    async def boot(self) -> None:
        """Give it its first unit. Raises MachineError, as all moves do."""
        began = time.monotonic()
        forked_from = self.record.image
        unit = await self._first_unit()
        now = time.time()
        took = {"started_at": now, "last_active_at": now, "boot_ms": (time.monotonic() - began) * 1000}
        self._commit(unit, state=MachineState.RUNNING, image=None, **took)
        point("boot.written")
        self._take(unit)
        if unit.naming is not None:
            await self._introduce(unit.naming)
        self._tell_soon()
        if forked_from is not None:
            self._release(forked_from)

    async def recover(self) -> bool:
        """Be again what the record says, after a restart of hostd. False when there is nothing to go on from."""
        record, images = self.record, self._parts.images
        if record.state is MachineState.HIBERNATING and images.has(record.image):
            self._retreat(state=MachineState.HIBERNATED, unit=None, placement=None, token="")
        elif record.state is MachineState.HIBERNATING:
            self._retreat(state=MachineState.FROZEN, image=None)
        elif record.state is MachineState.WAKING:
            self._retreat(state=MachineState.HIBERNATED)
        if self.record.state is MachineState.HIBERNATED:
            return images.has(record.image)
        return await self._adopt()

    async def freeze(self) -> None:
        """running ─▶ frozen."""
        if self.record.state is not MachineState.RUNNING:
            return
        if not self._parts.driver.capabilities().freeze:
            raise MachineError("unsupported", "this host cannot freeze machines")
        unit = self._running()
        hooks = await self._run_hooks(HookStage.BEFORE_PAUSE)
        self.line.hold()
        try:
            self._write(state=MachineState.FROZEN, frozen_at=time.time(), detail=failures(hooks))
            point("freeze.written")
            await self._parts.driver.freeze(unit.id)
        except BaseException:
            with contextlib.suppress(MachineError):
                await self._parts.driver.thaw(unit.id)
            self._retreat(state=MachineState.RUNNING, frozen_at=None)
            self.line.release()
            raise
        point("freeze.frozen")
        self.tell()

    async def reclaim(self) -> None:
        """Give back what memory a frozen unit can do without."""
        freed = await self._parts.driver.reclaim(self._running().id)
        logger.info("machine %s: %d MiB reclaimed", self.record.id, freed >> 20)

    async def wake(self) -> None:
        """frozen, hibernated ─▶ running."""
        if self.record.state is MachineState.FROZEN:
            await self._thaw()
        elif self.record.state is MachineState.HIBERNATED:
            await self._wake_from_image(self.record.image or "")

    async def hibernate(self) -> None:
        """running, frozen ─▶ hibernated."""
        if self.record.state is MachineState.HIBERNATED:
            return
        await self.freeze()
        unit, image = self._running(), str(uuid.uuid4())
        self._write(state=MachineState.HIBERNATING, image=image)
        point("hibernate.written")
        self.tell()
        self.line.hang_up()
        try:
            await self._parts.images.save(unit.id, image, self.record)
            point("hibernate.saved")
            self._write(state=MachineState.HIBERNATED, unit=None, placement=None, token="")
        except BaseException:
            self._retreat(state=MachineState.FROZEN, image=None)
            self._release(image)
            self.tell()
            raise
        point("hibernate.committed")
        self._take(None)
        self.tell()
        await asyncio.to_thread(self._parts.journal.sync, self.record.id)

    async def save(self, image: str) -> Capture:
        """Take its memory and files into an image that is yet to be published. Running or frozen it goes on so."""
        if self.record.state is MachineState.HIBERNATED:
            return Capture(self.record, self.record.image or "", None)
        record, unit = self.record, self._running()
        is_frozen = record.state is MachineState.FROZEN
        hooks = HooksRun() if is_frozen else await self._run_hooks(HookStage.BEFORE_SNAPSHOT)
        self.line.hold()
        # Saving resets every connection, and takes half as long if there is none.
        self.line.hang_up()
        try:
            point("save.held")
            saved = await self._parts.images.capture(unit.id, image)
            point("save.saved")
        finally:
            if not is_frozen:
                self.line.release()
        return Capture(record, image, saved, failures(hooks))

    async def restore(self, snapshot: str, restore_id: str | None) -> None:
        """running, frozen, hibernated ─▶ running, as it was when the snapshot was taken.

        restore_id: nothing happens if the last restore had it: whoever asked has not heard of its end.
        """
        if restore_id is not None and self.record.restore == restore_id:
            return
        found, old_image = self._parts.find_snapshot(snapshot), self.record.image
        self._make_room(found.image)
        unit = await self._restored(found.image, is_own=found.info.machine == self.record.id)
        point("restore.complete")
        state = MachineState.RUNNING
        came_from = {"snapshot": snapshot, "restore": restore_id, "image": None}
        self._commit(unit, state=state, frozen_at=None, last_active_at=time.time(), **came_from)
        point("restore.written")
        self._take(unit)
        self.tell()
        if old_image is not None:
            self._release(old_image)

    def begin_end(self, end: Exit) -> None:
        """Let nobody reach it any more: only then may a caller be told that it is gone."""
        self._retreat(cause=end.cause, detail=end.detail, state=MachineState.STOPPING)
        point("end.written")
        self.line.close(MachineError("machine_not_running", "the machine has ended", detail=end.detail or end.cause))
        self.tell()

    async def finish_end(self, *, is_failed: bool) -> None:
        """Free everything. What could not be freed leaves the record `stopping`, for the next start."""
        record = self.record
        left = None if record.unit is None else await self._parts.units.destroy(record.unit)
        point("end.freed")
        state = MachineState.FAILED if is_failed else MachineState.STOPPED
        if left is None:
            self._retreat(state=state, stopped_at=time.time(), image=None)
        else:
            self.record = replace(record, state=state, stopped_at=time.time(), detail=left)
        if record.image is not None:
            self._release(record.image)
        self.tell()

    def amend(self, **fields: Any) -> None:
        """Change settings, for good once this returns."""
        self._write(**fields)

    def tell(self) -> None:
        """Let everybody know the state."""
        record = self.record
        why = ": ".join(filter(None, (record.cause, record.detail)))
        logger.info("machine %s is %s%s", record.id, record.state, f" ({why})" if why else "")
        self._parts.on_change(record.info())

    async def _first_unit(self) -> Unit:
        spec, image = self.record.spec, self.record.image
        if image is None and spec.snapshot is None:
            return await self._parts.pool.obtain(spec)
        image = image or self._parts.find_snapshot(spec.snapshot or "").image
        self._make_room(image)
        return await self._restored(image, is_own=False)

    async def _restored(self, image: str, *, is_own: bool) -> Unit:
        """A unit made from an image. is_own: it was this machine that was saved."""
        async with self._parts.images.open(image) as files:
            return await self._parts.pool.restore(self.record.spec, files, is_own=is_own)

    def _make_room(self, image: str) -> None:
        size_bytes, _ = self._parts.images.sizes(image)
        self._parts.make_room(size_bytes)

    async def _introduce(self, naming: asyncio.Task[None]) -> None:
        """Wait until its guest knows who it is. With one that cannot be told, it is as if it had not been in stock."""
        try:
            await naming
        except MachineError as error:
            other = await self._parts.pool.replace(self.record.spec, error)
            self._commit(other)
            self._take(other)
        else:
            self._write(is_named=True)

    async def _adopt(self) -> bool:
        record, driver = self.record, self._parts.driver
        if record.unit is None or record.placement is None or not await driver.adopt(record.unit, record.placement):
            return False
        is_frozen = record.state is MachineState.FROZEN
        try:
            await (driver.freeze if is_frozen else driver.thaw)(record.unit)
        except MachineError as error:
            # It runs or it has ended, which `wait` will tell: no reason to give up the only copy.
            logger.warning("machine %s cannot be brought to where it was: %s", record.id, explain(error))
            is_frozen = False
            self._retreat(state=MachineState.RUNNING, frozen_at=None)
        origin = record.origin or Origin.COLD
        unit = self._parts.units.join(record.unit, record.token, record.placement, origin, is_held=is_frozen)
        self._take(unit)
        if record.is_named:
            return True
        try:
            await self._parts.units.name(record.spec, unit)
            self._write(is_named=True)
        except MachineError as error:
            logger.warning("machine %s cannot be told who it is: %s", record.id, explain(error))
            self._take(None)
            return False
        return True

    async def _thaw(self) -> None:
        unit = self._running()
        # First of all: its guest comes to while the record is written. One that says frozen still is made true again.
        await self._parts.driver.thaw(unit.id)
        point("thaw.thawed")
        try:
            self._write(state=MachineState.RUNNING, frozen_at=None, last_active_at=time.time(), detail=None)
        except BaseException:
            with contextlib.suppress(MachineError):
                await self._parts.driver.freeze(unit.id)
            raise
        point("thaw.written")
        self.line.release()
        self._tell_soon()
        # Whoever waits for the machine does not wait for its hooks, nor for a processor that they keep busy.
        self._hooks = run_in_background(self._after_resume(), f"after-resume {self.record.id}")

    def _tell_soon(self) -> None:
        """As `tell`, once whoever waits for the machine has it."""
        asyncio.get_running_loop().call_later(_NEWS_REST_S, self.tell)

    async def _after_resume(self) -> None:
        await asyncio.sleep(_HOOKS_REST_S)
        if self.record.state is MachineState.RUNNING:
            await self._run_hooks(HookStage.AFTER_RESUME)

    async def _wake_from_image(self, image: str) -> None:
        self._make_room(image)
        self._write(state=MachineState.WAKING)
        point("wake.written")
        self.tell()
        try:
            unit = await self._restored(image, is_own=True)
            point("wake.restored")
            state = MachineState.RUNNING
            self._commit(unit, state=state, image=None, frozen_at=None, last_active_at=time.time())
        except BaseException:
            self._retreat(state=MachineState.HIBERNATED)
            self.tell()
            raise
        point("wake.committed")
        self._take(unit)
        self.tell()
        self._release(image)

    def _commit(self, unit: Unit, **fields: Any) -> None:
        """Write that a new unit is the machine from now on, or give it up."""
        facts = {"unit": unit.id, "token": unit.token, "placement": unit.placement, "origin": unit.origin}
        try:
            self._write(detail=failures(unit.hooks), is_named=unit.naming is None, **facts, **fields)
        except BaseException:
            self._parts.units.discard(unit)
            raise

    def _take(self, unit: Unit | None) -> None:
        """Have another unit, or none; streams go along and the old one is given up."""
        old, old_line = self.unit, self.line
        self.unit, self.line = unit, AgentLine.nowhere(self.record.id) if unit is None else unit.line
        self.line.inherit(old_line)
        self._on_unit()
        if old is not None:
            self._parts.units.discard(old)

    def _release(self, image: str) -> None:
        """Let go of an image, behind everybody's back: nothing depends on when its files go."""
        self._parts.images.release_later(image)

    def _running(self) -> Unit:
        if self.unit is None:
            raise MachineError("machine_not_running", f"machine {self.record.id} does not run")
        return self.unit

    async def _run_hooks(self, stage: HookStage) -> HooksRun:
        """They may say what they like: nothing depends on it, and their time is limited."""
        try:
            return await run_hooks(self.line, stage)
        except VmmError as error:
            logger.warning("machine %s: hooks of stage %s could not run: %s", self.record.id, stage, explain(error))
            return HooksRun()

    def _write(self, **changes: Any) -> None:
        """Change the record in memory once it is changed on disk. Raises MachineError."""
        record = replace(self.record, **changes)
        try:
            self._parts.journal.save(record)
        except OSError as error:
            raise MachineError("driver_failed", "the journal cannot be written", detail=str(error)) from error
        self.record = record

    def _retreat(self, **changes: Any) -> None:
        """Change the record even if the disk does not take it: what it holds leads a next hostd to the same place."""
        try:
            self._write(**changes)
        except MachineError as error:
            logger.warning("machine %s: %s", self.record.id, explain(error))
            self.record = replace(self.record, **changes)


def ended_lost(record: Record) -> Record:
    """The record of a machine that has gone while nobody looked."""
    if record.is_over or record.state is MachineState.STOPPING:
        return replace(record, state=MachineState.STOPPED, stopped_at=record.stopped_at or time.time())
    detail = "it ended while the host service was away"
    return replace(
        record, state=MachineState.STOPPED, stopped_at=time.time(), cause=StopCause.LOST, detail=detail, image=None
    )
