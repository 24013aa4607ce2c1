"""The warm pool over real sandboxes: a claimed machine is its owner's alone, and whatever was made ahead goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.host import HostProcess, machine_spec
from tests.vmm.gvisor.support import Box
from vmm.client import HostClient
from vmm.drivers.gvisor.cgroups import Groups, find_hierarchy
from vmm.drivers.gvisor.config import instance_id
from vmm.types import MachineInfo, Origin, PoolStatus, StopCause

_SHAPE = {"template": "miosa-sandbox", "cpu_count": 1.0, "memory_mib": 512, "disk_mib": 3072}
_POOL = {"shapes": [_SHAPE], "ready_min": 2, "ready_max": 4, "shells_min": 1, "shells_max": 2, "memory_share": 0.5}


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    process = HostProcess(tmp_path_factory.mktemp("pooled"), host={"pool": _POOL})
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())
    process.clean()


@pytest.fixture
async def client(pooled: HostProcess) -> AsyncIterator[HostClient]:
    async with pooled.client() as client:
        yield client


async def filled(client: HostClient, *, ready: int = 2, shells: int = 1) -> PoolStatus:
    async with asyncio.timeout(60):
        while True:
            (found,) = await client.pool_status()
            if found.ready >= ready and found.shells >= shells:
                return found
            await asyncio.sleep(0.02)


async def claim(client: HostClient, hostname: str, **env: str) -> MachineInfo:
    await filled(client)
    machine = await client.create_machine(machine_spec(hostname=hostname, env=env))
    assert machine.origin is Origin.READY
    return machine


async def test_a_claimed_machine_is_its_owners(client: HostClient) -> None:
    mine = Box(client, await claim(client, "mine", SECRET="mine-only"))
    other = Box(client, await claim(client, "other"))
    try:
        for box, name in ((mine, "mine"), (other, "other")):
            seen = await box.shell("hostname; cat /etc/hostname; getent hosts $(hostname)")
            assert seen.split() == [name, name, box.address, name]
            assert "nameserver" in await box.shell("cat /etc/resolv.conf")
        ids = [(await box.shell("cat /etc/machine-id")).strip() for box in (mine, other)]
        assert len(set(ids)) == 2
        assert {len(machine_id) for machine_id in ids} == {32}
        assert "SECRET=mine-only" in await mine.shell("env")
        everything = await other.shell("env; ls -a /etc /tmp /home/user; cat /proc/*/environ", user="root")
        assert "mine" not in everything
        assert ".tmp" not in await mine.shell("ls -a /etc"), "no draft is left"
        drawn = [await box.shell("head -c 16 /dev/urandom | od -An -tx1") for box in (mine, other)]
        assert drawn[0] != drawn[1]
        assert abs(float(await mine.shell("date +%s.%N")) - time.time()) < 5, "however long it stood still"
    finally:
        for box in (mine, other):
            await client.destroy_machine(box.machine.id, StopCause.REQUESTED)


async def test_a_ready_unit_uses_no_processor_time(client: HostClient, pooled: HostProcess) -> None:
    await filled(client)
    groups = _groups(pooled)
    before = {unit: groups.stats(unit).cpu_seconds for unit in groups.machines() if groups.is_frozen(unit)}
    assert len(before) >= 3, "two ready units and a shell stand still"
    await asyncio.sleep(1.0)
    assert {unit: groups.stats(unit).cpu_seconds for unit in before} == before


async def test_a_killed_unit_is_replaced(client: HostClient, pooled: HostProcess) -> None:
    await filled(client)
    groups = _groups(pooled)
    doomed = groups.machines()
    for unit in doomed:
        for pid in groups.processes(unit):
            os.kill(pid, signal.SIGKILL)
        groups.set_frozen(unit, False)
    async with asyncio.timeout(60):
        while doomed & groups.machines():
            await asyncio.sleep(0.05)
    machine = await claim(client, "after")
    assert await Box(client, machine).shell("echo alive") == "alive\n"
    await client.destroy_machine(machine.id, StopCause.REQUESTED)


async def test_a_restarted_hostd_leaves_no_unit_of_the_last(tmp_path: Path) -> None:
    async with HostProcess(tmp_path, host={"pool": _POOL}) as host:
        async with host.client() as client:
            kept = await claim(client, "kept")
            await filled(client)
        before = _groups(host).machines()
        host.kill()
        await host.start()
        async with host.client() as client:
            assert await Box(client, kept).shell("hostname") == "kept\n"
            await filled(client)
            assert _groups(host).machines() & before == {kept.unit}
    assert not _groups(host).machines()


def _groups(host: HostProcess) -> Groups:
    """Where the units of a hostd can be seen from outside."""
    return Groups(find_hierarchy(), instance_id(host.home))
