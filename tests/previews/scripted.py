"""A hostd that says what a test tells it to, for a plane that carries out orders."""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio import StreamReader, StreamWriter
from typing import Any

from native import frames
from tests.previews.harness import PATIENCE_S

#: The only stream of each of the plane's connections.
STREAM = 1

Frame = tuple[int, int, int, int, bytes]


class Link:
    """One connection of the plane to hostd."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = frames.FrameDecoder()
        self._frames: list[Frame] = []

    async def next(self) -> Frame:
        async with asyncio.timeout(PATIENCE_S):
            while not self._frames:
                data = await self._reader.read(65536)
                if not data:
                    raise EOFError
                self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def rest(self) -> list[tuple[int, bytes]]:
        """Kinds and payloads of what comes until the plane leaves."""
        found = []
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                kind, _, _, _, payload = await self.next()
                found.append((kind, payload))
        return found

    async def op(self) -> dict[str, Any]:
        """The operation that is asked for, after the greeting."""
        kind, _, stream, _, payload = await self.next()
        assert (kind, stream) == (frames.HELLO, 0)
        assert json.loads(payload) == {"version": 1, "role": "api"}
        self.send(frames.encode(frames.HELLO, 0, 0, b'{"version":1,"role":"hostd"}'))
        kind, _, stream, _, payload = await self.next()
        assert (kind, stream) == (frames.OPEN, STREAM)
        found = json.loads(payload)
        assert isinstance(found, dict)
        return found

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def tell(self, kind: int, message: dict[str, Any]) -> None:
        self.send(frames.encode(kind, 0, STREAM, json.dumps(message).encode()))

    def reply(self) -> None:
        self.tell(frames.REPLY, {"id": "e1", "pid": 7})

    def data(self, text: bytes, offset: int = 0, channel: int = 1) -> None:
        self.send(frames.encode_data(channel, STREAM, offset, text))

    def close(self) -> None:
        self._writer.close()


class Hostd:
    """Hands out the plane's connections as they come."""

    def __init__(self) -> None:
        self._links: asyncio.Queue[Link] = asyncio.Queue()
        self.writers: list[StreamWriter] = []

    async def accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.writers.append(writer)
        self._links.put_nowait(Link(reader, writer))

    async def link(self) -> Link:
        async with asyncio.timeout(PATIENCE_S):
            return await self._links.get()
