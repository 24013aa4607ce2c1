"""Real machines frozen, hibernated, restored and forked, with programs that count in memory and on disk."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path

from tests.support.host import HostProcess, machine_spec
from tests.vmm.gvisor.support import Box, traces, until
from vmm.client import HostClient
from vmm.execution import Execution
from vmm.guest import Command
from vmm.types import ChildSpec, MachineInfo, MachineState, StopCause

#: Counts in its memory, says so, and writes each number down.
_COUNTER = """
import sys, time
for number in range(1, int(sys.argv[1]) + 1):
    print(number, flush=True)
    with open("/workspace/count", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.02)
"""


async def counting(box: Box, last: int) -> Execution:
    await box.agent.write("/workspace/count", b"")
    command = Command(argv=["python3", "-c", _COUNTER, str(last)])
    execution = await box.agent.exec("count", command, deadline=soon())
    await until(lambda: count_on_disk(box))
    return execution


async def read(execution: Execution) -> list[int]:
    return [int(line) for line in b"".join([chunk.data async for chunk in execution]).split()]


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def count_on_disk(box: Box) -> list[int]:
    content = await box.agent.read_bytes("/workspace/count", size_max=1 << 20, deadline=soon())
    return [int(line) for line in content.split()]


async def test_a_counter_and_its_reader_survive_every_pause(client: HostClient, box: Box) -> None:
    machine_id = box.machine.id
    async with await counting(box, 150) as execution:
        lines = asyncio.create_task(read(execution))
        for hibernate in (False, True):
            await client.pause_machine(machine_id, hibernate=hibernate, deadline=soon())
            woken = await client.resume_machine(machine_id, deadline=soon())
            assert woken.state is MachineState.RUNNING
        await client.create_snapshot(str(uuid.uuid4()), machine_id, deadline=soon())
        assert await lines == list(range(1, 151))
    assert await count_on_disk(box) == list(range(1, 151))


async def test_a_frozen_machine_uses_no_cpu_and_little_memory(client: HostClient, box: Box) -> None:
    # Something that has a place to go to, whatever the host has in its page cache for others.
    assert (await box.run("dd", "if=/dev/zero", "of=/workspace/zeros", "bs=1M", "count=64")).exit.exit_code == 0
    before = await client.stats(box.machine.id)
    await client.pause_machine(box.machine.id, deadline=soon())

    async def has_shrunk() -> bool:
        return (await client.stats(box.machine.id)).memory_bytes < before.memory_bytes

    await until(has_shrunk)
    first = await client.stats(box.machine.id)
    await asyncio.sleep(1)
    assert (await client.stats(box.machine.id)).cpu_seconds == first.cpu_seconds
    assert (await box.run("true")).exit.exit_code == 0


async def test_a_server_answers_again_after_each_wake(client: HostClient, box: Box) -> None:
    async with box.serving(8000):
        for hibernate in (False, True):
            await client.pause_machine(box.machine.id, hibernate=hibernate, deadline=soon())
            woken = Box(client, await client.resume_machine(box.machine.id, deadline=soon()))
            fetch = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/').status)"
            assert (await woken.run("python3", "-c", fetch)).stdout == b"200\n"


async def test_a_machine_goes_back_to_a_snapshot(client: HostClient, box: Box) -> None:
    machine_id = box.machine.id
    await box.agent.write("/workspace/f", b"before")
    taken = await client.create_snapshot(str(uuid.uuid4()), machine_id, deadline=soon())
    await box.agent.write("/workspace/f", b"after")
    restored = await client.restore_machine(machine_id, taken.id, deadline=soon())
    assert restored.address != box.machine.address
    assert await box.agent.read_bytes("/workspace/f", size_max=100) == b"before"
    assert await client.delete_snapshot(taken.id)


async def test_forks_go_on_apart(client: HostClient, box: Box) -> None:
    await counting(box, 10_000)
    children = [ChildSpec(id=str(uuid.uuid4()), hostname=f"child-{number}") for number in range(3)]
    fork = await client.fork_machine(box.machine.id, children, deadline=soon())
    boxes = [Box(client, child) for child in fork.machines if isinstance(child, MachineInfo)]
    assert len(boxes) == 3
    try:
        assert len({child.address for child in boxes} | {box.address}) == 4
        names = [(await child.run("hostname")).stdout.decode().strip() for child in boxes]
        assert names == ["child-0", "child-1", "child-2"]
        for one in (box, *boxes):
            counted = await count_on_disk(one)
            await until(lambda one=one, counted=counted: _is_longer(one, len(counted)))  # type: ignore[misc]
            now = await count_on_disk(one)
            assert now == list(range(1, len(now) + 1))
    finally:
        for child in boxes:
            await client.destroy_machine(child.machine.id, StopCause.REQUESTED)


async def _is_longer(box: Box, length: int) -> bool:
    return len(await count_on_disk(box)) > length


async def test_paused_machines_survive_a_killed_and_a_stopped_hostd(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        boxes = [Box(client, await client.create_machine(machine_spec())) for _ in range(2)]
        for box in boxes:
            await counting(box, 10_000)
        await client.pause_machine(boxes[0].machine.id, deadline=soon())
        await client.pause_machine(boxes[1].machine.id, hibernate=True, deadline=soon())
        host.kill()
        await host.start()
        states = [(await client.get_machine(box.machine.id, deadline=soon())).state for box in boxes]
        assert states == [MachineState.FROZEN, MachineState.HIBERNATED]
        await host.stop()
        assert not [kind for kind in traces(tmp_path) if kind != "loops"]
        await host.start()
        for box in boxes:
            assert (await client.get_machine(box.machine.id, deadline=soon())).state is MachineState.HIBERNATED
            counted = await count_on_disk(box)
            await until(lambda box=box, counted=counted: _is_longer(box, len(counted)))  # type: ignore[misc]
            await client.destroy_machine(box.machine.id, StopCause.REQUESTED)
    assert not traces(tmp_path)
