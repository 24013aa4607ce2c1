"""Memory that the hypervisor has backed already, kept for whoever is about to need some.

A virtual machine gets its memory page by page as it touches it: 2.5 ms a MiB, against 0.1 for memory it has in use. So
it is on a fresh one, and wherever free memory goes back to the hypervisor (free page reporting: Firecracker, Cloud
Hypervisor, QEMU). There a save stands still for the page cache it fills, and each copy for the memory it reads into.

Here some touched memory is held, and let go of just before somebody needs as much: what was freed last, the kernel
hands out first. It is taken anew a while later, by a thread that gives way to everything. The kernel may take it at any
time without asking (MADV_FREE), so it counts as available and is never written to swap. Where memory proves to be cheap
nothing is held, and a sample is taken now and then.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
#: At most this part of the machine's memory.
_SHARE = 16
#: A huge page: the least that goes back to the hypervisor, and the most that a step takes.
_STEP_BYTES = 2 * _MIB
#: Backed memory takes 0.1 to 0.2 ms to clear, a hypervisor with its own huge pages about 1, else 2 to 3.
_CHEAP_S_PER_MIB = 0.0005
#: Cheap steps in a row after which memory is taken to be so everywhere: many, as what a sandbox has left is cheap too.
_CHEAP_ROUNDS = 2
_SAMPLE_STEPS = 16
_SAMPLE_PERIOD_S = 30.0
#: From the last use on. Before, filling would take the processor, and memory, from what is going on.
_QUIET_S = 1.0
_LOOK_PERIOD_S = 1.0
_LOWEST_PRIORITY = 19


class Backing:
    """Holds up to `size_mib`, and up to a part of the machine's memory; 0 for none.

    available_bytes: memory the host could still give away; nothing is taken that would leave less than `reserve_mib`.
    clock: processor time of the calling thread, in seconds.
    """

    def __init__(
        self,
        size_mib: int,
        *,
        available_bytes: Callable[[], int],
        reserve_mib: int,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        size_bytes = min(size_mib * _MIB, _memory_bytes() // _SHARE)
        self._steps = size_bytes // _STEP_BYTES
        self._available_bytes = available_bytes
        self._needed_bytes = size_bytes + reserve_mib * _MIB
        self._clock = clock
        self._memory: mmap.mmap | None = None
        #: Where the first step begins, in the map and as an address.
        self._offset = self._address = 0
        #: Guards the count, and what is done by it.
        self._lock = threading.Lock()
        #: So many steps from the first on are held.
        self._held = 0
        self._cheap_in_row = 0
        self._fill_at = 0.0
        self._is_closing = threading.Event()
        self._filler = threading.Thread(target=self._fill, name="backing", daemon=True)

    def start(self) -> None:
        """Begin to fill. Raises OSError."""
        if not self._steps:
            return
        # One more, for the first to begin where a huge page does. Nothing of it is memory yet.
        self._memory = mmap.mmap(-1, (self._steps + 1) * _STEP_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._offset = -start % _STEP_BYTES
        self._address = start + self._offset
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            self._memory.madvise(advice)
        self._filler.start()

    def close(self) -> None:
        """Give everything back. Blocks for a step of the filling, some milliseconds."""
        self._is_closing.set()
        if self._memory is not None:
            self._filler.join()
            with self._lock:
                self._held = 0
                self._memory.close()
                self._memory = None

    @property
    def held_bytes(self) -> int:
        """What is held, but for what the kernel has taken of it."""
        return self._held * _STEP_BYTES

    def release(self, mib: float) -> None:
        """Let go of so much, or what there is; takes microseconds. For memory that is needed now: it does not stay."""
        with self._lock:
            self._fill_at = time.monotonic() + _QUIET_S
            self._drop(min(self._held, -int(-mib * _MIB // _STEP_BYTES)))

    def _drop(self, steps: int) -> None:
        if steps and self._memory is not None:
            self._held -= steps
            self._advise(mmap.MADV_DONTNEED, self._held, steps)

    def _advise(self, advice: int, first: int, steps: int) -> None:
        if self._memory is not None:
            self._memory.madvise(advice, self._offset + first * _STEP_BYTES, steps * _STEP_BYTES)

    def _fill(self) -> None:
        """Until it is closed. A step is about as long as anybody else would have to wait for a lock that it holds."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        pause_s = 0.0
        while not self._is_closing.wait(pause_s):
            pause_s = max(0.0, self._fill_at - time.monotonic())
            if not pause_s and self._may_fill():
                self._take_step()
            elif not pause_s:
                pause_s = _LOOK_PERIOD_S

    def _may_fill(self) -> bool:
        return self._held < self._steps and self._available_bytes() >= self._needed_bytes

    def _take_step(self) -> None:
        step = self._held
        began = self._clock()
        # All of it, as the kernel may not have a huge page. Neither the interpreter's lock nor the map's is held.
        ctypes.memset(self._address + step * _STEP_BYTES, 1, _STEP_BYTES)
        is_cheap = self._clock() - began < _CHEAP_S_PER_MIB * _STEP_BYTES / _MIB
        with self._lock:
            if self._held == step:
                self._held += 1
                self._advise(mmap.MADV_FREE, step, 1)
            else:  # those before it have been let go of meanwhile
                self._advise(mmap.MADV_DONTNEED, step, 1)
            self._cheap_in_row = self._cheap_in_row + 1 if is_cheap else 0
            if self._cheap_in_row >= _CHEAP_ROUNDS * self._steps:
                self._rest()

    def _rest(self) -> None:
        logger.debug("memory is cheap: none is kept for now")
        self._drop(self._held)
        self._cheap_in_row -= _SAMPLE_STEPS
        self._fill_at = time.monotonic() + _SAMPLE_PERIOD_S


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
