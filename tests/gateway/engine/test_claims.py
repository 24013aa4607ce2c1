"""Sandboxes from the warm pool: recorded while their machine is told who it is."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest

from gateway.commands import CreateSandbox, GetSandbox
from gateway.engine import Engine
from gateway.errors import GatewayError
from gateway.host import pool_config
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.settings import Settings
from gateway.store import sandboxes
from tests.gateway.engine.conftest import Recorder, event_types
from vmm.drivers.fake import FakeDriver
from vmm.host.config import PoolConfig
from vmm.types import MachineState


@pytest.fixture
def pool(settings: Settings) -> PoolConfig:
    usual = replace(settings, pool_ready=1, pool_ready_max=1, pool_shells=0, pool_shells_max=0, pool_memory_share=1.0)
    return pool_config(usual)


@pytest.fixture(autouse=True)
def long_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, a unit in stock is at hand."""
    monkeypatch.setattr("gateway.engine.creation._GLANCE_S", 60.0)


async def stocked(engine: Engine, driver: FakeDriver) -> str:
    """The only unit of the pool, once it is ready."""
    async with asyncio.timeout(60):
        while not any(pool.ready for pool in await engine.context.host.pool_status()):
            await asyncio.sleep(0.01)
    (unit,) = driver.units
    return unit


async def begin(engine: Engine, principal: Principal, driver: FakeDriver, effect_id: str) -> asyncio.Task[Sandbox]:
    """A create that has recorded its sandbox and waits for the agent, which has died."""
    unit = await stocked(engine, driver)
    driver.faults_of(unit).is_stalled = True
    creating = asyncio.create_task(engine.create_sandbox(principal, CreateSandbox(effect_id)))
    async with asyncio.timeout(60):
        while await engine.context.database.lookup(lambda connection: sandboxes.get(connection, effect_id)) is None:
            await asyncio.sleep(0.005)
    assert not creating.done()
    driver.faults_of(unit).refuses_dial = True
    driver.cut(unit)
    return creating


async def test_another_unit_takes_over_when_the_agent_does_not_answer(
    engine: Engine, principal: Principal, driver: FakeDriver, routes: Recorder
) -> None:
    creating = await begin(engine, principal, driver, str(uuid.uuid4()))
    made = await creating
    machine = await engine.context.host.get_machine(made.id)
    assert (made.state, machine.state) == (SandboxState.RUNNING, MachineState.RUNNING)
    assert made.address == machine.address
    assert await engine.get_sandbox(principal, GetSandbox(made.id)) == made
    # Once for the first address, and again for the other one.
    assert routes.pushed[:2] == [made.id] * 2
    assert driver.guests[machine.unit or ""].hostname == made.slug


async def test_a_recorded_sandbox_fails_with_its_machine(
    engine: Engine, principal: Principal, driver: FakeDriver
) -> None:
    effect_id = str(uuid.uuid4())
    creating = await begin(engine, principal, driver, effect_id)
    driver.faults.start_error = "driver_failed"
    with pytest.raises(GatewayError) as caught:
        await creating
    assert caught.value.code == "boot_failed"
    failed = await engine.get_sandbox(principal, GetSandbox(effect_id))
    assert (failed.state, failed.stop_cause) == (SandboxState.ERROR, "boot_failed")
    types = await event_types(engine, principal, effect_id)
    assert types == ["sandbox.created", "sandbox.running", "sandbox.error"]
    assert effect_id not in {machine.id for machine in await engine.context.host.list_machines()}
