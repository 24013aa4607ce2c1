"""What a build writes: lines, gathered and stored a few times a second, up to a limit.

Storing is also the builder's sign of life, and how it learns that somebody else has ended the build.
"""

from __future__ import annotations

import time
from typing import Literal

import sqlalchemy as sa

from gateway.engine.context import Context
from gateway.resources import Build, BuildLine
from gateway.store import builds as rows

Stream = Literal["stdout", "stderr", "system"]

#: Longer lines are cut into pieces of this size.
_LINE_CHARS_MAX = 4096


class BuildLog:
    """The log of one build. step: the number that new lines get."""

    def __init__(self, context: Context, build: Build) -> None:
        self._context = context
        self._build_id = build.id
        self._machine_id = build.machine_id
        # A build that was started again goes on with the log it has.
        self._bytes_left = context.settings.build_log_bytes_max - build.log_bytes
        self._bytes = build.log_bytes
        self._lines: list[BuildLine] = []
        self._partial: dict[Stream, str] = {}
        self.step = 0

    @property
    def has_lines(self) -> bool:
        """Whether anything waits to be stored."""
        return bool(self._lines)

    def write(self, stream: Stream, data: bytes) -> None:
        """Bytes of a process. A line that has not ended waits for its rest."""
        text = self._partial.pop(stream, "") + data.decode("utf-8", "replace").replace("\r\n", "\n")
        *lines, rest = text.split("\n")
        for line in lines:
            self._add(stream, line)
        if rest:
            self._partial[stream] = rest if len(rest) < _LINE_CHARS_MAX else ""
        if len(rest) >= _LINE_CHARS_MAX:
            self._add(stream, rest)

    def say(self, text: str) -> None:
        """A line of the builder's own."""
        self.end_lines()
        self._add("system", text)

    def end_lines(self) -> None:
        """No more comes to the lines that have not ended."""
        partial, self._partial = self._partial, {}
        for stream, rest in partial.items():
            self._add(stream, rest)

    def _add(self, stream: Stream, text: str) -> None:
        if self._bytes_left <= 0:
            return
        # A progress bar rewrites its line; what it shows last is the line.
        text = text.rpartition("\r")[2]
        for start in range(0, max(len(text), 1), _LINE_CHARS_MAX):
            piece = text[start : start + _LINE_CHARS_MAX]
            size = len(piece.encode()) + 1
            self._bytes_left -= size
            self._bytes += size
            if self._bytes_left <= 0:
                stream, piece = "system", "the log is full; what follows is not kept"
            self._lines.append(BuildLine(0, time.time(), self.step, stream, piece))
            if self._bytes_left <= 0:
                return

    async def flush(self) -> bool:
        """Store what has gathered; False if the build has been ended by somebody else."""
        lines, self._lines = self._lines, []

        def job(connection: sa.Connection) -> bool:
            signs = {"log_bytes": self._bytes, "alive_at": self._context.clock()}
            is_open = rows.change(connection, self._build_id, builder=self._machine_id, **signs)
            rows.append_lines(connection, self._build_id, lines)
            return is_open

        is_open = await self._context.database.write(job)
        if lines:
            self._context.events.announce()
        return is_open
