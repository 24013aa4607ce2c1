"""Paused machines: frozen and hibernated, woken by whoever needs them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.hosts import host_in_process
from vmm.agent import Agent
from vmm.client import HostClient
from vmm.drivers.base import Exit
from vmm.drivers.fake import FakeDriver
from vmm.errors import LinkError, MachineError
from vmm.execution import Execution
from vmm.guest import Command
from vmm.types import IdleAction, MachineInfo, MachineSpec, MachineState, StopCause

RUNNING, FROZEN, HIBERNATED = MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED


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


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def counting(client: HostClient, machine: MachineInfo, last: int) -> Execution:
    return await client.agent(machine.id).exec("count", Command(argv=["count", "0.005", str(last)]), deadline=soon())


async def read(execution: Execution) -> list[int]:
    return [int(line) for line in b"".join([chunk.data async for chunk in execution]).split()]


async def until_state(client: HostClient, machine: MachineInfo, state: MachineState) -> MachineInfo:
    async with asyncio.timeout(60):
        while (now := await client.get_machine(machine.id)).state is not state:
            await asyncio.sleep(0.01)
    return now


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def code_of(work: Any) -> str:
    with pytest.raises((MachineError, LinkError)) as caught:
        await work
    return caught.value.code


@pytest.mark.parametrize("hibernate", [False, True])
async def test_a_paused_machine_goes_on_where_it_was(client: HostClient, hibernate: bool) -> None:
    made = await client.create_machine(spec())
    async with await counting(client, made, 200) as execution:
        lines = asyncio.create_task(read(execution))
        await asyncio.sleep(0.2)
        paused = await client.pause_machine(made.id, hibernate=hibernate)
        assert paused.state is (HIBERNATED if hibernate else FROZEN)
        assert await client.pause_machine(made.id, hibernate=hibernate) == paused
        woken = await client.resume_machine(made.id)
        assert woken.state is RUNNING
        assert (woken.unit != made.unit) is hibernate
        assert await lines == list(range(1, 201))


async def test_output_is_neither_lost_nor_repeated_across_many_moves(client: HostClient) -> None:
    made = await client.create_machine(spec())
    async with await counting(client, made, 400) as execution:
        lines = asyncio.create_task(read(execution))
        while not lines.done():
            for move in (False, True):
                await client.create_snapshot(str(uuid.uuid4()), made.id)
                await client.pause_machine(made.id, hibernate=move)
                await client.resume_machine(made.id)
                await asyncio.sleep(0.03)
        assert await lines == list(range(1, 401))


async def test_an_open_stream_does_not_wake_but_input_on_it_does(client: HostClient) -> None:
    made = await client.create_machine(spec())
    async with await client.agent(made.id).exec("cat", Command(argv=["cat"], stdin=True)) as execution:
        chunk = asyncio.create_task(anext(execution))
        for state in (FROZEN, HIBERNATED):
            await client.pause_machine(made.id, hibernate=state is HIBERNATED)
            await asyncio.sleep(0.1)
            assert (await client.get_machine(made.id)).state is state
            await execution.write(state.encode())
            assert (await chunk).data == state.encode()
            assert (await client.get_machine(made.id)).state is RUNNING
            chunk = asyncio.create_task(anext(execution))
        chunk.cancel()


async def test_five_hundred_streams_cause_one_wake(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    await client.agent(made.id).write("/workspace/f", b"x")
    for hibernate in (False, True):
        await client.pause_machine(made.id, hibernate=hibernate)
        driver.faults.restore_delay_s = 0.1
        events = [asyncio.create_task(client.resume_machine(made.id)) for _ in range(20)]
        reads = [client.agent(made.id).read_bytes("/workspace/f", size_max=10, deadline=soon()) for _ in range(500)]
        assert set(await asyncio.gather(*reads)) == {b"x"}
        assert len({(await event).unit for event in events}) == 1
        assert len(driver.units) == 1


async def test_no_more_streams_wait_than_may(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    await client.pause_machine(made.id, hibernate=True)
    driver.faults.restore_delay_s = 0.5
    link = await client.link(soon())
    streams = [link.open({"op": "stat", "path": "/", "to": made.id}) for _ in range(1025)]
    replies = await asyncio.gather(*(stream.reply() for stream in streams), return_exceptions=True)
    refused = [reply for reply in replies if isinstance(reply, MachineError)]
    assert [error.code for error in refused] == ["no_capacity"]
    assert sum(isinstance(reply, dict) for reply in replies) == 1024


async def test_a_failed_wake_is_told_to_all_that_waited_and_may_be_tried_again(
    client: HostClient, driver: FakeDriver
) -> None:
    made = await client.create_machine(spec())
    await client.pause_machine(made.id, hibernate=True)
    driver.faults.restore_error = "driver_failed"
    stats = [code_of(client.agent(made.id).stat("/")) for _ in range(5)]
    assert set(await asyncio.gather(*stats)) == {"driver_failed"}
    assert (await client.get_machine(made.id)).state is HIBERNATED
    assert not driver.units
    driver.faults.restore_error = None
    assert (await client.agent(made.id).stat("/")).is_dir


async def test_a_wake_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    driver = FakeDriver()
    sockets = tmp_path / "w.sock"
    async with (
        host_in_process(tmp_path / "home", sockets, driver, wake_timeout_s=0.2),
        HostClient(str(sockets)) as client,
    ):
        made = await client.create_machine(spec())
        await client.pause_machine(made.id, hibernate=True)
        driver.faults.restore_delay_s = 30
        waiting = asyncio.create_task(code_of(client.agent(made.id).stat("/")))
        assert await code_of(client.resume_machine(made.id)) == "wake_timeout"
        assert await waiting == "wake_timeout"
        assert (await client.get_machine(made.id)).state is HIBERNATED
        await until(lambda: not driver.units)


async def test_a_machine_without_auto_resume_stays_paused(client: HostClient) -> None:
    made = await client.create_machine(spec(auto_resume=False))
    for hibernate in (False, True):
        await client.pause_machine(made.id, hibernate=hibernate)
        assert await code_of(client.agent(made.id).stat("/")) == "machine_paused"
    await client.update_machine(made.id, auto_resume=True)
    assert (await client.agent(made.id).stat("/")).is_dir


async def test_a_passive_stream_does_not_wake(client: HostClient) -> None:
    made = await client.create_machine(spec())
    await client.pause_machine(made.id)
    assert await code_of(client.agent(made.id, passive=True).stat("/")) == "machine_paused"
    assert (await client.get_machine(made.id)).state is FROZEN


async def test_an_idle_machine_is_paused_and_then_hibernated(client: HostClient) -> None:
    made = await client.create_machine(spec(idle_timeout_s=0.1, idle_action=IdleAction.PAUSE, hibernate_after_s=1.5))
    await until_state(client, made, FROZEN)
    await until_state(client, made, HIBERNATED)
    assert (await client.agent(made.id).stat("/")).is_dir
    await until_state(client, made, FROZEN)


async def test_a_machine_in_use_is_not_paused(client: HostClient) -> None:
    made = await client.create_machine(spec(idle_timeout_s=0.1, idle_action=IdleAction.PAUSE))
    done = await client.agent(made.id).run("busy", Command(argv=["sleep", "0.4"]), deadline=soon())
    assert done.exit.exit_code == 0
    await until_state(client, made, FROZEN)


async def test_an_idle_machine_is_kept_when_told_to(client: HostClient) -> None:
    kept = await client.create_machine(spec(idle_timeout_s=0.05, idle_action=IdleAction.KEEP))
    ended = await client.create_machine(spec(idle_timeout_s=0.05))
    await until_state(client, ended, MachineState.STOPPED)
    assert (await client.get_machine(kept.id)).state is RUNNING


@pytest.mark.parametrize("hibernate", [False, True])
async def test_a_paused_machine_expires(client: HostClient, driver: FakeDriver, hibernate: bool) -> None:
    made = await client.create_machine(spec())
    await client.pause_machine(made.id, hibernate=hibernate)
    await client.update_machine(made.id, expires_at=time.time() + 0.1)
    ended = await until_state(client, made, MachineState.STOPPED)
    assert ended.cause is StopCause.TIMEOUT
    assert not driver.units


async def test_a_hibernation_is_given_up_for_a_wake(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec(hibernate_after_s=0.0))
    driver.faults_of(made.unit or "").save_delay_s = 30
    await client.pause_machine(made.id)
    await until_state(client, made, MachineState.HIBERNATING)
    woken = await client.resume_machine(made.id)
    assert (woken.state, woken.unit) == (RUNNING, made.unit)


async def test_a_hibernation_that_fails_leaves_the_machine_frozen(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    driver.faults_of(made.unit or "").save_error = "no_space"
    assert await code_of(client.pause_machine(made.id, hibernate=True)) == "no_space"
    assert (await client.get_machine(made.id)).state is FROZEN
    assert (await client.agent(made.id).stat("/")).is_dir


async def test_a_machine_is_ended_while_it_is_saved(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    driver.faults_of(made.unit or "").save_delay_s = 30
    pausing = asyncio.create_task(code_of(client.pause_machine(made.id, hibernate=True)))
    await until_state(client, made, MachineState.HIBERNATING)
    assert await client.destroy_machine(made.id, StopCause.REQUESTED)
    assert await pausing == "machine_not_running"
    assert not driver.units


async def test_a_unit_that_dies_frozen_is_noticed(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    await client.pause_machine(made.id)
    await driver.end(made.unit or "", Exit(StopCause.KILLED))
    assert (await until_state(client, made, MachineState.STOPPED)).cause is StopCause.KILLED


async def test_a_freeze_or_thaw_that_fails_changes_nothing(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    faults = driver.faults_of(made.unit or "")
    faults.freeze_error = "driver_failed"
    assert await code_of(client.pause_machine(made.id)) == "driver_failed"
    assert (await client.agent(made.id).stat("/")).is_dir
    faults.freeze_error = None
    await client.pause_machine(made.id)
    faults.thaw_error = "driver_failed"
    assert await code_of(client.agent(made.id).stat("/")) == "driver_failed"
    assert (await client.get_machine(made.id)).state is FROZEN
    faults.thaw_error = None
    assert (await client.agent(made.id).stat("/")).is_dir


async def test_the_longest_frozen_machine_makes_room(tmp_path: Path) -> None:
    sockets = tmp_path / "r.sock"
    async with (
        host_in_process(tmp_path / "home", sockets, FakeDriver(), hibernate_below_mib=1 << 40),
        HostClient(str(sockets)) as client,
    ):
        machines = [await client.create_machine(spec()) for _ in range(3)]
        for machine in machines:
            await client.pause_machine(machine.id)
        order: list[str] = []
        async with asyncio.timeout(60):
            async for change in client.events():
                if change.state is HIBERNATED and change.id not in order:
                    order.append(change.id)
                if len(order) == 3:
                    break
        assert order == [machine.id for machine in machines]


async def test_a_wake_from_disk_needs_memory(tmp_path: Path) -> None:
    sockets = tmp_path / "m.sock"
    async with HostClient(str(sockets)) as client:
        async with host_in_process(tmp_path / "home", sockets, FakeDriver()):
            made = await client.create_machine(spec())
            await client.pause_machine(made.id, hibernate=True)
        async with host_in_process(tmp_path / "home", sockets, FakeDriver(), memory_reserve_mib=1 << 40):
            assert await code_of(client.resume_machine(made.id, deadline=soon())) == "no_capacity"
            assert (await client.get_machine(made.id)).state is HIBERNATED


async def test_paused_machines_outlive_an_orderly_end(tmp_path: Path) -> None:
    sockets = tmp_path / "o.sock"
    async with HostClient(str(sockets)) as client:
        async with host_in_process(tmp_path / "home", sockets, FakeDriver()):
            machines = [await client.create_machine(spec()) for _ in range(3)]
            for machine in machines:
                await agent_of(client, machine).write("/workspace/f", machine.id.encode())
            await client.pause_machine(machines[1].id)
            await client.pause_machine(machines[2].id, hibernate=True)
        async with host_in_process(tmp_path / "home", sockets, FakeDriver()):
            states = {machine.id: machine.state for machine in await client.list_machines(deadline=soon())}
            assert [states[machine.id] for machine in machines] == [MachineState.STOPPED, HIBERNATED, HIBERNATED]
            for machine in machines[1:]:
                content = await agent_of(client, machine).read_bytes("/workspace/f", size_max=100)
                assert content == machine.id.encode()


def agent_of(client: HostClient, machine: MachineInfo) -> Agent:
    return client.agent(machine.id)


async def test_what_has_ended_cannot_be_paused(client: HostClient) -> None:
    made = await client.create_machine(spec())
    await client.destroy_machine(made.id, StopCause.REQUESTED)
    assert await code_of(client.pause_machine(made.id)) == "machine_not_running"
    assert await code_of(client.resume_machine(str(uuid.uuid4()))) == "machine_not_found"
