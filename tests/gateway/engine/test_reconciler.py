"""What the watcher and the reconciler make of what died half-way."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from gateway.commands import CreateSandbox, DestroySandbox, GetSandbox
from gateway.engine import Engine
from gateway.engine.watcher import HostWatcher
from gateway.errors import GatewayError
from gateway.reconciler import Pace, Reconciler
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.store import sandboxes
from tests.gateway.engine.conftest import put_running
from vmm.drivers.base import Exit
from vmm.drivers.fake import FakeDriver
from vmm.types import MachineSpec, MachineState, StopCause

RUNNING = SandboxState.RUNNING
DESTROYED = SandboxState.DESTROYED
#: No patience: what a test sets up is old enough at once.
AT_ONCE = Pace(arrival_s=0.0, provisioning_s=0.0, orphan_s=0.0, overdue_s=0.0)


def new_id() -> str:
    return str(uuid.uuid4())


async def state_of(engine: Engine, principal: Principal, sandbox_id: str) -> tuple[SandboxState, str | None]:
    sandbox = await engine.get_sandbox(principal, GetSandbox(sandbox_id))
    return sandbox.state, sandbox.stop_cause


async def running_machines(engine: Engine) -> set[str]:
    machines = await engine.context.host.list_machines()
    return {machine.id for machine in machines if machine.state is MachineState.RUNNING}


def later(engine: Engine, seconds: float) -> Engine:
    """The same engine with its clock ahead."""
    clock = engine.context.clock
    return Engine(replace(engine.context, clock=lambda: clock() + seconds))


async def settle(engine: Engine) -> None:
    await Reconciler(engine, AT_ONCE).reconcile()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3])
async def test_every_worker_hears_an_end_and_one_records_it(
    engine: Engine, principal: Principal, driver: FakeDriver, workers: int
) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id()))
    watchers = [asyncio.create_task(HostWatcher(engine).run()) for _ in range(workers)]
    await driver.end(await unit_of(engine, made.id), Exit(StopCause.OOM, "killed by the kernel"))
    await until(lambda: is_in(engine, principal, made.id, DESTROYED))
    ended = await engine.get_sandbox(principal, GetSandbox(made.id))
    assert (ended.stop_cause, ended.stop_detail) == ("oom", "killed by the kernel")
    for watcher in watchers:
        watcher.cancel()
    await asyncio.wait(watchers)


async def unit_of(engine: Engine, machine_id: str) -> str:
    """What its driver calls a machine."""
    return (await engine.context.host.get_machine(machine_id)).unit or ""


async def is_in(engine: Engine, principal: Principal, sandbox_id: str, state: SandboxState) -> bool:
    return (await state_of(engine, principal, sandbox_id))[0] is state


async def test_a_machine_without_a_sandbox_is_destroyed(engine: Engine, principal: Principal) -> None:
    kept = await engine.create_sandbox(principal, CreateSandbox(new_id()))
    orphan = new_id()
    await engine.context.host.create_machine(MachineSpec(orphan, "default", "box"))
    await Reconciler(engine, replace(AT_ONCE, orphan_s=60.0)).reconcile()
    assert await running_machines(engine) == {kept.id, orphan}
    await settle(engine)
    assert await running_machines(engine) == {kept.id}
    assert await state_of(engine, principal, kept.id) == (RUNNING, None)


async def test_a_machine_whose_create_has_come_again_is_kept(engine: Engine, principal: Principal) -> None:
    machine = MachineSpec(new_id(), "default", "box")
    await engine.context.host.create_machine(machine)
    late = replace(AT_ONCE, orphan_s=60.0)
    await Reconciler(later(engine, 100.0), late).reconcile()
    assert await running_machines(engine) == {machine.id}


async def test_a_destroy_the_host_never_heard_of_is_finished(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id()))
    await engine.sandboxes.end(made, DESTROYED, StopCause.REQUESTED)
    assert await running_machines(engine) == {made.id}
    await settle(engine)
    assert await running_machines(engine) == set()


async def test_a_sandbox_without_a_machine_is_recorded_as_lost(engine: Engine, principal: Principal) -> None:
    sandbox = await put_running(engine, principal)
    await settle(engine)
    assert await state_of(engine, principal, sandbox.id) == (DESTROYED, "lost")


async def test_a_machine_that_ended_unheard_keeps_its_cause(
    engine: Engine, principal: Principal, driver: FakeDriver
) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id()))
    await driver.end(await unit_of(engine, made.id), Exit(StopCause.EXITED))
    await until(lambda: is_gone(engine, made.id))
    await settle(engine)
    assert await state_of(engine, principal, made.id) == (DESTROYED, "exited")


async def is_gone(engine: Engine, machine_id: str) -> bool:
    return machine_id not in await running_machines(engine)


async def put_provisioning(engine: Engine, principal: Principal) -> Sandbox:
    return await put_running(engine, principal, state=SandboxState.PROVISIONING, started_at=None, address=None)


async def test_a_create_that_died_before_its_machine_fails(engine: Engine, principal: Principal) -> None:
    sandbox = await put_provisioning(engine, principal)
    await Reconciler(engine, replace(AT_ONCE, provisioning_s=60.0)).reconcile()
    assert await state_of(engine, principal, sandbox.id) == (SandboxState.PROVISIONING, None)
    await settle(engine)
    assert await state_of(engine, principal, sandbox.id) == (SandboxState.ERROR, "boot_failed")


async def test_a_create_that_died_after_its_machine_is_finished(engine: Engine, principal: Principal) -> None:
    sandbox = await put_provisioning(engine, principal)
    machine = await engine.context.host.create_machine(MachineSpec(sandbox.id, "default", "box"))
    await settle(engine)
    finished = await engine.get_sandbox(principal, GetSandbox(sandbox.id))
    assert (finished.state, finished.address) == (RUNNING, machine.address)


async def test_a_create_that_still_waits_for_its_machine_is_left_alone(
    engine: Engine, principal: Principal, driver: FakeDriver
) -> None:
    sandbox = await put_provisioning(engine, principal)
    driver.faults.start_delay_s = 1.0
    creating = asyncio.create_task(engine.create_sandbox(principal, CreateSandbox(sandbox.id)))
    await until(lambda: is_known(engine, sandbox.id))
    await Reconciler(engine, replace(AT_ONCE, provisioning_s=60.0)).reconcile()
    assert await state_of(engine, principal, sandbox.id) == (SandboxState.PROVISIONING, None)
    assert (await creating).state is RUNNING


async def test_a_create_that_others_gave_up_fails(engine: Engine, principal: Principal, driver: FakeDriver) -> None:
    sandbox = await put_provisioning(engine, principal)
    driver.faults.start_delay_s = 1.0
    creating = asyncio.create_task(engine.create_sandbox(principal, CreateSandbox(sandbox.id)))
    await until(lambda: is_known(engine, sandbox.id))
    await engine.sandboxes.end(sandbox, SandboxState.ERROR, StopCause.BOOT_FAILED, "given up")
    with pytest.raises(GatewayError, match="given up") as caught:
        await creating
    assert caught.value.code == "boot_failed"
    assert await running_machines(engine) == set()


async def is_known(engine: Engine, machine_id: str) -> bool:
    return machine_id in {machine.id for machine in await engine.context.host.list_machines()}


async def test_a_create_that_died_half_way_is_finished_by_asking_again(engine: Engine, principal: Principal) -> None:
    sandbox = await put_provisioning(engine, principal)
    again = await engine.create_sandbox(principal, CreateSandbox(sandbox.id))
    assert (again.id, again.slug, again.state) == (sandbox.id, sandbox.slug, RUNNING)


async def test_a_sandbox_past_its_end_is_destroyed(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id(), timeout_s=60.0))
    await settle(engine)
    assert await state_of(engine, principal, made.id) == (RUNNING, None)
    await settle(later(engine, 61.0))
    assert await state_of(engine, principal, made.id) == (DESTROYED, "timeout")
    assert await running_machines(engine) == set()


async def test_timers_the_host_never_heard_of_are_told_again(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id(), timeout_s=60.0))
    change = partial(sandboxes.change, sandbox_id=made.id, expires_at=9e9, idle_timeout_s=77.0)
    await engine.context.database.write(change)
    await settle(engine)
    machine = await engine.context.host.get_machine(made.id)
    assert (machine.expires_at, machine.idle_timeout_s) == (9e9, 77.0)


async def test_one_of_several_reconcilers_works_and_another_follows(engine: Engine, principal: Principal) -> None:
    pace = replace(AT_ONCE, interval_s=0.02)
    first = asyncio.create_task(Reconciler(engine, pace).run())
    await until(lambda: reconciles(engine, principal))
    second = asyncio.create_task(Reconciler(engine, pace).run())
    first.cancel()
    await asyncio.wait([first])
    await until(lambda: reconciles(engine, principal))
    second.cancel()
    await asyncio.wait([second])


async def reconciles(engine: Engine, principal: Principal) -> bool:
    sandbox = await put_running(engine, principal)
    async with asyncio.timeout(60):
        while (await state_of(engine, principal, sandbox.id))[0] is RUNNING:
            await asyncio.sleep(0.01)
    return True


async def test_a_host_that_is_away_changes_nothing(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    task = asyncio.create_task(Reconciler(offline, replace(AT_ONCE, interval_s=0.01)).run())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task])
    assert await state_of(offline, principal, sandbox.id) == (RUNNING, None)


async def test_what_was_kept_long_enough_is_forgotten(engine: Engine, principal: Principal) -> None:
    made = await engine.create_sandbox(principal, CreateSandbox(new_id()))
    await engine.destroy_sandbox(principal, DestroySandbox(made.id))
    task = asyncio.create_task(Reconciler(later(engine, 91 * 86_400.0), replace(AT_ONCE, interval_s=0.01)).run())

    async def is_forgotten() -> bool:
        return await engine.context.database.lookup(partial(sandboxes.get, sandbox_id=made.id)) is None

    await until(is_forgotten)
    task.cancel()
    await asyncio.wait([task])
