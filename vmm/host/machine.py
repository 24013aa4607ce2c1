"""One machine: the task that alone moves it from state to state (`vmm.host.body`), and what others may ask of it.

What is asked waits in a queue and is done one by one. Between requests the task sees to the timers: an idle machine is
ended or paused, a frozen one gives back its memory and is hibernated after a while. A request to wake cuts such a chore
short; a request to end, or the end of the unit, cuts everything short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from vmm.drivers.base import Exit
from vmm.errors import MachineError, VmmError
from vmm.host.body import Body, Parts
from vmm.host.config import HostConfig
from vmm.host.images import Capture
from vmm.host.journal import Record
from vmm.host.line import AgentLine
from vmm.host.units import explain
from vmm.tasks import run_in_background
from vmm.types import IdleAction, MachineState, StopCause

logger = logging.getLogger(__name__)

Move = Callable[[], Coroutine[Any, Any, Any]]

#: After a chore has failed (the disk is full, say) nothing changes soon.
_CHORE_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class _Request:
    move: Move
    done: asyncio.Future[Any]
    is_wake: bool = False


class Machine:
    """See the module."""

    def __init__(self, record: Record, parts: Parts, config: HostConfig) -> None:
        self.id = record.id
        #: Streams that keep the machine from counting as idle, however quiet they are.
        self.busy = 0
        #: Set once it is on record with a unit, whose agent need not have answered yet.
        self.placed = asyncio.Event()
        #: Set once it runs or has ended; so is `placed` then.
        self.settled = asyncio.Event()
        #: Set once nobody can reach it any more. Its processes may take some milliseconds more to end.
        self.gone = asyncio.Event()
        self.error: MachineError | None = None
        #: When somebody last wanted it made, on the monotonic clock.
        self.wanted_at = time.monotonic()
        self._driver = parts.driver
        self._config = config
        self._body = Body(record, parts, self._watch_unit)
        self._signal = asyncio.Event()
        self._requests: deque[_Request] = deque()
        self._last_wake: _Request | None = None
        self._stop: Exit | None = None
        self._is_leaving = False
        self._is_reclaimed = False
        self._is_to_hibernate = False
        self._chores_at = 0.0
        self._end_of_unit: asyncio.Task[Exit] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def record(self) -> Record:
        """What it is now."""
        return self._body.record

    @property
    def may_hibernate(self) -> bool:
        """Whether it is frozen and nothing speaks against writing it to disk now."""
        can = self._driver.capabilities().memory_snapshot
        return can and self.record.state is MachineState.FROZEN and time.time() >= self._chores_at

    @property
    def line(self) -> AgentLine:
        """Where its streams go now."""
        return self._body.line

    def start(self) -> None:
        """Begin its life."""
        self._task = run_in_background(self._live(self._body.boot), f"machine {self.id}")

    async def recover(self) -> bool:
        """Continue a life that an earlier process began. False when there is nothing to continue."""
        if not await self._body.recover():
            return False
        # Activity since the record was written is unknown; count it as active now rather than end it early.
        self.touch()
        self.settle()
        self._task = run_in_background(self._live(None), f"machine {self.id}")
        return True

    def settle(self) -> None:
        """Let those go on who wait for its beginning."""
        self.placed.set()
        self.settled.set()

    def stop(self, cause: StopCause, detail: str | None = None) -> None:
        """Ask for its end; the first request counts."""
        if self._stop is None:
            self._stop = Exit(cause, detail)
            self._signal.set()

    def leave(self) -> None:
        """Hibernate if it is paused and let it be: hostd ends, the machine does not."""
        self._is_leaving = True
        self._signal.set()

    async def pause(self, *, hibernate: bool) -> None:
        """Freeze or hibernate it. Raises MachineError, as all requests do: `machine_not_running` when it has ended."""
        await self._ask(self._body.hibernate if hibernate else self._body.freeze)

    async def resume(self) -> None:
        """Have it run. However many ask, it is woken once."""
        if self.record.state is MachineState.RUNNING and not self._requests:
            return
        self._last_wake = self._next_wake()
        await asyncio.shield(self._last_wake.done)

    async def restore(self, snapshot: str, restore_id: str | None) -> None:
        """Take it back to a snapshot; not again if that restore was the last one."""
        await self._ask(lambda: self._body.restore(snapshot, restore_id))

    async def save(self, image: str) -> Capture:
        """Save it into an image yet to be published."""
        capture: Capture = await self._ask(lambda: self._body.save(image))
        return capture

    def hibernate_soon(self) -> None:
        """The host is short of memory: hibernate it if it is still frozen."""
        self._is_to_hibernate = True
        self._signal.set()

    def update(self, **fields: Any) -> None:
        """Change settings, for good once this returns. Raises MachineError."""
        self._body.amend(**fields)
        self._signal.set()

    def touch(self) -> None:
        """Something happened in it."""
        self.record.last_active_at = time.time()

    def use(self) -> None:
        """A client wants something of it: it is to be awake."""
        self.touch()
        if self.record.is_paused and self.record.auto_resume:
            self._last_wake = self._next_wake()

    async def over(self) -> None:
        """Wait until its task has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _live(self, boot: Move | None) -> None:
        try:
            if boot is not None:
                await self._perform(boot)
                self.settle()
            end = await self._run()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
            end = self._stop
        except MachineError as error:
            self.error = error
            end = Exit(StopCause.BOOT_FAILED, explain(error))
        except Exception:
            logger.exception("machine %s: its task failed", self.id)
            self.error = MachineError("internal", "hostd failed to run the machine")
            end = Exit(StopCause.BOOT_FAILED, "internal error")
        try:
            if end is not None:
                await self._end(end)
        finally:
            # Whatever happened, nobody is to wait for ever.
            self.gone.set()
            self.settle()

    async def _run(self) -> Exit | None:
        """Until something ends it; returns what, or None when it is left as it is."""
        while True:
            if end := self._ended():
                return end
            if self._requests:
                await self._fulfil(self._requests[0])
            elif self._is_leaving and self.record.is_paused:
                await self._try(self._body.hibernate)
                return None
            elif chore := self._chore():
                await self._try(chore)
            else:
                # Not `wait_for`, which in Python 3.11 may lose a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._time_left_s()):
                        await self._signal.wait()
                self._signal.clear()

    def _ended(self) -> Exit | None:
        record = self.record
        if self._stop is not None:
            return self._stop
        if self._end_of_unit is not None and self._end_of_unit.done():
            return self._end_of_unit.result()
        now = time.time()
        if record.expires_at is not None and now >= record.expires_at:
            return Exit(StopCause.TIMEOUT)
        if record.idle_action is IdleAction.DESTROY and now >= self._idle_at():
            return Exit(StopCause.IDLE)
        return None

    def _chore(self) -> Move | None:
        """What is due without anybody asking for it."""
        record, now = self.record, time.time()
        if now < self._chores_at:
            return None
        if record.idle_action is IdleAction.PAUSE and now >= self._idle_at():
            self._is_reclaimed = self._is_to_hibernate = False
            return self._body.freeze
        if record.state is not MachineState.FROZEN:
            return None
        if self._is_to_hibernate or now >= self._hibernate_at():
            return self._body.hibernate
        if now >= self._reclaim_at():
            self._is_reclaimed = True
            return self._body.reclaim
        return None

    def _time_left_s(self) -> float | None:
        """Until a timer can be due, None without one. Activity moves the idle timer, so it is looked at again then."""
        record, idle_at = self.record, self._idle_at()
        ends = [record.expires_at or math.inf, idle_at if record.idle_action is IdleAction.DESTROY else math.inf]
        chores = [
            self._reclaim_at(),
            self._hibernate_at(),
            idle_at if record.idle_action is IdleAction.PAUSE else math.inf,
        ]
        first = min(*ends, max(min(chores), self._chores_at))
        return None if first == math.inf else max(0.0, first - time.time())

    def _idle_at(self) -> float:
        record = self.record
        if record.state is not MachineState.RUNNING or record.idle_timeout_s is None:
            return math.inf
        return (time.time() if self.busy else record.last_active_at) + record.idle_timeout_s

    def _reclaim_at(self) -> float:
        record = self.record
        if record.state is not MachineState.FROZEN or self._is_reclaimed:
            return math.inf
        return (record.frozen_at or 0.0) + self._config.reclaim_after_s

    def _hibernate_at(self) -> float:
        record = self.record
        if record.state is not MachineState.FROZEN or not self._driver.capabilities().memory_snapshot:
            return math.inf
        after_s = self._config.hibernate_after_s if record.hibernate_after_s is None else record.hibernate_after_s
        return (record.frozen_at or 0.0) + after_s

    async def _ask(self, move: Move) -> Any:
        """Have the task do something and return its result. Who asks may be cancelled; what was asked is done."""
        return await asyncio.shield(self._enqueue(move).done)

    def _enqueue(self, move: Move, *, is_wake: bool = False) -> _Request:
        if self._stop is not None or self.gone.is_set() or self.record.is_over:
            raise MachineError("machine_not_running", f"machine {self.id} has ended", detail=self.record.cause)
        request = _Request(move, asyncio.get_running_loop().create_future(), is_wake)
        # Nobody need be interested in how it ends.
        request.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._requests.append(request)
        self._signal.set()
        return request

    def _next_wake(self) -> _Request:
        """The wake that was asked for last, if nothing was asked for since, or a new one."""
        last = self._last_wake
        if last is None or last.done.done() or (self._requests and self._requests[-1] is not last):
            return self._enqueue(self._wake, is_wake=True)
        return last

    async def _wake(self) -> None:
        try:
            async with asyncio.timeout(self._config.wake_timeout_s):
                await self._body.wake()
        except TimeoutError as error:
            late = MachineError("wake_timeout", "the machine did not wake in time")
            self.line.fail_waiting(late)
            raise late from error
        except VmmError as error:
            self.line.fail_waiting(error)
            raise
        self._is_reclaimed = self._is_to_hibernate = False

    async def _fulfil(self, request: _Request) -> None:
        try:
            result = await self._perform(request.move)
        except VmmError as error:
            request.done.set_exception(error)
        except asyncio.CancelledError:
            request.done.set_exception(self._has_ended())
            if self._stop is None:
                raise
        except Exception:
            logger.exception("machine %s: a request failed", self.id)
            request.done.set_exception(MachineError("internal", "the host service failed"))
        else:
            request.done.set_result(result)
        finally:
            self._requests.popleft()

    async def _try(self, chore: Move) -> None:
        try:
            await self._perform(chore, is_chore=True)
        except asyncio.CancelledError:
            if not self._is_cut_short():
                raise
        except MachineError as error:
            logger.warning("machine %s: %s", self.id, explain(error))
            self._chores_at = time.time() + _CHORE_RETRY_S

    async def _perform(self, move: Move, *, is_chore: bool = False) -> Any:
        """Do something to its end, unless the machine is to end, or to wake while this is but a chore."""
        work = asyncio.create_task(move(), name=f"{move.__name__} {self.id}")
        work.add_done_callback(lambda _: self._signal.set())
        try:
            while not work.done():
                await self._signal.wait()
                self._signal.clear()
                if self._stop is not None or (is_chore and self._is_cut_short()):
                    break
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait([work])
        return work.result()

    def _is_cut_short(self) -> bool:
        return self._stop is not None or any(request.is_wake for request in self._requests)

    async def _end(self, end: Exit) -> None:
        self._body.begin_end(end)
        while self._requests:
            self._requests.popleft().done.set_exception(self._has_ended())
        self.gone.set()
        try:
            await self._body.finish_end(is_failed=self.error is not None)
        finally:
            if self._end_of_unit is not None:
                self._end_of_unit.cancel()

    def _has_ended(self) -> MachineError:
        cause = self.record.cause if self._stop is None else self._stop.cause
        return MachineError("machine_not_running", "the machine has ended", detail=cause)

    def _watch_unit(self) -> None:
        """Notice the end of the unit that it has now."""
        if self._end_of_unit is not None:
            self._end_of_unit.cancel()
        unit = self._body.unit
        if unit is None:
            self._end_of_unit = None
            return
        self.placed.set()
        self._end_of_unit = asyncio.create_task(self._wait(unit.id), name=f"wait {unit.id}")

    async def _wait(self, unit: str) -> Exit:
        try:
            end = await self._driver.wait(unit)
        except MachineError as error:
            end = Exit(StopCause.LOST, explain(error))
        self._signal.set()
        return end
