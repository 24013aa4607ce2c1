"""The life of sandboxes on fake machines: real hostd, sockets and database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from gateway.commands import (
    CreateSandbox,
    DestroySandbox,
    ExtendSandbox,
    GetSandbox,
    GetSandboxByName,
    ListSandboxes,
    UpdateSandbox,
    WaitReady,
)
from gateway.engine import Engine
from gateway.errors import GatewayError
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.settings import Settings
from tests.gateway.engine.conftest import Recorder, event_types
from vmm.drivers.fake import FakeDriver, Faults

RUNNING = SandboxState.RUNNING
DESTROYED = SandboxState.DESTROYED


def create(**fields: object) -> CreateSandbox:
    return replace(CreateSandbox(str(uuid.uuid4())), **fields)  # type: ignore[arg-type]


async def machine_ids(engine: Engine) -> set[str]:
    return {machine.id for machine in await engine.context.host.list_machines() if machine.state == "running"}


async def test_a_sandbox_lives_and_ends(engine: Engine, principal: Principal, routes: Recorder) -> None:
    made = await engine.create_sandbox(principal, create(name="web", env={"A": "1"}, tags=["x"], metadata={"k": [1]}))
    assert made.state is RUNNING
    assert made.address is not None
    assert made.boot_ms is not None
    assert await engine.get_sandbox(principal, GetSandbox(made.id)) == made
    assert await engine.get_sandbox_by_name(principal, GetSandboxByName("web")) == made
    assert await engine.get_sandbox_by_name(principal, GetSandboxByName(made.slug)) == made
    assert await machine_ids(engine) == {made.id}

    await engine.destroy_sandbox(principal, DestroySandbox(made.id))
    ended = await engine.get_sandbox(principal, GetSandbox(made.id))
    assert (ended.state, ended.stop_cause, ended.address) == (DESTROYED, "requested", None)
    assert ended.destroyed_at is not None
    assert await machine_ids(engine) == set()
    await engine.destroy_sandbox(principal, DestroySandbox(made.id))
    assert await engine.get_sandbox(principal, GetSandbox(made.id)) == ended
    assert routes.pushed == [made.id, f"{made.id} dropped"]
    names = await event_types(engine, principal, made.id)
    assert names == ["sandbox.created", "sandbox.running", "sandbox.destroyed"]


async def test_strangers_see_nothing(engine: Engine, principal: Principal, stranger: Principal) -> None:
    made = await engine.create_sandbox(principal, create(name="web"))
    for attempt in (
        engine.get_sandbox(stranger, GetSandbox(made.id)),
        engine.get_sandbox_by_name(stranger, GetSandboxByName("web")),
        engine.destroy_sandbox(stranger, DestroySandbox(made.id)),
        engine.update_sandbox(stranger, UpdateSandbox(made.id, name="mine")),
        engine.extend_sandbox(stranger, ExtendSandbox(made.id, 60)),
        engine.create_sandbox(stranger, create(effect_id=made.id)),
    ):
        with pytest.raises(GatewayError, match="sandbox_not_found"):
            await attempt
    assert (await engine.list_sandboxes(stranger, ListSandboxes())).total == 0
    assert (await engine.get_sandbox(principal, GetSandbox(made.id))).state is RUNNING


async def test_one_effect_makes_one_sandbox_however_often_it_is_asked_for(engine: Engine, principal: Principal) -> None:
    command = create(name="web")
    made = await asyncio.gather(*(engine.create_sandbox(principal, command) for _ in range(5)))
    assert {sandbox.id for sandbox in made} == {command.effect_id}
    assert all(sandbox.state is RUNNING for sandbox in made)
    assert await machine_ids(engine) == {command.effect_id}
    assert await event_types(engine, principal, made[0].id) == ["sandbox.created", "sandbox.running"]
    await engine.destroy_sandbox(principal, DestroySandbox(command.effect_id))
    assert (await engine.create_sandbox(principal, command)).state is DESTROYED
    assert await machine_ids(engine) == set()


async def test_a_name_belongs_to_one_living_sandbox_of_a_workspace(
    engine: Engine, principal: Principal, stranger: Principal
) -> None:
    results = await asyncio.gather(
        *(engine.create_sandbox(principal, create(name="web")) for _ in range(5)), return_exceptions=True
    )
    made = [result for result in results if isinstance(result, Sandbox)]
    refused = [result.code for result in results if isinstance(result, GatewayError)]
    assert (len(made), refused) == (1, ["name_taken"] * 4)
    assert (await engine.create_sandbox(stranger, create(name="web"))).name == "web"
    other = await engine.create_sandbox(principal, create())
    with pytest.raises(GatewayError, match="name_taken"):
        await engine.update_sandbox(principal, UpdateSandbox(other.id, name="web"))
    assert (await engine.update_sandbox(principal, UpdateSandbox(made[0].id, name="web"))).name == "web"
    await engine.destroy_sandbox(principal, DestroySandbox(made[0].id))
    assert (await engine.update_sandbox(principal, UpdateSandbox(other.id, name="web"))).name == "web"


async def test_a_wanted_slug_is_had_or_refused(engine: Engine, principal: Principal, stranger: Principal) -> None:
    made = await engine.create_sandbox(principal, create(slug="my-app"))
    assert made.slug == "my-app"
    with pytest.raises(GatewayError, match="conflict"):
        await engine.create_sandbox(stranger, create(slug="my-app"))
    await engine.destroy_sandbox(principal, DestroySandbox(made.id))
    assert (await engine.create_sandbox(stranger, create(slug="my-app"))).slug == "my-app"


async def test_a_full_workspace_is_told_so(engine: Engine, principal: Principal, settings: Settings) -> None:
    small = Engine(replace(engine.context, settings=replace(settings, sandboxes_per_workspace=2)))
    results = await asyncio.gather(
        *(small.create_sandbox(principal, create()) for _ in range(4)), return_exceptions=True
    )
    made = [result for result in results if isinstance(result, Sandbox)]
    assert [result.code for result in results if isinstance(result, GatewayError)] == ["quota_exceeded"] * 2
    await small.destroy_sandbox(principal, DestroySandbox(made[0].id))
    assert (await small.create_sandbox(principal, create())).state is RUNNING


async def test_an_unknown_template_leaves_nothing(engine: Engine, principal: Principal) -> None:
    with pytest.raises(GatewayError, match="template_not_found"):
        await engine.create_sandbox(principal, create(template="nope"))
    assert (await engine.list_sandboxes(principal, ListSandboxes(state=SandboxState.ERROR))).total == 0


async def test_an_alias_is_resolved_to_its_template(engine: Engine, principal: Principal) -> None:
    assert (await engine.create_sandbox(principal, create(template="miosa-sandbox"))).template == "default"


@pytest.mark.parametrize("code", ["driver_failed", "no_capacity"])
async def test_a_failed_start_is_typed_and_may_be_tried_again(
    engine: Engine, principal: Principal, driver: FakeDriver, code: str
) -> None:
    command = create(name="web")
    driver.faults = Faults(start_error=code)
    with pytest.raises(GatewayError) as caught:
        await engine.create_sandbox(principal, command)
    assert caught.value.code == {"driver_failed": "boot_failed", "no_capacity": "no_capacity"}[code]
    failed = await engine.get_sandbox(principal, GetSandbox(command.effect_id))
    assert (failed.state, failed.stop_cause) == (SandboxState.ERROR, "boot_failed")
    assert failed.stop_detail
    assert await machine_ids(engine) == set()
    assert (await engine.list_sandboxes(principal, ListSandboxes())).total == 0
    assert await event_types(engine, principal, failed.id) == ["sandbox.created", "sandbox.error"]

    driver.faults = Faults()
    assert (await engine.create_sandbox(principal, command)).state is RUNNING


async def test_destroying_what_still_starts_leaves_no_machine(
    engine: Engine, principal: Principal, driver: FakeDriver
) -> None:
    driver.faults = Faults(start_delay_s=1.5)
    command = create()
    creating = asyncio.create_task(engine.create_sandbox(principal, command))
    await until(lambda: engine_has(engine, principal, command.effect_id))
    await engine.destroy_sandbox(principal, DestroySandbox(command.effect_id))
    results = await asyncio.gather(creating, return_exceptions=True)
    assert not isinstance(results[0], Sandbox) or results[0].state is DESTROYED
    assert (await engine.get_sandbox(principal, GetSandbox(command.effect_id))).state is DESTROYED
    await until(lambda: no_machines(engine))


async def test_waiting_ends_when_it_runs(engine: Engine, principal: Principal, driver: FakeDriver) -> None:
    driver.faults = Faults(start_delay_s=1.0)
    command = create()
    creating = asyncio.create_task(engine.create_sandbox(principal, command))
    await until(lambda: engine_has(engine, principal, command.effect_id))
    with pytest.raises(GatewayError, match="timeout"):
        await engine.wait_ready(principal, WaitReady(command.effect_id, 0.01))
    assert (await engine.wait_ready(principal, WaitReady(command.effect_id, 10))).state is RUNNING
    await creating


async def test_update_changes_what_is_given(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, create(tags=["a"], metadata={"k": 1}))
    changed = await engine.update_sandbox(principal, UpdateSandbox(made.id, tags=["b", "b"], idle_timeout_s=60.0))
    assert changed == replace(made, tags=("b",), idle_timeout_s=60.0)
    assert (await engine.context.host.get_machine(made.id)).idle_timeout_s == 60.0
    forever = await engine.update_sandbox(principal, UpdateSandbox(made.id, always_on=True))
    assert (forever.expires_at, forever.timeout_s, forever.idle_timeout_s) == (None, None, None)
    assert (await engine.context.host.get_machine(made.id)).expires_at is None
    with pytest.raises(GatewayError, match="conflict"):
        await engine.extend_sandbox(principal, ExtendSandbox(made.id, 60))
    mortal = await engine.update_sandbox(principal, UpdateSandbox(made.id, always_on=False))
    assert mortal.expires_at is not None


async def test_extending_moves_the_end(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, create(timeout_s=60.0))
    longer = await engine.extend_sandbox(principal, ExtendSandbox(made.id, 600.0))
    assert made.expires_at is not None
    assert longer.expires_at is not None
    assert longer.expires_at > made.expires_at + 500
    assert (await engine.context.host.get_machine(made.id)).expires_at == longer.expires_at
    with pytest.raises(GatewayError, match="validation_failed"):
        await engine.extend_sandbox(principal, ExtendSandbox(made.id, 1e9))
    await engine.destroy_sandbox(principal, DestroySandbox(made.id))
    with pytest.raises(GatewayError, match="sandbox_not_running"):
        await engine.extend_sandbox(principal, ExtendSandbox(made.id, 60.0))


async def engine_has(engine: Engine, principal: Principal, sandbox_id: str) -> bool:
    try:
        return (await engine.get_sandbox(principal, GetSandbox(sandbox_id))).id == sandbox_id
    except GatewayError:
        return False


async def no_machines(engine: Engine) -> bool:
    return await machine_ids(engine) == set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.01)
