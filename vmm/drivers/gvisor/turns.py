"""Who runs when one thread of a sandbox wakes another.

A command in gVisor is some hundred turns that its kernel's threads and the guest's take, one waking the other and then
going to sleep. Usually Linux lets a woken thread run at once, in place of the one that woke it if no other processor is
awake; that one could not go to sleep yet, and the other polls in vain for what it would have said next. By SCHED_BATCH
a woken thread waits until the running one sleeps, and the same command takes less than half the time. All threads of a
sandbox begin so (`native/crates/jailer`).

But when no processor is idle, most woken threads find a stranger running, and would wait for the end of its turn, some
milliseconds, each time. While the host is that busy, the kernels' threads are scheduled as usual, so that they run at
once. The guests' stay as they are: it is for their work that strangers would wait.

Measured with two processors, p50: `true` takes 21 ms as usual and 8 by turns on an idle host, `python3 -c pass` 58 and
26. With two more sandboxes that compute without end the latter takes 49 and 59, but 77 and 190 in the mean, which is
why there are both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vmm.drivers.gvisor import processes
from vmm.drivers.gvisor.unit import Unit

_PERIOD_S = 0.5
#: Shares of the processors' time that nobody used, in one period. Two, so that it does not change back and forth.
_BUSY_BELOW, _CALM_ABOVE = 0.08, 0.2
#: In /proc/stat, of all processors: idle, and idle until a disk answers.
_IDLE_FIELDS = slice(3, 5)
#: Time of guests of this host is in that of users already.
_COUNTED_FIELDS = slice(0, 8)


class Turns:
    """Keeps the kernels of all sandboxes scheduled as it suits the host. units: those that have not ended.

    processor_times: a file as /proc/stat.
    """

    def __init__(self, units: Callable[[], Iterable[Unit]], processor_times: Path) -> None:
        self._units = units
        self._processor_times = processor_times
        self._before = self._times()
        self.is_busy = False

    async def watch(self) -> None:
        """Look at the host until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look()
            changing = [unit for unit in self._units() if unit.is_urgent is not self.is_busy]
            if changing:
                await asyncio.to_thread(self.apply, changing)

    def look(self) -> None:
        """See whether processors were idle since the last look."""
        before, self._before = self._before, self._times()
        idle, total = (now - then for now, then in zip(self._before, before, strict=True))
        if total > 0:
            self.is_busy = idle / total < (_CALM_ABOVE if self.is_busy else _BUSY_BELOW)

    def apply(self, units: Iterable[Unit]) -> None:
        """Schedule the kernels of these as it suits the host now."""
        policy = os.SCHED_OTHER if self.is_busy else os.SCHED_BATCH
        for unit in units:
            unit.is_urgent = self.is_busy
            for thread in processes.threads(unit.pid):
                # One that begins meanwhile is as the one it came of: at worst it is slower.
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(thread, policy, os.sched_param(0))

    def _times(self) -> tuple[int, int]:
        """Clock ticks of all processors, idle and in all."""
        with self._processor_times.open() as lines:
            fields = [int(field) for field in lines.readline().split()[1:]]
        return sum(fields[_IDLE_FIELDS]), sum(fields[_COUNTED_FIELDS])
