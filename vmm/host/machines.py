"""All machines of the host: admission, recovery after a restart, the end of everything."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from vmm.drivers.base import Driver
from vmm.errors import MachineError
from vmm.host.config import HostConfig
from vmm.host.journal import Journal, Record
from vmm.host.machine import Machine
from vmm.tasks import run_in_background, stop
from vmm.types import MachineInfo, MachineSpec, MachineState, MachineStats, StopCause

logger = logging.getLogger(__name__)

_ID_LENGTH = 36
_HOSTNAME_MAX = 63
_MEMORY_MIB_MIN = 128
_DISK_MIB_MIN = 16
_MIB = 1024 * 1024
#: Refusals after which nothing of the machine is remembered, so that the same id may be tried again.
_FORGOTTEN = frozenset({"no_capacity", "limit_exceeded", "template_not_found", "driver_failed"})
_ENDED_MAX = 2000
_TIDY_PERIOD_S = 60.0


class Machines:
    """The machines by id. Ended ones are kept for a while to say why they ended."""

    def __init__(self, config: HostConfig, driver: Driver) -> None:
        self.driver = driver
        self._config = config
        self._journal = Journal(config.home / "host" / "machines")
        self._machines: dict[str, Machine] = {}
        self._watchers: set[Callable[[MachineInfo], None]] = set()
        self._is_closing = False
        self._tidier: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Get the driver ready, adopt what still runs, finish what was under way, and end what nobody knows."""
        await self.driver.open()
        for record in await asyncio.to_thread(self._journal.load):
            await self._recover(record)
        running = {machine.id for machine in self._machines.values() if not machine.record.is_over}
        for machine_id in await self.driver.sweep(running):
            logger.warning("ended machine %s, which no record owned", machine_id)
        self._tidier = run_in_background(self._tidy(), "tidier")

    async def _recover(self, record: Record) -> None:
        machine_id = record.spec.id
        if record.state is MachineState.PREPARING:
            # Whoever asked for it has lost the connection and asks again, with the same id.
            await asyncio.to_thread(self._journal.remove, machine_id)
            return
        machine = self._new_machine(record)
        if record.state is MachineState.RUNNING and record.placement is not None:
            if await self.driver.adopt(machine_id, record.placement):
                await self.driver.thaw(machine_id)
                logger.info("adopted machine %s", machine_id)
                # Activity since the record was written is unknown; count it as active now rather than end it early.
                record.last_active_at = time.time()
                machine.settled.set()
                machine.start(adopted=True)
                return
            record.cause, record.detail = StopCause.LOST, "it ended while the host service was away"
        if not record.is_over:
            record.state = MachineState.STOPPED
            record.stopped_at = time.time()
            await asyncio.to_thread(self._journal.save, record)
        machine.settled.set()
        machine.dead.set()

    async def close(self) -> None:
        """End every machine, as many at once as the driver can, and give the host back as it was."""
        self._is_closing = True
        await stop(self._tidier)
        for machine in self._machines.values():
            machine.stop(StopCause.SHUTDOWN)
        ends = [asyncio.create_task(machine.over()) for machine in self._machines.values()]
        if ends:
            _, late = await asyncio.wait(ends, timeout=self._config.shutdown_timeout_s)
            for end in late:
                end.cancel()
            if late:
                logger.error("%d machines did not end in time; the next start ends them", len(late))
        await self.driver.close()

    async def create(self, spec: MachineSpec) -> MachineInfo:
        """Start a machine, or return the one with this id. Returns once its agent answers. Raises MachineError."""
        machine = self._machines.get(spec.id)
        if machine is None:
            self._admit(spec)
            now = time.time()
            record = Record(spec, secrets.token_hex(32), now, now, spec.expires_at, spec.idle_timeout_s)
            machine = self._new_machine(record)
            self._changed(record.info())
            machine.start()
        await machine.settled.wait()
        if machine.error is not None:
            if machine.error.code in _FORGOTTEN:
                await self._forget(machine)
            raise MachineError(machine.error.code, machine.error.message, detail=machine.error.detail)
        return machine.record.info()

    async def destroy(self, machine_id: str, cause: StopCause) -> bool:
        """End a machine; returns, once nothing in it runs, whether it was there to end."""
        machine = self._machines.get(machine_id)
        if machine is None or machine.dead.is_set():
            return False
        machine.stop(cause)
        await machine.dead.wait()
        return True

    def find(self, machine_id: str) -> Machine:
        """A machine by id. Raises MachineError(`machine_not_found`)."""
        machine = self._machines.get(machine_id)
        if machine is None:
            raise MachineError("machine_not_found", f"there is no machine {machine_id[:64]!r}")
        return machine

    def find_running(self, machine_id: str) -> Machine:
        """A machine that runs. Raises MachineError: `machine_not_found`, `machine_not_running`."""
        machine = self.find(machine_id)
        if machine.record.state is not MachineState.RUNNING:
            detail = machine.record.cause or machine.record.state
            raise MachineError("machine_not_running", f"machine {machine_id} does not run", detail=detail)
        return machine

    def infos(self) -> list[MachineInfo]:
        """Every machine, also those that ended lately."""
        return [machine.record.info() for machine in self._machines.values()]

    @property
    def live_count(self) -> int:
        """Machines that hold resources."""
        return sum(1 for machine in self._machines.values() if not machine.record.is_over)

    async def stats(self, machine_id: str) -> MachineStats:
        """Resource use of a running machine."""
        return await self.driver.stats(self.find_running(machine_id).id)

    def watch(self, watcher: Callable[[MachineInfo], None]) -> Callable[[], None]:
        """Call `watcher` on every change of state from now on; returns how to stop that."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    def _new_machine(self, record: Record) -> Machine:
        machine = Machine(record, self.driver, self._journal, self._config, self._changed)
        self._machines[machine.id] = machine
        return machine

    def _changed(self, info: MachineInfo) -> None:
        for watcher in list(self._watchers):
            watcher(info)

    def _admit(self, spec: MachineSpec) -> None:
        """Refuse what is malformed, too large, or more than the host can take now."""
        config = self._config
        if self._is_closing:
            raise MachineError("no_capacity", "the host is shutting down")
        _check_names(spec)
        limits = (
            ("memory_mib", spec.memory_mib, _MEMORY_MIB_MIN, config.memory_mib_max),
            ("disk_mib", spec.disk_mib, _DISK_MIB_MIN, config.disk_mib_max),
            ("cpu_count", spec.cpu_count, 0.05, config.cpu_count_max),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                raise MachineError("limit_exceeded", f"{name} must be between {least} and {most}")
        if self.live_count >= config.machines_max:
            raise MachineError("no_capacity", "the host runs as many machines as it may")
        if available_memory_bytes() < config.memory_reserve_mib * _MIB:
            raise MachineError("no_capacity", "the host is short of memory")
        disk = os.statvfs(config.home)
        if disk.f_bavail * disk.f_frsize < config.disk_reserve_mib * _MIB:
            raise MachineError("no_capacity", "the host is short of disk space")

    async def _forget(self, machine: Machine) -> None:
        if self._machines.get(machine.id) is machine:
            del self._machines[machine.id]
            await asyncio.to_thread(self._journal.remove, machine.id)

    async def _tidy(self) -> None:
        """Forget machines that ended long ago, or first when there are very many."""
        while True:
            await asyncio.sleep(_TIDY_PERIOD_S)
            ended = [machine for machine in self._machines.values() if machine.record.is_over]
            ended.sort(key=lambda machine: machine.record.stopped_at or 0.0)
            oldest_kept = time.time() - self._config.ended_kept_s
            surplus = len(ended) - _ENDED_MAX
            for number, machine in enumerate(ended):
                if number < surplus or (machine.record.stopped_at or 0.0) < oldest_kept:
                    await self._forget(machine)


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel could give without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _check_names(spec: MachineSpec) -> None:
    """Ids become file and group names: only a UUID's characters, and its length, as nothing may be another's prefix."""
    if len(spec.id) != _ID_LENGTH or not all(c in "0123456789abcdef-" for c in spec.id):
        raise MachineError("bad_request", "id must be a lower-case UUID")
    name = spec.hostname
    if not (0 < len(name) <= _HOSTNAME_MAX and name.isascii() and name.replace("-", "a").isalnum()):
        raise MachineError("bad_request", "hostname must be letters, digits and hyphens, at most 63")
