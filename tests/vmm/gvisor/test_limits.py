"""A guest that takes all it can get: the limit holds, the cause is told, host and neighbours go on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.support.host import machine_spec
from tests.vmm.gvisor.support import Box, until
from vmm.client import HostClient
from vmm.errors import VmmError
from vmm.types import MachineState, StopCause

_MIB = 1024 * 1024


async def test_too_much_memory_ends_the_machine_with_cause_oom(client: HostClient, neighbour: Box) -> None:
    machine = await client.create_machine(machine_spec(memory_mib=256))
    greedy = Box(client, machine)
    with pytest.raises(VmmError, match=r"agent_unreachable|machine_not_running"):
        await greedy.run("python3", "-c", "b = bytearray(1 << 30)\nfor i in range(0, len(b), 4096): b[i] = 1")
    await until(lambda: _is_over(client, machine.id))
    ended = await client.get_machine(machine.id)
    assert ended.state is MachineState.STOPPED
    assert ended.cause is StopCause.OOM
    assert (await neighbour.run("true")).exit.exit_code == 0


async def test_a_full_disk_is_an_error_inside_and_nothing_else(client: HostClient, box: Box) -> None:
    small = Box(client, await client.create_machine(machine_spec(disk_mib=64, memory_mib=256)))
    full = await small.run("dd", "if=/dev/zero", "of=/workspace/big", "bs=1M", "count=200")
    assert full.exit.exit_code == 1
    assert b"No space left on device" in full.stderr
    written = int(await small.shell("stat -c %s /workspace/big"))
    assert 60 * _MIB <= written <= 80 * _MIB
    # The machine goes on, and what is deleted can be written again.
    assert (await small.shell("rm /workspace/big && echo again > /workspace/a && cat /workspace/a")).strip() == "again"
    assert (await small.run("dd", "if=/dev/zero", "of=/workspace/b", "bs=1M", "count=50")).exit.exit_code == 0
    assert (await box.run("dd", "if=/dev/zero", "of=/workspace/b", "bs=1M", "count=100")).exit.exit_code == 0
    await client.destroy_machine(small.machine.id, StopCause.REQUESTED)


async def test_what_was_written_to_the_disk_can_be_run(box: Box) -> None:
    assert (await box.shell("cp /bin/echo /workspace/own && /workspace/own runs")).strip() == "runs"


async def test_a_file_larger_than_the_memory_fits_the_disk(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec(memory_mib=256, disk_mib=1024)))
    # Whole blocks: a signal may cut a read of random bytes short.
    done = await box.run("dd", "if=/dev/urandom", "of=/workspace/big", "bs=1M", "count=600", "iflag=fullblock")
    assert done.exit.exit_code == 0, done.stderr
    assert (await box.shell("stat -c %s /workspace/big")).strip() == str(600 * _MIB)
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)


async def test_a_fork_bomb_harms_nobody_else(client: HostClient, neighbour: Box) -> None:
    box = Box(client, await client.create_machine(machine_spec(memory_mib=256)))
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    # It ends by its timeout or takes the machine along; both are the guest's own affair.
    with contextlib.suppress(VmmError):
        await box.run("python3", "-c", bomb, timeout_s=5)
    assert (await neighbour.run("true")).exit.exit_code == 0
    assert await client.stats(neighbour.machine.id)
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)
    await until(lambda: _is_over(client, box.machine.id))


async def test_the_processor_limit_holds(client: HostClient) -> None:
    box = Box(client, await client.create_machine(machine_spec(cpu_count=0.5)))
    before = (await client.stats(box.machine.id)).cpu_seconds
    line = "timeout 2 sh -c 'while :; do :; done' & timeout 2 sh -c 'while :; do :; done' & wait"
    started = float(Path("/proc/uptime").read_text().split()[0])
    await box.shell(line)
    elapsed_s = float(Path("/proc/uptime").read_text().split()[0]) - started
    used_s = (await client.stats(box.machine.id)).cpu_seconds - before
    # Two busy loops would use twice the elapsed time; a period's slack allows for the edges.
    assert used_s <= 0.5 * elapsed_s + 0.3
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)


async def _is_over(client: HostClient, machine_id: str) -> bool:
    return (await client.get_machine(machine_id)).state in (MachineState.STOPPED, MachineState.FAILED)
