"""Runs the server's processes: starts them, keeps their output, restarts one that died, stops them.

A child is in a session of its own, so that Ctrl-C reaches the supervisor alone, and gets SIGTERM from the kernel when
the supervisor dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

#: A child that dies is started again after this long, doubling up to the second while it keeps dying.
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.05, 2.0
#: One that has lived this long can start; its next death begins with the short delay again.
_HEALTHY_S = 2.0

#: What a child wrote last is in the pipe already when it ends.
_LAST_LINES_S = 1.0

_LOG_BYTES_MAX = 32 * 1024**2
_TAIL_LINES = 20


class StartError(Exception):
    """The server cannot start; the message says why and what to do."""


class LogFile:
    """A child's output in a file that is rolled over once, so that it never takes more than twice its limit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._file = path.open("ab", buffering=0)
        path.chmod(0o600)
        self._size = path.stat().st_size

    def write(self, line: bytes) -> None:
        """Append a line."""
        if self._size + len(line) > _LOG_BYTES_MAX:
            self._file.close()
            self.path.rename(self.path.with_suffix(".log.1"))
            self._file = self.path.open("ab", buffering=0)
            self.path.chmod(0o600)
            self._size = 0
        self._file.write(line)
        self._size += len(line)
        self.tail.append(line.decode("utf-8", "replace").rstrip())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Process:
    """A running process and the task that copies its output, if that is kept."""

    process: asyncio.subprocess.Process
    copying: asyncio.Task[None] | None

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    async def wait(self) -> int:
        """Wait for its end and its last lines; its exit code."""
        code = await self.process.wait()
        if self.copying is not None:
            # A descendant that outlives it still holds the pipe; nothing waits for that.
            await asyncio.wait([self.copying], timeout=_LAST_LINES_S)
            self.copying.cancel()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended does not mind."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Child:
    """One process that is started again when it dies.

        start ──▶ running ──dies──▶ (pause) running …
                     │ replace: a successor runs, this one retires
                     └ hold ──▶ held ──release──▶ running …

    is_ready: whether it serves now.  log: where its output goes; None leaves it to the supervisor's own.
    keep_fds: descriptors it inherits.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        environ: Mapping[str, str],
        *,
        is_ready: Callable[[], Awaitable[bool]],
        log: LogFile | None,
        keep_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._argv = [str(part) for part in argv]
        self._environ = dict(environ)
        self.is_ready = is_ready
        self._log = log
        self._keep_fds = tuple(keep_fds)
        self._current: _Process | None = None
        self._successor: _Process | None = None
        #: What has been replaced and still ends its work, with the task that waits for it.
        self._retiring: dict[_Process, asyncio.Task[None]] = {}
        self._replaced = asyncio.Event()
        self._replacing = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._is_stopping = False

    @property
    def pid(self) -> int | None:
        """The running process, if there is one."""
        current = self._current
        return current.process.pid if current is not None and current.is_alive else None

    @property
    def pids(self) -> set[int]:
        """The running process, those that it has replaced, and one that is about to replace it."""
        return {one.process.pid for one in self._alive()}

    def _alive(self) -> list[_Process]:
        all_of_them = (*self._retiring, self._current, self._successor)
        return [one for one in all_of_them if one is not None and one.is_alive]

    async def start(self) -> None:
        """Start the process; `keep_running` is to follow."""
        self._current = await self._spawn()

    async def _spawn(self, *flags: str) -> _Process:
        output, copying = None, None
        if self._log is not None:
            # A pipe of our own: `wait` would not return before every descendant closed one of asyncio's.
            source, output = os.pipe()
            copying = asyncio.create_task(_copy(source, self._log), name=f"log of {self.name}")
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                *flags,
                env=self._environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else asyncio.subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self._keep_fds,
                preexec_fn=dying_with(os.getpid(), signal.SIGTERM),
            )
        finally:
            if output is not None:
                os.close(output)
        return _Process(process, copying)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until it serves. Raises StartError if it dies first or takes too long."""
        if self._current is not None:
            await self._until(self._current, self.is_ready, timeout_s)

    async def _until(self, one: _Process, is_ready: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not await is_ready():
            if not one.is_alive:
                raise StartError(f"{self.name} ended while starting.{self._last_words()}")
            if time.monotonic() > until:
                raise StartError(f"{self.name} was not ready after {timeout_s:g} s.{self._last_words()}")
            await asyncio.sleep(0.01)

    async def keep_running(self) -> None:
        """Start it again whenever it ends, until `stop`."""
        backoff_s = _BACKOFF_FIRST_S
        while (current := self._current) is not None:
            started = time.monotonic()
            code = await self._end_of(current)
            if code is None:
                continue
            if not self._is_stopping and self._wanted.is_set():
                backoff_s = _BACKOFF_FIRST_S if time.monotonic() - started > _HEALTHY_S else backoff_s
                _log.warning("%s %s; starting it again in %g s", self.name, _how(code), backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)
            await self._wanted.wait()
            if self._is_stopping:
                return
            if self._current is current:
                await self.start()

    async def _end_of(self, one: _Process) -> int | None:
        """The exit code of a process, or None once another has replaced it."""
        self._replaced.clear()
        ending = asyncio.ensure_future(one.wait())
        replaced = asyncio.ensure_future(self._replaced.wait())
        try:
            await asyncio.wait({ending, replaced}, return_when=asyncio.FIRST_COMPLETED)
            if one is not self._current:
                return None
            code = await ending
            # Replaced at its end: who replaces it has not noted it yet.
            async with self._replacing:
                return code if one is self._current else None
        finally:
            ending.cancel()
            replaced.cancel()

    async def replace(self, *flags: str, serves: Callable[[int], Awaitable[bool]], timeout_s: float) -> int:
        """Have a successor, started with further flags, take the work over; its process id.

        serves: whether the process with this id does the work now. The one before is left to end by itself.
        Raises StartError if the successor does not serve; then the one before goes on.
        """
        async with self._replacing:
            self._successor = successor = await self._spawn(*flags)
            try:
                await self._until(successor, lambda: serves(successor.process.pid), timeout_s)
            except BaseException:
                successor.signal(signal.SIGKILL)
                await successor.wait()
                raise
            finally:
                self._successor = None
            before, self._current = self._current, successor
        if before is not None and before.is_alive:
            self._retiring[before] = asyncio.create_task(self._retire(before), name=f"{self.name} before")
        self._replaced.set()
        return successor.process.pid

    async def _retire(self, one: _Process) -> None:
        code = await one.wait()
        _log.info("the %s that was replaced %s", self.name, _how(code))
        self._retiring.pop(one, None)

    async def hold(self, timeout_s: float) -> None:
        """Have it end, SIGTERM first, and not start again before `release`."""
        self._wanted.clear()
        if self._current is not None:
            await self._end(self._current, timeout_s, asyncio.Event())

    @property
    def is_held(self) -> bool:
        """Whether it is down because it is to be."""
        return not self._wanted.is_set()

    async def release(self, timeout_s: float) -> None:
        """Have a held one start again and wait until it serves. Raises StartError if it does not."""
        before = self._current
        self._wanted.set()
        until = time.monotonic() + timeout_s
        while self._current is before:
            if time.monotonic() > until:
                raise StartError(f"{self.name} was not started again.")
            await asyncio.sleep(0.01)
        await self.wait_ready(until - time.monotonic())

    async def stop(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM, and SIGKILL after timeout_s. Once `hurry` is set, a second SIGTERM and at most two seconds more."""
        self._is_stopping = True
        self._wanted.set()
        await asyncio.gather(*(self._end(one, timeout_s, hurry) for one in self._alive()))
        await asyncio.gather(*self._retiring.values())

    async def _end(self, one: _Process, timeout_s: float, hurry: asyncio.Event) -> None:
        one.signal(signal.SIGTERM)
        ended = asyncio.ensure_future(one.process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            await asyncio.wait({ended, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and hurry.is_set():
                one.signal(signal.SIGTERM)
                await asyncio.wait({ended}, timeout=2.0)
            if not ended.done():
                _log.warning("%s did not stop in time and is killed", self.name)
                one.signal(signal.SIGKILL)
            await ended
        finally:
            hurried.cancel()

    def _last_words(self) -> str:
        if self._log is None or not self._log.tail:
            return ""
        lines = "\n  ".join(self._log.tail)
        return f" Its last lines ({self._log.path}):\n  {lines}"


async def _copy(source: int, log: LogFile) -> None:
    """Copy lines until whoever writes to the pipe has closed it. source: the end to read from, which is closed here."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb", buffering=0)
    )
    try:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than the reader's limit; it has dropped the line
                line = b"(a line that was too long)\n"
            if not line:
                return
            log.write(line)
    finally:
        transport.close()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def dying_with(parent: int, number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel send the signal to the child when `parent` dies; it does nothing else."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)  # it died before the line above

    return prepare


def follow_parent() -> None:
    """Have the kernel kill this process when its parent dies; for processes that somebody else's code has started."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it died before the line above


def settle_heap() -> None:
    """Leave all that is there now out of the collector's later rounds, which nothing else can happen in.

    Call once, when the process is ready to serve. A round over all of hostd's modules took up to 50 ms, now 7.
    """
    gc.collect()
    gc.freeze()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that nothing escapes."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans(own: set[int]) -> None:
    """Collect what ended and is not in `own`; those are awaited elsewhere."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        # One of our own comes first as long as its waiter has not collected it; it wakes us again by its end.
        if ended is None or ended.si_pid in own:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


def kill_orphans(timeout_s: float) -> int:
    """Kill and collect every process that is still a child of this one; returns how many. Blocks."""
    until = time.monotonic() + timeout_s
    killed: set[int] = set()
    while (left := _children()) and time.monotonic() < until:
        for pid in left - killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left
        reap_orphans(set())
        time.sleep(0.005)
    return len(killed)


def _children() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stat = path.read_text()
            if int(stat[stat.rindex(")") + 2 :].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found
