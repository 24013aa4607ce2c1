"""Threads of a sandbox wait for the one that woke them, unless the host has no processor to spare."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.vmm.gvisor.support import opened_driver, until
from vmm.drivers.base import Shape
from vmm.drivers.gvisor import processes
from vmm.drivers.gvisor.turns import Turns
from vmm.drivers.gvisor.unit import Unit

_SHAPE = Shape("miosa-sandbox", 1.0, 512, 1024)


class Host:
    """/proc/stat of a host of our own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle = self._used = 0
        self.pass_time(used=0.5)

    def pass_time(self, *, used: float) -> None:
        """One second of ten processors goes by, this share of it used."""
        self._used += round(1000 * used)
        self._idle += round(1000 * (1 - used))
        # user nice system idle iowait irq softirq steal guest guest_nice
        self._path.write_text(f"cpu  {self._used} 0 0 {self._idle} 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "stat")


@pytest.fixture
async def kernel(host: Host, tmp_path: Path) -> AsyncIterator[int]:
    """The process of a sandbox's kernel on that host, with a guest."""
    async with opened_driver(tmp_path / "home", processor_times=tmp_path / "stat") as driver:
        placement = await driver.start(str(uuid.uuid4()), _SHAPE, token="unused")
        pid = placement.facts["pid"]
        await until(lambda: descendants(pid))
        yield pid


def policies(*pids: int) -> set[int]:
    """Of all threads of these processes."""
    found = set()
    for thread in (thread for pid in pids for thread in processes.threads(pid)):
        with contextlib.suppress(ProcessLookupError):
            found.add(os.sched_getscheduler(thread))
    return found


def descendants(pid: int) -> set[int]:
    """Processes that come of this one."""
    found = set(processes.children(pid))
    return found.union(*map(descendants, found))


def test_a_host_is_busy_once_no_processor_is_idle_and_until_some_are(host: Host, tmp_path: Path) -> None:
    turns = Turns(list, tmp_path / "stat")
    for used, is_busy in ((0.5, False), (0.9, False), (0.95, True), (0.85, True), (0.75, False), (0.9, False)):
        host.pass_time(used=used)
        turns.look()
        assert turns.is_busy is is_busy, used


def test_no_time_gone_by_says_nothing(host: Host, tmp_path: Path) -> None:
    turns = Turns(list, tmp_path / "stat")
    host.pass_time(used=1)
    turns.look()
    turns.look()
    assert turns.is_busy


async def test_every_thread_of_a_sandbox_is_scheduled_as_a_batch(kernel: int) -> None:
    assert policies(kernel, *descendants(kernel)) == {os.SCHED_BATCH}


async def test_on_a_busy_host_the_kernel_runs_at_once_and_the_guest_does_not(kernel: int, host: Host) -> None:
    for used, policy in ((1.0, os.SCHED_OTHER), (0.1, os.SCHED_BATCH)):
        host.pass_time(used=used)
        await until(lambda: policies(kernel) == {policy})  # noqa: B023
        assert policies(*descendants(kernel)) == {os.SCHED_BATCH}


async def test_a_kernel_that_has_ended_is_passed_over(kernel: int, host: Host, tmp_path: Path) -> None:
    ended = Unit(kernel, -1, 0, "", "", _SHAPE)
    os.kill(kernel, signal.SIGKILL)
    await until(lambda: not Path(f"/proc/{kernel}").exists())
    Turns(lambda: [ended], tmp_path / "stat").apply([ended])
    assert ended.is_urgent is False
