"""The driver for hosts without KVM: each machine is a gVisor sandbox.

A shell is: link and disk from the supplies, a sandbox that runs nothing (`launch`), a frozen control group. Booting or
restoring it takes two or three calls on its control socket. An end is: kill everything in the machine's control group,
reap, remove the group and runsc's state. Link and disk go with the sandbox's last process; nothing of them has a name
that could be left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from vmm.drivers.base import AGENT_PORT, Capabilities, Exit, ImageFiles, Placement, Saved, Shape
from vmm.drivers.gvisor import bundle, cgroups, firewall, memory, network, processes, runsc, saving, syscalls
from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.launch import Resources
from vmm.drivers.gvisor.network import Slot
from vmm.drivers.gvisor.supplies import Supplies, Supply
from vmm.drivers.gvisor.turns import Turns
from vmm.drivers.gvisor.unit import Unit
from vmm.errors import MachineError
from vmm.tasks import run_in_background, stop
from vmm.templates.store import Template, TemplateStore
from vmm.types import MachineSpec, MachineStats, StopCause, TemplateInfo

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_RCU_EXPEDITED = Path("/sys/kernel/rcu_expedited")
_BLOCK_LOCKS = Path("/run/sandgate/blocks")
#: How long the processes of a killed machine may take to disappear. Freeing gigabytes takes part of a second.
_DESTROY_TIMEOUT_S = 15.0
_DESTROY_POLL_S = 0.003
_REAP_PERIOD_S = 2.0
#: struct linger: on, zero seconds.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class GvisorDriver:
    """See `vmm.drivers.base.Driver`. processor_times: a file as /proc/stat."""

    name = "gvisor"

    def __init__(
        self, config: GvisorConfig, templates: TemplateStore, *, processor_times: Path = Path("/proc/stat")
    ) -> None:
        self._config = config
        self._templates = templates
        self._groups = cgroups.Groups(cgroups.find_hierarchy(), config.instance)
        self._starters = ThreadPoolExecutor(config.starts_max, "runsc")
        self._units: dict[str, Unit] = {}
        self._resolvers: tuple[str, ...] = ()
        self._turns = Turns(self._living, processor_times)
        self._tasks: list[asyncio.Task[None]] = []
        self._release = ""
        self._runsc: runsc.Runsc
        self._block: network.Block
        self._supplies: Supplies | None = None

    def capabilities(self) -> Capabilities:
        can_freeze = self._groups.can_freeze()
        return Capabilities(
            "gvisor", limits=True, freeze=can_freeze, memory_snapshot=True, reconnect_after_snapshot=True
        )

    def templates(self) -> Sequence[TemplateInfo]:
        return self._templates.infos()

    async def open(self) -> None:
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise MachineError("driver_failed", "the host cannot be set up for machines", detail=str(error)) from error
        default = MachineSpec(id="", template="", hostname="")
        self._supplies = Supplies(self._config, self._block, disk_mib=default.disk_mib)
        self._tasks = [run_in_background(self._reap(), "reaper"), run_in_background(self._turns.watch(), "turns")]

    def _open(self) -> None:
        if os.geteuid() != 0:
            raise MachineError("driver_failed", "hostd has to run as root")
        program = runsc.find()
        if program is None:
            raise MachineError("driver_failed", "runsc is missing; `sandgate doctor` says how to install it")
        self._release = runsc.release(program)
        if self._release not in runsc.RELEASES:
            supported = ", ".join(runsc.RELEASES)
            raise MachineError("driver_failed", f"runsc {self._release} is not supported; install release {supported}")
        if not self._groups.is_complete:
            raise MachineError("driver_failed", "the cgroup controllers cpu, memory and pids are not all mounted")
        config = self._config
        self._resolvers = config.resolvers or tuple(firewall.host_resolvers())
        state = config.run_dir / "machines"
        for directory in (state, config.disk_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if config.rcu_expedited:
            _expedite_rcu()
        syscalls.become_subreaper()
        self._templates.load()
        self._runsc = runsc.Runsc(program, state)
        self._block = network.claim_block(ipaddress.IPv4Network(config.address_range), config.instance, _BLOCK_LOCKS)
        firewall.enable_forwarding()
        firewall.apply(
            firewall.ruleset(
                config.instance,
                prefix=self._block.prefix,
                block=self._block.network,
                resolvers=self._resolvers,
                allowed=config.egress_allow,
                denied=[*firewall.NOT_INTERNET, config.address_range, *map(str, network.host_networks())],
            )
        )

    async def close(self) -> None:
        if self._supplies is None:
            return  # `open` did not get far enough to leave anything
        for task in self._tasks:
            await stop(task)
        await self._supplies.close()
        await asyncio.to_thread(self._starters.shutdown)
        for made in self._units.values():
            _unwatch(made)
        if not self._units:
            await asyncio.to_thread(firewall.remove, self._config.instance)
            self._groups.close()
            for directory in (self._config.run_dir / "machines", self._config.run_dir):
                with contextlib.suppress(OSError):
                    directory.rmdir()
        self._block.close()

    async def prepare(self, unit: str, shape: Shape, *, token: str) -> None:
        await self._create(unit, shape, token)
        try:
            await self.freeze(unit)
        except BaseException:
            await asyncio.shield(self.destroy(unit))
            raise

    async def boot(self, unit: str) -> Placement:
        return await self._enliven(unit, lambda slot: self._runsc.start(unit, slot), counts_connections=True)

    async def restore(self, unit: str, image: ImageFiles) -> Placement:
        def load(slot: Slot) -> None:
            self._unit(unit).check_fits(image, self._release)
            self._runsc.restore(unit, slot, image.directory)

        return await self._enliven(unit, load, counts_connections=image.is_quiet)

    async def start(self, unit: str, shape: Shape, *, token: str) -> Placement:
        await self._create(unit, shape, token)
        return await self.boot(unit)

    async def save(self, unit: str, directory: Path) -> Saved:
        made = self._started(unit)
        async with made.lock:
            work = asyncio.create_task(asyncio.to_thread(saving.save, self._groups, self._runsc, unit, made, directory))
            try:
                pause_s, is_quiet = await asyncio.shield(work)
            except asyncio.CancelledError:
                # The sandbox cannot be told to give up: it is done in a moment, and then nothing is to be left.
                while not work.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([work])
                saving.clear(directory)
                raise
        size_bytes = sum(file.stat().st_size for file in directory.iterdir())
        return Saved(pause_s, size_bytes, made.template_digest, self._release, is_quiet)

    async def reclaim(self, unit: str) -> int:
        made = self._unit(unit)
        async with made.lock:
            return await asyncio.to_thread(memory.reclaim, self._groups, unit) if made.is_frozen else 0

    async def _create(self, unit: str, shape: Shape, token: str) -> None:
        """Make a shell that is not frozen yet."""
        template = self._templates.find(shape.template)
        if self._supplies is None:
            raise MachineError("driver_failed", "the driver is not open")
        supply = await self._supplies.take(shape.disk_mib)
        try:
            pid, pidfd = await self._whole(unit, lambda: self._make_shell(unit, shape, token, template, supply))
        except BaseException:
            self._block.give_back(supply.slot.index)
            raise
        slot = supply.slot
        self._watch(unit, Unit(pid, pidfd, slot.index, slot.address, template.info.digest, shape, slot))

    def _make_shell(self, unit: str, shape: Shape, token: str, template: Template, supply: Supply) -> tuple[int, int]:
        try:
            config = bundle.make(shape, agent=template.agent, token=token, image=template.image)
            resources = Resources(
                image=template.image,
                disk=supply.disk.path,
                network=supply.slot.namespace,
                groups=self._groups.make(unit, pids_max=bundle.PIDS_MAX),
                cpu_count=shape.cpu_count,
                memory_bytes=bundle.memory_bytes(shape),
            )
            pid = self._runsc.create(unit, config, resources)
            # Opened before anything runs in it: a sandbox that ends at once is reaped at once.
            return pid, os.pidfd_open(pid)
        except BaseException:
            supply.slot.release()
            raise
        finally:
            supply.disk.release()

    async def _enliven(self, unit: str, start: Callable[[Slot], None], *, counts_connections: bool) -> Placement:
        """Make a shell run, by whatever `start` tells its sandbox."""
        shell = self._unit(unit)
        slot = shell.slot
        if slot is None:
            raise MachineError("driver_failed", f"unit {unit} has been started before")
        try:
            await self._whole(unit, lambda: self._start_shell(unit, shell, slot, start))
        finally:
            shell.slot = None
        shell.counts_connections = counts_connections
        return Placement(shell.address, resolvers=self._resolvers, facts=shell.facts())

    def _start_shell(self, unit: str, shell: Unit, slot: Slot, start: Callable[[Slot], None]) -> None:
        try:
            if shell.is_frozen:
                self._groups.set_frozen(unit, False)
                shell.is_frozen = False
            # Half of the time of a start is the sandbox's own work, on as many processors as there are.
            start(slot)
            saving.limit(self._groups, unit, shell.shape)
        finally:
            slot.release()

    async def _whole(self, unit: str, step: Callable[[], _T]) -> _T:
        """Run a step towards a running unit in a thread; if it fails or is cancelled, nothing of the unit is left."""
        work = asyncio.get_running_loop().run_in_executor(self._starters, step)
        try:
            return await asyncio.shield(work)
        except BaseException as error:
            # The thread cannot be stopped; what it has made by its end is taken down.
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            await asyncio.shield(self.destroy(unit))
            if isinstance(error, OSError):
                raise MachineError("driver_failed", "the sandbox could not be started", detail=str(error)) from error
            raise

    async def adopt(self, unit: str, placement: Placement) -> bool:
        made = Unit.adopted(placement.address, placement.facts)
        if made is None:
            return False
        self._block.reserve(made.slot_index)
        try:
            await asyncio.to_thread(saving.recover, self._groups, unit, made)
        except OSError:
            os.close(made.pidfd)
            return False  # It is ending just now.
        self._watch(unit, made)
        return True

    async def dial(self, unit: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        made = self._unit(unit)
        address = made.address
        async with made.lock:
            pass  # While it is saved its greeting would be lost, and sent again only after a second.
        return await _connect(protocol, address)

    async def wait(self, unit: str) -> Exit:
        machine = self._unit(unit)
        await machine.ended.wait()
        return machine.exit or Exit(StopCause.EXITED)

    async def stats(self, unit: str) -> MachineStats:
        self._unit(unit)
        return await asyncio.to_thread(self._groups.stats, unit)

    async def freeze(self, unit: str) -> None:
        await self._set_frozen(unit, True)

    async def thaw(self, unit: str) -> None:
        await self._set_frozen(unit, False)

    async def destroy(self, unit: str) -> None:
        deadline = asyncio.get_running_loop().time() + _DESTROY_TIMEOUT_S
        while not await asyncio.to_thread(self._kill, unit):
            if asyncio.get_running_loop().time() > deadline:
                left = sorted(self._groups.processes(unit))
                raise MachineError("driver_failed", "the machine's processes do not end", detail=f"pids {left}")
            await asyncio.sleep(_DESTROY_POLL_S)
        await asyncio.to_thread(self._runsc.remove, unit)
        machine = self._units.pop(unit, None)
        if machine is not None:
            self._end(unit, machine)
            if machine.slot is not None:
                machine.slot.release()
            self._block.give_back(machine.slot_index)

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        known = await asyncio.to_thread(lambda: self._groups.machines() | self._runsc.ids())
        strangers = sorted(known - set(keep))
        for unit in strangers:
            try:
                await self.destroy(unit)
            except MachineError as error:
                # Nothing to stay away for: it is tried again at the next start.
                logger.warning("machine %s, which no record owns, cannot be ended: %s", unit, error.detail)
        if self._supplies is not None:
            self._supplies.start()
        return strangers

    def _unit(self, unit: str) -> Unit:
        machine = self._units.get(unit)
        if machine is None:
            raise MachineError("machine_not_running", f"machine {unit} does not run")
        return machine

    async def _set_frozen(self, unit: str, is_frozen: bool) -> None:
        made = self._unit(unit)
        async with made.lock:
            try:
                if is_frozen:
                    await asyncio.to_thread(self._groups.set_frozen, unit, True)
                else:  # a thread would take longer than it takes
                    self._groups.set_frozen(unit, False)
            except OSError as error:
                verb = "frozen" if is_frozen else "thawed"
                raise MachineError("driver_failed", f"the machine could not be {verb}", detail=str(error)) from error
            made.is_frozen = is_frozen

    def _started(self, unit: str) -> Unit:
        made = self._unit(unit)
        if made.slot is not None or made.ended.is_set():
            raise MachineError("machine_not_running", f"machine {unit} does not run")
        return made

    def _thaw(self, unit: str) -> None:
        with contextlib.suppress(OSError):
            self._groups.set_frozen(unit, False)

    def _kill(self, unit: str) -> bool:
        """One step towards a machine's end; True when nothing of it runs. A frozen process dies only once thawed."""
        pids = self._groups.processes(unit)
        if not pids and unit not in self._units:
            # One that was being launched when hostd ended, and has not joined the group yet.
            root = f"--root={self._config.run_dir}/machines/{unit}"
            pids = {pid for pid, rest in processes.with_argument(root) if not rest}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids:
            self._thaw(unit)
        processes.reap_orphans(spare=self._watched())
        return not pids and self._groups.remove(unit)

    def _living(self) -> list[Unit]:
        return [machine for machine in list(self._units.values()) if not machine.ended.is_set()]

    def _watched(self) -> set[int]:
        return {machine.pid for machine in self._living()}

    def _watch(self, unit: str, made: Unit) -> None:
        self._units[unit] = made
        asyncio.get_running_loop().add_reader(made.pidfd, self._end, unit, made)

    def _end(self, unit: str, machine: Unit) -> None:
        if machine.ended.is_set():
            return
        _unwatch(machine)
        status: int | None = None
        with contextlib.suppress(ChildProcessError):
            pid, code = os.waitpid(machine.pid, os.WNOHANG)
            status = code if pid else None
        machine.exit = self._cause(unit, status)
        machine.ended.set()

    def _cause(self, unit: str, status: int | None) -> Exit:
        if self._groups.oom_kills(unit):
            return Exit(StopCause.OOM, "the machine used all of its memory")
        if status is None:  # adopted: another process's child
            return Exit(StopCause.EXITED)
        if os.WIFSIGNALED(status):
            return Exit(StopCause.KILLED, f"the sandbox was killed by {signal.Signals(os.WTERMSIG(status)).name}")
        return Exit(StopCause.EXITED, f"the sandbox exited with status {os.WEXITSTATUS(status)}")

    async def _reap(self) -> None:
        """Helpers of a sandbox that ended by itself, with nobody destroying it yet."""
        while True:
            await asyncio.sleep(_REAP_PERIOD_S)
            await asyncio.to_thread(processes.reap_orphans, self._watched())


def _expedite_rcu() -> None:
    """Let no start wait for every processor to have been idle or in user mode once, as the kernel does by default.

    It does when a process joins a control group and when gVisor registers for memory barriers: 14 and 20 ms, in which
    nothing happens. It stays on when hostd ends, as forwarding does.
    """
    try:
        _RCU_EXPEDITED.write_text("1")
    except OSError as error:
        logger.info("starts wait for the kernel's grace periods: %s", error)


async def _connect(protocol: Callable[[], asyncio.Protocol], address: str) -> asyncio.Transport:
    """A connection to an agent. Whichever way we close it, it is gone at once at the other end too: see `saving`."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as closing:
        connection = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        await loop.sock_connect(connection, (address, AGENT_PORT))
        transport, _ = await loop.create_connection(protocol, sock=connection)
        closing.pop_all()
    return transport


def _unwatch(machine: Unit) -> None:
    if machine.pidfd >= 0:
        asyncio.get_running_loop().remove_reader(machine.pidfd)
        os.close(machine.pidfd)
        machine.pidfd = -1
