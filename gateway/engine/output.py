"""What a process writes, as the gateway's resources."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from typing import Literal

from gateway.resources import ExecResult, OutputChunk, Process, ProcessExit
from vmm import guest
from vmm.stream import PTY, STDERR, STDOUT, Chunk

_STREAMS: dict[int, Literal["stdout", "stderr", "pty"]] = {STDOUT: "stdout", STDERR: "stderr", PTY: "pty"}


def output_chunk(chunk: Chunk) -> OutputChunk:
    """Bytes of one stream."""
    return OutputChunk(_STREAMS[chunk.channel], chunk.offset, chunk.data)


def process_exit(ended: guest.ProcessExit) -> ProcessExit:
    """How a process ended."""
    return ProcessExit(ended.exit_code, signal_number(ended.signal), ended.reason, ended.duration_ms)


def exec_result(completed: guest.Completed) -> ExecResult:
    """A command that ran to its end."""
    ended = completed.exit
    return ExecResult(
        stdout=completed.stdout,
        stderr=completed.stderr,
        exit_code=ended.exit_code,
        signal=signal_number(ended.signal),
        reason=ended.reason,
        duration_ms=ended.duration_ms,
        truncated=completed.stdout_truncated or completed.stderr_truncated,
    )


def process(record: guest.ProcessRecord) -> Process:
    """What the agent knows of a process."""
    return Process(
        pid=record.pid,
        exec_id=record.id,
        name=record.name,
        command=record.shell if record.shell is not None else shlex.join(record.argv or ()),
        cwd=record.cwd or "",
        state=record.state,
        exit_code=record.exit_code,
        signal=signal_number(record.signal),
        reason=record.reason,
        started_at=record.started_at,
        exited_at=record.exited_at,
        background=record.background,
    )


def signal_number(value: int | str | None) -> int | None:
    """A signal's number; the agent may name it."""
    if isinstance(value, str):
        return int(signal.Signals[value]) if value in signal.Signals.__members__ else None
    return value


def last_lines(chunks: Sequence[OutputChunk], count: int) -> list[OutputChunk]:
    """The end of some output from the line `count` before the last on; a line break at the very end opens none."""
    kept: list[OutputChunk] = []
    breaks = 0
    for index, chunk in enumerate(reversed([chunk for chunk in chunks if chunk.data])):
        end = len(chunk.data) - (1 if index == 0 and chunk.data.endswith(b"\n") else 0)
        while (at := chunk.data.rfind(b"\n", 0, end)) >= 0:
            breaks += 1
            if breaks == count:
                kept.append(OutputChunk(chunk.stream, chunk.offset + at + 1, chunk.data[at + 1 :]))
                return kept[::-1]
            end = at
        kept.append(chunk)
    return kept[::-1]
