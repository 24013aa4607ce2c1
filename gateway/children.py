"""Runs the server's processes: starts them, keeps their output, restarts one that died, stops them.

A child is in a session of its own, so that Ctrl-C reaches the supervisor alone, and gets SIGTERM from the kernel when
the supervisor dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
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


class Child:
    """One process of the server.

    is_ready: asks whether it serves. log: where its output goes; None leaves it to the supervisor's own.
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
        self._process: asyncio.subprocess.Process | None = None
        self._copying: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def pid(self) -> int | None:
        """The running process, if there is one."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start the process; `keep_running` is to follow."""
        output = None
        if self._log is not None:
            # A pipe of our own: `wait` would not return before every descendant closed one of asyncio's.
            source, output = os.pipe()
            self._copying = asyncio.create_task(_copy(source, self._log), name=f"log of {self.name}")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
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

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until it serves. Raises StartError if it dies first or takes too long."""
        until = time.monotonic() + timeout_s
        while not await self.is_ready():
            if self.pid is None:
                raise StartError(f"{self.name} ended while starting.{self._last_words()}")
            if time.monotonic() > until:
                raise StartError(f"{self.name} was not ready after {timeout_s:g} s.{self._last_words()}")
            await asyncio.sleep(0.01)

    async def keep_running(self) -> None:
        """Start it again whenever it ends, until `stop`."""
        backoff_s = _BACKOFF_FIRST_S
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            if self._copying is not None:
                # A descendant that outlives it still holds the pipe; nothing waits for that.
                await asyncio.wait([self._copying], timeout=_LAST_LINES_S)
                self._copying.cancel()
            if self._is_stopping:
                return
            backoff_s = _BACKOFF_FIRST_S if time.monotonic() - started > _HEALTHY_S else backoff_s
            _log.warning("%s %s; starting it again in %g s", self.name, _how(code), backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)
            if not self._is_stopping:
                await self.start()

    async def stop(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM, and SIGKILL after timeout_s. Once `hurry` is set, a second SIGTERM and at most two seconds more."""
        self._is_stopping = True
        if self.pid is None or self._process is None:
            return
        self._signal(signal.SIGTERM)
        ended = asyncio.ensure_future(self._process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            await asyncio.wait({ended, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and hurry.is_set():
                self._signal(signal.SIGTERM)
                await asyncio.wait({ended}, timeout=2.0)
            if not ended.done():
                _log.warning("%s did not stop in time and is killed", self.name)
                self._signal(signal.SIGKILL)
            await ended
        finally:
            hurried.cancel()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

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
