"""One connection that carries frames: bytes in, frames out, with back-pressure on the way out.

Used by the client side (`vmm.link`) and by hostd's relay. It knows frames, not streams: credits, stream ids and what to
do about a lost connection belong to its owner, who gives it two callbacks. No task is made per connection or per frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from native import frames
from native.frames import Frame, FrameDecoder, FrameError
from vmm.errors import LinkError

#: Writers wait once this much is queued on a connection, until it has shrunk to a quarter. The larger of the two has
#: to hold a few DATA frames, or relaying at full speed would stop for each one.
WRITE_BYTES_HIGH = 1024 * 1024
WRITE_BYTES_LOW = WRITE_BYTES_HIGH // 4

#: Below this a frame is copied into one piece with its head; above, head and payload are queued as two.
_COPY_BYTES_MAX = 16 * 1024


class FrameProtocol(asyncio.Protocol):
    """An asyncio protocol whose peer speaks frames.

    on_frame: called for every frame received, in order. If it raises, the connection is aborted.
    on_lost: called once when the connection has ended, with the cause or None after a plain close.
    on_writable: called with False when the write queue is full and True when it has drained, for owners that relay and
        would rather stop reading elsewhere than await `drain`.
    """

    def __init__(
        self,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[Exception | None], None],
        on_writable: Callable[[bool], None] | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_writable = on_writable
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._is_writable = True
        self._error: Exception | None = None
        self._drain_waiters: set[asyncio.Future[None]] = set()
        #: Set whenever bytes arrive; keep-alive clears it and looks again later.
        self.has_heard = False

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def local_address(self) -> str:
        """Our end's IP address, empty when there is none."""
        name = None if self._transport is None else self._transport.get_extra_info("sockname")
        return str(name[0]) if isinstance(name, tuple) else ""

    @property
    def is_writable(self) -> bool:
        """Whether `drain` would return at once."""
        return self._is_writable

    def send(self, *parts: bytes | memoryview) -> None:
        """Queue encoded frames, or a head and its payload; dropped when the connection has ended (`on_lost` tells)."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if len(parts) == 1:
            transport.write(parts[0])
        else:
            transport.writelines(parts)

    def send_data(self, channel: int, stream: int, offset: int, data: bytes | memoryview) -> None:
        """Queue one DATA frame of at most `frames.DATA_BYTES_MAX` bytes, without copying a large one."""
        if len(data) <= _COPY_BYTES_MAX:
            self.send(frames.encode_data(channel, stream, offset, bytes(data)))
        else:
            self.send(frames.data_head(channel, stream, offset, len(data)), data)

    def relay(self, frame: Frame, stream: int) -> None:
        """Queue a frame received elsewhere under another stream id."""
        kind, channel, _, offset, payload = frame
        if kind == frames.DATA:
            self.send_data(channel, stream, offset, payload)
        elif kind in (frames.END, frames.CREDIT):
            self.send(frames.encode_offset(kind, channel, stream, offset))
        else:
            self.send(frames.encode(kind, channel, stream, payload))

    async def drain(self) -> None:
        """Wait until the write queue has room. Raises LinkError when the connection ends first."""
        if self._is_writable and self.is_open:
            return
        if not self.is_open:
            raise LinkError("link_lost", "the connection has ended", detail=str(self._error or ""))
        waiter = asyncio.get_running_loop().create_future()
        self._drain_waiters.add(waiter)
        try:
            await waiter
        finally:
            self._drain_waiters.discard(waiter)

    def pause_reading(self) -> None:
        """Let the peer wait: its own writes will stall."""
        if self.is_open and self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        if self.is_open and self._transport is not None:
            self._transport.resume_reading()

    def close(self) -> None:
        """End the connection once everything queued is written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """End the connection now, dropping what is queued; `error` becomes the cause given to `on_lost`."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A stream transport by contract of create_connection and create_server; uvloop's is no subclass of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH, low=WRITE_BYTES_LOW)

    def data_received(self, data: bytes) -> None:
        self.has_heard = True
        try:
            received = self._decoder.feed(data)
        except FrameError as error:
            self.abort(error)
            return
        on_frame = self._on_frame
        for frame in received:
            on_frame(frame)

    def pause_writing(self) -> None:
        self._is_writable = False
        if self._on_writable is not None:
            self._on_writable(False)

    def resume_writing(self) -> None:
        self._is_writable = True
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._on_writable is not None:
            self._on_writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        cause = self._error or exc
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_exception(LinkError("link_lost", "the connection has ended", detail=str(cause or "")))
        self._on_lost(cause)
