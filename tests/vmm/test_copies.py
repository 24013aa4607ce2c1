"""Snapshots, restores and forks: copies of a machine, and what happens when making one fails."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.vmm.hosts import host_in_process
from tests.vmm.test_pause import client, code_of, counting, driver, read, soon, spec, until
from vmm.client import HostClient
from vmm.drivers.fake import FakeDriver
from vmm.errors import MachineError
from vmm.guest import Command
from vmm.types import ChildSpec, ForkFailure, MachineInfo, MachineState, SnapshotState, SnapshotStep, StopCause

__all__ = ["client", "driver"]


async def content(client: HostClient, machine: MachineInfo, path: str = "/workspace/f") -> bytes:
    return await client.agent(machine.id).read_bytes(path, size_max=100, deadline=soon())


async def made_with(client: HostClient, text: bytes) -> MachineInfo:
    made = await client.create_machine(spec())
    await client.agent(made.id).write("/workspace/f", text)
    return made


def children(count: int) -> list[ChildSpec]:
    return [ChildSpec(id=str(uuid.uuid4()), hostname=f"child-{number}") for number in range(count)]


async def test_a_snapshot_is_restored_in_place_and_elsewhere(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"before")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    assert (taken.state, taken.machine, taken.parent) == (SnapshotState.READY, made.id, None)
    assert taken.size_bytes > 0
    assert taken.pause_ms is not None
    await client.agent(made.id).write("/workspace/f", b"after")
    restored = await client.restore_machine(made.id, taken.id)
    assert (restored.snapshot, restored.unit != made.unit, restored.address != made.address) == (taken.id, True, True)
    assert await content(client, restored) == b"before"
    other = await client.create_machine(spec(snapshot=taken.id))
    assert await content(client, other) == b"before"
    assert len(driver.units) == 2
    again = await client.create_snapshot(str(uuid.uuid4()), other.id)
    assert again.parent == taken.id


async def test_a_restore_that_is_asked_for_again_is_not_made_again(client: HostClient) -> None:
    made = await made_with(client, b"before")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    restores = await asyncio.gather(*(client.restore_machine(made.id, taken.id, first) for _ in range(3)))
    assert len({restored.unit for restored in restores}) == 1
    await client.agent(made.id).write("/workspace/f", b"after")
    assert (await client.restore_machine(made.id, taken.id, first)).unit == restores[0].unit
    assert await content(client, restores[0]) == b"after"
    # Nor is the snapshot needed for that any more.
    other = await client.create_snapshot(str(uuid.uuid4()), made.id)
    await client.delete_snapshot(taken.id)
    assert (await client.restore_machine(made.id, taken.id, first)).unit == restores[0].unit
    assert await code_of(client.restore_machine(made.id, taken.id, second)) == "snapshot_not_found"
    assert (await client.restore_machine(made.id, other.id, second)).unit != restores[0].unit
    # Without a name each is one of its own.
    unnamed = [(await client.restore_machine(made.id, other.id)).unit for _ in range(2)]
    assert len(set(unnamed)) == 2


@pytest.mark.parametrize("state", [MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED])
async def test_a_snapshot_leaves_the_machine_as_it_was(client: HostClient, state: MachineState) -> None:
    made = await made_with(client, b"x")
    if state is not MachineState.RUNNING:
        await client.pause_machine(made.id, hibernate=state is MachineState.HIBERNATED)
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    assert (await client.get_machine(made.id)).state is state
    other = await client.create_machine(spec(snapshot=taken.id))
    assert await content(client, other) == b"x"
    assert await client.delete_snapshot(taken.id)
    assert await content(client, made) == b"x"


async def test_the_same_id_is_the_same_snapshot(client: HostClient) -> None:
    made = await made_with(client, b"x")
    snapshot_id = str(uuid.uuid4())
    taken = await asyncio.gather(*(client.create_snapshot(snapshot_id, made.id) for _ in range(3)))
    assert taken[0] == taken[1] == taken[2] == await client.get_snapshot(snapshot_id)
    assert await client.list_snapshots() == [taken[0]]


async def test_the_steps_of_a_snapshot_are_told(client: HostClient) -> None:
    made = await made_with(client, b"x")
    snapshot_id = str(uuid.uuid4())
    told: list[tuple[SnapshotState, SnapshotStep | None]] = []

    async def follow() -> None:
        async for snapshot in client.snapshot_events():
            told.append((snapshot.state, snapshot.step))  # noqa: PERF401 - what it is extended with is read meanwhile

    following = asyncio.create_task(follow())
    await client.list_snapshots()
    await client.create_snapshot(snapshot_id, made.id)
    await until(lambda: told and told[-1][0] is SnapshotState.READY)
    following.cancel()
    steps = [step for state, step in told if state is SnapshotState.PENDING]
    assert list(dict.fromkeys(steps)) == [SnapshotStep.SAVING, SnapshotStep.HASHING, SnapshotStep.PUBLISHING]


async def test_a_snapshot_that_fails_says_why_and_may_be_tried_again(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"x")
    snapshot_id = str(uuid.uuid4())
    driver.faults_of(made.unit or "").save_error = "no_space"
    assert await code_of(client.create_snapshot(snapshot_id, made.id)) == "no_space"
    failed = await client.get_snapshot(snapshot_id)
    assert (failed.state, failed.detail is not None) == (SnapshotState.ERROR, True)
    assert await code_of(client.create_machine(spec(snapshot=snapshot_id))) == "snapshot_not_found"
    assert await content(client, made) == b"x"
    driver.faults_of(made.unit or "").save_error = None
    assert (await client.create_snapshot(snapshot_id, made.id)).state is SnapshotState.READY


async def test_a_deleted_snapshot_leaves_nothing(client: HostClient, tmp_path: Path) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    assert await client.delete_snapshot(taken.id)
    assert not await client.delete_snapshot(taken.id)
    assert await code_of(client.get_snapshot(taken.id)) == "snapshot_not_found"
    assert not [path for path in (tmp_path / "home" / "host" / "images").rglob("*") if path.is_file()]


async def test_a_snapshot_in_use_is_not_deleted(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    driver.faults.restore_delay_s = 0.3
    creating = asyncio.create_task(client.create_machine(spec(snapshot=taken.id)))
    await until(lambda: len(driver.units) == 2)
    assert await code_of(client.delete_snapshot(taken.id)) == "in_use"
    await creating
    assert await client.delete_snapshot(taken.id)


async def test_a_restore_that_fails_leaves_the_machine_as_it_was(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"before")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    await client.agent(made.id).write("/workspace/f", b"after")
    async with await counting(client, made, 100) as execution:
        lines = asyncio.create_task(read(execution))
        for fault, value in (("restore_error", "driver_failed"), ("start_error", "no_capacity")):
            setattr(driver.faults, fault, value)
            assert await code_of(client.restore_machine(made.id, taken.id)) == value
            setattr(driver.faults, fault, None)
        assert (await client.get_machine(made.id)).unit == made.unit
        assert await content(client, made) == b"after"
        assert await lines == list(range(1, 101))
    await until(lambda: len(driver.units) == 1)
    assert await code_of(client.restore_machine(made.id, str(uuid.uuid4()))) == "snapshot_not_found"


async def test_a_machine_ends_while_it_is_restored(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    driver.faults.restore_delay_s = 30
    restoring = asyncio.create_task(code_of(client.restore_machine(made.id, taken.id)))
    await until(lambda: len(driver.units) == 2)
    assert await client.destroy_machine(made.id, StopCause.REQUESTED)
    assert await restoring == "machine_not_running"
    await until(lambda: not driver.units)


async def test_a_process_that_is_not_in_the_snapshot_is_unknown_after_it(client: HostClient) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    async with await counting(client, made, 100_000) as execution:
        lines = asyncio.create_task(read(execution))
        await client.restore_machine(made.id, taken.id)
        assert await code_of(lines) == "no_answer"


async def test_a_snapshot_of_another_size_is_refused(client: HostClient) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    assert await code_of(client.create_machine(spec(snapshot=taken.id, memory_mib=2048))) == "snapshot_incompatible"
    larger = await client.create_machine(spec(memory_mib=2048))
    assert await code_of(client.restore_machine(larger.id, taken.id)) == "snapshot_incompatible"
    assert await code_of(client.create_machine(spec(snapshot=str(uuid.uuid4())))) == "snapshot_not_found"


def images_of(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "home" / "host" / "images").iterdir()} - {"chunks"}


async def parts_of(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def exported(client: HostClient, snapshot_id: str) -> bytes:
    return b"".join([part async for part in client.export_snapshot(snapshot_id)])


async def test_a_snapshot_leaves_the_host_as_a_file_and_comes_back(client: HostClient) -> None:
    made = await made_with(client, b"x")
    # More than the credit of a stream, and nothing that could be compressed.
    await client.agent(made.id).write("/workspace/big", os.urandom(5_000_000))
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    data = await exported(client, taken.id)
    assert len(data) > 5_000_000
    copy = await client.import_snapshot(str(uuid.uuid4()), parts_of(data))
    assert (copy.state, copy.size_bytes, copy.memory_mib) == (SnapshotState.READY, taken.size_bytes, taken.memory_mib)
    assert await client.delete_snapshot(taken.id)
    other = await client.create_machine(spec(snapshot=copy.id))
    assert await content(client, other) == b"x"


async def test_a_file_that_is_no_snapshot_is_refused(client: HostClient, tmp_path: Path) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    data = await exported(client, taken.id)
    for wrong in (data[:-10], b"not a snapshot" * 100_000, b"", data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        assert await code_of(client.import_snapshot(str(uuid.uuid4()), parts_of(wrong))) == "snapshot_corrupt"
    assert await code_of(client.import_snapshot(taken.id, parts_of(data))) == "in_use"
    assert await code_of(exported(client, str(uuid.uuid4()))) == "snapshot_not_found"
    assert [snapshot.id for snapshot in await client.list_snapshots()] == [taken.id]
    assert images_of(tmp_path) == {taken.id}


async def test_a_transfer_that_is_left_leaves_nothing(client: HostClient, tmp_path: Path) -> None:
    made = await made_with(client, b"x")
    await client.agent(made.id).write("/workspace/big", os.urandom(5_000_000))
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    leaving = client.export_snapshot(taken.id)
    assert await anext(leaving)
    await leaving.aclose()  # type: ignore[attr-defined]

    async def breaking() -> AsyncIterator[bytes]:
        yield b"half of a snapshot"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await client.import_snapshot(str(uuid.uuid4()), breaking())
    await until(lambda: images_of(tmp_path) == {taken.id})
    async with asyncio.timeout(60):
        while await code_of_deletion(client, taken.id) == "in_use":
            await asyncio.sleep(0.01)


async def code_of_deletion(client: HostClient, snapshot_id: str) -> str | None:
    try:
        await client.delete_snapshot(snapshot_id)
    except MachineError as error:
        return error.code
    return None


async def test_a_damaged_image_is_refused_and_the_machine_goes_on(client: HostClient, tmp_path: Path) -> None:
    made = await made_with(client, b"x")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    memory = tmp_path / "home" / "host" / "images" / taken.id / "memory"
    memory.write_bytes(memory.read_bytes()[:-1] + b"!")
    assert await code_of(client.restore_machine(made.id, taken.id)) == "snapshot_corrupt"
    assert await code_of(client.create_machine(spec(snapshot=taken.id))) == "snapshot_corrupt"
    assert await content(client, made) == b"x"


async def test_images_take_no_more_of_the_disk_than_they_may(tmp_path: Path) -> None:
    sockets = tmp_path / "q.sock"
    async with (
        host_in_process(tmp_path / "home", sockets, FakeDriver(), images_mib_max=1),
        HostClient(str(sockets)) as client,
    ):
        made = await client.create_machine(spec())
        await client.agent(made.id).write("/workspace/big", os.urandom(2_000_000))
        assert await code_of(client.create_snapshot(str(uuid.uuid4()), made.id)) == "no_space"
        assert await code_of(client.pause_machine(made.id, hibernate=True)) == "no_space"
        assert (await client.get_machine(made.id)).state is MachineState.FROZEN
        assert len(await client.agent(made.id).read_bytes("/workspace/big", size_max=3_000_000)) == 2_000_000


@pytest.mark.parametrize("state", [MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED])
async def test_a_fork_runs_on_from_the_same_instant(client: HostClient, state: MachineState) -> None:
    made = await made_with(client, b"x")
    await client.agent(made.id).exec("count", Command(argv=["count", "0.005"], background=True))
    if state is not MachineState.RUNNING:
        await client.pause_machine(made.id, hibernate=state is MachineState.HIBERNATED)
    wanted = children(5)
    fork = await client.fork_machine(made.id, wanted, deadline=soon())
    assert [child.id for child in fork.machines] == [child.id for child in wanted]
    machines = [child for child in fork.machines if isinstance(child, MachineInfo)]
    assert len({child.address for child in machines} | {made.address}) == 6
    for child in machines:
        assert await content(client, child, "/etc/hostname") == f"child-{machines.index(child)}\n".encode()
        assert (await client.agent(child.id).process("count")).state == "running"
    assert (await client.get_machine(made.id)).state is state
    assert len({await content(client, child, "/etc/machine-id") for child in machines}) == 5
    again = await client.fork_machine(made.id, wanted, deadline=soon())
    assert [child.unit for child in again.machines if isinstance(child, MachineInfo)] == [m.unit for m in machines]


async def test_children_that_cannot_be_made_are_told_of_one_by_one(tmp_path: Path) -> None:
    sockets = tmp_path / "f.sock"
    driver = FakeDriver(units_max=4)
    async with host_in_process(tmp_path / "home", sockets, driver), HostClient(str(sockets)) as client:
        made = await client.create_machine(spec())
        fork = await client.fork_machine(made.id, children(5), deadline=soon())
        failed = [child for child in fork.machines if isinstance(child, ForkFailure)]
        assert [child.code for child in failed] == ["no_capacity"] * 2
        assert sum(isinstance(child, MachineInfo) for child in fork.machines) == 3
        assert (await client.get_machine(made.id)).state is MachineState.RUNNING


async def test_a_fork_that_cannot_be_saved_makes_no_children(client: HostClient, driver: FakeDriver) -> None:
    made = await made_with(client, b"x")
    driver.faults_of(made.unit or "").save_error = "snapshot_failed"
    assert await code_of(client.fork_machine(made.id, children(2))) == "snapshot_failed"
    assert len(driver.units) == 1
    assert await content(client, made) == b"x"
