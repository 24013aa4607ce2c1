"""Links and disks, made ahead of the machines that will use them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vmm.drivers.gvisor import network
from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.disk import Disk, make_disk
from vmm.drivers.gvisor.network import Block, Slot
from vmm.errors import MachineError
from vmm.tasks import run_in_background, stop

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_RETRY_S = 1.0


@dataclass(slots=True)
class Supply:
    """What one machine needs of the host before it is started."""

    slot: Slot
    disk: Disk

    def release(self) -> None:
        """Let go of both; a sandbox that was given them keeps them alive."""
        self.slot.release()
        self.disk.release()


class Supplies:
    """A few supplies with disks of the usual size; others are made when asked for."""

    def __init__(self, config: GvisorConfig, block: Block, *, disk_mib: int) -> None:
        self._config = config
        self._block = block
        self._disk_mib = disk_mib
        self._mtu = network.uplink_mtu()
        self._ready: deque[Supply] = deque()
        self._wanted = asyncio.Event()
        # Links are made one at a time by a thread of their own, because it changes its network namespace meanwhile.
        self._links = ThreadPoolExecutor(1, "links")
        self._disks = ThreadPoolExecutor(1, "disks")
        self._filler: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fill up. Not before every adopted machine has reserved its index."""
        self._wanted.set()
        self._filler = run_in_background(self._fill(), "supplies")

    async def take(self, disk_mib: int) -> Supply:
        """A supply, ready or made now. Raises MachineError: `no_capacity`, `driver_failed`."""
        self._wanted.set()
        if disk_mib == self._disk_mib and self._ready:
            return self._ready.popleft()
        return await self._make(disk_mib)

    async def close(self) -> None:
        """Stop filling up and release what is ready."""
        await stop(self._filler)
        while self._ready:
            supply = self._ready.popleft()
            supply.release()
            self._block.give_back(supply.slot.index)
        self._links.shutdown()
        self._disks.shutdown()

    async def _fill(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while len(self._ready) < self._config.pool_size:
                try:
                    self._ready.append(await self._make(self._disk_mib))
                except MachineError as error:
                    logger.warning("no link or disk in advance: %s (%s)", error, error.detail)
                    await asyncio.sleep(_RETRY_S)
                    if error.code == "no_capacity":
                        break

    async def _make(self, disk_mib: int) -> Supply:
        index = self._block.take()
        loop = asyncio.get_running_loop()
        link = loop.run_in_executor(self._links, network.make_slot, self._block, index, self._mtu)
        disk = loop.run_in_executor(self._disks, make_disk, self._config.disk_dir, disk_mib * _MIB)
        try:
            # Shielded: the threads go on after a cancellation, and what they make would leak.
            await asyncio.shield(asyncio.gather(link, disk))
        except (OSError, asyncio.CancelledError) as error:
            made = await _settled(link, disk)
            for thing in made:
                thing.release()
            self._block.give_back(index)
            if isinstance(error, asyncio.CancelledError):
                raise
            message = "the host could not make a link and a disk for the machine"
            raise MachineError("driver_failed", message, detail=str(error)) from error
        return Supply(link.result(), disk.result())


async def _settled(*work: asyncio.Future[Slot] | asyncio.Future[Disk]) -> list[Slot | Disk]:
    """Wait for all, however often we are cancelled; the results of those that worked."""
    while not all(future.done() for future in work):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(work)
    return [future.result() for future in work if future.exception() is None]
