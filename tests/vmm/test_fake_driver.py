"""The fake driver: its faults, its scale, and that it keeps machines apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from vmm.agent import Agent
from vmm.drivers.base import Exit, Shape
from vmm.drivers.fake import FakeDriver, Faults
from vmm.errors import LinkError, MachineError
from vmm.guest import Command
from vmm.link import Link
from vmm.types import StopCause


@pytest.fixture
async def driver() -> AsyncIterator[FakeDriver]:
    driver = FakeDriver(units_max=1_001)
    await driver.open()
    yield driver
    await driver.close()


async def join(driver: FakeDriver, machine_id: str, token: str = "t") -> Link:
    return await Link.connect(lambda protocol: driver.dial(machine_id, protocol), role="host", token=token)


def agent_of(link: Link) -> Agent:
    async def links(_: float) -> Link:
        return link

    return Agent(links)


SHAPE = Shape("default", cpu_count=1.0, memory_mib=512, disk_mib=1024)


async def test_a_thousand_machines_share_a_listener_and_nothing_else(driver: FakeDriver) -> None:
    async def live(number: int) -> None:
        machine_id = f"m{number}"
        await driver.start(machine_id, SHAPE, token=machine_id)
        link = await join(driver, machine_id, machine_id)
        agent = agent_of(link)
        await agent.write("/workspace/name", machine_id.encode())
        done = await agent.run("x", Command(argv=["cat", "/workspace/name"]))
        assert done.stdout == machine_id.encode()
        link.close()

    for start in range(0, 1_000, 100):
        await asyncio.gather(*(live(number) for number in range(start, start + 100)))
    assert len(driver.guests) == 1_000
    await driver.start("last", SHAPE, token="last")
    with pytest.raises(MachineError, match="no_capacity"):
        await driver.start("one too many", SHAPE, token="x")


async def test_a_wrong_token_is_refused(driver: FakeDriver) -> None:
    await driver.start("m", SHAPE, token="right")
    with pytest.raises(LinkError, match="unauthorized"):
        await join(driver, "m", "wrong")


async def test_an_unknown_template_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(MachineError, match="template_not_found"):
        await driver.start("m", replace(SHAPE, template="no-such"), token="t")


async def test_a_start_can_fail(driver: FakeDriver) -> None:
    driver.faults.start_error = "driver_failed"
    with pytest.raises(MachineError, match="driver_failed"):
        await driver.start("m", SHAPE, token="t")
    assert not driver.guests


async def test_a_machine_can_refuse_to_be_dialled(driver: FakeDriver) -> None:
    driver.faults.refuses_dial = True
    await driver.start("m", SHAPE, token="t")
    with pytest.raises(ConnectionRefusedError):
        await join(driver, "m")


async def test_a_machine_can_stall(driver: FakeDriver) -> None:
    await driver.start("m", SHAPE, token="t")
    link = await join(driver, "m")
    driver.faults_of("m").is_stalled = True
    with pytest.raises(LinkError, match="no_answer"):
        await agent_of(link).stat("/", deadline=time.monotonic() + 0.1)
    driver.faults_of("m").is_stalled = False
    assert (await agent_of(link).stat("/")).is_dir
    link.close()


async def test_a_connection_can_be_cut_after_some_bytes(driver: FakeDriver) -> None:
    driver.faults = Faults(cut_after_bytes=500)
    await driver.start("m", SHAPE, token="t")
    link = await join(driver, "m")
    stream = link.open({"op": "list", "path": "/", "depth": 2})
    with pytest.raises(LinkError, match="link_lost"):
        await stream.reply()
    assert not link.is_open


async def test_a_machine_can_end_by_itself(driver: FakeDriver) -> None:
    await driver.start("m", SHAPE, token="t")
    link = await join(driver, "m")
    waiting = asyncio.create_task(driver.wait("m"))
    await driver.end("m", Exit(StopCause.OOM, "told to"))
    assert await waiting == Exit(StopCause.OOM, "told to")
    await asyncio.wait_for(link.closed.wait(), 5)
    with pytest.raises(MachineError, match="machine_not_running"):
        await driver.stats("m")


async def test_a_frozen_machine_answers_once_thawed(driver: FakeDriver) -> None:
    await driver.start("m", SHAPE, token="t")
    link = await join(driver, "m")
    await driver.freeze("m")
    asking = asyncio.create_task(agent_of(link).stat("/"))
    await asyncio.sleep(0.02)
    assert not asking.done()
    await driver.thaw("m")
    assert (await asking).is_dir
    link.close()


async def test_a_sweep_keeps_what_it_is_told(driver: FakeDriver) -> None:
    for machine_id in ("a", "b", "c"):
        await driver.start(machine_id, SHAPE, token=machine_id)
    assert sorted(await driver.sweep({"b"})) == ["a", "c"]
    assert list(driver.guests) == ["b"]
