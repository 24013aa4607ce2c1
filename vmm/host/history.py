"""What machines have used lately: samples of the running ones, kept in memory while they live, lost with hostd."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from vmm.errors import MachineError
from vmm.types import MachineStats, Sample

#: From one sample to the next, and how many are kept of a machine: two hours' worth.
_PERIOD_S = 15.0
_KEPT = 480


class History:
    """running: the machines to sample now.  stats: of one of them."""

    def __init__(self, running: Callable[[], Iterable[str]], stats: Callable[[str], Awaitable[MachineStats]]) -> None:
        self._running = running
        self._stats = stats
        self._samples: dict[str, deque[Sample]] = {}

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(_PERIOD_S)

    async def sample(self) -> None:
        """Take one of each machine that runs."""
        for machine in list(self._running()):
            # It has ended or been paused since.
            with contextlib.suppress(MachineError):
                stats = await self._stats(machine)
                samples = self._samples.setdefault(machine, deque(maxlen=_KEPT))
                samples.append(Sample(time.time(), stats.cpu_seconds, stats.memory_bytes))

    def since(self, machine: str, at: float) -> Sequence[Sample]:
        """A machine's samples that are not older, oldest first."""
        return [sample for sample in self._samples.get(machine, ()) if sample.at >= at]

    def forget(self, machine: str) -> None:
        """It has ended."""
        self._samples.pop(machine, None)
