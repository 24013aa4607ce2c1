"""hostd killed or ended: machines go on or go away, and nothing is left that should not be."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from pathlib import Path

from tests.support.host import HostProcess, machine_spec
from tests.vmm.gvisor.support import Box, traces, until
from vmm.guest import Command
from vmm.types import MachineState, StopCause


async def test_machines_and_their_commands_survive_a_killed_hostd(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        boxes = [Box(client, await client.create_machine(machine_spec())) for _ in range(3)]
        line = "for i in $(seq 30); do echo $i; sleep 0.1; done"
        counting = await boxes[0].agent.exec(str(uuid.uuid4()), Command(argv=["bash", "-c", line]))
        output = asyncio.create_task(_read(counting))
        host.kill()
        await host.start()
        assert (await output).split() == [str(number) for number in range(1, 31)]
        assert (await counting.wait()).exit_code == 0
        for box in boxes:
            assert (await client.get_machine(box.machine.id)).state is MachineState.RUNNING
            assert (await box.run("true")).exit.exit_code == 0
        assert await client.destroy_machine(boxes[0].machine.id, StopCause.REQUESTED)
    assert not traces(tmp_path)


async def test_a_create_cut_off_by_a_kill_happens_once(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        for delay_s in (0.0, 0.02, 0.05, 0.1, 0.15, 0.25):
            spec = machine_spec()
            creating = asyncio.create_task(client.create_machine(spec, deadline=time.monotonic() + 60))
            await asyncio.sleep(delay_s)
            host.kill()
            await host.start()
            machine = await creating
            assert machine.state is MachineState.RUNNING
            assert (await Box(client, machine).run("true")).exit.exit_code == 0
            live = [each for each in await client.list_machines() if each.state is MachineState.RUNNING]
            assert [each.id for each in live] == [spec.id]
            await client.destroy_machine(spec.id, StopCause.REQUESTED)
    assert not traces(tmp_path)


async def test_a_machine_that_died_meanwhile_is_told_as_lost(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        machine = await client.create_machine(machine_spec())
        host.kill()
        for pid in traces(tmp_path)["processes"]:
            os.kill(int(pid), signal.SIGKILL)
        await host.start()
        found = await client.get_machine(machine.id)
        assert (found.state, found.cause) == (MachineState.STOPPED, StopCause.LOST)
    assert not traces(tmp_path)


async def test_a_crashed_sandbox_is_noticed_at_once(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        machine = await client.create_machine(machine_spec())
        victims = [pid for pid in traces(tmp_path)["processes"] if _is_sandbox(int(pid))]
        os.kill(int(victims[0]), signal.SIGKILL)

        async def is_over() -> bool:
            return (await client.get_machine(machine.id)).state is MachineState.STOPPED

        await until(is_over)
        ended = await client.get_machine(machine.id)
        assert ended.cause is StopCause.KILLED
        assert ended.detail is not None
        assert "SIGKILL" in ended.detail


async def test_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    async with HostProcess(tmp_path) as host, host.client() as client:
        machines = [await client.create_machine(machine_spec()) for _ in range(4)]
        before = traces(tmp_path)
        assert {"processes", "interfaces", "cgroups", "loops", "tables", "run"} <= before.keys()
        await client.destroy_machine(machines[0].id, StopCause.REQUESTED)
    assert not traces(tmp_path)


async def test_destroyed_machines_leave_nothing_while_hostd_goes_on(tmp_path: Path) -> None:
    async with HostProcess(tmp_path, pool_size=0) as host, host.client() as client:
        machines = await asyncio.gather(*(client.create_machine(machine_spec()) for _ in range(4)))
        await asyncio.gather(*(client.destroy_machine(machine.id, StopCause.REQUESTED) for machine in machines))
        await until(lambda: not {"interfaces", "loops"} & traces(tmp_path).keys())
        cgroups = [path for found in traces(tmp_path).get("cgroups", []) for path in Path(found).iterdir()]
        assert not [path for path in cgroups if path.is_dir()]
        assert not list(Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split())


async def test_two_instances_share_a_host(tmp_path: Path) -> None:
    homes = [tmp_path / "a", tmp_path / "b"]
    async with HostProcess(homes[0]) as first, HostProcess(homes[1]) as second:
        async with first.client() as one, second.client() as two:
            boxes = [Box(client, await client.create_machine(machine_spec())) for client in (one, two)]
            assert boxes[0].address != boxes[1].address
            async with boxes[1].serving(8000):
                assert await boxes[0].open_ports(f"{boxes[1].address}:8000") == set()
        await first.stop()
        async with second.client() as two:
            assert (await Box(two, boxes[1].machine).run("true")).exit.exit_code == 0
        await first.start()
    assert not traces(homes[0])
    assert not traces(homes[1])


async def _read(execution: object) -> str:
    return b"".join([chunk.data async for chunk in execution]).decode()  # type: ignore[attr-defined]


def _is_sandbox(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"runsc-sandbox")
