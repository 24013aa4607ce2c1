"""The warm pool: units of usual shapes made ahead, so that a create is a claim and a restore finds its shell.

`native.pool` decides what to make, what to give up and who gets which; here it is done. A *ready* unit is booted, its
agent is connected and has seen to what a first command would wait for, and it is frozen: it costs memory and no CPU. A
*shell* is created and nothing runs in it. Neither has an owner or holds a secret of one; a claimed unit never comes
back. Units of the pool are in no journal: a hostd that died leaves them to the next one's sweep.

Whoever wants a unit gets the best there is, ready, shell or made from nothing, and never waits for a refill.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from native.pool import Bounds, Kind, Scheduler
from vmm.drivers.base import Driver, ImageFiles, Shape
from vmm.errors import VmmError
from vmm.host.config import PoolConfig
from vmm.host.units import Shell, Unit, Units, explain
from vmm.tasks import run_in_background, stop
from vmm.types import MachineSpec, PoolStatus

logger = logging.getLogger(__name__)

#: Shapes with a pool of their own; further ones are started from nothing.
_POOLS_MAX = 32
#: MiB that a unit takes; of a ready one, until the first was measured.
_WEIGHT_MIB = {Kind.READY: 48.0, Kind.SHELL: 8.0}
_MIB = 1024 * 1024
#: After a claim, its owner's first command needs the processors: a refill that is not urgent waits for that.
_REST_S = 0.1
#: Templates and free memory are not looked at for each of many claims.
_LOOK_PACE_S = 0.1
#: What has gone wrong with the unit and not with what was wanted of it.
_UNITS_FAULT = frozenset({"driver_failed", "machine_not_running", "agent_unreachable"})


class Pool:
    """See the module. available_bytes: memory the host could still give away; refills leave `reserve_mib` of it."""

    def __init__(
        self, driver: Driver, units: Units, config: PoolConfig, *, available_bytes: Callable[[], int], reserve_mib: int
    ) -> None:
        self._driver = driver
        self._units = units
        self._config = config
        self._available_bytes = available_bytes
        self._reserve_mib = reserve_mib
        self._memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _MIB * config.memory_share
        # A refill may take a core; the claims that come meanwhile need the others.
        self._scheduler = Scheduler(refills_max=max(1, (os.cpu_count() or 1) // 2), memory_mib_max=self._memory_mib)
        self._weights = dict(_WEIGHT_MIB)
        self._pools: dict[tuple[Shape, str], int] = {}
        self._stock: dict[int, Unit | Shell] = {}
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._makes: set[asyncio.Task[None]] = set()
        #: By pool: units made, and those that could not be.
        self._refills: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._changed = asyncio.Event()
        #: Claims that are over and still hold up refills.
        self._resting = 0
        self._rest: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fill up. Not before the driver has swept."""
        if self._config.is_on:
            self._task = run_in_background(self._refill(), "pool")

    async def close(self) -> None:
        """Make nothing more and give up all there is."""
        await stop(self._task)
        if self._rest is not None:
            self._rest.cancel()
        self._scheduler.drain()
        for task in list(self._makes):
            await stop(task)
        self._act()

    async def obtain(self, spec: MachineSpec) -> Unit:
        """A unit for a new machine: ready, else a shell booted now, else from nothing. Raises MachineError."""
        with self._claim(Shape.of(spec)) as stocked:
            try:
                if isinstance(stocked, Unit):
                    return await self._units.claim(spec, stocked)
                if isinstance(stocked, Shell):
                    return await self._units.start(spec, stocked)
            except VmmError as error:
                self._excuse(error)
            return await self._units.start(spec)

    async def replace(self, spec: MachineSpec, error: VmmError) -> Unit:
        """Another unit, from nothing, for one of `obtain`'s that is no good. Raises MachineError as that does."""
        self._excuse(error)
        return await self._units.start(spec)

    async def restore(self, spec: MachineSpec, image: ImageFiles, *, is_own: bool = False) -> Unit:
        """A unit that goes on where the image was saved, in a shell if there is one. Raises MachineError.

        is_own: as for `Units.restore`.
        """
        with self._claim_shell(Shape.of(spec)) as shell:
            try:
                if shell is not None:
                    return await self._units.restore(spec, image, shell, is_own=is_own)
            except VmmError as error:
                self._excuse(error)
            return await self._units.restore(spec, image, is_own=is_own)

    def status(self) -> list[PoolStatus]:
        """Every pool as it is now."""
        statuses = []
        for (shape, _), pool in self._pools.items():
            found = self._scheduler.status(pool, time.monotonic())
            statuses.append(
                PoolStatus(
                    template=shape.template,
                    cpu_count=shape.cpu_count,
                    memory_mib=shape.memory_mib,
                    disk_mib=shape.disk_mib,
                    ready=found.ready,
                    shells=found.shells,
                    target_ready=found.target_ready,
                    target_shells=found.target_shells,
                    claims=found.claims,
                    misses=found.misses,
                    refill_ms=found.refill_s * 1000,
                    thawed=self._thawed(pool, found.ready),
                    refills=self._refills[pool],
                    failures=self._failures[pool],
                )
            )
        return statuses

    def _thawed(self, pool: int, ready: int) -> int:
        units = (self._stock.get(number) for number in self._scheduler.first_ready(pool, ready))
        return sum(isinstance(unit, Unit) and not unit.line.is_held for unit in units)

    @contextmanager
    def _claim(self, shape: Shape) -> Iterator[Unit | Shell | None]:
        """Take what there is; refills are held up until the claim is over."""
        pool = self._pool_of(shape)
        if pool is None:
            yield None
            return
        claimed = self._scheduler.claim(pool, time.monotonic())
        with self._settling(pool):
            yield None if claimed is None else self._take(claimed.unit)

    @contextmanager
    def _claim_shell(self, shape: Shape) -> Iterator[Shell | None]:
        pool = self._pool_of(shape)
        if pool is None:
            yield None
            return
        claimed = self._scheduler.claim_shell(pool, time.monotonic())
        with self._settling(pool):
            shell = None if claimed is None else self._take(claimed)
            yield shell if isinstance(shell, Shell) else None

    @contextmanager
    def _settling(self, pool: int) -> Iterator[None]:
        try:
            yield
        finally:
            self._resting += 1
            if self._rest is not None:
                self._rest.cancel()
            status = self._scheduler.status(pool, time.monotonic())
            if 2 * status.ready < status.target_ready:
                self._settle()
            else:
                self._rest = asyncio.get_running_loop().call_later(_REST_S, self._settle)

    def _settle(self) -> None:
        """Let refills begin."""
        while self._resting:
            self._resting -= 1
            self._scheduler.settled()
        self._changed.set()

    def _take(self, number: int) -> Unit | Shell:
        self._watches.pop(number).cancel()
        return self._stock.pop(number)

    def _excuse(self, error: VmmError) -> None:
        """Go on with a new unit if it was the stocked one's fault; else that would fail in the same way."""
        if error.code not in _UNITS_FAULT:
            raise error
        logger.warning("a unit of the pool is no good: %s", explain(error))

    def _pool_of(self, shape: Shape) -> int | None:
        """The pool of a shape, a new one if need be; none when there are too many or the template is missing."""
        if not self._config.is_on or self._task is None:
            return None
        key = self._key(shape)
        if key is None:
            return None
        pool = self._pools.get(key)
        if pool is None:
            if len(self._pools) >= _POOLS_MAX and not self._drop_unused():
                return None
            pool = self._pools[key] = max(self._pools.values(), default=0) + 1
            self._set_bounds(key)
        return pool

    def _key(self, shape: Shape) -> tuple[Shape, str] | None:
        """Units of a template are of one digest: of one that was built anew since, they are another's."""
        for template in self._driver.templates():
            if shape.template == template.name or shape.template in template.aliases:
                return replace(shape, template=template.name), template.digest
        return None

    def _set_bounds(self, key: tuple[Shape, str]) -> None:
        config = self._config
        usual = {self._key(shape) for shape in config.shapes}
        least = (config.ready_min, config.shells_min) if key in usual else (0, 0)
        self._scheduler.set_pool(
            self._pools[key],
            ready=Bounds(min(least[0], config.ready_max), config.ready_max),
            shells=Bounds(min(least[1], config.shells_max), config.shells_max),
            weight_mib=(self._weights[Kind.READY], self._weights[Kind.SHELL]),
        )

    def _drop_unused(self) -> bool:
        for key, pool in list(self._pools.items()):
            status = self._scheduler.status(pool, time.monotonic())
            if not (status.ready or status.shells or status.target_ready or status.target_shells):
                self._drop(key)
                return True
        return False

    def _drop(self, key: tuple[Shape, str]) -> None:
        self._scheduler.remove_pool(self._pools.pop(key))

    async def _refill(self) -> None:
        look_at = 0.0
        while True:
            self._changed.clear()
            if time.monotonic() >= look_at:
                self._look_around()
                look_at = time.monotonic() + _LOOK_PACE_S
            self._act()
            await self._thaw_first()
            with suppress(TimeoutError):
                # Not `wait_for`, which in Python 3.11 may lose a cancellation.
                async with asyncio.timeout(self._scheduler.wait_s(time.monotonic())):
                    await self._changed.wait()

    async def _thaw_first(self) -> None:
        """Keep those awake that will be claimed next, where that is worth the processor time they use."""
        for pool in list(self._pools.values()):
            for number in self._scheduler.first_ready(pool, self._config.thawed):
                unit = self._stock.get(number)
                if not isinstance(unit, Unit) or not unit.line.is_held:
                    continue
                try:
                    await self._driver.thaw(unit.id)
                except VmmError as error:
                    logger.warning("unit %s of the pool cannot be thawed: %s", unit.id, explain(error))
                else:
                    if number in self._stock:
                        unit.line.release()

    def _look_around(self) -> None:
        """Templates come and go, and memory is short or not."""
        for key in list(self._pools):
            if self._key(key[0]) != key:
                self._drop(key)
        for shape in self._config.shapes:
            self._pool_of(shape)
        spare_mib = self._available_bytes() / _MIB - self._reserve_mib
        self._scheduler.limit_memory(min(self._memory_mib, max(0.0, self._scheduler.memory_mib + spare_mib)))

    def _act(self) -> None:
        """Begin what the scheduler says."""
        shapes = {pool: shape for (shape, _), pool in self._pools.items()}
        while (action := self._scheduler.next(time.monotonic())) is not None:
            if action.kind is None:
                self._give_up(self._take(action.unit))
            else:
                make = self._make(action.unit, action.pool, shapes[action.pool], action.kind)
                task = run_in_background(make, f"refill {action.unit}")
                self._makes.add(task)
                task.add_done_callback(self._makes.discard)

    async def _make(self, number: int, pool: int, shape: Shape, kind: Kind) -> None:
        made: Unit | Shell | None = None
        try:
            if kind is Kind.SHELL:
                made = await self._units.prepare(shape)
            else:
                made = await self._units.warm(shape)
                await self._weigh(made)
        except VmmError as error:
            self._failures[pool] += 1
            logger.warning("no %s unit of %s could be made ahead: %s", kind, shape.template, explain(error))
        else:
            self._refills[pool] += 1
            if self._scheduler.made(number, time.monotonic()):
                self._stock[number] = made
                self._watches[number] = run_in_background(self._watch(number, made.id), f"watch {made.id}")
                made = None
        finally:
            if made is not None:
                self._give_up(made)
            # Unless it was made.
            self._scheduler.failed(number, time.monotonic())
            self._changed.set()

    async def _weigh(self, made: Unit) -> None:
        """What the newest takes is what the next will."""
        stats = await self._driver.stats(made.id)
        self._weights[Kind.READY] = max(1.0, stats.memory_bytes / _MIB)
        for key in self._pools:
            self._set_bounds(key)

    async def _watch(self, number: int, unit: str) -> None:
        """One that ends by itself is no stock any more."""
        ended = await self._driver.wait(unit)
        logger.warning("unit %s of the pool has ended: %s", unit, ended.detail or ended.cause)
        if self._scheduler.lost(number):
            del self._watches[number]
            self._give_up(self._stock.pop(number))
            self._changed.set()

    def _give_up(self, unit: Unit | Shell) -> None:
        if isinstance(unit, Unit):
            self._units.discard(unit)
        else:
            self._units.destroy_later(unit.id)
