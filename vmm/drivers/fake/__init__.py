"""A driver for faults and scale: its machines are in memory and isolate nothing.

Nobody's code can run in it: a machine is a file tree in a dictionary and a few programs that print or sleep
(`vmm.drivers.fake.processes.PROGRAMS`). What is real is what lies between: hostd, sockets, frames, credits, offsets,
life-cycles. A thousand machines fit into a process: all of them share one listener on 127.0.0.1 and are told apart by
their tokens. They end with the process, so there is never anything to adopt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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


@dataclass(slots=True)
class _Machine:
    shape: Shape
    token: str
    ended: asyncio.Future[Exit]
    #: None until it is booted.
    guest: Guest | None = None


class FakeDriver:
    """Implements `vmm.drivers.base.Driver`.

    faults: what goes wrong with machines from their start on; `faults_of` changes it for one that runs.
    machines_max: how many fit, for tests of a full host.
    """

    name = "fake"

    def __init__(self, faults: Faults | None = None, *, machines_max: int = 10_000) -> None:
        self.faults = faults or Faults()
        self._machines_max = machines_max
        self._machines: dict[str, _Machine] = {}
        self._exits: dict[str, Exit] = {}
        self._guests: dict[str, Guest] = {}
        self._server: asyncio.Server | None = None

    def capabilities(self) -> Capabilities:
        return Capabilities(isolation="none", limits=False, freeze=False)

    def templates(self) -> Sequence[TemplateInfo]:
        return TEMPLATES

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self._guests.get).wire, "127.0.0.1", 0)

    async def close(self) -> None:
        for unit in list(self._machines):
            await self.destroy(unit)
        if self._server is not None:
            self._server.close()
            self._server = None

    async def prepare(self, unit: str, shape: Shape, *, token: str) -> None:
        faults = self.faults
        await asyncio.sleep(faults.start_delay_s)
        if faults.start_error is not None:
            raise MachineError(faults.start_error, "this start was told to fail")
        if shape.template not in (name for info in TEMPLATES for name in (info.name, *info.aliases)):
            raise MachineError("template_not_found", f"no template {shape.template!r}")
        if len(self._machines) >= self._machines_max:
            raise MachineError("no_capacity", f"{self._machines_max} machines run already")
        self._machines[unit] = _Machine(shape, token, asyncio.get_running_loop().create_future())

    async def boot(self, unit: str) -> Placement:
        machine = self._machines.get(unit)
        if machine is None:
            raise MachineError("machine_not_running", f"there is no shell {unit}")
        machine.guest = Guest(machine.token, {}, replace(self.faults), self._guests)
        address, port = self._address()
        return Placement(address=address, agent_port=port)

    async def restore(self, unit: str, image: ImageFiles) -> Placement:
        raise MachineError("snapshot_incompatible", f"a fake machine cannot be restored from {image.id}", detail=unit)

    async def start(self, unit: str, shape: Shape, *, token: str) -> Placement:
        await self.prepare(unit, shape, token=token)
        return await self.boot(unit)

    async def save(self, unit: str, directory: Path) -> Saved:
        raise MachineError("snapshot_failed", f"a fake machine cannot be saved to {directory.name}", detail=unit)

    async def reclaim(self, unit: str) -> int:
        self._running(unit)
        return 0

    async def adopt(self, unit: str, placement: Placement) -> bool:  # noqa: ARG002 - there is nowhere to look
        return unit in self._machines

    async def dial(self, unit: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        machine = self._machines.get(unit)
        if machine is None or machine.guest is None or machine.guest.faults.refuses_dial:
            raise ConnectionRefusedError(f"machine {unit} does not listen")
        transport, _ = await asyncio.get_running_loop().create_connection(protocol, *self._address())
        return transport

    async def wait(self, unit: str) -> Exit:
        machine = self._machines.get(unit)
        if machine is None:
            return self._exits.get(unit, Exit(StopCause.LOST))
        return await asyncio.shield(machine.ended)

    async def stats(self, unit: str) -> MachineStats:
        guest = self._running(unit)
        return MachineStats(
            cpu_seconds=0.0,
            memory_bytes=guest.files.size_bytes(),
            memory_limit_bytes=self._machines[unit].shape.memory_mib * 1024 * 1024,
            pids=sum(1 for process in guest.processes.values() if process.exit is None),
        )

    async def freeze(self, unit: str) -> None:
        for connection in self._running(unit).connections:
            connection.wire.pause_reading()

    async def thaw(self, unit: str) -> None:
        if unit in self.guests:
            for connection in self.guests[unit].connections:
                connection.wire.resume_reading()

    async def destroy(self, unit: str) -> None:
        await self.end(unit, Exit(StopCause.REQUESTED))
        self._exits.pop(unit, None)

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        gone = [unit for unit in self._machines if unit not in keep]
        for unit in gone:
            await self.destroy(unit)
        return gone

    async def end(self, unit: str, exit_: Exit) -> None:
        """Let a machine end by itself, as after a kill or for want of memory."""
        machine = self._machines.pop(unit, None)
        if machine is not None:
            self._exits[unit] = exit_
            if machine.guest is not None:
                await machine.guest.stop()
            machine.ended.set_result(exit_)

    def faults_of(self, unit: str) -> Faults:
        """What goes wrong with one machine; change it in place."""
        return self._running(unit).faults

    def cut(self, unit: str) -> None:
        """Break the connections to its agent; its processes go on."""
        self._running(unit).cut()

    @property
    def guests(self) -> Mapping[str, Guest]:
        """The insides of the machines that run, by machine id."""
        return {unit: machine.guest for unit, machine in self._machines.items() if machine.guest is not None}

    def _running(self, unit: str) -> Guest:
        machine = self._machines.get(unit)
        if machine is None or machine.guest is None:
            raise MachineError("machine_not_running", f"machine {unit} does not run")
        return machine.guest

    def _address(self) -> tuple[str, int]:
        if self._server is None:
            raise MachineError("driver_failed", "the driver is not open")
        address, port = self._server.sockets[0].getsockname()[:2]
        return str(address), int(port)
