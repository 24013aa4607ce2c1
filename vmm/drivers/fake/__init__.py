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

from vmm.drivers.base import Capabilities, Exit, Placement
from vmm.drivers.fake.agent import Connection, Guest
from vmm.drivers.fake.faults import Faults
from vmm.errors import MachineError
from vmm.types import MachineSpec, MachineStats, StopCause, TemplateInfo

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
    spec: MachineSpec
    guest: Guest
    ended: asyncio.Future[Exit]


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
        for machine_id in list(self._machines):
            await self.destroy(machine_id)
        if self._server is not None:
            self._server.close()
            self._server = None

    async def start(self, spec: MachineSpec, *, token: str) -> Placement:
        faults = replace(self.faults)
        await asyncio.sleep(faults.start_delay_s)
        if faults.start_error is not None:
            raise MachineError(faults.start_error, "this start was told to fail")
        if spec.template not in (name for info in TEMPLATES for name in (info.name, *info.aliases)):
            raise MachineError("template_not_found", f"no template {spec.template!r}")
        if len(self._machines) >= self._machines_max:
            raise MachineError("no_capacity", f"{self._machines_max} machines run already")
        guest = Guest(token, spec.env, faults, self._guests)
        self._machines[spec.id] = _Machine(spec, guest, asyncio.get_running_loop().create_future())
        address, port = self._address()
        return Placement(address=address, agent_port=port)

    async def adopt(self, machine_id: str, placement: Placement) -> bool:  # noqa: ARG002 - there is nowhere to look
        return machine_id in self._machines

    async def dial(self, machine_id: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        machine = self._machines.get(machine_id)
        if machine is None or machine.guest.faults.refuses_dial:
            raise ConnectionRefusedError(f"machine {machine_id} does not listen")
        transport, _ = await asyncio.get_running_loop().create_connection(protocol, *self._address())
        return transport

    async def wait(self, machine_id: str) -> Exit:
        machine = self._machines.get(machine_id)
        if machine is None:
            return self._exits.get(machine_id, Exit(StopCause.LOST))
        return await asyncio.shield(machine.ended)

    async def stats(self, machine_id: str) -> MachineStats:
        machine = self._running(machine_id)
        return MachineStats(
            cpu_seconds=0.0,
            memory_bytes=machine.guest.files.size_bytes(),
            memory_limit_bytes=machine.spec.memory_mib * 1024 * 1024,
            pids=sum(1 for process in machine.guest.processes.values() if process.exit is None),
        )

    async def freeze(self, machine_id: str) -> None:
        for connection in self._running(machine_id).guest.connections:
            connection.wire.pause_reading()

    async def thaw(self, machine_id: str) -> None:
        if machine_id in self._machines:
            for connection in self._machines[machine_id].guest.connections:
                connection.wire.resume_reading()

    async def destroy(self, machine_id: str) -> None:
        await self.end(machine_id, Exit(StopCause.REQUESTED))
        self._exits.pop(machine_id, None)

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        gone = [machine_id for machine_id in self._machines if machine_id not in keep]
        for machine_id in gone:
            await self.destroy(machine_id)
        return gone

    async def end(self, machine_id: str, exit_: Exit) -> None:
        """Let a machine end by itself, as after a kill or for want of memory."""
        machine = self._machines.pop(machine_id, None)
        if machine is not None:
            self._exits[machine_id] = exit_
            await machine.guest.stop()
            machine.ended.set_result(exit_)

    def faults_of(self, machine_id: str) -> Faults:
        """What goes wrong with one machine; change it in place."""
        return self._running(machine_id).guest.faults

    def cut(self, machine_id: str) -> None:
        """Break the connections to its agent; its processes go on."""
        self._running(machine_id).guest.cut()

    @property
    def guests(self) -> Mapping[str, Guest]:
        """The insides of the machines that run, by machine id."""
        return {machine_id: machine.guest for machine_id, machine in self._machines.items()}

    def _running(self, machine_id: str) -> _Machine:
        machine = self._machines.get(machine_id)
        if machine is None:
            raise MachineError("machine_not_running", f"machine {machine_id} does not run")
        return machine

    def _address(self) -> tuple[str, int]:
        if self._server is None:
            raise MachineError("driver_failed", "the driver is not open")
        address, port = self._server.sockets[0].getsockname()[:2]
        return str(address), int(port)
