"""Deaths at named points: the host to break, the operations that pass the points, and what has to hold afterwards."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tests.support.fuse import HOSTD, NEWEST, UNITS, Fuse
from vmm.client import HostClient
from vmm.errors import LinkError, MachineError, VmmError
from vmm.guest import Command
from vmm.types import ChildSpec, Fork, MachineInfo, MachineSpec, MachineState, StopCause

STEADY = (MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED)
OVER = (MachineState.STOPPED, MachineState.FAILED)
#: Memory of the machines that a host with a pool keeps ready; what the other cases make is of another size.
POOLED_MIB = 192


class Host(Protocol):
    """A hostd whose units outlive it. counter: a command that prints 1, 2, 3, …"""

    home: Path
    fuse: Fuse
    counter: Sequence[str]

    async def start(self) -> None:
        """Start it, for the first time or again."""
        ...

    async def has_died(self) -> None:
        """Wait for its death and bury it."""
        ...

    def spec(self, machine_id: str, **fields: Any) -> MachineSpec:
        """A small machine."""
        ...

    def units(self) -> set[str]:
        """All that the driver has, whoever owns it."""
        ...

    def alive(self) -> set[str]:
        """Those of them in which something executes, or would if it were not frozen."""
        ...


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
        await self.client.create_machine(self.host.spec(self.machine), deadline=soon())
        agent = self.client.agent(self.machine)
        await agent.exec("count", Command(argv=self.host.counter, background=True), deadline=soon())
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

    async def check_owner(self, machine_id: str) -> None:
        """It knows whose it is: the operation gave it a variable."""
        execution = await self.client.agent(machine_id).exec("env", Command(argv=("env",)), deadline=soon())
        printed = b"".join([chunk.data async for chunk in execution])
        assert f"OWNER={machine_id}".encode() in printed.split(b"\n")

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
            alive = self.host.alive()
            machines = await self.client.list_machines(deadline=soon())
            moving = [
                machine
                for machine in machines
                if machine.state not in OVER and (machine.state not in STEADY or machine.unit not in {None, *alive})
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
            images = {path.name for path in (self.host.home / "host" / "images").glob("*")} - {"chunks"}
            # A hibernated machine may share its image with the snapshot that was taken of it.
            stock = sum(pool.ready + pool.shells for pool in await self.client.pool_status(deadline=soon()))
            others = self.host.units() - units
            is_owned = units <= self.host.units() and len(others) == stock
            if is_owned and max(hibernated, ready) <= len(images) <= hibernated + ready:
                break
            assert time.monotonic() < deadline, (others, stock, units, images, hibernated, ready)
            await asyncio.sleep(0.02)
        drafts = [path for path in (self.host.home / "host").rglob("*") if path.suffix in (".new", ".draft")]
        assert drafts == []
        for spare in (self.host.home / "host").rglob("*.spare"):
            assert spare.with_suffix(".json").exists(), "the spare file of a record that is gone"


def child(machine_id: str) -> ChildSpec:
    return ChildSpec(id=machine_id, hostname="child")


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def ending(work: Awaitable[object]) -> VmmError | None:
    """The error that something ended with, if it did."""
    try:
        await work
    except (MachineError, LinkError) as error:
        return error
    return None


Operation = Callable[[Scene], Any]


async def _paused(scene: Scene, *, hibernate: bool) -> None:
    await scene.client.pause_machine(scene.machine, hibernate=hibernate, deadline=soon())


async def frozen(scene: Scene) -> None:
    await _paused(scene, hibernate=False)


async def hibernated(scene: Scene) -> None:
    await _paused(scene, hibernate=True)


async def stocked(scene: Scene) -> None:
    """With a unit in the pool."""
    deadline = soon()
    while not any(pool.ready for pool in await scene.client.pool_status(deadline=deadline)):
        assert time.monotonic() < deadline, "the pool stays empty"
        await asyncio.sleep(0.02)


async def running(_: Scene) -> None:
    """As it is."""


def destroy(scene: Scene) -> Awaitable[bool]:
    return scene.client.destroy_machine(scene.machine, StopCause.REQUESTED, deadline=soon())


FREEZE = ["freeze.written", "freeze.frozen"]
PUBLISH = ["image.drafted", "image.published"]
HIBERNATE = ["hibernate.written", *PUBLISH, "hibernate.saved", "hibernate.committed"]
MAKE = ["restore.prepared", "restore.restored"]
SNAPSHOT = ["snapshot.written", "save.held", "save.saved", *PUBLISH, "snapshot.ready"]
RESTORE = [*MAKE, "restore.complete", "restore.written"]
WAKE = ["wake.written", *MAKE, "wake.restored", "wake.committed"]


@dataclass(frozen=True)
class Case:
    """before: brings the machine to where the operation starts.  labels: the points it passes, in order."""

    before: Operation
    act: Operation
    labels: list[str]


def create(scene: Scene) -> Awaitable[object]:
    return scene.client.create_machine(scene.host.spec(scene.other), deadline=soon())


def claim(scene: Scene) -> Awaitable[object]:
    spec = scene.host.spec(scene.other, env={"OWNER": scene.other})
    return scene.client.create_machine(replace(spec, memory_mib=POOLED_MIB), deadline=soon())


def create_from_snapshot(scene: Scene) -> Awaitable[object]:
    return scene.client.create_machine(scene.host.spec(scene.other, snapshot=scene.snapshot), deadline=soon())


def pause(scene: Scene) -> Awaitable[object]:
    return scene.client.pause_machine(scene.machine, deadline=soon())


def hibernate(scene: Scene) -> Awaitable[object]:
    return scene.client.pause_machine(scene.machine, hibernate=True, deadline=soon())


def resume(scene: Scene) -> Awaitable[object]:
    return scene.client.resume_machine(scene.machine, deadline=soon())


def snapshot(scene: Scene) -> Awaitable[object]:
    return scene.client.create_snapshot(scene.other, scene.machine, deadline=soon())


def restore(scene: Scene) -> Awaitable[object]:
    return scene.client.restore_machine(scene.machine, scene.snapshot, deadline=soon())


def fork(scene: Scene) -> Awaitable[object]:
    return scene.client.fork_machine(scene.machine, [child(each) for each in scene.children], deadline=soon())


def delete_snapshot(scene: Scene) -> Awaitable[object]:
    return scene.client.delete_snapshot(scene.snapshot, deadline=soon())


CASES: dict[str, Case] = {
    "create": Case(running, create, ["start.started", "boot.written"]),
    "claim": Case(stocked, claim, ["claim.thawed", "boot.written", "claim.named"]),
    "create-from-snapshot": Case(running, create_from_snapshot, [*MAKE, "boot.written"]),
    "pause": Case(running, pause, FREEZE),
    "hibernate": Case(running, hibernate, [*FREEZE, *HIBERNATE]),
    "hibernate-frozen": Case(frozen, hibernate, HIBERNATE),
    "resume-frozen": Case(frozen, resume, ["thaw.thawed", "thaw.written"]),
    "resume-hibernated": Case(hibernated, resume, WAKE),
    "use-hibernated": Case(hibernated, Scene.content, WAKE),
    "snapshot": Case(running, snapshot, SNAPSHOT),
    "snapshot-frozen": Case(frozen, snapshot, SNAPSHOT),
    "snapshot-hibernated": Case(hibernated, snapshot, ["snapshot.written", "snapshot.ready"]),
    "restore": Case(running, restore, RESTORE),
    "restore-frozen": Case(frozen, restore, RESTORE),
    "restore-hibernated": Case(hibernated, restore, RESTORE),
    "fork": Case(running, fork, ["save.held", "save.saved", *PUBLISH, *MAKE, "boot.written"]),
    "fork-hibernated": Case(hibernated, fork, [*MAKE, "boot.written"]),
    "destroy": Case(running, destroy, ["end.written", "end.freed"]),
    "destroy-hibernated": Case(hibernated, destroy, ["end.written", "end.freed"]),
    "delete-snapshot": Case(running, delete_snapshot, ["snapshot.forgotten"]),
}

#: Operations that make a unit besides the one there is.
MAKING = ("create-from-snapshot", "restore", "restore-frozen", "restore-hibernated", "fork", "fork-hibernated")

DEATHS = [
    (name, label, victim)
    for name, case in CASES.items()
    for label in case.labels
    for victim in (HOSTD, UNITS, *([NEWEST] if name in MAKING else []))
]


async def die(here: Scene, name: str, label: str, victim: str) -> None:
    """Do an operation that a death at a label cuts short, and check what is left of it."""
    case = CASES[name]
    await case.before(here)
    here.host.fuse.light(label, victim)
    acting = asyncio.create_task(ending(case.act(here)))
    if victim == HOSTD:
        await here.host.has_died()
        acting.cancel()
        await asyncio.wait([acting])
        await here.host.start()
    else:
        await acting
    await here.settled()
    machine = await here.info()
    if name.startswith("destroy"):
        await check_gone_or_whole(here, machine, victim)
    elif machine is not None and machine.state in OVER:
        assert may_end(name, label, victim), machine
        assert machine.cause is StopCause.KILLED
    else:
        await check_whole(here, name, machine)
    await check_others(here, victim)
    await here.check_nothing_left()
    if victim == HOSTD:
        await check_again(here, name, case)


async def check_whole(here: Scene, name: str, machine: MachineInfo | None) -> None:
    """The machine is in a state that it can be used from, and what is in it is of one moment."""
    assert machine is not None
    assert machine.state in STEADY
    content = await here.content()
    assert content in (("new", "old") if name.startswith("restore") else ("new",))
    await here.check_counter()


async def check_gone_or_whole(here: Scene, machine: MachineInfo | None, victim: str) -> None:
    assert machine is not None
    if machine.state in OVER:
        assert machine.cause in (StopCause.REQUESTED, StopCause.KILLED)
    else:
        assert victim == HOSTD
        await here.check_counter()


def may_end(name: str, label: str, victim: str) -> bool:
    """Whether the death took the only copy of the machine with it."""
    if victim == HOSTD:
        return False
    if name.startswith("hibernate"):
        return label not in (*PUBLISH, "hibernate.saved", "hibernate.committed")
    if name in ("resume-hibernated", "use-hibernated", "restore-hibernated"):
        return label in ("wake.restored", "wake.committed", "restore.complete", "restore.written")
    if victim == NEWEST and name.startswith("restore"):
        return label in ("restore.complete", "restore.written")
    return name not in ("snapshot-hibernated", "fork-hibernated", "destroy-hibernated")


async def check_others(here: Scene, victim: str) -> None:
    """What the operation makes is there whole, or not at all."""
    for machine_id in (here.other, *here.children):
        machine = await here.info(machine_id)
        if machine is not None and machine.state not in OVER:
            assert machine.state is MachineState.RUNNING
            await here.client.agent(machine_id).stat("/", deadline=soon())
        elif machine is not None:
            assert victim != HOSTD
    for taken in await here.client.list_snapshots(deadline=soon()):
        assert taken.state in ("ready", "error")
        if taken.state == "ready" and taken.id != here.snapshot:
            copy = await here.client.create_machine(
                here.host.spec(str(uuid.uuid4()), snapshot=taken.id), deadline=soon()
            )
            assert await here.content(copy.id) == "new"
            await here.check_counter(copy.id)
            await here.client.destroy_machine(copy.id, StopCause.REQUESTED, deadline=soon())


async def check_again(here: Scene, name: str, case: Case) -> None:
    """Whoever asked asks again, with the same ids, and gets what was asked for."""
    machine = await here.info()
    if name.startswith("destroy") and machine is not None and machine.state in OVER:
        return
    result = await case.act(here)
    if isinstance(result, Fork):
        assert [each.id for each in result.machines] == list(here.children)
        assert all(isinstance(each, MachineInfo) for each in result.machines)
    if name == "claim":
        await here.check_owner(here.other)
    await here.check_nothing_left()
