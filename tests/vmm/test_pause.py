"""Paused machines: frozen and hibernated, woken by whoever needs them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.hosts import host_in_process
from vmm.client import HostClient
from vmm.drivers.fake import FakeDriver
from vmm.errors import MachineError
from vmm.guest import Command
from vmm.types import MachineInfo, MachineSpec, MachineState, StopCause


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[FakeDriver]:
    driver = FakeDriver()
    async with host_in_process(tmp_path / "home", tmp_path / "h.sock", driver):
        yield driver


@pytest.fixture
async def client(driver: FakeDriver, tmp_path: Path) -> AsyncIterator[HostClient]:
    async with HostClient(str(tmp_path / "h.sock")) as client:
        yield client


def spec(**fields: Any) -> MachineSpec:
    return MachineSpec(**{"id": str(uuid.uuid4()), "template": "default", "hostname": "m", **fields})


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


async def counting(client: HostClient, machine: MachineInfo, last: int) -> Any:
    return await client.agent(machine.id).exec("count", Command(argv=["count", "0.005", str(last)]), deadline=soon())


async def read(execution: Any) -> list[int]:
    return [int(line) for line in b"".join([chunk.data async for chunk in execution]).split()]


@pytest.mark.parametrize("hibernate", [False, True])
async def test_a_paused_machine_goes_on_where_it_was(client: HostClient, hibernate: bool) -> None:
    made = await client.create_machine(spec())
    async with await counting(client, made, 200) as execution:
        lines = asyncio.create_task(read(execution))
        await asyncio.sleep(0.2)
        paused = await client.pause_machine(made.id, hibernate=hibernate)
        assert paused.state is (MachineState.HIBERNATED if hibernate else MachineState.FROZEN)
        assert await client.pause_machine(made.id, hibernate=hibernate) == paused
        woken = await client.resume_machine(made.id)
        assert woken.state is MachineState.RUNNING
        assert (woken.unit != made.unit) is hibernate
        assert await lines == list(range(1, 201))
    assert await client.destroy_machine(made.id, StopCause.REQUESTED)


async def test_use_wakes_once(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    await client.agent(made.id).write("/workspace/f", b"x")
    await client.pause_machine(made.id, hibernate=True)
    assert not driver.units
    driver.faults.restore_delay_s = 0.1
    reads = [client.agent(made.id).read_bytes("/workspace/f", size_max=10) for _ in range(500)]
    assert set(await asyncio.gather(*reads)) == {b"x"}
    assert len(driver.units) == 1


async def test_a_snapshot_is_restored_in_place_and_elsewhere(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    agent = client.agent(made.id)
    await agent.write("/workspace/f", b"before")
    taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
    await agent.write("/workspace/f", b"after")
    restored = await client.restore_machine(made.id, taken.id)
    assert (restored.snapshot, restored.unit != made.unit) == (taken.id, True)
    assert await agent.read_bytes("/workspace/f", size_max=10) == b"before"
    other = await client.create_machine(spec(snapshot=taken.id))
    assert await client.agent(other.id).read_bytes("/workspace/f", size_max=10) == b"before"
    assert len(driver.units) == 2


async def test_a_machine_without_auto_resume_stays_paused(client: HostClient) -> None:
    made = await client.create_machine(spec(auto_resume=False))
    await client.pause_machine(made.id)
    with pytest.raises(MachineError, match="machine_paused"):
        await client.agent(made.id).stat("/")
    assert (await client.resume_machine(made.id)).state is MachineState.RUNNING
    await client.agent(made.id).stat("/")
