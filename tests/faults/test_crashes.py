"""kill -9 of hostd or of what it runs, at every named point: the old state or the new, never half."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.crashes import CASES, DEATHS, POOLED_MIB, Scene, die, ending
from tests.faults.fakehost import FakeHost, Keeper, keeper
from tests.support.fuse import HOSTD
from vmm.client import HostClient
from vmm.drivers.base import Shape
from vmm.host.config import PoolConfig

#: One unit, of a shape that only the case about it asks for.
POOL = PoolConfig(shapes=(Shape("default", 1.0, POOLED_MIB, 3072),), ready_min=1, ready_max=1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def units() -> Iterator[Keeper]:
    with keeper() as running_keeper:
        yield running_keeper


@asynccontextmanager
async def scene(name: str, home: Path, units: Keeper) -> AsyncIterator[Scene]:
    host = FakeHost(home, units, pool=POOL if name == "claim" else PoolConfig())
    try:
        await host.start()
        async with HostClient(str(host.socket_path)) as client:
            scene = Scene(host, client)
            await scene.set()
            yield scene
    finally:
        await host.stop()
        units.ask("sweep", [])


def test_there_are_enough_deaths() -> None:
    assert len(DEATHS) >= 100


def test_every_point_is_died_at() -> None:
    named = {
        label
        for path in (ROOT / "vmm" / "host").glob("*.py")
        if path.name != "crash.py"
        for label in re.findall(r'point\("([^"]+)"\)', path.read_text())
    }
    assert named == {label for case in CASES.values() for label in case.labels}


@pytest.mark.parametrize("name", CASES)
async def test_the_operation_passes_its_points(name: str, tmp_path: Path, units: Keeper) -> None:
    case = CASES[name]
    async with scene(name, tmp_path / "home", units) as here:
        await case.before(here)
        here.host.fuse.light("none", HOSTD)
        assert await ending(case.act(here)) is None
        await here.settled()
        assert list(dict.fromkeys(here.host.fuse.labels())) == case.labels
        here.host.fuse.path.unlink()
        await here.check_nothing_left()


@pytest.mark.parametrize(("name", "label", "victim"), DEATHS, ids=str)
async def test_a_death_leaves_the_old_state_or_the_new(
    name: str, label: str, victim: str, tmp_path: Path, units: Keeper
) -> None:
    async with scene(name, tmp_path / "home", units) as here:
        await die(here, name, label, victim)
