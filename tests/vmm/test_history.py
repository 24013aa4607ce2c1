"""The samples that hostd keeps of running machines."""

from __future__ import annotations

from vmm.errors import MachineError
from vmm.host.history import History
from vmm.types import MachineStats


async def test_machines_that_run_are_remembered_until_they_end() -> None:
    running = ["a", "gone"]

    async def stats(machine: str) -> MachineStats:
        if machine == "gone":
            raise MachineError("machine_not_running", "it has ended")
        return MachineStats(cpu_seconds=1.5, memory_bytes=7, memory_limit_bytes=9, pids=1)

    history = History(lambda: running, stats)
    await history.sample()
    await history.sample()
    (first, second) = history.since("a", 0.0)
    assert (first.cpu_seconds, first.memory_bytes) == (1.5, 7)
    assert history.since("a", second.at + 1) == []
    assert history.since("gone", 0.0) == []
    history.forget("a")
    assert history.since("a", 0.0) == []
