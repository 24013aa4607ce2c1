"""A driver for faults and scale: its units are in memory and isolate nothing.

Nobody's code can run in it: a unit is a file tree in a dictionary and a few programs that print, count or sleep
(`vmm.drivers.fake.processes.PROGRAMS`). What is real is what lies between: hostd, sockets, frames, credits, offsets,
images, life-cycles. A thousand units fit into a process: each has an address of its own in 127.0.0.0/8, behind one
listener. They end with the process; `vmm.drivers.fake.keeper` keeps them in another one, to be adopted.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from vmm.drivers.base import Capabilities, Exit, ImageFiles, Placement, Saved, Shape
from vmm.drivers.fake.agent import Connection, Guest
from vmm.drivers.fake.faults import Faults
from vmm.errors import MachineError
from vmm.types import MachineStats, StopCause, TemplateInfo

__all__ = ["FakeDriver", "Faults"]

TEMPLATES = (
    TemplateInfo(
        name="default",
        digest="0" * 64,
        description="A file tree in memory; isolates nothing",
        size_bytes=0,
        created_at=0.0,
        aliases=("miosa-sandbox",),
    ),
)

_RUNTIME = "fake-1"
_MEMORY_FILE = "memory"
#: Every address, for those of the units are many; a connection to one that is none of theirs is refused.
_LISTEN = "0.0.0.0"  # noqa: S104
_FIRST_ADDRESS = ipaddress.IPv4Address("127.1.0.1")


@dataclass(slots=True)
class _Unit:
    shape: Shape
    token: str
    address: str
    ended: asyncio.Future[Exit]
    #: None until it is booted or restored.
    guest: Guest | None = None


class FakeDriver:
    """Implements `vmm.drivers.base.Driver`.

    faults: what goes wrong with units from their start on; `faults_of` changes it for one that runs.
    units_max: how many fit, for tests of a full host.
    """

    name = "fake"

    def __init__(self, faults: Faults | None = None, *, units_max: int = 10_000) -> None:
        self.faults = faults or Faults()
        self._units_max = units_max
        self._units: dict[str, _Unit] = {}
        self._exits: dict[str, Exit] = {}
        self._addresses: dict[str, _Unit] = {}
        self._last_address = _FIRST_ADDRESS
        self._server: asyncio.Server | None = None

    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolation="none", limits=False, freeze=True, memory_snapshot=True, reconnect_after_snapshot=True
        )

    def templates(self) -> Sequence[TemplateInfo]:
        return TEMPLATES

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self._guest_at).wire, _LISTEN, 0)

    async def close(self) -> None:
        for unit in list(self._units):
            await self.destroy(unit)
        if self._server is not None:
            self._server.close()
            self._server = None

    async def prepare(self, unit: str, shape: Shape, *, token: str) -> None:
        await asyncio.sleep(self.faults.start_delay_s)
        _raise(self.faults.start_error, "start")
        if shape.template not in (name for info in TEMPLATES for name in (info.name, *info.aliases)):
            raise MachineError("template_not_found", f"no template {shape.template!r}")
        if len(self._units) >= self._units_max:
            raise MachineError("no_capacity", f"{self._units_max} units exist already")
        self._last_address += 1
        made = _Unit(shape, token, str(self._last_address), asyncio.get_running_loop().create_future())
        self._units[unit] = self._addresses[made.address] = made

    async def boot(self, unit: str) -> Placement:
        shell = self._shell(unit)
        shell.guest = Guest(shell.token, replace(self.faults))
        return self._placement(shell)

    async def restore(self, unit: str, image: ImageFiles) -> Placement:
        shell = self._shell(unit)
        try:
            await asyncio.sleep(self.faults.restore_delay_s)
            _raise(self.faults.restore_error, "restore")
            if (image.runtime, image.template_digest) != (_RUNTIME, TEMPLATES[0].digest):
                raise MachineError("snapshot_incompatible", "the image is of another runtime or template")
            memory = await asyncio.to_thread((image.directory / _MEMORY_FILE).read_bytes)
            shell.guest = Guest.load(_loads(memory), replace(self.faults))
        except BaseException:
            await self.destroy(unit)
            raise
        return self._placement(shell)

    async def start(self, unit: str, shape: Shape, *, token: str) -> Placement:
        await self.prepare(unit, shape, token=token)
        return await self.boot(unit)

    async def save(self, unit: str, directory: Path) -> Saved:
        guest = self._running(unit)
        was_running = guest.may_run.is_set()
        loop = asyncio.get_running_loop()
        began = loop.time()
        guest.freeze()
        try:
            await asyncio.sleep(guest.faults.save_delay_s)
            _raise(guest.faults.save_error, "save")
            memory = msgspec.msgpack.encode(guest.dump())
            (directory / _MEMORY_FILE).write_bytes(memory)
        except OSError as error:
            raise MachineError("no_space", "the unit could not be written", detail=str(error)) from error
        finally:
            guest.cut()
            if was_running:
                guest.thaw()
        return Saved(loop.time() - began, len(memory), TEMPLATES[0].digest, _RUNTIME)

    async def reclaim(self, unit: str) -> int:
        self._running(unit)
        return 0

    async def adopt(self, unit: str, placement: Placement) -> bool:  # noqa: ARG002 - there is nowhere to look
        return unit in self._units

    async def dial(self, unit: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        dialled = self._units.get(unit)
        if dialled is None or dialled.guest is None or dialled.guest.faults.refuses_dial:
            raise ConnectionRefusedError(f"unit {unit} does not listen")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(protocol, dialled.address, self._port())
        return transport

    async def wait(self, unit: str) -> Exit:
        waited = self._units.get(unit)
        if waited is None:
            return self._exits.get(unit, Exit(StopCause.LOST))
        return await asyncio.shield(waited.ended)

    async def stats(self, unit: str) -> MachineStats:
        guest = self._running(unit)
        return MachineStats(
            cpu_seconds=0.0,
            memory_bytes=guest.files.size_bytes(),
            memory_limit_bytes=self._units[unit].shape.memory_mib * 1024 * 1024,
            pids=sum(1 for process in guest.processes.values() if process.exit is None),
        )

    async def freeze(self, unit: str) -> None:
        guest = self._running(unit)
        _raise(guest.faults.freeze_error, "freeze")
        guest.freeze()

    async def thaw(self, unit: str) -> None:
        guest = self.guests.get(unit)
        if guest is not None:
            _raise(guest.faults.thaw_error, "thaw")
            guest.thaw()

    async def destroy(self, unit: str) -> None:
        await self.end(unit, Exit(StopCause.REQUESTED))
        self._exits.pop(unit, None)

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        gone = [unit for unit in self._units if unit not in keep]
        for unit in gone:
            await self.destroy(unit)
        return gone

    async def end(self, unit: str, exit_: Exit) -> None:
        """Let a unit end by itself, as after a kill or for want of memory."""
        ended = self._units.pop(unit, None)
        if ended is not None:
            del self._addresses[ended.address]
            self._exits[unit] = exit_
            if ended.guest is not None:
                await ended.guest.stop()
            ended.ended.set_result(exit_)

    def faults_of(self, unit: str) -> Faults:
        """What goes wrong with one unit; change it in place."""
        return self._running(unit).faults

    def cut(self, unit: str) -> None:
        """Break the connections to its agent; its processes go on."""
        self._running(unit).cut()

    @property
    def units(self) -> Sequence[str]:
        """All there are, shells too."""
        return list(self._units)

    @property
    def guests(self) -> Mapping[str, Guest]:
        """The insides of the units that run, by unit."""
        return {unit: found.guest for unit, found in self._units.items() if found.guest is not None}

    def _running(self, unit: str) -> Guest:
        found = self._units.get(unit)
        if found is None or found.guest is None:
            raise MachineError("machine_not_running", f"unit {unit} does not run")
        return found.guest

    def _shell(self, unit: str) -> _Unit:
        found = self._units.get(unit)
        if found is None or found.guest is not None:
            raise MachineError("machine_not_running", f"there is no shell {unit}")
        return found

    def _guest_at(self, address: str) -> Guest | None:
        found = self._addresses.get(address)
        return None if found is None else found.guest

    def _placement(self, unit: _Unit) -> Placement:
        return Placement(address=unit.address, agent_port=self._port())

    def _port(self) -> int:
        if self._server is None:
            raise MachineError("driver_failed", "the driver is not open")
        return int(self._server.sockets[0].getsockname()[1])


def _raise(code: str | None, what: str) -> None:
    if code is not None:
        raise MachineError(code, f"this {what} was told to fail")


def _loads(memory: bytes) -> Mapping[str, Any]:
    try:
        return msgspec.msgpack.decode(memory, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise MachineError("snapshot_corrupt", "the image cannot be read", detail=str(error)) from error
