"""Memory kept backed by the hypervisor: real memory, with a clock that says what touching it costs."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vmm.hosts import host_in_process
from vmm.client import HostClient
from vmm.drivers.fake import FakeDriver
from vmm.host import backing
from vmm.host.backing import Backing
from vmm.types import MachineSpec

_MIB = 1024 * 1024
_SIZE_MIB = 16
_DEAR_S, _CHEAP_S = 0.005, 0.0001


class Clock:
    """Processor time of a thread that uses `step_s` from one look to the next."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.looks = 0
        self._now = 0.0

    def __call__(self) -> float:
        self.looks += 1
        self._now += self.step_s
        return self._now


class Host:
    """What a host says it has available."""

    def __init__(self) -> None:
        self.available_mib = 100_000
        self.looks = 0

    def __call__(self) -> int:
        self.looks += 1
        return self.available_mib * _MIB


Make = Callable[[Clock], Backing]


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def make(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes one that has begun to fill."""
    monkeypatch.setattr(backing, "_QUIET_S", 0.01)
    monkeypatch.setattr(backing, "_LOOK_PERIOD_S", 0.01)
    monkeypatch.setattr(backing, "_SAMPLE_PERIOD_S", 0.01)
    made: list[Backing] = []

    def make(clock: Clock) -> Backing:
        one = Backing(_SIZE_MIB, available_bytes=host, reserve_mib=64, clock=clock)
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        one.close()


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what is to become true."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_full(one: Backing) -> bool:
    """Whether it holds all it may."""
    return one.held_bytes == _SIZE_MIB * _MIB


def free_mib() -> float:
    """Memory of this process that the kernel may take."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("LazyFree:"))


def fill(one: Backing, before_mib: float) -> None:
    """Wait until it holds all it may; again from the start if the kernel has taken some of that."""

    def is_done() -> bool:
        until(lambda: is_full(one))
        is_whole = free_mib() - before_mib == _SIZE_MIB
        if not is_whole:
            one.release(_SIZE_MIB)
        return is_whole

    until(is_done)


def test_what_is_let_go_of_is_free_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_QUIET_S", 3600)
    before = free_mib()
    one = make(Clock(_DEAR_S))
    until(lambda: is_full(one))
    one.release(5)
    # In whole huge pages.
    assert one.held_bytes == (_SIZE_MIB - 6) * _MIB
    assert free_mib() - before <= _SIZE_MIB - 6


def test_what_was_let_go_of_is_taken_again(make: Make) -> None:
    before = free_mib()
    one = make(Clock(_DEAR_S))
    fill(one, before)
    one.release(1000)
    fill(one, before)


def test_cheap_memory_is_not_held(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_SAMPLE_PERIOD_S", 3600)
    before = free_mib()
    one = make(Clock(_CHEAP_S))
    until(lambda: is_full(one))
    # The second round is of what was let go of after the first.
    one.release(_SIZE_MIB)
    until(lambda: one.held_bytes == 0 and free_mib() <= before)


def test_memory_that_has_become_dear_is_held_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_CHEAP_ROUNDS", 1)
    monkeypatch.setattr(backing, "_SAMPLE_STEPS", 2)
    clock = Clock(_CHEAP_S)
    one = make(clock)
    until(lambda: clock.looks > 100)
    clock.step_s = _DEAR_S
    until(lambda: is_full(one))
    looks = clock.looks
    one.release(_SIZE_MIB)
    until(lambda: is_full(one) and clock.looks > looks)


def test_nothing_is_taken_while_memory_is_short(make: Make, host: Host) -> None:
    host.available_mib = _SIZE_MIB + 63
    one = make(Clock(_DEAR_S))
    until(lambda: host.looks > 3)
    assert one.held_bytes == 0
    host.available_mib += 1
    until(lambda: is_full(one))


def test_its_end_leaves_neither_thread_nor_memory(make: Make) -> None:
    before = free_mib()
    one = make(Clock(_DEAR_S))
    assert any(thread.name == "backing" for thread in threading.enumerate())
    one.close()
    one.close()
    one.release(8)
    assert not any(thread.name == "backing" for thread in threading.enumerate())
    assert one.held_bytes == 0
    assert free_mib() <= before


def test_none_is_kept_where_none_is_wanted(host: Host) -> None:
    one = Backing(0, available_bytes=host, reserve_mib=0)
    one.start()
    one.release(8)
    one.close()
    assert host.looks == 0


async def test_starts_saves_and_restores_get_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_QUIET_S", 3600)
    socket_path, size = tmp_path / "h.sock", 96 * _MIB
    spec = MachineSpec(id=str(uuid.uuid4()), template="default", hostname="m")
    host = host_in_process(tmp_path / "home", socket_path, FakeDriver(), backing_mib=size // _MIB)
    async with host, HostClient(str(socket_path)) as client:

        async def held() -> int:
            return (await client.host_info()).backing_bytes

        async with asyncio.timeout(60):
            while await held() < size:
                await asyncio.sleep(0.01)
        made = await client.create_machine(spec)
        after_start = await held()
        taken = await client.create_snapshot(str(uuid.uuid4()), made.id)
        after_save = await held()
        await client.restore_machine(made.id, taken.id)
        assert size > after_start > after_save > await held()
