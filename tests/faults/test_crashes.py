"""kill -9 of hostd or of what it runs, at every named point: the old state or the new, never half."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.crashes import (
    OVER,
    STEADY,
    Host,
    Keeper,
    Operation,
    Scene,
    child,
    destroy,
    ending,
    frozen,
    hibernated,
    keeper,
    running,
    soon,
    spec,
)
from tests.support.fuse import HOSTD, NEWEST, UNITS
from vmm.client import HostClient
from vmm.types import Fork, MachineInfo, MachineState, StopCause

ROOT = Path(__file__).resolve().parents[2]

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


def create(scene: Scene) -> object:
    return scene.client.create_machine(spec(scene.other), deadline=soon())


def create_from_snapshot(scene: Scene) -> object:
    return scene.client.create_machine(spec(scene.other, snapshot=scene.snapshot), deadline=soon())


def pause(scene: Scene) -> object:
    return scene.client.pause_machine(scene.machine, deadline=soon())


def hibernate(scene: Scene) -> object:
    return scene.client.pause_machine(scene.machine, hibernate=True, deadline=soon())


def resume(scene: Scene) -> object:
    return scene.client.resume_machine(scene.machine, deadline=soon())


def snapshot(scene: Scene) -> object:
    return scene.client.create_snapshot(scene.other, scene.machine, deadline=soon())


def restore(scene: Scene) -> object:
    return scene.client.restore_machine(scene.machine, scene.snapshot, deadline=soon())


def fork(scene: Scene) -> object:
    return scene.client.fork_machine(scene.machine, [child(each) for each in scene.children], deadline=soon())


def delete_snapshot(scene: Scene) -> object:
    return scene.client.delete_snapshot(scene.snapshot, deadline=soon())


CASES: dict[str, Case] = {
    "create": Case(running, create, ["start.started", "boot.written"]),
    "create-from-snapshot": Case(running, create_from_snapshot, [*MAKE, "boot.written"]),
    "pause": Case(running, pause, FREEZE),
    "hibernate": Case(running, hibernate, [*FREEZE, *HIBERNATE]),
    "hibernate-frozen": Case(frozen, hibernate, HIBERNATE),
    "resume-frozen": Case(frozen, resume, ["thaw.written", "thaw.thawed"]),
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


@pytest.fixture(scope="module")
def units() -> Iterator[Keeper]:
    with keeper() as running_keeper:
        yield running_keeper


@asynccontextmanager
async def scene(home: Path, units: Keeper) -> AsyncIterator[Scene]:
    host = Host(home, units)
    try:
        await host.start()
        async with HostClient(str(host.socket_path)) as client:
            scene = Scene(host, client)
            await scene.set()
            yield scene
    finally:
        await host.stop()
        units.ask("sweep", [])


def test_there_are_enough_deaths() -> None:
    assert len(DEATHS) >= 100


def test_every_point_is_died_at() -> None:
    named = {
        label
        for path in (ROOT / "vmm" / "host").glob("*.py")
        if path.name != "crash.py"
        for label in re.findall(r'point\("([^"]+)"\)', path.read_text())
    }
    assert named == {label for case in CASES.values() for label in case.labels}


@pytest.mark.parametrize("name", CASES)
async def test_the_operation_passes_its_points(name: str, tmp_path: Path, units: Keeper) -> None:
    case = CASES[name]
    async with scene(tmp_path / "home", units) as here:
        await case.before(here)
        here.host.fuse.light("none", HOSTD)
        assert await ending(case.act(here)) is None  # type: ignore[arg-type]
        assert list(dict.fromkeys(here.host.fuse.labels())) == case.labels
        here.host.fuse.path.unlink()
        await here.check_nothing_left()


@pytest.mark.parametrize(("name", "label", "victim"), DEATHS, ids=str)
async def test_a_death_leaves_the_old_state_or_the_new(
    name: str, label: str, victim: str, tmp_path: Path, units: Keeper
) -> None:
    case = CASES[name]
    async with scene(tmp_path / "home", units) as here:
        await case.before(here)
        here.host.fuse.light(label, victim)
        acting = asyncio.create_task(ending(case.act(here)))  # type: ignore[arg-type]
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
            copy = await here.client.create_machine(spec(str(uuid.uuid4()), snapshot=taken.id), deadline=soon())
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
    await here.check_nothing_left()
