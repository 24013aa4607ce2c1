"""All machines of the host: admission, recovery after a restart, relief when memory is short, the end of everything."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict

import orjson

from vmm.drivers.base import Driver
from vmm.errors import MachineError, VmmError
from vmm.host.admission import available_memory_bytes, check_disk, check_id, check_memory, check_spec
from vmm.host.backing import Backing
from vmm.host.body import Parts, ended_lost
from vmm.host.config import HostConfig
from vmm.host.history import History
from vmm.host.images import Images
from vmm.host.journal import Journal, Record, SnapshotRecord
from vmm.host.machine import Machine
from vmm.host.pool import Pool
from vmm.host.snapshots import Snapshots
from vmm.host.units import Units
from vmm.images.store import ImageStore
from vmm.tasks import run_in_background, stop
from vmm.types import (
    ChildSpec,
    Fork,
    ForkFailure,
    MachineInfo,
    MachineSpec,
    MachineState,
    MachineStats,
    SnapshotInfo,
    StopCause,
)

logger = logging.getLogger(__name__)

#: Refusals after which nothing of the machine is remembered, so that the same id may be tried again.
_FORGOTTEN = frozenset(
    {
        "driver_failed",
        "limit_exceeded",
        "no_capacity",
        "snapshot_corrupt",
        "snapshot_incompatible",
        "snapshot_not_found",
        "template_not_found",
    }
)
_OVER = (MachineState.STOPPED, MachineState.FAILED)
_ENDED_MAX = 2000
_TIDY_PERIOD_S = 60.0
_RELIEF_PERIOD_S = 1.0

Change = MachineInfo | SnapshotInfo


class Machines:
    """The machines by id. Ended ones are kept for a while to say why they ended."""

    def __init__(
        self, config: HostConfig, driver: Driver, *, available_bytes: Callable[[], int] = available_memory_bytes
    ) -> None:
        self.driver = driver
        self._config = config
        self._available_bytes = available_bytes
        host = config.home / "host"
        self._journal = Journal(host / "machines", Record)
        self._machines: dict[str, Machine] = {}
        #: Ids of those that hold resources: counting them at each create would take longer than the rest of it.
        self._live: set[str] = set()
        self._watchers: set[tuple[Callable[[Change], bool], Callable[[bytes], None]]] = set()
        self._is_closing = False
        self._chores: list[asyncio.Task[None]] = []
        self.snapshots = Snapshots(Journal(host / "snapshots", SnapshotRecord), self._changed)
        store = ImageStore(host / "images", disk_mib_max=config.images_mib_max)
        reserve_mib = max(config.memory_reserve_mib, config.hibernate_below_mib)
        self.backing = Backing(config.backing_mib, available_bytes=available_bytes, reserve_mib=reserve_mib)
        self._images = Images(store, driver, self.backing, self._is_needed)
        self.snapshots.images = self._images
        self.history = History(self._running, self.stats)
        self._units = Units(driver, self.backing, boot_timeout_s=config.boot_timeout_s)
        self.pool = Pool(
            driver,
            self._units,
            config.pool,
            available_bytes=available_bytes,
            reserve_mib=reserve_mib,
        )
        self._parts = Parts(
            driver,
            self._units,
            self.pool,
            self._images,
            self._journal,
            on_change=self._changed,
            find_snapshot=self.snapshots.find_ready,
            make_room=lambda wanted_bytes: check_memory(config, wanted_bytes),
        )

    async def open(self) -> None:
        """Get the driver ready, adopt what still runs, finish what was under way, and end what nobody knows."""
        await self.driver.open()
        await asyncio.to_thread(self._images.load)
        await self.snapshots.load()
        for record in await asyncio.to_thread(self._journal.load):
            await self._recover(record)
        units = {machine.record.unit for machine in self._machines.values() if not machine.record.is_over}
        for unit in await self.driver.sweep({unit for unit in units if unit is not None}):
            logger.warning("ended unit %s, which no record owned", unit)
        await asyncio.to_thread(self._images.sweep)
        self._chores = [run_in_background(self._tidy(), "tidier"), run_in_background(self._relieve(), "relief")]
        self._chores.append(run_in_background(self.history.run(), "history"))
        self.backing.start()
        self.pool.start()

    async def _recover(self, record: Record) -> None:
        machine = self._new_machine(record)
        if not record.is_over and record.state is not MachineState.STOPPING and await machine.recover():
            logger.info("machine %s is %s again", record.id, machine.record.state)
            return
        ended = ended_lost(record)
        if not record.is_over:
            await asyncio.to_thread(self._journal.save, ended)
        machine = self._new_machine(ended)
        machine.settle()
        machine.gone.set()

    async def close(self) -> None:
        """End every machine that runs and leave those that are paused in their images; give the host back as it was."""
        self._is_closing = True
        for chore in self._chores:
            await stop(chore)
        await asyncio.to_thread(self.backing.close)
        await self.pool.close()
        for machine in self._machines.values():
            if machine.record.is_paused:
                machine.leave()
            else:
                machine.stop(StopCause.SHUTDOWN)
        try:
            async with asyncio.timeout(self._config.shutdown_timeout_s):
                for machine in list(self._machines.values()):
                    await machine.over()
                await self._units.settle()
                await self._images.settle()
        except TimeoutError:
            logger.exception("not all machines ended in time; the next start sees to them")
        await self.driver.close()

    async def create(self, spec: MachineSpec, image: str | None = None, *, is_early: bool = False) -> MachineInfo:
        """Start a machine, or return the one with this id. Returns once its agent answers. Raises MachineError.

        image: what to make it from, instead of the snapshot that the spec names.
        is_early: return as soon as it is on record with an address, which changes if its agent turns out not to answer.
        """
        machine = self._machines.get(spec.id)
        if machine is None:
            self._admit(spec)
            machine = self._new_machine(Record.new(spec, time.time(), image))
            self._changed(machine.record.info())
            machine.start()
        machine.wanted_at = time.monotonic()
        await (machine.placed if is_early else machine.settled).wait()
        if machine.error is not None:
            if machine.error.code in _FORGOTTEN:
                self._forget(machine)
            raise MachineError(machine.error.code, machine.error.message, detail=machine.error.detail)
        return machine.record.info()

    async def fork(self, machine_id: str, children: Sequence[ChildSpec]) -> Fork:
        """Save a machine once and restore it under each child's name, all at once. Raises MachineError for the save."""
        parent = self.find_live(machine_id)
        specs = [self._child_spec(parent, child) for child in children]
        if all(spec.id in self._machines for spec in specs):
            return Fork(tuple([await self.create(spec) for spec in specs]), 0.0)
        image, pause_ms = await self._capture(parent)
        # Each child's record names the image until its memory has been read; the last one takes it along.
        made = await asyncio.gather(*(self._fork_one(spec, image) for spec in specs))
        self._images.release_later(image)
        return Fork(tuple(made), pause_ms)

    async def _capture(self, parent: Machine) -> tuple[str, float]:
        """An image of the machine now, and for how many milliseconds it stood still for that."""
        image = str(uuid.uuid4())
        capture = await parent.save(image)
        if capture.saved is None:
            return capture.image, 0.0
        # It is gone as soon as the children have read it, and of no use to another process.
        await self._images.publish(image, capture.saved, capture.record, lambda _: None, is_lasting=False)
        return image, capture.saved.pause_s * 1000

    async def _fork_one(self, spec: MachineSpec, image: str) -> MachineInfo | ForkFailure:
        try:
            return await self.create(spec, image)
        except VmmError as error:
            return ForkFailure(spec.id, error.code, error.message, error.detail)

    async def pause(self, machine_id: str, *, hibernate: bool) -> MachineInfo:
        """Freeze or hibernate a machine."""
        return await self._move(machine_id, lambda machine: machine.pause(hibernate=hibernate))

    async def resume(self, machine_id: str) -> MachineInfo:
        """Have a machine run again."""
        return await self._move(machine_id, Machine.resume)

    async def restore(self, machine_id: str, snapshot_id: str, restore_id: str | None = None) -> MachineInfo:
        """Take a machine back to a snapshot; not again if that restore was the last one."""
        return await self._move(machine_id, lambda machine: machine.restore(snapshot_id, restore_id))

    async def snapshot(self, snapshot_id: str, machine_id: str) -> SnapshotInfo:
        """Take a snapshot of a machine."""
        check_id(snapshot_id)
        return await self.snapshots.create(snapshot_id, self.find_live(machine_id))

    async def _move(self, machine_id: str, move: Callable[[Machine], Awaitable[None]]) -> MachineInfo:
        machine = self.find_live(machine_id)
        await machine.settled.wait()
        await move(machine)
        return machine.record.info()

    async def destroy(self, machine_id: str, cause: StopCause, unwanted_for_s: float = 0.0) -> bool:
        """End a machine; returns, once nobody can reach it any more, whether it was there to end.

        Raises MachineError(`in_use`) if somebody has asked to create it within the last `unwanted_for_s`.
        """
        machine = self._machines.get(machine_id)
        if machine is None or machine.gone.is_set():
            return False
        if time.monotonic() - machine.wanted_at < unwanted_for_s:
            raise MachineError("in_use", f"machine {machine_id} has just been asked for")
        machine.stop(cause)
        await machine.gone.wait()
        return True

    def find(self, machine_id: str) -> Machine:
        """A machine by id. Raises MachineError(`machine_not_found`)."""
        machine = self._machines.get(machine_id)
        if machine is None:
            raise MachineError("machine_not_found", f"there is no machine {machine_id[:64]!r}")
        return machine

    def find_live(self, machine_id: str) -> Machine:
        """A machine that has not ended, paused or not. Raises MachineError as `find`, and `machine_not_running`."""
        machine = self.find(machine_id)
        record = machine.record
        if record.is_over or record.state is MachineState.STOPPING:
            raise MachineError(
                "machine_not_running", f"machine {machine_id} does not run", detail=record.cause or record.state
            )
        return machine

    def find_usable(self, machine_id: str, *, is_passive: bool) -> Machine:
        """A machine that runs, or that use wakes. Raises MachineError as `find_live`, and `machine_paused`."""
        machine = self.find_live(machine_id)
        if machine.record.state is MachineState.PREPARING:
            raise MachineError("machine_not_running", f"machine {machine_id} does not run yet", detail="preparing")
        if machine.record.is_paused and (is_passive or not machine.record.auto_resume):
            raise MachineError("machine_paused", f"machine {machine_id} is paused", detail=machine.record.state)
        return machine

    def infos(self) -> list[MachineInfo]:
        """Every machine, also those that ended lately."""
        return [machine.record.info() for machine in self._machines.values()]

    @property
    def live_count(self) -> int:
        """Machines that hold resources."""
        return len(self._live)

    async def stats(self, machine_id: str) -> MachineStats:
        """Resource use of a running or frozen machine. Raises MachineError(`machine_paused`) while hibernated."""
        unit = self.find_live(machine_id).record.unit
        if unit is None:
            raise MachineError("machine_paused", f"machine {machine_id} is hibernated")
        return await self.driver.stats(unit)

    def _running(self) -> Iterable[str]:
        return [one for one in self._live if self._machines[one].record.state is MachineState.RUNNING]

    def watch(self, wants: Callable[[Change], bool], tell: Callable[[bytes], None]) -> Callable[[], None]:
        """Tell the event of every change of state that is wanted from now on; returns how to stop that."""
        watcher = (wants, tell)
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    def _new_machine(self, record: Record) -> Machine:
        machine = Machine(record, self._parts, self._config)
        self._machines[machine.id] = machine
        (self._live.discard if record.is_over else self._live.add)(machine.id)
        return machine

    def _changed(self, change: Change) -> None:
        if change.state in _OVER:
            self._live.discard(change.id)
            self.history.forget(change.id)
        told = [tell for wants, tell in self._watchers if wants(change)]
        if told:
            kind = "machine" if isinstance(change, MachineInfo) else "snapshot"
            event = orjson.dumps({"type": kind, kind: change})
            for tell in told:
                tell(event)

    def _admit(self, spec: MachineSpec) -> None:
        """Refuse what is malformed, too large, or more than the host can take now."""
        if self._is_closing:
            raise MachineError("no_capacity", "the host is shutting down")
        check_spec(spec, self._config)
        if self.live_count >= self._config.machines_max:
            raise MachineError("no_capacity", "the host runs as many machines as it may")
        check_memory(self._config)
        check_disk(self._config)

    def _child_spec(self, parent: Machine, child: ChildSpec) -> MachineSpec:
        shape = parent.record.spec
        spec = MachineSpec(
            template=shape.template,
            cpu_count=shape.cpu_count,
            memory_mib=shape.memory_mib,
            disk_mib=shape.disk_mib,
            snapshot=parent.record.snapshot,
            **asdict(child),
        )
        check_spec(spec, self._config)
        return spec

    def _is_needed(self, image: str) -> bool:
        owners = (machine.record for machine in self._machines.values() if not machine.record.is_over)
        return self.snapshots.names(image) or any(owner.image == image for owner in owners)

    def _forget(self, machine: Machine) -> None:
        if self._machines.get(machine.id) is machine:
            del self._machines[machine.id]
            self._journal.remove(machine.id)

    async def _tidy(self) -> None:
        """Forget machines that ended long ago, or first when there are very many; pack images that lie about."""
        while True:
            await asyncio.sleep(_TIDY_PERIOD_S)
            ended = [machine for machine in self._machines.values() if machine.record.is_over]
            ended.sort(key=lambda machine: machine.record.stopped_at or 0.0)
            oldest_kept = time.time() - self._config.ended_kept_s
            surplus = len(ended) - _ENDED_MAX
            for number, machine in enumerate(ended):
                if number < surplus or (machine.record.stopped_at or 0.0) < oldest_kept:
                    self._forget(machine)
            await self._images.pack(self._config.pack_after_s)

    async def _relieve(self) -> None:
        """While memory is short, hibernate the machine that has been frozen for longest."""
        while True:
            await asyncio.sleep(_RELIEF_PERIOD_S)
            if self._available_bytes() < self._config.hibernate_below_mib * 1024 * 1024:
                self.relieve()

    def relieve(self) -> None:
        """Hibernate one frozen machine, unless one is on its way already."""
        states = [machine.record.state for machine in self._machines.values()]
        frozen = [machine for machine in self._machines.values() if machine.may_hibernate]
        if frozen and MachineState.HIBERNATING not in states:
            min(frozen, key=lambda machine: machine.record.frozen_at or 0.0).hibernate_soon()
