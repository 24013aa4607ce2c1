"""Forks: copies of one instant, each its own."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest

from gateway.commands import (
    CreateSandbox,
    CreateSnapshot,
    DestroySandbox,
    Exec,
    ForkSandbox,
    ListSandboxes,
    PauseSandbox,
    ReadFile,
    WriteFile,
)
from gateway.engine import Engine
from gateway.errors import GatewayError
from gateway.resources import Attribution, Principal, Sandbox, SandboxState
from gateway.settings import Settings
from vmm.drivers.fake import FakeDriver

PATH = "/workspace/note"


def new_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
async def parent(engine: Engine, principal: Principal) -> Sandbox:
    command = CreateSandbox(
        new_id(), name="parent", env={"A": "1"}, tags=("t",), attribution=Attribution(external_user_id="u")
    )
    made = await engine.create_sandbox(principal, command)
    await engine.write_file(principal, WriteFile(made.id, PATH, b"shared"))
    return made


async def read(engine: Engine, principal: Principal, sandbox: Sandbox) -> bytes:
    _, content = await engine.read_file(principal, ReadFile(sandbox.id, PATH))
    return b"".join([part async for part in content])


async def test_copies_have_the_parents_files_and_their_own_names(
    engine: Engine, principal: Principal, parent: Sandbox
) -> None:
    command = ForkSandbox(parent.id, new_id(), count=3, name="copy", env={"B": "2"}, timeout_s=60)
    copies = await engine.fork_sandbox(principal, command)
    assert [copy.name for copy in copies] == ["copy-1", "copy-2", "copy-3"]
    assert {copy.state for copy in copies} == {SandboxState.RUNNING}
    assert {copy.parent_id for copy in copies} == {parent.id}
    assert len({copy.id for copy in copies} | {copy.slug for copy in copies} | {parent.id, parent.slug}) == 8
    assert {(copy.tags, copy.attribution.external_user_id, copy.timeout_s) for copy in copies} == {(("t",), "u", 60)}
    await engine.write_file(principal, WriteFile(copies[0].id, PATH, b"changed"))
    contents = [await read(engine, principal, one) for one in (parent, *copies)]
    assert contents == [b"shared", b"changed", b"shared", b"shared"]
    result = await engine.exec(principal, Exec(copies[1].id, new_id(), argv=["env"]))
    assert b"A=1" in result.stdout
    assert b"B=2" in result.stdout


async def test_the_same_command_makes_no_more_copies(engine: Engine, principal: Principal, parent: Sandbox) -> None:
    command = ForkSandbox(parent.id, new_id(), count=2)
    first = await engine.fork_sandbox(principal, command)
    second = await engine.fork_sandbox(principal, command)
    assert [copy.id for copy in first] == [copy.id for copy in second]
    assert (await engine.list_sandboxes(principal, ListSandboxes())).total == 3
    assert len(await engine.context.host.list_machines()) == 3
    # What is there is still found when the parent is gone.
    await engine.destroy_sandbox(principal, DestroySandbox(parent.id))
    assert [copy.id for copy in await engine.fork_sandbox(principal, command)] == [copy.id for copy in first]


@pytest.mark.parametrize("hibernate", [False, True])
async def test_a_paused_sandbox_can_be_copied(
    engine: Engine, principal: Principal, parent: Sandbox, *, hibernate: bool
) -> None:
    await engine.pause_sandbox(principal, PauseSandbox(parent.id, hibernate=hibernate))
    (copy,) = await engine.fork_sandbox(principal, ForkSandbox(parent.id, new_id()))
    assert copy.state is SandboxState.RUNNING
    assert await read(engine, principal, copy) == b"shared"


async def test_a_snapshot_can_be_copied(engine: Engine, principal: Principal, parent: Sandbox) -> None:
    taken = await engine.create_snapshot(principal, CreateSnapshot(parent.id, new_id(), is_awaited=True))
    await engine.write_file(principal, WriteFile(parent.id, PATH, b"later"))
    await engine.destroy_sandbox(principal, DestroySandbox(parent.id))
    command = ForkSandbox(parent.id, new_id(), count=2, snapshot_id=taken.id)
    copies = await engine.fork_sandbox(principal, command)
    assert {copy.snapshot_id for copy in copies} == {taken.id}
    assert [await read(engine, principal, copy) for copy in copies] == [b"shared", b"shared"]


async def test_what_cannot_be_copied_is_refused(
    engine: Engine, principal: Principal, stranger: Principal, parent: Sandbox, settings: Settings
) -> None:
    with pytest.raises(GatewayError, match="sandbox_not_found"):
        await engine.fork_sandbox(stranger, ForkSandbox(parent.id, new_id()))
    with pytest.raises(GatewayError, match="name_taken"):
        await engine.fork_sandbox(principal, ForkSandbox(parent.id, new_id(), name="parent"))
    with pytest.raises(GatewayError, match="count: must be between 1 and 100"):
        await engine.fork_sandbox(principal, ForkSandbox(parent.id, new_id(), count=101))
    few = Engine(replace(engine.context, settings=replace(settings, sandboxes_per_workspace=2)))
    with pytest.raises(GatewayError, match="quota_exceeded"):
        await few.fork_sandbox(principal, ForkSandbox(parent.id, new_id(), count=2))
    assert (await engine.list_sandboxes(principal, ListSandboxes())).total == 1
    await engine.destroy_sandbox(principal, DestroySandbox(parent.id))
    with pytest.raises(GatewayError, match="sandbox_not_running"):
        await engine.fork_sandbox(principal, ForkSandbox(parent.id, new_id()))


async def test_a_copy_that_fails_does_not_take_the_others_along(
    engine: Engine, principal: Principal, parent: Sandbox, driver: FakeDriver
) -> None:
    driver.faults.restore_error = "no_capacity"
    command = ForkSandbox(parent.id, new_id(), count=2)
    with pytest.raises(GatewayError, match="no_capacity"):
        await engine.fork_sandbox(principal, command)
    failed = await engine.list_sandboxes(principal, ListSandboxes(state=SandboxState.ERROR))
    assert failed.total == 2
    driver.faults.restore_error = None
    copies = await engine.fork_sandbox(principal, command)
    assert {copy.state for copy in copies} == {SandboxState.RUNNING}
    assert await read(engine, principal, parent) == b"shared"


async def test_two_at_once_with_one_id_make_one_set(engine: Engine, principal: Principal, parent: Sandbox) -> None:
    command = ForkSandbox(parent.id, new_id(), count=3)
    results = await asyncio.gather(*(engine.fork_sandbox(principal, command) for _ in range(2)))
    assert [copy.id for copy in results[0]] == [copy.id for copy in results[1]]
    assert len(await engine.context.host.list_machines()) == 4
