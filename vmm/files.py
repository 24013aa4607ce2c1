"""File content and file changes as streams, across links that break.

Reading goes on where it was, if the file is still the same. Watching goes on with an `overflow` event in between, since
nobody saw what happened meanwhile. Writing bytes starts again from nothing: the agent publishes a file only once it is
complete.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from types import TracebackType
from typing import Any, Self

from vmm.calls import LinkProvider, Patience, ask, decode, is_break, limit_of, open_stream, within
from vmm.errors import LinkError, VmmError
from vmm.guest import FileEvent, FileInfo, WrittenFile
from vmm.stream import Chunk, Event, Stream


class _Resuming:
    """A stream that is opened again when its link breaks."""

    def __init__(self, links: LinkProvider, op: Mapping[str, Any]) -> None:
        self._links = links
        self._op = op
        self._deadline: float | None = None
        self._stream: Stream | None = None
        self._is_closed = False

    def close(self) -> None:
        """Leave the stream; the iteration ends."""
        self._is_closed = True
        if self._stream is not None:
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _open(self, op: Mapping[str, Any], broken_by: VmmError | None = None) -> dict[str, Any]:
        patience = Patience(limit_of(self._deadline))
        error = broken_by
        while True:
            if error is not None:
                await patience.after(error)
            try:
                self._stream, reply = await ask(self._links, op, patience)
            except VmmError as again:
                error = again
            else:
                return reply


class FileReader(_Resuming):
    """Made by `Agent.read`. Iterate over its bytes; `info` is what the file was when it was opened."""

    def __init__(self, links: LinkProvider, op: Mapping[str, Any], offset: int, length: int | None) -> None:
        super().__init__(links, op)
        self._offset = offset
        self._left = length
        self.info = FileInfo(0, 0, 0.0)

    async def open(self, deadline: float | None) -> Self:
        """Ask for the content. Raises AgentError `not_found`, `is_a_directory`, `not_regular`, …"""
        self._deadline = deadline
        self.info = decode(FileInfo, await self._open(self._rest()))
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while self._stream is not None and not self._is_closed:
            try:
                item = await anext(self._stream)
            except StopAsyncIteration:
                break
            except VmmError as error:
                await self._continue(error)
                continue
            if isinstance(item, Chunk):
                self._offset += len(item.data)
                self._left = None if self._left is None else self._left - len(item.data)
                return item.data
        raise StopAsyncIteration

    def _rest(self) -> dict[str, Any]:
        length = {} if self._left is None else {"length": self._left}
        return {**self._op, "offset": self._offset, **length}

    async def _continue(self, error: VmmError) -> None:
        if not is_break(error):
            raise error
        now = decode(FileInfo, await self._open(self._rest(), broken_by=error))
        if now != self.info:
            self.close()
            raise LinkError("link_lost", "the file changed while the connection was down") from error


class FileWatch(_Resuming):
    """Made by `Agent.watch`. Iterate over FileEvents until you `close` it."""

    async def open(self, deadline: float | None) -> Self:
        """Start watching; every change from now on is told."""
        self._deadline = deadline
        await self._open(self._op)
        self._deadline = None
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileEvent:
        while self._stream is not None and not self._is_closed:
            try:
                item = await anext(self._stream)
            except StopAsyncIteration:
                break
            except VmmError as error:
                if not is_break(error):
                    raise
                await self._open(self._op, broken_by=error)
                return FileEvent("overflow")
            if isinstance(item, Event):
                return decode(FileEvent, item)
        raise StopAsyncIteration


async def write_once(
    links: LinkProvider, op: Mapping[str, Any], content: AsyncIterable[bytes], deadline: float | None
) -> WrittenFile:
    """Write a file from a stream, on one link. A deadline of None limits each step, not the whole."""
    with await open_stream(links, op, Patience(limit_of(deadline))) as stream:
        async for part in content:
            async with within(deadline):
                await stream.send(part)
        async with within(deadline):
            stream.end()
            return decode(WrittenFile, await stream.reply())
