"""One machine: a task that takes it through its life and alone changes its record.

    (new) ─▶ preparing ─▶ running ─▶ stopping ─▶ stopped(cause)
                 └─────────── on an error ─────▶ failed(cause)

Others ask by `stop`, `update` and `touch`; the task acts on what they left and tells of every change of state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from vmm.drivers.base import Driver, Exit, Shape
from vmm.errors import AgentError, MachineError, VmmError
from vmm.host.config import HostConfig
from vmm.host.journal import Journal, Record
from vmm.host.line import AgentLine
from vmm.host.names import write_names
from vmm.tasks import run_in_background, stop
from vmm.types import MachineInfo, MachineState, StopCause

logger = logging.getLogger(__name__)

_DESTROY_ATTEMPTS = 3
_DESTROY_RETRY_S = 1.0


class Machine:
    """See the module. `line` is where its streams go while it runs."""

    def __init__(
        self,
        record: Record,
        driver: Driver,
        journal: Journal,
        config: HostConfig,
        on_change: Callable[[MachineInfo], None],
    ) -> None:
        self.id = record.spec.id
        self.record = record
        self.line = AgentLine(self.id, lambda protocol: driver.dial(self.id, protocol), record.token)
        #: Streams that keep the machine from counting as idle, however quiet they are.
        self.busy = 0
        #: Set once the record says running, stopped or failed.
        self.settled = asyncio.Event()
        #: Set once nothing in the machine runs any more.
        self.dead = asyncio.Event()
        self.error: MachineError | None = None
        self._driver = driver
        self._journal = journal
        self._config = config
        self._on_change = on_change
        self._signal = asyncio.Event()
        self._saving = asyncio.Lock()
        self._stop: Exit | None = None
        self._task: asyncio.Task[None] | None = None
        self._line_task: asyncio.Task[None] | None = None

    def start(self, *, adopted: bool = False) -> None:
        """Begin its life, or continue one that an earlier process began and the driver has adopted."""
        self._task = run_in_background(self._live(adopted), f"machine {self.id}")

    def stop(self, cause: StopCause, detail: str | None = None) -> None:
        """Ask for its end; the first request counts."""
        if self._stop is None:
            self._stop = Exit(cause, detail)
            self._signal.set()

    async def update(self, **fields: float | None) -> None:
        """Change `expires_at` or `idle_timeout_s`, for good once this returns. Raises MachineError."""
        for name, value in fields.items():
            setattr(self.record, name, value)
        self._signal.set()
        await self._save()

    def touch(self) -> None:
        """Something happened in it."""
        self.record.last_active_at = time.time()

    async def over(self) -> None:
        """Wait until it has ended and given everything back."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _live(self, adopted: bool) -> None:
        try:
            if adopted:
                self._connect()
            await self._end((None if adopted else await self._boot()) or await self._run())
        except MachineError as error:
            self.error = error
            await self._end(Exit(StopCause.BOOT_FAILED, _explain(error)))
        except Exception:
            logger.exception("machine %s: its task failed", self.id)
            self.error = MachineError("internal", "hostd failed to run the machine")
            await self._end(Exit(StopCause.BOOT_FAILED, "internal error"))
        finally:
            # Whatever happened, nobody is to wait for ever.
            self.dead.set()
            self.settled.set()
            await stop(self._line_task)

    def _connect(self) -> None:
        self._line_task = run_in_background(self.line.run(), f"line {self.id}")

    async def _boot(self) -> Exit | None:
        """Make it run; returns why it is to end instead, if that was asked for meanwhile. Raises MachineError."""
        began = time.monotonic()
        await self._save()
        boot = asyncio.create_task(self._bring_up(), name=f"boot {self.id}")
        boot.add_done_callback(lambda _: self._signal.set())
        while not boot.done() and self._stop is None:
            await self._signal.wait()
            self._signal.clear()
        if self._stop is not None:
            boot.cancel()
            await asyncio.wait([boot])
            return self._stop
        await boot
        record = self.record
        record.started_at = record.last_active_at = time.time()
        record.boot_ms = (time.monotonic() - began) * 1000
        record.state = MachineState.RUNNING
        await self._save()
        self._tell()
        self.settled.set()
        return None

    async def _bring_up(self) -> None:
        record = self.record
        record.placement = await self._driver.start(self.id, Shape.of(record.spec), token=record.token)
        self._connect()
        up = asyncio.create_task(self.line.is_up.wait())
        ended = asyncio.create_task(self._driver.wait(self.id))
        try:
            async with asyncio.timeout(self._config.boot_timeout_s):
                await asyncio.wait({up, ended}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    raise MachineError(
                        "driver_failed", "the machine ended while it booted", detail=ended.result().detail
                    )
                await write_names(self.line, record.spec, record.placement)
        except TimeoutError as error:
            message = "the machine's agent did not answer in time"
            raise MachineError("driver_failed", message, detail=self.line.last_error) from error
        except AgentError as error:
            message = "the machine's agent refused to set it up"
            raise MachineError("driver_failed", message, detail=str(error)) from error
        finally:
            up.cancel()
            ended.cancel()

    async def _run(self) -> Exit:
        """Until something ends it; returns what."""
        ended = asyncio.create_task(self._driver.wait(self.id), name=f"wait {self.id}")
        ended.add_done_callback(lambda _: self._signal.set())
        try:
            while True:
                if ended.done():
                    return ended.result()
                if self._stop is not None:
                    return self._stop
                if due := self._due():
                    return due
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._signal.wait(), self._time_left_s())
                self._signal.clear()
        finally:
            ended.cancel()

    def _due(self) -> Exit | None:
        record, now = self.record, time.time()
        if record.expires_at is not None and now >= record.expires_at:
            return Exit(StopCause.TIMEOUT)
        if record.idle_timeout_s is not None and now >= self._idle_at(record.idle_timeout_s):
            return Exit(StopCause.IDLE)
        return None

    def _time_left_s(self) -> float | None:
        """Until a timer can be due, None without one. Activity moves the idle timer, so it is looked at again then."""
        record = self.record
        times = [] if record.expires_at is None else [record.expires_at]
        if record.idle_timeout_s is not None:
            times.append(self._idle_at(record.idle_timeout_s))
        return max(0.0, min(times) - time.time()) if times else None

    def _idle_at(self, idle_timeout_s: float) -> float:
        return (time.time() if self.busy else self.record.last_active_at) + idle_timeout_s

    async def _end(self, end: Exit) -> None:
        record = self.record
        record.cause, record.detail = end.cause, end.detail
        record.state = MachineState.STOPPING
        # First of all nobody may reach it any more: only then may a caller be told that it is gone.
        self.line.close(MachineError("machine_not_running", "the machine has ended", detail=end.detail or end.cause))
        await self._try_to_save()
        self._tell()
        left = await self._destroy()
        record.stopped_at = time.time()
        record.state = MachineState.STOPPED if self.error is None else MachineState.FAILED
        if left:
            record.detail = left
        else:
            await self._try_to_save()
        self._tell()
        self.settled.set()

    async def _destroy(self) -> str | None:
        """Free everything; returns what was left, or None. The record then stays `stopping`, for the next start."""
        dying = asyncio.create_task(self._die())
        left = None
        for attempt in range(_DESTROY_ATTEMPTS):
            try:
                await self._driver.destroy(self.id)
            except MachineError as error:
                left = _explain(error)
                logger.warning("machine %s cannot be freed (attempt %d): %s", self.id, attempt + 1, left)
                await asyncio.sleep(_DESTROY_RETRY_S)
            else:
                left = None
                break
        self.dead.set()
        dying.cancel()
        return left

    async def _die(self) -> None:
        """The sandbox ends well before all it held is free; whoever asked for the end need not wait for that."""
        with contextlib.suppress(MachineError):
            await self._driver.wait(self.id)
        self.dead.set()

    async def _save(self) -> None:
        try:
            async with self._saving:
                await asyncio.to_thread(self._journal.save, self.record)
        except OSError as error:
            raise MachineError("driver_failed", "the journal cannot be written", detail=str(error)) from error

    async def _try_to_save(self) -> None:
        """An end goes on without its record: a next hostd finds the machine gone, or without an owner."""
        try:
            await self._save()
        except MachineError as error:
            logger.warning("machine %s: %s: %s", self.id, error.message, error.detail)

    def _tell(self) -> None:
        record = self.record
        why = ": ".join(filter(None, (record.cause, record.detail)))
        logger.info("machine %s is %s%s", self.id, record.state, f" ({why})" if why else "")
        self._on_change(record.info())


def _explain(error: VmmError) -> str:
    return f"{error.message}: {error.detail}" if error.detail else error.message
