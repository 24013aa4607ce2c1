"""Pausing and waking: by command, by themselves, by use."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.commands import (
    CreateSandbox,
    DestroySandbox,
    Exec,
    ExtendSandbox,
    GetMetrics,
    GetSandbox,
    GetUsage,
    PauseSandbox,
    ResumeSandbox,
    SetEnv,
    UpdateSandbox,
)
from gateway.engine import Engine
from gateway.engine.watcher import HostWatcher
from gateway.errors import GatewayError
from gateway.reconciler import Pace, Reconciler
from gateway.resources import IdleAction, PauseKind, Principal, Sandbox, SandboxState
from gateway.wakes import WakeRelay
from tests.gateway.engine.conftest import Recorder, event_types
from vmm.types import MachineState

RUNNING, PAUSED = SandboxState.RUNNING, SandboxState.PAUSED


def new_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
async def sandbox(engine: Engine, principal: Principal) -> Sandbox:
    return await engine.create_sandbox(principal, CreateSandbox(new_id()))


@pytest.fixture
async def watcher(engine: Engine) -> AsyncIterator[None]:
    """Two workers that hear what the host does."""
    tasks = [asyncio.create_task(HostWatcher(engine).run()) for _ in range(2)]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def become(engine: Engine, principal: Principal, sandbox_id: str, state: SandboxState) -> Sandbox:
    async with asyncio.timeout(60):
        while True:
            sandbox = await engine.get_sandbox(principal, GetSandbox(sandbox_id))
            if sandbox.state is state:
                return sandbox
            await asyncio.sleep(0.01)


async def test_a_paused_sandbox_says_so_and_goes_on_when_resumed(
    engine: Engine, principal: Principal, sandbox: Sandbox, routes: Recorder
) -> None:
    paused = await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    assert (paused.state, paused.pause_kind) == (PAUSED, PauseKind.FROZEN)
    assert paused.paused_at is not None
    assert (await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))).paused_at == paused.paused_at

    resumed = await engine.resume_sandbox(principal, ResumeSandbox(sandbox.id))
    assert (resumed.state, resumed.pause_kind, resumed.paused_at) == (RUNNING, None, None)
    assert resumed.paused_s > 0
    # Visitors are let in before SQL is told, and again by what SQL says.
    assert routes.pushed[-2:] == [f"{sandbox.id} running at {resumed.address}", sandbox.id]
    assert await engine.resume_sandbox(principal, ResumeSandbox(sandbox.id)) == resumed
    expected = ["sandbox.created", "sandbox.running", "sandbox.paused", "sandbox.resumed"]
    assert await event_types(engine, principal, sandbox.id) == expected


async def test_a_stopped_one_is_hibernated_and_wakes_at_a_new_address(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    paused = await engine.pause_sandbox(principal, PauseSandbox(sandbox.id, hibernate=True))
    assert (paused.state, paused.pause_kind) == (PAUSED, PauseKind.HIBERNATED)
    resumed = await engine.resume_sandbox(principal, ResumeSandbox(sandbox.id))
    machine = await engine.context.host.get_machine(sandbox.id)
    assert (resumed.state, resumed.address) == (RUNNING, machine.address)


@pytest.mark.parametrize("hibernate", [False, True])
async def test_use_wakes_it(
    engine: Engine, principal: Principal, sandbox: Sandbox, watcher: None, *, hibernate: bool
) -> None:
    await engine.set_env(principal, SetEnv(sandbox.id, {"KEPT": "yes"}))
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id, hibernate=hibernate))
    result = await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["env"]))
    assert b"KEPT=yes" in result.stdout
    await become(engine, principal, sandbox.id, RUNNING)


async def test_one_that_shall_not_wake_refuses_use(engine: Engine, principal: Principal) -> None:
    sandbox = await engine.create_sandbox(principal, CreateSandbox(new_id(), auto_resume=False))
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    with pytest.raises(GatewayError, match="sandbox_paused"):
        await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["true"]))
    with pytest.raises(GatewayError, match="sandbox_paused"):
        await engine.set_env(principal, SetEnv(sandbox.id, {"A": "b"}))
    assert (await engine.resume_sandbox(principal, ResumeSandbox(sandbox.id))).state is RUNNING


async def test_looking_at_its_figures_does_not_wake_it(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    with pytest.raises(GatewayError, match="sandbox_paused"):
        await engine.get_metrics(principal, GetMetrics(sandbox.id))
    assert (await engine.context.host.get_machine(sandbox.id)).state is MachineState.FROZEN


async def test_an_idle_one_is_paused_and_every_worker_agrees(
    engine: Engine, principal: Principal, watcher: None
) -> None:
    command = CreateSandbox(new_id(), idle_timeout_s=0.3, idle_action=IdleAction.PAUSE)
    sandbox = await engine.create_sandbox(principal, command)
    paused = await become(engine, principal, sandbox.id, PAUSED)
    assert paused.pause_kind is PauseKind.FROZEN
    assert (await event_types(engine, principal, sandbox.id)).count("sandbox.paused") == 1


async def test_a_persistent_one_is_paused_by_its_timeout_and_has_no_end(engine: Engine, principal: Principal) -> None:
    sandbox = await engine.create_sandbox(principal, CreateSandbox(new_id(), timeout_s=60, is_persistent=True))
    assert (sandbox.expires_at, sandbox.idle_timeout_s, sandbox.idle_action) == (None, 60, IdleAction.PAUSE)
    extended = await engine.extend_sandbox(principal, ExtendSandbox(sandbox.id, 90))
    assert (extended.expires_at, extended.idle_timeout_s, extended.timeout_s) == (None, 90, 90)
    machine = await engine.context.host.get_machine(sandbox.id)
    assert (machine.expires_at, machine.idle_timeout_s) == (None, 90)


async def test_the_policy_of_a_paused_one_can_be_changed(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    changed = await engine.update_sandbox(
        principal, UpdateSandbox(sandbox.id, idle_action=IdleAction.KEEP, auto_resume=False)
    )
    assert (changed.state, changed.idle_action, changed.auto_resume) == (PAUSED, IdleAction.KEEP, False)
    machine = await engine.context.host.get_machine(sandbox.id)
    assert (machine.idle_action, machine.auto_resume) == ("keep", False)


async def test_time_paused_is_not_counted_as_use(engine: Engine, principal: Principal) -> None:
    now = [1000.0]
    engine = Engine(replace(engine.context, clock=lambda: now[0]))
    sandbox = await engine.create_sandbox(principal, CreateSandbox(new_id(), always_on=True))

    def tick(seconds: float) -> None:
        now[0] += seconds

    began = sandbox.started_at
    assert began is not None
    now[0] = began + 10
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    tick(100)

    async def used(start: float, end: float) -> float:
        return (await engine.get_usage(principal, GetUsage(sandbox.id, start, end))).running_s

    assert await used(began, began + 110) == pytest.approx(10)
    await engine.resume_sandbox(principal, ResumeSandbox(sandbox.id))
    tick(5)
    assert await used(began, began + 115) == pytest.approx(15)
    assert await used(began + 50, began + 112) == pytest.approx(2)
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    tick(50)
    await engine.destroy_sandbox(principal, DestroySandbox(sandbox.id))
    tick(1000)
    assert await used(began, now[0]) == pytest.approx(15)
    ended = await engine.get_sandbox(principal, GetSandbox(sandbox.id))
    assert ended.paused_s == pytest.approx(150)
    await engine.close()


async def test_visitors_wake_it_once_however_often_the_plane_asks(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    refused: list[str] = []
    relay = WakeRelay(engine.pausing.wake, refused.append)
    running = asyncio.create_task(relay.run())
    for _ in range(5):
        relay.note(sandbox.id)
    stranger = new_id()
    relay.note(stranger)  # nobody's: refused by the host, and no reason to stop
    await become(engine, principal, sandbox.id, RUNNING)
    async with asyncio.timeout(30):
        while refused != [stranger]:
            await asyncio.sleep(0.01)
    assert (await event_types(engine, principal, sandbox.id)).count("sandbox.resumed") == 1
    await engine.pause_sandbox(principal, PauseSandbox(sandbox.id))
    relay.note(sandbox.id)
    await become(engine, principal, sandbox.id, RUNNING)
    running.cancel()
    await asyncio.wait([running])


async def test_the_reconciler_notes_a_pause_nobody_heard_of(
    engine: Engine, principal: Principal, sandbox: Sandbox
) -> None:
    await engine.context.host.pause_machine(sandbox.id)
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    assert (await engine.get_sandbox(principal, GetSandbox(sandbox.id))).state is PAUSED
    await engine.context.host.resume_machine(sandbox.id)
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    assert (await engine.get_sandbox(principal, GetSandbox(sandbox.id))).state is RUNNING


async def test_a_late_word_of_a_pause_does_not_stick(engine: Engine, principal: Principal, sandbox: Sandbox) -> None:
    frozen = await engine.context.host.pause_machine(sandbox.id)
    await engine.context.host.resume_machine(sandbox.id)
    await engine.pausing.follow(frozen)
    assert (await engine.get_sandbox(principal, GetSandbox(sandbox.id))).state is RUNNING
