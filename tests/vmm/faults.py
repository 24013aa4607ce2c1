"""Faults as things a test holds in its hand: a relay that cuts and stalls, and a peer that says what it is told to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson

from native import frames
from native.frames import Frame
from vmm.link import Dial
from vmm.wire import FrameProtocol


class Relay:
    """Stands between a client and what it dials, byte by byte.

    next_budget: asked at each connection how many bytes, both ways together, may pass before it is cut; None: all.
    """

    def __init__(self, target: Dial, next_budget: Callable[[], int | None] = lambda: None) -> None:
        self._target = target
        self._next_budget = next_budget
        self._pipes: set[_Pipe] = set()
        self.connections = 0

    async def dial(self, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """A `vmm.link.Dial`, and what a driver's `dial` returns."""
        loop = asyncio.get_running_loop()
        pipe = _Pipe(self._next_budget(), self._pipes.discard)
        self._pipes.add(pipe)
        try:
            await self._target(lambda: pipe.far)
            server = await loop.create_server(lambda: pipe.near, "127.0.0.1", 0)
            try:
                transport, _ = await loop.create_connection(protocol, *server.sockets[0].getsockname()[:2])
                await pipe.joined.wait()
            finally:
                server.close()
        except BaseException:
            pipe.cut()
            raise
        self.connections += 1
        return transport

    def cut(self) -> None:
        """Break every connection."""
        for pipe in list(self._pipes):
            pipe.cut()

    def stall(self) -> None:
        """Let nothing pass any more, on the connections there are."""
        for pipe in self._pipes:
            pipe.near.pause()
            pipe.far.pause()


class _Pipe:
    def __init__(self, budget: int | None, forget: Callable[[_Pipe], None]) -> None:
        self.near = _End(self)
        self.far = _End(self)
        self.near.other, self.far.other = self.far, self.near
        self.joined = asyncio.Event()
        self._budget = budget
        self._forget = forget

    def take(self, size: int) -> int:
        if self._budget is None:
            return size
        taken = min(size, self._budget)
        self._budget -= taken
        return taken

    def cut(self) -> None:
        for end in (self.near, self.far):
            if end.transport is not None:
                # Not `close`, which would wait for bytes that the other side may never take.
                end.transport.abort()
        self._forget(self)


class _End(asyncio.Protocol):
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []

    def pause(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        for data in self._unsent:
            transport.write(data)
        if self.other is not None and self.other.transport is not None:
            self._pipe.joined.set()

    def data_received(self, data: bytes) -> None:
        passed = data[: self._pipe.take(len(data))]
        if self.other is not None:
            self.other.pass_on(passed)
        if len(passed) < len(data):
            self._pipe.cut()

    def pass_on(self, data: bytes) -> None:
        if self.transport is None:
            self._unsent.append(data)
        else:
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pipe.cut()


def random_budgets(seed: int, least: int, most: int, cuts: int) -> Callable[[], int | None]:
    """Budgets for a Relay: `cuts` connections are cut somewhere between `least` and `most` bytes, the others never."""
    chance = random.Random(seed)
    left = iter(range(cuts))
    return lambda: None if next(left, None) is None else chance.randrange(least, most)


class Peer:
    """The server's end of one connection, played by the test."""

    def __init__(self) -> None:
        self.wire = FrameProtocol(self._on_frame, lambda _: self.lost.set())
        self.lost = asyncio.Event()
        self.greets_with: dict[str, Any] | None = {"version": 1, "role": "agent", "boot_id": "b"}
        self.answers_pings = True
        self.pings = 0
        self.hello: dict[str, Any] = {}
        self._received: asyncio.Queue[Frame] = asyncio.Queue()

    async def frame(self, kind: int) -> Frame:
        """The next frame, which has to be of this type."""
        async with asyncio.timeout(60):
            frame = await self._received.get()
        assert frame[0] == kind, frame
        return frame

    async def frame_after(self, kind: int, *skipped: int) -> Frame:
        """The next frame of this type; those before it have to be of the types skipped."""
        async with asyncio.timeout(60):
            while (frame := await self._received.get())[0] != kind:
                assert frame[0] in skipped, frame
        return frame

    async def opened(self) -> tuple[int, dict[str, Any]]:
        """The stream id and the operation of the next OPEN."""
        frame = await self.frame(frames.OPEN)
        return frame[2], orjson.loads(frame[4])

    def received_nothing(self) -> bool:
        return self._received.empty()

    def say(self, kind: int, stream: int, message: Any = None, channel: int = 0) -> None:
        payload = message if isinstance(message, bytes) else b"" if message is None else orjson.dumps(message)
        self.wire.send(frames.encode(kind, channel, stream, payload))

    def data(self, stream: int, channel: int, offset: int, data: bytes) -> None:
        self.wire.send_data(channel, stream, offset, data)

    def number(self, kind: int, stream: int, channel: int, number: int) -> None:
        """END and CREDIT."""
        self.wire.send(frames.encode_offset(kind, channel, stream, number))

    def _on_frame(self, frame: Frame) -> None:
        if frame[0] == frames.HELLO:
            self.hello = orjson.loads(frame[4])
            if self.greets_with is not None:
                self.say(frames.ERROR if "code" in self.greets_with else frames.HELLO, 0, self.greets_with)
        elif frame[0] == frames.PING:
            self.pings += 1
            if self.answers_pings:
                self.say(frames.PONG, 0, frame[4])
        else:
            self._received.put_nowait(frame)


@asynccontextmanager
async def listening(peer: Peer) -> AsyncIterator[Dial]:
    """Have `peer` take the connections made through the yielded dial."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: peer.wire, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()[:2]
    try:
        yield lambda protocol: loop.create_connection(protocol, *address)
    finally:
        server.close()
        peer.wire.abort()
        await server.wait_closed()
