"""hostd with fake units that outlive it, killed at named points: what the crash tests share."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import orjson

from tests.support.fuse import Fuse
from vmm.client import HostClient
from vmm.drivers.fake.keeper import KeptDriver
from vmm.errors import LinkError, MachineError, VmmError
from vmm.guest import Command
from vmm.host import crash
from vmm.host.config import HostConfig
from vmm.host.server import serve
from vmm.types import ChildSpec, MachineInfo, MachineSpec, MachineState, StopCause

STEADY = (MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED)


def _fork_server() -> ForkServerContext:
    """hostd starts in milliseconds when its modules are there already; what is killed is a process all the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Keeper:
    """The process that fake units live in."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sg-"))
        self.socket_path = self.directory / "keeper.sock"
        command = [sys.executable, "-m", "vmm.drivers.fake.keeper", str(self.socket_path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def ask(self, call: str, *arguments: Any) -> Any:
        """One call, without an event loop: hostd's stands still while its units are killed."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket_path))
            connection.sendall(orjson.dumps({"n": 1, "call": call, "arguments": arguments}) + b"\n")
            return orjson.loads(connection.makefile("rb").readline())["result"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self.directory)


def _run(home: str, socket_path: str, keeper_socket: str, ready: Any) -> None:
    """hostd, in a process of its own."""
    keeper = Keeper.__new__(Keeper)
    keeper.socket_path = Path(keeper_socket)
    crash.arm(Fuse(Path(home) / "fuse", lambda count: keeper.ask("end_newest", count)).on_point)
    config = HostConfig(
        home=Path(home),
        socket_path=Path(socket_path),
        memory_reserve_mib=0,
        disk_reserve_mib=0,
        hibernate_below_mib=0,
    )
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    asyncio.run(serve(config, KeptDriver(Path(keeper_socket)), ready=ready.set))


@dataclass
class Host:
    """hostd over a keeper. `kill` is kill -9."""

    home: Path
    keeper: Keeper
    process: BaseProcess | None = None
    fuse: Fuse = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True)
        self.socket_path = self.keeper.directory / f"{uuid.uuid4().hex[:8]}.sock"
        self.fuse = Fuse(self.home / "fuse", lambda _: None)

    async def start(self) -> None:
        context = _fork_server()
        ready = context.Event()
        arguments = (str(self.home), str(self.socket_path), str(self.keeper.socket_path), ready)
        self.process = context.Process(target=_run, args=arguments, daemon=True)
        self.process.start()
        assert await asyncio.to_thread(ready.wait, 20), "hostd did not start"

    async def has_died(self) -> None:
        """Wait for its death and bury it."""
        assert self.process is not None
        await asyncio.to_thread(self.process.join, 20)
        assert self.process.exitcode == -9
        self.process = None

    async def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.join, 20)
        self.socket_path.unlink(missing_ok=True)

    def units(self) -> set[str]:
        """All that the driver runs, whoever owns it."""
        return set(self.keeper.ask("units"))

    def images(self) -> set[str]:
        """All that lies in the images' directory."""
        return {path.name for path in (self.home / "host" / "images").glob("*")}


@contextlib.contextmanager
def keeper() -> Iterator[Keeper]:
    """For the duration of a test."""
    process = Keeper()
    try:
        yield process
    finally:
        process.stop()


@dataclass
class Scene:
    """A machine that counts, a snapshot of it from before a file changed, and a host to break."""

    host: Host
    client: HostClient
    machine: str = field(default_factory=lambda: str(uuid.uuid4()))
    snapshot: str = field(default_factory=lambda: str(uuid.uuid4()))
    other: str = field(default_factory=lambda: str(uuid.uuid4()))
    children: tuple[str, ...] = field(default_factory=lambda: tuple(str(uuid.uuid4()) for _ in range(3)))

    async def set(self) -> None:
        """Everything up to the operation."""
        await self.client.create_machine(spec(self.machine), deadline=soon())
        agent = self.client.agent(self.machine)
        await agent.exec("count", Command(argv=["count", "0.002"], background=True), deadline=soon())
        await agent.write("/workspace/f", b"old", deadline=soon())
        await self.client.create_snapshot(self.snapshot, self.machine, deadline=soon())
        await agent.write("/workspace/f", b"new", deadline=soon())

    async def info(self, machine_id: str | None = None) -> MachineInfo | None:
        """A machine now, if it is known."""
        try:
            return await self.client.get_machine(machine_id or self.machine, deadline=soon())
        except MachineError as error:
            if error.code != "machine_not_found":
                raise
            return None

    async def content(self, machine_id: str | None = None) -> str:
        """What the file says; wakes the machine."""
        agent = self.client.agent(machine_id or self.machine)
        return (await agent.read_bytes("/workspace/f", size_max=100, deadline=soon())).decode()

    async def check_counter(self, machine_id: str | None = None) -> None:
        """It counts on, and has left nothing out and said nothing twice."""
        agent = self.client.agent(machine_id or self.machine)
        before = await self._counted(agent)
        deadline = soon()
        while (now := await self._counted(agent)) <= before:
            assert time.monotonic() < deadline, "the counter stands still"
            await asyncio.sleep(0.01)
        assert now > before

    async def _counted(self, agent: Any) -> int:
        execution = await agent.attach("count", offsets={1: 0, 2: 0}, follow=False, deadline=soon())
        data = b"".join([chunk.data async for chunk in execution])
        numbers = [int(line) for line in data.split(b"\n")[:-1]]
        assert numbers == list(range(1, len(numbers) + 1))
        return len(numbers)

    async def settled(self) -> list[MachineInfo]:
        """All machines, once none of them is on its way anywhere and no death is unnoticed."""
        deadline = soon(30)
        while True:
            units = self.host.units()
            machines = await self.client.list_machines(deadline=soon())
            moving = [
                machine
                for machine in machines
                if machine.state not in OVER and (machine.state not in STEADY or machine.unit not in {None, *units})
            ]
            if not moving:
                return machines
            assert time.monotonic() < deadline, moving
            await asyncio.sleep(0.02)

    async def check_nothing_left(self) -> None:
        """Every unit and every image has an owner, within 30 seconds."""
        deadline = soon(30)
        while True:
            machines = await self.settled()
            live = [machine for machine in machines if machine.state not in OVER]
            units = {machine.unit for machine in live if machine.unit is not None}
            snapshots = await self.client.list_snapshots(deadline=soon())
            hibernated = sum(machine.state is MachineState.HIBERNATED for machine in live)
            ready = sum(snapshot.state == "ready" for snapshot in snapshots)
            images = self.host.images()
            # A hibernated machine may share its image with the snapshot that was taken of it.
            if self.host.units() == units and max(hibernated, ready) <= len(images) <= hibernated + ready:
                break
            assert time.monotonic() < deadline, (self.host.units(), units, images, hibernated, ready)
            await asyncio.sleep(0.02)
        drafts = [path for path in (self.host.home / "host").rglob("*") if path.suffix in (".new", ".draft")]
        assert drafts == []


OVER = (MachineState.STOPPED, MachineState.FAILED)


def spec(machine_id: str, **fields: Any) -> MachineSpec:
    return MachineSpec(id=machine_id, template="default", hostname="m", memory_mib=128, **fields)


def child(machine_id: str) -> ChildSpec:
    return ChildSpec(id=machine_id, hostname="child")


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


async def ending(work: Awaitable[object]) -> VmmError | None:
    """The error that something ended with, if it did."""
    try:
        await work
    except (MachineError, LinkError) as error:
        return error
    return None


Operation = Callable[[Scene], Awaitable[object]]


async def _paused(scene: Scene, *, hibernate: bool) -> None:
    await scene.client.pause_machine(scene.machine, hibernate=hibernate, deadline=soon())


async def frozen(scene: Scene) -> None:
    await _paused(scene, hibernate=False)


async def hibernated(scene: Scene) -> None:
    await _paused(scene, hibernate=True)


async def running(_: Scene) -> None:
    """As it is."""


def destroy(scene: Scene) -> Awaitable[bool]:
    return scene.client.destroy_machine(scene.machine, StopCause.REQUESTED, deadline=soon())
