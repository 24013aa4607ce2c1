"""Some of the deaths of test_crashes.py with real machines: gVisor's kernel has ends of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crashes import DEATHS, Scene, die
from tests.support.fuse import HOSTD, Fuse
from tests.support.host import HostProcess, machine_spec
from tests.vmm.gvisor.support import processes, traces
from vmm.drivers.gvisor.cgroups import Groups, find_hierarchy
from vmm.drivers.gvisor.config import instance_id
from vmm.types import MachineSpec, StopCause

#: Where the real driver does most: with hostd dying, and a few with the sandbox.
_OPERATIONS = ("hibernate", "resume-hibernated", "snapshot", "restore", "fork", "create-from-snapshot", "pause")
_CHOSEN = [
    (name, label, victim)
    for name, label, victim in DEATHS
    if name in _OPERATIONS and (victim == HOSTD or label in ("save.held", "hibernate.saved", "restore.restored"))
]


@dataclass
class RealHost:
    """hostd over gVisor."""

    home: Path
    counter: Sequence[str] = ("bash", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    fuse: Fuse = field(init=False)

    def __post_init__(self) -> None:
        self.process = HostProcess(self.home, host={"hibernate_below_mib": 0})
        self.fuse = Fuse(self.home / "fuse", lambda _: None)
        self._groups = Groups(find_hierarchy(), instance_id(self.home))

    async def start(self) -> None:
        await self.process.start()

    async def has_died(self) -> None:
        await asyncio.to_thread(self.process.bury)

    def spec(self, machine_id: str, **fields: Any) -> MachineSpec:
        return machine_spec(id=machine_id, memory_mib=256, **fields)

    def units(self) -> set[str]:
        return self._groups.machines()

    def alive(self) -> set[str]:
        lines = [line for _, line in processes() if line.startswith("runsc-sandbox")]
        return {unit for unit in self._groups.machines() if any(unit in line for line in lines)}


@asynccontextmanager
async def scene(home: Path) -> AsyncIterator[Scene]:
    host = RealHost(home)
    await host.start()
    try:
        async with host.process.client() as client:
            scene = Scene(host, client)
            await scene.set()
            yield scene
            for machine in await client.list_machines():
                await client.destroy_machine(machine.id, StopCause.REQUESTED)
    finally:
        await host.process.stop()
        host.process.clean()


@pytest.mark.parametrize(("name", "label", "victim"), _CHOSEN, ids=str)
async def test_a_death_leaves_the_old_state_or_the_new(name: str, label: str, victim: str, tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        await die(here, name, label, victim)
    assert not traces(tmp_path)
