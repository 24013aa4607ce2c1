"""Snapshots: taking, going back, starting from, deleting, and what is left when somebody dies."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from gateway.commands import (
    CreateSandbox,
    CreateSnapshot,
    DeleteSnapshot,
    DestroySandbox,
    Exec,
    FollowSnapshot,
    GetSandbox,
    GetSnapshot,
    ListSandboxes,
    ListSnapshots,
    PauseSandbox,
    ReadFile,
    RestoreSandbox,
    SetEnv,
    WriteFile,
)
from gateway.engine import Engine
from gateway.engine.watcher import HostWatcher
from gateway.errors import GatewayError
from gateway.reconciler import Pace, Reconciler
from gateway.resources import Principal, Sandbox, SandboxState, Snapshot, SnapshotState
from gateway.settings import Settings
from gateway.store import snapshots
from vmm.drivers.fake import FakeDriver, Faults

PATH = "/workspace/note"
AT_ONCE = Pace(orphan_s=0.0)


def new_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
async def sandbox(engine: Engine, principal: Principal) -> Sandbox:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id(), env={"A": "1"}))
    await write(engine, principal, made, b"before")
    return made


async def write(engine: Engine, principal: Principal, sandbox: Sandbox, content: bytes) -> None:
    await engine.write_file(principal, WriteFile(sandbox.id, PATH, content))


async def read(engine: Engine, principal: Principal, sandbox: Sandbox) -> bytes:
    _, content = await engine.read_file(principal, ReadFile(sandbox.id, PATH))
    return b"".join([part async for part in content])


async def take(engine: Engine, principal: Principal, sandbox: Sandbox, label: str | None = None) -> Snapshot:
    return await engine.create_snapshot(principal, CreateSnapshot(sandbox.id, new_id(), label=label, is_awaited=True))


async def faults_of(engine: Engine, driver: FakeDriver, sandbox: Sandbox) -> Faults:
    machine = await engine.context.host.get_machine(sandbox.id)
    assert machine.unit is not None
    return driver.faults_of(machine.unit)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.01)


async def test_a_snapshot_is_taken_listed_and_deleted(
    engine: Engine, principal: Principal, stranger: Principal, sandbox: Sandbox
) -> None:
    taken = await take(engine, principal, sandbox, "first")
    assert (taken.state, taken.label, taken.progress) == (SnapshotState.READY, "first", 1.0)
    assert None not in {taken.size_bytes, taken.pause_ms, taken.ready_at}
    page = await engine.list_snapshots(principal, ListSnapshots(sandbox.id))
    assert [item.id for item in page.items] == [taken.id]
    assert (await engine.list_snapshots(principal, ListSnapshots())).total == 1
    assert (await engine.list_snapshots(stranger, ListSnapshots())).total == 0
    with pytest.raises(GatewayError, match="snapshot_not_found"):
        await engine.get_snapshot(stranger, GetSnapshot(taken.id))
    with pytest.raises(GatewayError, match="snapshot_not_found"):
        await engine.get_snapshot(principal, GetSnapshot(taken.id, new_id()))
    with pytest.raises(GatewayError, match="snapshot_not_found"):
        await engine.delete_snapshot(stranger, DeleteSnapshot(taken.id))
    await engine.delete_snapshot(principal, DeleteSnapshot(taken.id, sandbox.id))
    with pytest.raises(GatewayError, match="snapshot_not_found"):
        await engine.get_snapshot(principal, GetSnapshot(taken.id))
    assert await engine.context.host.list_snapshots() == []


async def test_the_same_command_takes_one_snapshot(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    command = CreateSnapshot(sandbox.id, new_id(), is_awaited=True)
    first, second = await asyncio.gather(
        engine.create_snapshot(principal, command), engine.create_snapshot(principal, command)
    )
    assert first.id == second.id == command.effect_id
    assert len(await engine.context.host.list_snapshots()) == 1


async def test_going_back_undoes_what_was_done_since(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    taken = await take(engine, principal, sandbox)
    await write(engine, principal, sandbox, b"after")
    await engine.set_env(principal, SetEnv(sandbox.id, {"LATER": "kept"}))
    back = await engine.restore_sandbox(principal, RestoreSandbox(sandbox.id, taken.id, new_id()))
    assert (back.state, back.snapshot_id) == (SandboxState.RUNNING, taken.id)
    assert await read(engine, principal, sandbox) == b"before"
    # Variables belong to the sandbox, not to its memory.
    result = await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["env"]))
    assert b"LATER=kept" in result.stdout
    assert (await take(engine, principal, back)).parent_id == taken.id


async def test_the_same_command_takes_it_back_once(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    taken = await take(engine, principal, sandbox)
    command = RestoreSandbox(sandbox.id, taken.id, new_id())
    await engine.restore_sandbox(principal, command)
    await write(engine, principal, sandbox, b"after")
    assert (await engine.restore_sandbox(principal, command)).state is SandboxState.RUNNING
    assert await read(engine, principal, sandbox) == b"after"
    await engine.restore_sandbox(principal, replace(command, effect_id=new_id()))
    assert await read(engine, principal, sandbox) == b"before"


async def test_a_restore_whose_worker_died_is_not_made_again(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    taken = await take(engine, principal, sandbox)
    command = RestoreSandbox(sandbox.id, taken.id, new_id())
    await engine.set_env(principal, SetEnv(sandbox.id, {"LATER": "kept"}))
    # The worker asks the host, and dies before it has noted anything.
    await engine.context.host.restore_machine(sandbox.id, taken.id, command.effect_id)
    await write(engine, principal, sandbox, b"after")
    back = await engine.restore_sandbox(principal, command)
    assert (back.state, back.snapshot_id) == (SandboxState.RUNNING, taken.id)
    assert await read(engine, principal, sandbox) == b"after"
    result = await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["env"]))
    assert b"LATER=kept" in result.stdout


async def test_a_paused_sandbox_can_be_saved_and_restored(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id, hibernate=True))
    taken = await take(engine, principal, sandbox)
    back = await engine.restore_sandbox(principal, RestoreSandbox(sandbox.id, taken.id, new_id()))
    assert back.state is SandboxState.RUNNING
    assert await read(engine, principal, sandbox) == b"before"


async def test_a_snapshot_outlives_its_sandbox(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    taken = await take(engine, principal, sandbox)
    await engine.destroy_sandbox(principal, DestroySandbox(sandbox.id))
    made = await engine.create_sandbox(principal, CreateSandbox(new_id(), snapshot_id=taken.id, env={"B": "2"}))
    assert (made.snapshot_id, made.parent_id, made.image_id) == (taken.id, sandbox.id, taken.id)
    assert made.env == {"A": "1", "B": "2"}
    assert await read(engine, principal, made) == b"before"
    with pytest.raises(GatewayError, match="memory_mb: must be 1024"):
        await engine.create_sandbox(principal, CreateSandbox(new_id(), snapshot_id=taken.id, memory_mib=512))


async def test_a_sandbox_of_another_size_cannot_take_it(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    taken = await take(engine, principal, sandbox)
    other = await engine.create_sandbox(principal, CreateSandbox(new_id(), memory_mib=256))
    with pytest.raises(GatewayError, match="snapshot_incompatible"):
        await engine.restore_sandbox(principal, RestoreSandbox(other.id, taken.id, new_id()))


async def test_progress_can_be_followed(
    engine: Engine, principal: Principal, sandbox: Sandbox, driver: FakeDriver
) -> None:
    watcher = asyncio.create_task(HostWatcher(engine).run())
    (await faults_of(engine, driver, sandbox)).save_delay_s = 0.2
    command = CreateSnapshot(sandbox.id, new_id())
    creating = asyncio.create_task(engine.create_snapshot(principal, command))
    await until(
        partial(engine.context.database.lookup, lambda connection: snapshots.get(connection, command.effect_id))
    )
    states = [
        (item.state, item.progress)
        async for item in await engine.follow_snapshot(principal, FollowSnapshot(command.effect_id))
    ]
    assert states[0][0] is SnapshotState.PENDING
    assert states[-1] == (SnapshotState.READY, 1.0)
    assert [progress for _, progress in states] == sorted(progress for _, progress in states)
    # The answer came once the instant was caught, ready or not.
    assert (await creating).id == command.effect_id
    watcher.cancel()
    await asyncio.wait([watcher])


async def test_one_that_fails_says_why_and_leaves_the_sandbox(
    engine: Engine, principal: Principal, sandbox: Sandbox, driver: FakeDriver
) -> None:
    faults = await faults_of(engine, driver, sandbox)
    faults.save_error = "no_space"
    command = CreateSnapshot(sandbox.id, new_id(), is_awaited=True)
    with pytest.raises(GatewayError, match="disk_full"):
        await engine.create_snapshot(principal, command)
    failed = await engine.get_snapshot(principal, GetSnapshot(command.effect_id))
    assert (failed.state, failed.error_code) == (SnapshotState.ERROR, "disk_full")
    with pytest.raises(GatewayError, match="snapshot_not_ready"):
        await engine.restore_sandbox(principal, RestoreSandbox(sandbox.id, command.effect_id, new_id()))
    assert await read(engine, principal, sandbox) == b"before"
    faults.save_error = None
    assert (await engine.create_snapshot(principal, command)).state is SnapshotState.READY


async def test_limits_of_number_and_size(
    engine: Engine, principal: Principal, sandbox: Sandbox, settings: Settings
) -> None:
    small = Engine(replace(engine.context, settings=replace(settings, snapshot_bytes_max=1)))
    with pytest.raises(GatewayError, match="snapshot_too_large"):
        await take(small, principal, sandbox)
    assert await engine.context.host.list_snapshots() == []
    few = Engine(replace(engine.context, settings=replace(settings, snapshots_per_workspace=1)))
    await take(few, principal, sandbox)
    with pytest.raises(GatewayError, match="quota_exceeded"):
        await take(few, principal, sandbox)


async def put_pending(engine: Engine, sandbox: Sandbox) -> Snapshot:
    """A row whose taker died before it asked the host, long ago."""
    taken = Snapshot(
        new_id(), sandbox.workspace_id, sandbox.id, None, None, SnapshotState.PENDING, None, 0.0,
        sandbox.template, sandbox.base_template, sandbox.cpu_count, sandbox.memory_mib, sandbox.disk_mib, {},
        None, None, None, 1.0, None, None, None,
    )  # fmt: skip
    await engine.context.database.write(partial(snapshots.insert, snapshot=taken))
    return taken


async def test_the_reconciler_ends_what_nobody_takes(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    pending = await put_pending(engine, sandbox)
    with pytest.raises(GatewayError, match="snapshot_not_ready"):
        await engine.delete_snapshot(principal, DeleteSnapshot(pending.id))
    await Reconciler(engine, AT_ONCE).reconcile()
    failed = await engine.get_snapshot(principal, GetSnapshot(pending.id))
    assert (failed.state, failed.error_code) == (SnapshotState.ERROR, "snapshot_failed")


async def test_the_reconciler_finishes_what_the_host_took(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    pending = await put_pending(engine, sandbox)
    await engine.context.host.create_snapshot(pending.id, sandbox.id)
    await Reconciler(engine, AT_ONCE).reconcile()
    assert (await engine.get_snapshot(principal, GetSnapshot(pending.id))).state is SnapshotState.READY


async def test_the_reconciler_removes_images_and_rows_that_have_lost_each_other(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    orphan = new_id()
    await engine.context.host.create_snapshot(orphan, sandbox.id)
    lost = await take(engine, principal, sandbox)
    await engine.context.host.delete_snapshot(lost.id)
    doomed = await take(engine, principal, sandbox)
    await engine.context.database.write(
        lambda connection: snapshots.change(
            connection, doomed.id, only_in=[SnapshotState.READY], state=SnapshotState.DELETING
        )
    )
    kept = await take(engine, principal, sandbox)
    await Reconciler(engine, AT_ONCE).reconcile()
    assert {image.id for image in await engine.context.host.list_snapshots()} == {kept.id}
    assert (await engine.get_snapshot(principal, GetSnapshot(lost.id))).error_code == "snapshot_corrupt"
    assert {item.id for item in (await engine.list_snapshots(principal, ListSnapshots())).items} == {kept.id, lost.id}


async def test_a_snapshot_that_is_being_restored_stays(
    engine: Engine, principal: Principal, sandbox: Sandbox, driver: FakeDriver
) -> None:
    taken = await take(engine, principal, sandbox)
    driver.faults.restore_delay_s = 0.5
    creating = asyncio.create_task(engine.create_sandbox(principal, CreateSandbox(new_id(), snapshot_id=taken.id)))
    await until(partial(is_provisioning, engine, principal))
    with pytest.raises(GatewayError, match="snapshot_in_use"):
        await engine.delete_snapshot(principal, DeleteSnapshot(taken.id))
    made = await creating
    await engine.delete_snapshot(principal, DeleteSnapshot(taken.id))
    assert (await engine.get_sandbox(principal, GetSandbox(made.id))).state is SandboxState.RUNNING
    assert await read(engine, principal, made) == b"before"


async def is_provisioning(engine: Engine, principal: Principal) -> bool:
    page = await engine.list_sandboxes(principal, ListSandboxes(state=SandboxState.PROVISIONING))
    return page.total == 1
