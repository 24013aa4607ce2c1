"""The client's end of a connection to an agent or to hostd: many streams at once over one pair of sockets.

A link does not reconnect. When it breaks, every open stream fails with LinkError and `closed` is set; who owns the link
(`vmm.client`, hostd's machine task) makes a new one. A peer that says nothing for three keep-alive periods, although
asked, counts as dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

import orjson

from native import frames
from native.frames import Frame
from vmm.errors import LinkError, VmmError
from vmm.stream import Stream
from vmm.wire import FrameProtocol

VERSION = 1

#: Connects a protocol to the peer, as `Driver.dial` does. Raises OSError while the peer does not listen.
Dial = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]

#: Three silent periods mean 6 to 9 seconds from the last byte to the verdict.
_KEEPALIVE_PERIOD_S = 3.0
_SILENT_PERIODS_MAX = 3

_HELLO_TIMEOUT_S = 5.0
_STREAM_ID_MAX = 0xFFFF_FFFF


def unix(path: str) -> Dial:
    """Dial a Unix socket."""
    return lambda protocol: asyncio.get_running_loop().create_unix_connection(protocol, path)


def tcp(address: str, port: int) -> Dial:
    """Dial a TCP address."""
    return lambda protocol: asyncio.get_running_loop().create_connection(protocol, address, port)


class Link:
    """Use `Link.connect`. `hello` is what the peer said of itself: `role`, `boot_id`."""

    def __init__(self) -> None:
        self.hello: dict[str, Any] = {}
        self.closed = asyncio.Event()
        self._wire = FrameProtocol(self._on_frame, self._on_lost)
        self._streams: dict[int, Stream] = {}
        self._last_id = 0
        self._error: LinkError | None = None
        self._hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._keepalive: asyncio.TimerHandle | None = None
        self._silent_periods = 0

    @classmethod
    async def connect(cls, dial: Dial, *, role: str, token: str | None = None) -> Self:
        """Connect and shake hands.

        role: ours, "host" or "api".  token: the machine's, for an agent.
        Raises OSError when nobody listens, LinkError when the peer refuses us or says nothing for five seconds.
        """
        link = cls()
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                await dial(lambda: link._wire)
                hello = {"version": VERSION, "role": role, **({} if token is None else {"token": token})}
                link._wire.send(frames.encode(frames.HELLO, 0, 0, orjson.dumps(hello)))
                link.hello = await link._hello
        except TimeoutError as error:
            raise LinkError("link_lost", "the peer did not answer the greeting") from error
        finally:
            if not link.hello:
                link._hello.cancel()
                link._wire.abort()
        link._tick()
        return link

    @property
    def is_open(self) -> bool:
        """Whether streams can be opened."""
        return self._error is None and self._wire.is_open

    @property
    def stream_count(self) -> int:
        """Streams that are not over."""
        return len(self._streams)

    def open(self, op: Mapping[str, Any]) -> Stream:
        """Start an operation. Raises LinkError when the link is broken: the peer has then not heard of it."""
        if not self.is_open or self._last_id == _STREAM_ID_MAX:
            raise LinkError("link_lost", "the connection has ended", detail=str(self._error or ""))
        self._last_id += 1
        to_machine = "to" in op or self.hello.get("role") == "agent"
        stream = Stream(self._wire, self._last_id, self._streams.pop, to_machine=to_machine)
        self._wire.send(frames.encode(frames.OPEN, 0, stream.id, orjson.dumps(op)))
        self._streams[stream.id] = stream
        return stream

    def close(self) -> None:
        """End the connection; streams still open fail with LinkError."""
        self._lose(LinkError("link_lost", "the connection was closed"))
        self._wire.close()

    def _on_frame(self, frame: Frame) -> None:
        kind, _, stream_id, _, payload = frame
        if stream_id:
            stream = self._streams.get(stream_id)
            # Frames for a stream that we have left may still be under way.
            if stream is not None:
                stream.receive(frame)
        elif kind == frames.PING and self._wire.is_writable:
            self._wire.send(frames.encode(frames.PONG, 0, 0, payload))
        elif kind in (frames.HELLO, frames.ERROR):
            self._greet(kind, payload)

    def _greet(self, kind: int, payload: bytes) -> None:
        try:
            message = orjson.loads(payload)
            code, text = message.get("code", "bad_frame"), message.get("message", "the peer refused the connection")
        except (orjson.JSONDecodeError, AttributeError):
            self._wire.abort(LinkError("bad_frame", "the peer's greeting is no JSON object"))
            return
        if kind == frames.HELLO and message.get("version") != VERSION:
            code, text = "bad_frame", f"the peer speaks version {message.get('version')!r}, we speak {VERSION}"
        elif kind == frames.HELLO:
            if not self._hello.done():
                self._hello.set_result(message)
            return
        self._wire.abort(LinkError(str(code), str(text)[:1000]))

    def _on_lost(self, cause: Exception | None) -> None:
        if isinstance(cause, LinkError):
            self._lose(cause)
        else:
            self._lose(LinkError("link_lost", "the connection broke", detail=str(cause or "closed by the peer")))

    def _lose(self, error: LinkError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._keepalive is not None:
            self._keepalive.cancel()
        if not self._hello.done():
            self._hello.set_exception(error)
        for stream in list(self._streams.values()):
            # Each gets its own: raising one exception object in many tasks would mix up their tracebacks.
            stream.fail(_copy(error))
        self.closed.set()

    def _tick(self) -> None:
        self._silent_periods = 0 if self._wire.has_heard else self._silent_periods + 1
        self._wire.has_heard = False
        if self._silent_periods >= _SILENT_PERIODS_MAX:
            self._wire.abort(LinkError("link_lost", "the peer stopped answering"))
            return
        if self._silent_periods > 0:
            self._wire.send(frames.encode(frames.PING, 0, 0, bytes(8)))
        self._keepalive = asyncio.get_running_loop().call_later(_KEEPALIVE_PERIOD_S, self._tick)


def _copy(error: LinkError) -> VmmError:
    return LinkError(error.code, error.message, detail=error.detail)
