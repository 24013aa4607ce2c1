"""Processes of a fake machine: coroutines that print, read and sleep like the programs they are named after.

    running ──▶ exited, kept until its status is acknowledged or 1 000 newer ones exist

Output waits in a buffer per channel until a reader has given credit for it, as with the real agent.

A program keeps what it has done so far in `Process.memory` and goes on from there when it is called again. So it can be
saved between two steps and restored elsewhere, and it stands still while `Process.may_run` is not set.
"""

from __future__ import annotations

import asyncio
import shlex
import signal as signals
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vmm.drivers.fake.files import FileTree
from vmm.errors import AgentError
from vmm.stream import PTY, STDERR, STDOUT

LOG_BYTES_MAX = 1024 * 1024

#: How long a full buffer waits for a reader before its oldest bytes go.
_UNREAD_WAIT_S = 60.0


class Signal:
    """Something happened: wakes whoever waits, and calls whoever listens."""

    def __init__(self) -> None:
        self.listeners: set[Callable[[], None]] = set()
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake and call."""
        self._event.set()
        self._event = asyncio.Event()
        for listener in self.listeners:
            listener()

    async def wait(self) -> None:
        """Until the next time."""
        await self._event.wait()


class Output:
    """What a process wrote on one channel: the bytes not yet credited, and as many older ones as fit."""

    def __init__(self, bytes_max: int, changed: Signal) -> None:
        self.end = 0
        self.credited = 0
        self.is_ended = False
        self._kept = bytearray()
        self._bytes_max = bytes_max
        self._changed = changed

    @property
    def start(self) -> int:
        """Offset of the oldest byte kept."""
        return self.end - len(self._kept)

    async def write(self, data: bytes) -> None:
        """Add bytes, waiting while the buffer is full of unread ones."""
        for at in range(0, len(data), 64 * 1024):
            part = data[at : at + 64 * 1024]
            await self._make_room(len(part))
            self._kept += part
            self.end += len(part)
            self._changed.notify()

    def read(self, offset: int, size: int) -> bytes:
        """Kept bytes from an offset on."""
        return bytes(self._kept[offset - self.start :][:size])

    def credit(self, size: int) -> None:
        """A reader has taken `size` more bytes."""
        self.credited += size
        self._changed.notify()

    def finish(self) -> None:
        """Nothing follows."""
        self.is_ended = True
        self._changed.notify()

    def dump(self) -> Any:
        """Everything, in plain values."""
        return [self.end, self.credited, self.is_ended, bytes(self._kept)]

    def load(self, dumped: Any) -> None:
        """Become what was dumped."""
        self.end, self.credited, self.is_ended, kept = dumped
        self._kept = bytearray(kept)

    async def _make_room(self, size: int) -> None:
        deadline = time.monotonic() + _UNREAD_WAIT_S
        while (over := len(self._kept) + size - self._bytes_max) > 0 and self.start + over > self.credited:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        if over > 0:
            del self._kept[:over]


class Input:
    """What a process has been sent and has not read yet. `offset` counts what arrived."""

    def __init__(self, changed: Signal) -> None:
        self.offset = 0
        self.read_bytes = 0
        self.is_ended = False
        self._kept = bytearray()
        self._changed = changed

    def feed(self, offset: int, data: bytes) -> int:
        """Take bytes; those that arrived before are skipped. Returns how many were."""
        fresh = data[max(0, self.offset - offset) :]
        self._kept += fresh
        self.offset += len(fresh)
        self._changed.notify()
        return len(data) - len(fresh)

    def finish(self) -> None:
        """Nothing follows."""
        self.is_ended = True
        self._changed.notify()

    def dump(self) -> Any:
        """Everything, in plain values."""
        return [self.offset, self.read_bytes, self.is_ended, bytes(self._kept)]

    def load(self, dumped: Any) -> None:
        """Become what was dumped."""
        self.offset, self.read_bytes, self.is_ended, kept = dumped
        self._kept = bytearray(kept)

    async def read(self) -> bytes:
        """What has arrived; empty at the end."""
        while not self._kept and not self.is_ended:
            await self._changed.wait()
        data = bytes(self._kept)
        self._kept.clear()
        self.read_bytes += len(data)
        self._changed.notify()
        return data


class Process:
    """One of them. `changed` tells of output, of input taken and of its end."""

    def __init__(
        self,
        pid: int,
        op: Mapping[str, Any],
        files: FileTree,
        env: Mapping[str, str],
        *,
        may_run: asyncio.Event,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """may_run: set while the machine is not frozen.  saved: what `dump` gave, to go on from there."""
        self.id = str(op["id"])
        self.memory: dict[str, Any] = {}
        self.may_run = may_run
        self.pid = pid
        self.op = op
        self.files = files
        self.env = env
        self.cwd = op.get("cwd") or "/home/user"
        self.started_at = time.time()
        self.exit: dict[str, Any] | None = None
        self.changed = Signal()
        self.input = Input(self.changed)
        if not op.get("stdin") and not op.get("pty"):
            self.input.finish()
        channels = (PTY,) if op.get("pty") else (STDOUT, STDERR)
        self.outputs = {channel: Output(op.get("log_bytes_max") or LOG_BYTES_MAX, self.changed) for channel in channels}
        if saved is not None:
            self._load(saved)
        self._task = asyncio.create_task(self._live(), name=f"fake process {self.id}")

    def dump(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "pid": self.pid,
            "op": self.op,
            "env": dict(self.env),
            "started_at": self.started_at,
            "exit": self.exit,
            "memory": self.memory,
            "input": self.input.dump(),
            "outputs": {str(channel): output.dump() for channel, output in self.outputs.items()},
        }

    def _load(self, saved: Mapping[str, Any]) -> None:
        self.started_at, self.exit = saved["started_at"], saved["exit"]
        self.memory = dict(saved["memory"])
        self.input.load(saved["input"])
        for channel, output in self.outputs.items():
            output.load(saved["outputs"][str(channel)])

    async def write(self, data: bytes, channel: int = STDOUT) -> None:
        """Print."""
        await self.may_run.wait()
        await self.outputs[PTY if PTY in self.outputs else channel].write(data)

    def signal(self, number: int) -> None:
        """Every signal but 0 ends it: these programs handle none."""
        if self.exit is None and number:
            self._end(128 + number, "signaled", number)
            self._task.cancel()

    def record(self) -> dict[str, Any]:
        """What the agent tells of it."""
        state = {"state": "running"} if self.exit is None else {**self.exit, "state": "exited"}
        state.pop("type", None)
        return {
            "id": self.id,
            "pid": self.pid,
            "name": self.op.get("name"),
            "argv": self.op.get("argv"),
            "shell": self.op.get("shell"),
            "cwd": self.cwd,
            "user": self.op.get("user", "user"),
            "started_at": self.started_at,
            "background": bool(self.op.get("background")),
            "stdout_bytes": self.outputs[next(iter(self.outputs))].end,
            "stderr_bytes": self.outputs[STDERR].end if STDERR in self.outputs else 0,
            "stdin_bytes": self.input.offset,
            **state,
        }

    async def stop(self) -> None:
        """End it with the machine."""
        self.signal(signals.SIGKILL)
        await asyncio.wait([self._task])

    async def _live(self) -> None:
        if self.exit is not None:
            return
        limit = self.op.get("timeout_s")
        try:
            async with asyncio.timeout(limit):
                code = await _run(self)
            await self.may_run.wait()
            self._end(code, "exited", None)
        except TimeoutError:
            self._end(124, "timeout", signals.SIGTERM)

    def _end(self, code: int, reason: str, number: int | None) -> None:
        if self.exit is not None:
            return
        duration_ms = (time.time() - self.started_at) * 1000
        self.exit = {"exit_code": code, "signal": number, "reason": reason, "duration_ms": duration_ms}
        self.exit["exited_at"] = time.time()
        for output in self.outputs.values():
            output.finish()


def check(op: Mapping[str, Any]) -> None:
    """Refuse what the agent would refuse before it starts anything."""
    if (op.get("argv") is None) == (op.get("shell") is None) or not isinstance(op.get("id"), str):
        raise AgentError("bad_request", "exec needs an id, and either argv or shell")
    argv = op.get("argv")
    if argv is not None and (not argv or argv[0].rpartition("/")[2] not in PROGRAMS):
        raise AgentError("command_not_found", f"{argv[0] if argv else ''}: command not found")


async def _run(process: Process) -> int:
    argv = process.op.get("argv")
    if argv is not None:
        return await _run_program(process, argv)
    memory = process.memory
    lines = [line.split("&&") for line in str(process.op["shell"]).split(";")]
    while (at := memory.get("line", 0)) < len(lines):
        part = memory.get("part", 0)
        memory["code"] = await _run_program(process, shlex.split(lines[at][part]))
        is_over = memory["code"] or part + 1 == len(lines[at])
        memory.update({"line": at + 1, "part": 0} if is_over else {"part": part + 1}, program={})
    return int(memory.get("code", 0))


async def _run_program(process: Process, argv: list[str]) -> int:
    if not argv:
        return 0
    await process.may_run.wait()
    program = PROGRAMS.get(argv[0].rpartition("/")[2])
    if program is None:
        await process.write(f"{argv[0]}: command not found\n".encode(), STDERR)
        return 127
    return await program(process, argv[1:])


async def _true(_: Process, __: list[str]) -> int:
    return 0


async def _false(_: Process, __: list[str]) -> int:
    return 1


async def _exit(_: Process, arguments: list[str]) -> int:
    return int(arguments[0]) & 0xFF if arguments else 0


async def _echo(process: Process, arguments: list[str]) -> int:
    channel = STDOUT
    if arguments and arguments[-1] == ">&2":
        channel = STDERR
        arguments = arguments[:-1]
    await process.write((" ".join(arguments) + "\n").encode(), channel)
    return 0


async def _sleep(process: Process, arguments: list[str]) -> int:
    until = _progress(process).setdefault("until", time.time() + float(arguments[0]))
    await asyncio.sleep(max(0.0, until - time.time()))
    return 0


async def _count(process: Process, arguments: list[str]) -> int:
    """`count [DELAY [LAST]]`: 1, 2, 3, … a line each."""
    delay_s = float(arguments[0]) if arguments else 0.01
    last = int(arguments[1]) if len(arguments) > 1 else None
    progress = _progress(process)
    while last is None or progress.get("count", 0) < last:
        await asyncio.sleep(delay_s)
        await process.may_run.wait()
        count = progress.get("count", 0) + 1
        # Noted in the same instant as it is written, or a copy would skip or repeat a line.
        await process.write(f"{count}\n".encode())
        progress["count"] = count
    return 0


async def _cat(process: Process, arguments: list[str]) -> int:
    for path in arguments:
        try:
            content, _ = process.files.read(path)
        except AgentError as error:
            await process.write(f"cat: {path}: {error.message}\n".encode(), STDERR)
            return 1
        await process.write(content)
    while not arguments and (data := await process.input.read()):
        await process.write(data)
    return 0


async def _env(process: Process, _: list[str]) -> int:
    await process.write("".join(f"{name}={value}\n" for name, value in sorted(process.env.items())).encode())
    return 0


async def _pwd(process: Process, _: list[str]) -> int:
    await process.write(f"{process.cwd}\n".encode())
    return 0


async def _yes(process: Process, arguments: list[str]) -> int:
    """`yes` for ever; with `| head -c N`, the first N bytes of it."""
    block = b"y\n" * (32 * 1024)
    total = int(arguments[-1]) if arguments[:3] == ["|", "head", "-c"] else None
    progress = _progress(process)
    while total is None or progress.get("written", 0) < total:
        part = block if total is None else block[: total - progress.get("written", 0)]
        await process.write(part)
        progress["written"] = progress.get("written", 0) + len(part)
    return 0


def _progress(process: Process) -> dict[str, Any]:
    """What the program that runs now remembers of itself."""
    progress: dict[str, Any] = process.memory.setdefault("program", {})
    return progress


Program = Callable[[Process, list[str]], Awaitable[int]]

PROGRAMS: Mapping[str, Program] = {
    "cat": _cat,
    "count": _count,
    "echo": _echo,
    "env": _env,
    "exit": _exit,
    "false": _false,
    "pwd": _pwd,
    "sh": _cat,
    "bash": _cat,
    "sleep": _sleep,
    "true": _true,
    "yes": _yes,
}
