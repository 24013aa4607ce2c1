"""The client of hostd against a real hostd with the fake driver, killed and cut on the way."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import orjson
import pytest

from native import frames
from tests.vmm.hosts import HostProcess, host_in_process
from vmm.agent import Agent
from vmm.client import HostClient
from vmm.drivers.base import Exit
from vmm.drivers.fake import FakeDriver
from vmm.errors import AgentError, LinkError, MachineError
from vmm.guest import Command
from vmm.link import VERSION
from vmm.types import MachineInfo, MachineSpec, MachineState, StopCause


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "h.sock"


@pytest.fixture
async def driver(tmp_path: Path, socket_path: Path) -> AsyncIterator[FakeDriver]:
    driver = FakeDriver()
    async with host_in_process(tmp_path / "home", socket_path, driver):
        yield driver


@pytest.fixture
async def client(driver: FakeDriver, socket_path: Path) -> AsyncIterator[HostClient]:
    async with HostClient(str(socket_path)) as client:
        yield client


@pytest.fixture
async def host(tmp_path: Path, socket_path: Path) -> AsyncIterator[HostProcess]:
    host = HostProcess(tmp_path / "home", socket_path)
    await host.start()
    yield host
    await host.kill()


def spec(**fields: object) -> MachineSpec:
    return MachineSpec(**{"id": str(uuid.uuid4()), "template": "default", "hostname": "m", **fields})  # type: ignore[arg-type]


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def test_a_machine_lives_and_ends(client: HostClient) -> None:
    wanted = spec(env={"A": "1"}, idle_timeout_s=600.0)
    made = await client.create_machine(wanted)
    assert (made.id, made.state) == (wanted.id, MachineState.RUNNING)
    assert await client.get_machine(wanted.id) == made
    assert [machine.id for machine in await client.list_machines()] == [wanted.id]
    done = await client.agent(wanted.id).run("x", Command(argv=["env"]))
    assert b"A=1\n" in done.stdout
    assert (await client.stats(wanted.id)).memory_limit_bytes == 1024 * 1024 * 1024
    assert await client.destroy_machine(wanted.id, StopCause.REQUESTED)
    with pytest.raises(MachineError) as caught:
        await client.agent(wanted.id).stat("/")
    assert caught.value.code in ("machine_not_running", "machine_not_found")


async def test_the_same_id_is_the_same_machine(client: HostClient, driver: FakeDriver) -> None:
    wanted = spec()
    first, second = await asyncio.gather(client.create_machine(wanted), client.create_machine(wanted))
    assert first.id == second.id
    assert list(driver.guests) == [first.unit]


async def test_a_machine_that_was_just_asked_for_is_not_an_orphan(client: HostClient) -> None:
    made = await client.create_machine(spec())
    with pytest.raises(MachineError) as caught:
        await client.destroy_machine(made.id, StopCause.LOST, unwanted_for_s=600.0)
    assert caught.value.code == "in_use"
    assert (await client.get_machine(made.id)).state is MachineState.RUNNING
    assert await client.destroy_machine(made.id, StopCause.LOST, unwanted_for_s=0.0)


async def test_update_changes_what_is_given_alone(client: HostClient) -> None:
    made = await client.create_machine(spec(expires_at=time.time() + 500, idle_timeout_s=50.0))
    updated = await client.update_machine(made.id, idle_timeout_s=None)
    assert (updated.idle_timeout_s, updated.expires_at) == (None, made.expires_at)
    updated = await client.update_machine(made.id, expires_at=None)
    assert (updated.idle_timeout_s, updated.expires_at) == (None, None)


async def test_refusals_are_machine_errors(client: HostClient) -> None:
    with pytest.raises(MachineError) as caught:
        await client.get_machine(str(uuid.uuid4()))
    assert caught.value.code == "machine_not_found"
    with pytest.raises(MachineError) as caught:
        await client.create_machine(spec(template="no-such"))
    assert caught.value.code == "template_not_found"


async def test_what_the_agent_refuses_is_an_agent_error(client: HostClient) -> None:
    made = await client.create_machine(spec())
    with pytest.raises(AgentError, match="not_found"):
        await client.agent(made.id).stat("/no/such")


async def test_templates_and_host_are_told(client: HostClient) -> None:
    assert "default" in [template.name for template in await client.templates()]
    info = await client.host_info()
    assert (info.driver, info.capabilities["isolation"]) == ("fake", "none")


async def test_activity_is_reported(client: HostClient) -> None:
    made = await client.create_machine(spec(idle_timeout_s=600.0))
    await client.touch([made.id])
    touched = await client.get_machine(made.id)
    assert touched.last_active_at >= made.last_active_at
    await client.agent(made.id, passive=True).stat("/")
    assert (await client.get_machine(made.id)).last_active_at == touched.last_active_at


async def test_large_output_and_input_pass_through(client: HostClient) -> None:
    agent = client.agent((await client.create_machine(spec())).id)
    done = await agent.run("big", Command(shell="yes | head -c 20000000"), output_bytes_max=30_000_000)
    assert done.stdout == b"y\n" * 10_000_000
    data = bytes(range(256)) * 20_000
    assert (await agent.run("cat", Command(argv=["cat"]), stdin=data)).stdout == data
    assert (await agent.write("/workspace/f", data)).size == len(data)
    assert await agent.read_bytes("/workspace/f", size_max=len(data)) == data


async def test_a_cut_between_host_and_agent_loses_nothing(client: HostClient, driver: FakeDriver) -> None:
    made = await client.create_machine(spec())
    agent = client.agent(made.id)
    async with await agent.exec("long", Command(shell="yes | head -c 5000000"), deadline=soon()) as execution:
        received = bytearray()
        async for _, offset, data in execution:
            assert offset == len(received)
            if len(received) < 3_000_000 <= len(received) + len(data):
                driver.cut(made.unit or "")
            received += data
        assert received == b"y\n" * 2_500_000
        assert execution.exit is not None
        assert execution.exit.exit_code == 0


async def test_every_agent_shares_one_connection(client: HostClient, driver: FakeDriver) -> None:
    machines = [(await client.create_machine(spec())).id for _ in range(20)]
    link = await client.link(soon())
    outcomes = await asyncio.gather(
        *(
            client.agent(machine).run(f"{machine}-{n}"[:64], Command(argv=["echo", machine]))
            for n in range(5)
            for machine in machines
        )
    )
    assert [done.stdout.decode().strip() for done in outcomes] == machines * 5
    assert await client.link(soon()) is link
    assert link.stream_count == 0


async def test_events_tell_what_is_and_what_changes(client: HostClient, driver: FakeDriver) -> None:
    first = await client.create_machine(spec())
    async with asyncio.timeout(60), _events(client) as events:
        assert (await anext(events)).id == first.id
        second = await client.create_machine(spec())
        await _event(events, lambda m: m.id == second.id and m.state == MachineState.RUNNING)
        await driver.end(first.unit or "", Exit(StopCause.OOM, "out of memory"))
        ended = await _event(events, lambda m: m.id == first.id and m.state == MachineState.STOPPED)
        assert ended.cause == StopCause.OOM


async def test_a_client_without_a_host_gives_up_at_its_deadline(socket_path: Path) -> None:
    async with HostClient(str(socket_path)) as client:
        with pytest.raises(LinkError) as caught:
            await client.list_machines(deadline=soon(0.1))
    assert caught.value.code == "host_unreachable"


async def test_a_closed_client_does_not_wait(client: HostClient) -> None:
    client.close()
    with pytest.raises(LinkError, match="closed"):
        await client.list_machines(deadline=soon())


async def test_calls_wait_for_a_killed_host_to_come_back(host: HostProcess, socket_path: Path) -> None:
    async with HostClient(str(socket_path)) as client:
        await client.create_machine(spec(), deadline=soon())
        await host.kill()
        under_way = [asyncio.create_task(client.host_info(deadline=soon())) for _ in range(5)]
        wanted = spec()
        creating = asyncio.create_task(client.create_machine(wanted, deadline=soon()))
        await host.start()
        assert {info.driver for info in await asyncio.gather(*under_way)} == {"fake"}
        assert (await creating).id == wanted.id


async def test_no_change_stays_unseen_when_the_host_is_killed(host: HostProcess, socket_path: Path) -> None:
    async with HostClient(str(socket_path)) as client, asyncio.timeout(60), _events(client) as events:
        made = await client.create_machine(spec(), deadline=soon())
        await _event(events, lambda m: m.id == made.id and m.state == MachineState.RUNNING)
        await host.kill()
        await host.start()
        # The fake driver's machines end with their process: the new hostd can only say that they are lost.
        over = (MachineState.STOPPED, MachineState.FAILED)
        await _event(events, lambda m: m.id == made.id and m.state in over)
        fresh = await client.create_machine(spec(), deadline=soon())
        await _event(events, lambda m: m.id == fresh.id and m.state == MachineState.RUNNING)


async def test_what_may_not_be_repeated_says_so(host: HostProcess, socket_path: Path) -> None:
    async with HostClient(str(socket_path)) as client:
        made = await client.create_machine(spec(), deadline=soon())
        agent = client.agent(made.id)
        execution = await agent.exec("s", Command(argv=["sleep", "60"]), deadline=soon())
        with pytest.raises(LinkError):
            await agent.write("/workspace/f", _then("some", host.kill), deadline=soon())
        execution.close()


async def test_many_machines_are_made_at_once(client: HostClient, driver: FakeDriver) -> None:
    async def live(wanted: MachineSpec) -> None:
        await client.create_machine(wanted, deadline=soon(60))
        done = await client.agent(wanted.id).run("x", Command(argv=["echo", wanted.id]), deadline=soon(60))
        assert done.stdout.decode().strip() == wanted.id

    await asyncio.gather(*(live(spec(memory_mib=128)) for _ in range(100)))
    assert len(driver.guests) == 100


async def _then(first: str, act: Callable[[], Awaitable[None]]) -> AsyncIterator[bytes]:
    yield first.encode()
    await act()
    yield b"more"


class _events:  # noqa: N801 - reads as a function
    """Reads events in a task, so that none waits for the test."""

    def __init__(self, client: HostClient) -> None:
        self._client = client
        self._queue: asyncio.Queue[MachineInfo] = asyncio.Queue()

    async def __aenter__(self) -> AsyncIterator[MachineInfo]:
        self._task = asyncio.create_task(self._read())
        return self._take()

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        async for machine in self._client.events():
            self._queue.put_nowait(machine)

    async def _take(self) -> AsyncIterator[MachineInfo]:
        while True:
            yield await self._queue.get()


async def _event(events: AsyncIterator[MachineInfo], wanted: Callable[[MachineInfo], bool]) -> MachineInfo:
    async for machine in events:
        if wanted(machine):
            return machine
    raise AssertionError("the events ended")


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("ends_with_client", [True, False])
async def test_a_process_ends_with_its_client_if_that_is_wanted(
    client: HostClient, socket_path: Path, ends_with_client: bool
) -> None:
    machine = spec()
    await client.create_machine(machine)
    agent = client.agent(machine.id)
    op = {**agent.exec_op("e", Command(shell="sleep 987")), "ends_with_client": ends_with_client}
    wire = await greeted(socket_path)
    wire.write(frames.encode(frames.OPEN, 0, 1, orjson.dumps(op)))
    await eventually_state(agent, "e", "running")
    wire.close()
    await eventually_state(agent, "e", "exited" if ends_with_client else "running")
    await agent.signal("SIGKILL", "e")


async def greeted(socket_path: Path) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_unix_connection(str(socket_path))
    writer.write(frames.encode(frames.HELLO, 0, 0, orjson.dumps({"version": VERSION, "role": "api"})))
    return writer


async def eventually_state(agent: Agent, exec_id: str, state: str) -> None:
    async with asyncio.timeout(30):
        while [one.state for one in await agent.processes() if one.id == exec_id] != [state]:
            await asyncio.sleep(0.02)
