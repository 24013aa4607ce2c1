"""One operation on a link: what the client sees of it.

    open ──▶ REPLY ──▶ DATA / END / EVENT … ──▶ CLOSE         over in order: iteration ends
      └────────┴────────────┴─▶ ERROR, lost link, violation    over: `reply`, iteration and `send` raise

A stream has one reader (`reply`, then iteration) and at most one writer. What has arrived is handed out before an
error is raised. Credit goes back as the reader takes chunks, so a reader that stops stalls its own stream and no other.
A peer that sends more than its credit, or a malformed message, ends this stream only: behind hostd's connection there
are other machines that did nothing wrong.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from native import frames
from native.frames import Frame
from vmm.errors import AgentError, LinkError, MachineError, VmmError
from vmm.wire import FrameProtocol

INPUT = 0
STDOUT = 1
STDERR = 2
PTY = 3

#: What a sender may have under way on a channel (docs/protocol.md), and how much is consumed before credit goes back:
#: often enough that the sender never waits for it, seldom enough to cost nothing.
CREDIT_BYTES = 1024 * 1024
_CREDIT_STEP_BYTES = CREDIT_BYTES // 4

#: The window of a channel on which nothing may follow.
_ENDED = -1

#: Events need no credit. A reader this far behind gets one `overflow` event in place of those that came too late.
_EVENTS_MAX = 1024

#: Codes that hostd gives, also on streams that it forwards; every other code comes from the agent.
_MACHINE_CODES = frozenset(
    {
        "agent_unreachable",
        "driver_failed",
        "limit_exceeded",
        "machine_not_found",
        "machine_not_running",
        "machine_paused",
        "no_capacity",
        "snapshot_corrupt",
        "snapshot_incompatible",
        "snapshot_not_found",
        "template_not_found",
        "wake_timeout",
    }
)


class Chunk(NamedTuple):
    """Bytes of one channel; `offset` counts from the channel's first byte, so that a gap is visible."""

    channel: int
    offset: int
    data: bytes


class End(NamedTuple):
    """Nothing follows on this channel, which had `total` bytes."""

    channel: int
    total: int


class Event(dict[str, Any]):
    """An EVENT frame's JSON object."""


Item = Chunk | End | Event


class Stream:
    """Made by `Link.open`. Use as a context manager, or `close` it: both tell the peer if it is not over yet."""

    def __init__(
        self, wire: FrameProtocol, stream_id: int, forget: Callable[[int], object], *, to_machine: bool
    ) -> None:
        self.id = stream_id
        self._wire = wire
        self._forget = forget
        self._to_machine = to_machine
        self._reply: dict[str, Any] | None = None
        self._items: deque[Item] = deque()
        self._events = 0
        self._error: VmmError | None = None
        self._is_over = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._send_credit = CREDIT_BYTES
        self._sent = 0
        self._window = [CREDIT_BYTES] * 4
        self._consumed = [0] * 4
        self._next_offset = [0] * 4

    @property
    def is_over(self) -> bool:
        """Whether nothing more will arrive; what has arrived may still wait to be read."""
        return self._is_over

    async def reply(self) -> dict[str, Any]:
        """The operation's result. Raises AgentError or MachineError when refused, LinkError when the link broke."""
        while self._reply is None:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise LinkError("bad_frame", "the stream ended without a reply")
            await self._wait_to_read()
        return self._reply

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            await self._wait_to_read()
        return self._take()

    async def send(self, data: bytes) -> None:
        """Send input, waiting for credit and for room in the connection. After an error `sent` tells how far it got."""
        if self._writer is not None:
            raise RuntimeError("a stream has one writer at a time")
        view = memoryview(data)
        while view:
            while self._send_credit <= 0 and not self._is_over:
                await self._wait_to_write()
            if not self._wire.is_writable:
                await self._wire.drain()
            self._raise_if_over()
            part = view[: min(self._send_credit, frames.DATA_BYTES_MAX)]
            self._wire.send_data(INPUT, self.id, self._sent, part if len(part) < len(data) else data)
            self._sent += len(part)
            self._send_credit -= len(part)
            view = view[len(part) :]

    def end(self) -> None:
        """Say that no more input follows."""
        self._raise_if_over()
        self._wire.send(frames.encode_offset(frames.END, INPUT, self.id, self._sent))

    @property
    def sent(self) -> int:
        """Offset of the next input byte."""
        return self._sent

    @property
    def sent_and_taken(self) -> int:
        """Input bytes that the peer has given credit back for: it will not ask for them again."""
        return max(0, self._sent + self._send_credit - CREDIT_BYTES)

    def start_input_at(self, offset: int) -> None:
        """Continue input that an earlier stream of the same process began."""
        self._sent = offset

    def control(self, message: Mapping[str, Any]) -> None:
        """Send a CONTROL message, such as a resize."""
        self._raise_if_over()
        self._wire.send(frames.encode(frames.CONTROL, 0, self.id, orjson.dumps(message)))

    def ack(self) -> None:
        """Tell the peer that the exit status has been received, and leave the stream."""
        self._leave(frames.ACK)

    def close(self) -> None:
        """Leave the stream: a process is detached, an unfinished write is dropped. No effect when it is over."""
        self._leave(frames.CLOSE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def receive(self, frame: Frame) -> None:
        """Take a frame addressed to this stream; called by the link."""
        kind, channel, _, offset, payload = frame
        if kind == frames.DATA:
            self._receive_data(channel, offset, payload)
        elif kind == frames.CREDIT:
            self._send_credit += offset
            self._wake_writer()
        elif kind == frames.END:
            self._receive_end(channel, offset)
        elif kind == frames.CLOSE:
            self._finish(None)
        else:
            self._receive_json(kind, payload)

    def fail(self, error: VmmError) -> None:
        """End the stream with an error; called by the link when it breaks."""
        self._finish(error)

    def _receive_data(self, channel: int, offset: int, data: bytes) -> None:
        if not STDOUT <= channel <= PTY or offset < self._next_offset[channel] or len(data) > self._window[channel]:
            self._violate("data out of order or beyond its credit")
            return
        self._window[channel] -= len(data)
        self._next_offset[channel] = offset + len(data)
        self._put(Chunk(channel, offset, data))

    def _receive_end(self, channel: int, total: int) -> None:
        if not STDOUT <= channel <= PTY or self._window[channel] == _ENDED:
            self._violate("a channel ended twice")
            return
        self._window[channel] = _ENDED
        self._put(End(channel, total))

    def _receive_json(self, kind: int, payload: bytes) -> None:
        try:
            message = orjson.loads(payload)
        except orjson.JSONDecodeError:
            message = None
        if not isinstance(message, dict):
            self._violate("a message is no JSON object")
        elif kind == frames.EVENT:
            self._receive_event(Event(message))
        elif kind == frames.ERROR:
            self._finish(self._error_from(message))
        elif kind == frames.REPLY and self._reply is None:
            self._reply = message
            self._wake_reader()
        else:
            self._violate(f"frame of type {kind} out of place")

    def _receive_event(self, event: Event) -> None:
        if self._events < _EVENTS_MAX:
            self._put(event)
        elif self._events == _EVENTS_MAX:
            self._put(Event(type="overflow"))
        else:
            return
        self._events += 1

    def _error_from(self, message: dict[str, Any]) -> VmmError:
        code, text, detail = str(message.get("code")), str(message.get("message")), message.get("detail")
        error = MachineError if code in _MACHINE_CODES or not self._to_machine else AgentError
        return error(code, text[:1000], detail=None if detail is None else str(detail)[:4000])

    def _violate(self, what: str) -> None:
        if not self._is_over:
            self._wire.send(frames.encode(frames.CLOSE, 0, self.id))
            self._finish(LinkError("bad_frame", "the peer broke the protocol", detail=what))

    def _put(self, item: Item) -> None:
        self._items.append(item)
        self._wake_reader()

    def _take(self) -> Item:
        item = self._items.popleft()
        if isinstance(item, Chunk):
            self._return_credit(item.channel, len(item.data))
        elif isinstance(item, Event):
            self._events -= 1
        return item

    def _return_credit(self, channel: int, size: int) -> None:
        consumed = self._consumed[channel] + size
        if consumed >= _CREDIT_STEP_BYTES and not self._is_over and self._window[channel] != _ENDED:
            self._wire.send(frames.encode_offset(frames.CREDIT, channel, self.id, consumed))
            self._window[channel] += consumed
            consumed = 0
        self._consumed[channel] = consumed

    def _leave(self, kind: int) -> None:
        if not self._is_over:
            self._wire.send(frames.encode(kind, 0, self.id))
            self._finish(None)
        self._items.clear()

    def _finish(self, error: VmmError | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._error = error
        self._forget(self.id)
        self._wake_reader()
        self._wake_writer()

    def _raise_if_over(self) -> None:
        if self._is_over:
            raise self._error or LinkError("stream_closed", "the stream is over")

    async def _wait_to_read(self) -> None:
        if self._reader is not None:
            raise RuntimeError("a stream has one reader at a time")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def _wait_to_write(self) -> None:
        self._writer = asyncio.get_running_loop().create_future()
        try:
            await self._writer
        finally:
            self._writer = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)
