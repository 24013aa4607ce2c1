"""The warm pool over the fake driver: what it holds, whom it serves, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.hosts import host_in_process
from vmm.client import HostClient
from vmm.drivers.base import Exit, Shape
from vmm.drivers.fake import FakeDriver, Faults
from vmm.errors import VmmError
from vmm.guest import Command
from vmm.host.config import PoolConfig
from vmm.types import ChildSpec, MachineSpec, MachineState, Origin, PoolStatus, StopCause

SHAPE = Shape("default", 1.0, 1024, 3072)


def pool_config(**fields: Any) -> PoolConfig:
    given = {"ready_min": 2, "ready_max": 8, "shells_min": 1, "shells_max": 4, "memory_share": 1.0, **fields}
    return PoolConfig(shapes=(SHAPE,), **given)


def spec(**fields: Any) -> MachineSpec:
    return MachineSpec(**{"id": str(uuid.uuid4()), "template": "default", "hostname": "m", **fields})


@asynccontextmanager
async def pooled(
    tmp_path: Path, driver: FakeDriver | None = None, **fields: Any
) -> AsyncIterator[tuple[FakeDriver, HostClient]]:
    driver = driver or FakeDriver()
    socket_path = tmp_path / "h.sock"
    host = host_in_process(tmp_path / "home", socket_path, driver, pool=pool_config(**fields))
    async with host, HostClient(str(socket_path)) as client:
        yield driver, client
    assert not driver.units, "nothing is left"


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def status(client: HostClient) -> PoolStatus:
    (found,) = await client.pool_status()
    return found


async def filled(client: HostClient, *, ready: int = 2, shells: int = 1) -> PoolStatus:
    async with asyncio.timeout(60):
        while ((found := await status(client)).ready, found.shells) < (ready, shells):
            await asyncio.sleep(0.005)
    return found


async def test_a_create_is_served_from_stock_which_is_filled_up_again(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (driver, client):
        await filled(client)
        made = await client.create_machine(spec(hostname="mine", env={"A": "1"}))
        assert (made.origin, made.state) == (Origin.READY, MachineState.RUNNING)
        assert made.unit in driver.guests
        guest = driver.guests[made.unit]
        assert (guest.hostname, guest.env) == ("mine", {"A": "1"})
        done = await client.agent(made.id).run("x", Command(argv=["env"]), deadline=time.monotonic() + 20)
        assert b"A=1\n" in done.stdout
        after = await filled(client)
        assert (after.claims, after.misses) == (1, 0)


async def test_misses_take_a_shell_and_then_nothing(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (driver, client):
        await filled(client)
        driver.faults.start_delay_s = 30.0
        made = await asyncio.gather(*(client.create_machine(spec()) for _ in range(3)))
        assert sorted(machine.origin or "" for machine in made) == ["ready", "ready", "shell"]
        driver.faults.start_delay_s = 0.0
        assert (await client.create_machine(spec())).origin is Origin.COLD


async def test_forks_and_restores_take_shells(tmp_path: Path) -> None:
    async with pooled(tmp_path, shells_min=3) as (driver, client):
        await filled(client, shells=3)
        parent = await client.create_machine(spec())
        await client.agent(parent.id).write("/workspace/f", b"x")
        await filled(client, shells=3)
        driver.faults.start_delay_s = 30.0
        children = [ChildSpec(id=str(uuid.uuid4()), hostname=f"c{number}") for number in range(3)]
        fork = await client.fork_machine(parent.id, children)
        assert [machine.origin for machine in fork.machines] == [Origin.RESTORED] * 3  # type: ignore[union-attr]
        for child in children:
            assert await client.agent(child.id).read_bytes("/workspace/f", size_max=9) == b"x"
        driver.faults.start_delay_s = 0.0


async def test_no_two_claims_get_one_unit(tmp_path: Path) -> None:
    async with pooled(tmp_path, ready_min=8) as (driver, client):
        await filled(client, ready=8)
        made = await asyncio.gather(*(client.create_machine(spec(hostname=f"h{number}")) for number in range(40)))
        assert len({machine.unit for machine in made}) == 40
        names = sorted(driver.guests[machine.unit].hostname for machine in made if machine.unit)
        assert names == sorted(f"h{number}" for number in range(40))
        assert {machine.state for machine in made} == {MachineState.RUNNING}


async def test_the_next_ones_to_be_claimed_may_be_kept_awake(tmp_path: Path) -> None:
    async with pooled(tmp_path, ready_min=3, shells_min=0, thawed=1) as (driver, client):
        await filled(client, ready=3, shells=0)

        def awake() -> list[str]:
            return [unit for unit, guest in driver.guests.items() if guest.may_run.is_set()]

        await eventually(lambda: len(awake()) == 1)
        (first,) = awake()
        assert (await client.create_machine(spec())).unit == first
        await filled(client, ready=3, shells=0)
        await eventually(lambda: len(awake()) == 2)


async def test_other_shapes_are_cold_and_kept_once_asked_for_again(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (_, client):
        await filled(client)
        for _ in range(2):
            assert (await client.create_machine(spec(memory_mib=512))).origin is Origin.COLD

        async def has_stock() -> bool:
            return any(pool.memory_mib == 512 and pool.ready for pool in await client.pool_status())

        async with asyncio.timeout(60):
            while not await has_stock():
                await asyncio.sleep(0.005)
        assert (await client.create_machine(spec(memory_mib=512))).origin is Origin.READY


async def test_an_alias_of_the_template_is_served_too(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (_, client):
        await filled(client)
        assert (await client.create_machine(spec(template="miosa-sandbox"))).origin is Origin.READY


async def test_a_unit_that_dies_in_stock_is_replaced(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (driver, client):
        await filled(client)
        before = set(driver.units)
        for unit in before:
            await driver.end(unit, Exit(StopCause.KILLED))
        await eventually(lambda: len(driver.units) == 3 and not before & set(driver.units))
        assert (await client.create_machine(spec())).state is MachineState.RUNNING


@pytest.mark.parametrize("fault", ["thaw_error", "refuses_dial"])
async def test_a_stocked_unit_that_is_no_good_costs_time_and_no_failure(tmp_path: Path, fault: str) -> None:
    async with pooled(tmp_path, shells_min=0) as (driver, client):
        await filled(client, shells=0)
        bad = set(driver.units)
        for unit in bad:
            if fault == "thaw_error":
                driver.faults_of(unit).thaw_error = "driver_failed"
            else:
                driver.cut(unit)
                driver.faults_of(unit).refuses_dial = True
        made = await client.create_machine(spec(), deadline=time.monotonic() + 60)
        assert made.state is MachineState.RUNNING
        assert made.unit not in bad


async def test_an_early_answer_does_not_wait_for_the_agent(tmp_path: Path) -> None:
    async with pooled(tmp_path, shells_min=0) as (driver, client):
        await filled(client, shells=0)
        bad = set(driver.units)
        for unit in bad:
            driver.faults_of(unit).is_stalled = True
        wanted = spec(hostname="mine")
        early = await client.create_machine(wanted, is_early=True)
        assert (early.state, early.unit in bad) == (MachineState.RUNNING, True)
        made = asyncio.create_task(client.create_machine(wanted, deadline=time.monotonic() + 60))
        for unit in bad:
            driver.faults_of(unit).refuses_dial = True
            driver.cut(unit)
        machine = await made
        assert machine.unit not in bad
        assert driver.guests[machine.unit or ""].hostname == "mine"
        assert (await client.create_machine(wanted, is_early=True)).unit == machine.unit


async def test_a_template_that_fails_is_not_tried_all_the_time(tmp_path: Path) -> None:
    driver = FakeDriver(Faults(start_error="driver_failed"))
    async with pooled(tmp_path, driver) as (driver, client):
        attempts = 0
        original = driver.prepare

        async def counted(unit: str, shape: Shape, *, token: str) -> None:
            nonlocal attempts
            attempts += 1
            await original(unit, shape, token=token)

        driver.prepare = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.5)
        assert attempts <= 2
        with pytest.raises(VmmError, match="told to fail"):
            await client.create_machine(spec())
        driver.faults.start_error = None
        assert (await client.create_machine(spec())).origin is Origin.COLD
        await filled(client)


async def test_a_refill_under_way_does_not_hold_up_a_claim_or_the_end(tmp_path: Path) -> None:
    async with pooled(tmp_path) as (driver, client):
        await filled(client)
        driver.faults.start_delay_s = 3600.0
        for _ in range(2):
            assert (await client.create_machine(spec())).origin is Origin.READY


async def test_claims_that_are_cancelled_leave_no_unit(tmp_path: Path) -> None:
    chance = random.Random(1)
    async with pooled(tmp_path, ready_min=4) as (driver, client):
        for _ in range(30):
            wanted = spec()
            task = asyncio.create_task(client.create_machine(wanted))
            await asyncio.sleep(chance.choice([0, 0.0005, 0.002, 0.005]))
            task.cancel()
            await asyncio.wait([task])
            await client.destroy_machine(wanted.id, StopCause.REQUESTED)
        await filled(client, ready=4)
        found = await status(client)
        await eventually(lambda: len(driver.units) <= found.target_ready + found.target_shells)


async def test_a_pool_of_nothing_is_no_pool(tmp_path: Path) -> None:
    async with pooled(tmp_path, ready_min=0, ready_max=0, shells_min=0, shells_max=0) as (driver, client):
        assert await client.pool_status() == []
        assert (await client.create_machine(spec())).origin is Origin.COLD
        assert len(driver.units) == 1


async def test_without_memory_nothing_is_held(tmp_path: Path) -> None:
    async with pooled(tmp_path, memory_share=0.0) as (driver, client):
        assert (await client.create_machine(spec())).origin is Origin.COLD
        assert (await client.create_machine(spec())).origin is Origin.COLD
        assert len(driver.units) == 2
