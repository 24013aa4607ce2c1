"""The life of real machines as a client of hostd sees it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid

import pytest

from tests.support.host import machine_spec
from tests.vmm.gvisor.support import Box, until
from vmm.client import HostClient
from vmm.errors import MachineError, VmmError
from vmm.guest import Command
from vmm.types import MachineInfo, MachineState, StopCause


async def test_a_machine_runs_commands_with_its_environment(client: HostClient) -> None:
    spec = machine_spec(env={"COLOUR": "green"})
    box = Box(client, await client.create_machine(spec))
    assert box.machine.state is MachineState.RUNNING
    assert box.machine.boot_ms is not None
    assert (await box.shell("echo $COLOUR")).strip() == "green"
    assert await client.destroy_machine(spec.id, StopCause.REQUESTED)
    assert not await client.destroy_machine(spec.id, StopCause.REQUESTED)


async def test_the_same_id_yields_the_same_machine(client: HostClient) -> None:
    spec = machine_spec()
    machines = await asyncio.gather(*(client.create_machine(spec) for _ in range(5)))
    assert len({machine.address for machine in machines}) == 1
    await client.destroy_machine(spec.id, StopCause.REQUESTED)
    assert (await client.create_machine(spec)).state in (MachineState.STOPPING, MachineState.STOPPED)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"template": "no-such"}, "template_not_found"),
        ({"id": "../../etc/passwd"}, "bad_request"),
        ({"id": "A" * 36}, "bad_request"),
        ({"hostname": "not a name"}, "bad_request"),
        ({"hostname": "x" * 64}, "bad_request"),
        ({"memory_mib": 127}, "limit_exceeded"),
        ({"memory_mib": 1 << 20}, "limit_exceeded"),
        ({"disk_mib": 1 << 30}, "limit_exceeded"),
        ({"cpu_count": 0}, "limit_exceeded"),
    ],
)
async def test_what_cannot_be_made_is_refused_and_leaves_no_trace(
    client: HostClient, fields: dict[str, object], code: str
) -> None:
    spec = machine_spec(**fields)
    with pytest.raises(MachineError) as caught:
        await client.create_machine(spec)
    assert caught.value.code == code
    assert spec.id not in {machine.id for machine in await client.list_machines()}


async def test_aliases_name_the_template(client: HostClient) -> None:
    (template,) = await client.templates()
    box = Box(client, await client.create_machine(machine_spec(template=template.aliases[0])))
    assert "Python 3" in await box.shell("python3 --version; node --version; git --version")
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)


async def test_a_machine_ends_when_it_expires(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec()))
    await client.update_machine(box.machine.id, expires_at=time.time() + 0.2)
    await until(lambda: _is_over(client, box.machine.id))
    assert (await client.get_machine(box.machine.id)).cause is StopCause.TIMEOUT


async def test_activity_and_only_activity_keeps_a_machine(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec()))
    await box.run("sleep", "0.1")
    await client.update_machine(box.machine.id, idle_timeout_s=1.5)
    # A silent command that somebody waits for outlasts the timeout; asking passively does not extend it.
    await box.run("sleep", "2.5")
    assert (await client.get_machine(box.machine.id)).state is MachineState.RUNNING
    passive = client.agent(box.machine.id, passive=True)

    async def has_idled_out_although_asked() -> bool:
        with contextlib.suppress(VmmError):
            await passive.metrics()
        return await _is_over(client, box.machine.id)

    await until(has_idled_out_although_asked)
    assert (await client.get_machine(box.machine.id)).cause is StopCause.IDLE


async def test_touching_keeps_a_machine(client: HostClient) -> None:
    machine = await client.create_machine(machine_spec(idle_timeout_s=1.0))
    for _ in range(8):
        await asyncio.sleep(0.25)
        await client.touch([machine.id, str(uuid.uuid4())])
    assert (await client.get_machine(machine.id)).state is MachineState.RUNNING
    await client.destroy_machine(machine.id, StopCause.REQUESTED)


async def test_the_user_cannot_kill_the_agent(box: Box) -> None:
    await box.shell("kill -9 1; kill -TERM 1; kill -STOP 1")
    assert (await box.run("true")).exit.exit_code == 0


async def test_a_machine_that_root_ends_from_inside_is_told_as_exited(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec()))
    with contextlib.suppress(VmmError):
        await box.shell("kill -9 1", user="root")
    await until(lambda: _is_over(client, box.machine.id))
    ended = await client.get_machine(box.machine.id)
    assert ended.state is MachineState.STOPPED
    assert ended.cause is StopCause.EXITED


async def test_changes_of_state_are_told(client: HostClient) -> None:
    spec = machine_spec()
    told: list[MachineInfo] = []

    async def listen() -> None:
        async for machine in client.events():
            told.extend([machine] if machine.id == spec.id else [])

    listening = asyncio.create_task(listen())
    await client.create_machine(spec)
    await until(lambda: any(machine.state is MachineState.RUNNING for machine in told))
    await client.destroy_machine(spec.id, StopCause.REQUESTED)
    await until(lambda: told[-1].state is MachineState.STOPPED)
    listening.cancel()
    states = [machine.state for machine in told]
    assert states == sorted(states, key=list(MachineState).index)
    assert told[-1].cause is StopCause.REQUESTED


async def test_thirty_machines_at_once(client: HostClient) -> None:
    specs = [machine_spec(hostname=f"box-{number}", memory_mib=256) for number in range(30)]
    machines = await asyncio.gather(*(client.create_machine(spec, deadline=time.monotonic() + 120) for spec in specs))
    assert len({machine.address for machine in machines}) == 30
    boxes = [Box(client, machine) for machine in machines]
    names = await asyncio.gather(*(box.shell("hostname") for box in boxes))
    assert [name.strip() for name in names] == [spec.hostname for spec in specs]
    ended = await asyncio.gather(*(client.destroy_machine(spec.id, StopCause.REQUESTED) for spec in specs))
    assert all(ended)


async def test_a_slow_reader_stalls_its_own_stream_only(client: HostClient, box: Box) -> None:
    slow = await box.agent.exec(str(uuid.uuid4()), Command(argv=["head", "-c", "50000000", "/dev/zero"]))
    first = await anext(aiter(slow))
    assert first.data
    # Nobody reads `slow` now, and others of the same machine and connection do not notice.
    for _ in range(3):
        done = await box.run("head", "-c", "3000000", "/dev/zero")
        assert len(done.stdout) == 3_000_000
    rest = sum([len(chunk.data) async for chunk in slow])
    assert len(first.data) + rest == 50_000_000
    assert (await slow.wait()).exit_code == 0


async def test_streams_end_with_their_machine(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec()))
    execution = await box.agent.exec(str(uuid.uuid4()), Command(argv=["sleep", "1000"]))
    waiting = asyncio.create_task(execution.wait())
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)
    with pytest.raises(VmmError) as caught:
        async with asyncio.timeout(60):
            await waiting
    assert caught.value.code == "machine_not_running"


async def _is_over(client: HostClient, machine_id: str) -> bool:
    return (await client.get_machine(machine_id)).state in (MachineState.STOPPED, MachineState.FAILED)
