"""A client of HTTP/2 that sends exactly what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
from hyperframe.frame import Frame, GoAwayFrame

from tests.previews.harness import PATIENCE_S, Plane
from tests.support.certificates import Authority

Fields = list[tuple[str, str]]


@dataclass
class Answer:
    """What one stream has received."""

    interim: list[dict[str, str]] = field(default_factory=list)
    fields: Fields = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[str, str] = field(default_factory=dict)
    is_over: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(dict(self.fields)[":status"])


class _Connection(h2.connection.H2Connection):
    """The protocol machine, without its belief that a server which says goodbye has already left (RFC 9113, 6.8)."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        return [], [h2.events.ConnectionTerminated()]


class Http2Client:
    """One connection. Nothing is checked before it is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="latin-1",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = _Connection(config)
        self.h2.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.is_ending = False
        self.is_closed = False
        #: Whether received content is acknowledged, so that more may come.
        self.is_reading = True

    def flush(self) -> None:
        """Send what the protocol machine has to say."""
        self._writer.write(self.h2.data_to_send())

    def begin(self, fields: Fields, *, is_over: bool = True) -> int:
        """Open a stream with these fields, pseudo-fields included."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, fields, end_stream=is_over)
        self.flush()
        return stream

    async def send(self, stream: int, data: bytes, *, is_over: bool = False) -> None:
        """Send content as the plane's window permits."""
        while data:
            async with asyncio.timeout(PATIENCE_S):
                while not (window := self.h2.local_flow_control_window(stream)):
                    await self.receive()
            count = min(window, self.h2.max_outbound_frame_size, len(data))
            self.h2.send_data(stream, data[:count])
            data = data[count:]
            self.flush()
            await self._writer.drain()
        if is_over:
            self.h2.end_stream(stream)
            self.flush()

    async def receive(self) -> None:
        """Wait for something and take it in."""
        data = await self._reader.read(65536)
        if not data:
            self.is_closed = True
            raise ConnectionResetError("closed")
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.is_ending = True
        answer = self.answers.get(getattr(event, "stream_id", None) or 0)
        if answer is None:
            return
        match event:
            case h2.events.InformationalResponseReceived():
                answer.interim.append({str(name): str(value) for name, value in event.headers or []})
            case h2.events.ResponseReceived():
                answer.fields = [(str(name), str(value)) for name, value in event.headers or []]
            case h2.events.DataReceived():
                answer.body += event.data or b""
                if self.is_reading:
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            case h2.events.TrailersReceived():
                answer.trailers = {str(name): str(value) for name, value in event.headers or []}
            case h2.events.StreamEnded():
                answer.is_over = True
            case h2.events.StreamReset():
                answer.reset = int(event.error_code or 0)

    async def finish(self, stream: int) -> Answer:
        """Wait until a stream is over or reset."""
        answer = self.answers[stream]
        async with asyncio.timeout(PATIENCE_S):
            while not answer.is_over and answer.reset is None:
                await self.receive()
        return answer

    async def until_closed(self) -> None:
        """Take in what comes until the plane closes."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.is_closed:
                with contextlib.suppress(ConnectionResetError):
                    await self.receive()

    async def request(self, method: str, authority: str, path: str = "/", *fields: tuple[str, str]) -> Answer:
        """A request without content."""
        return await self.finish(self.begin([*pseudo(method, authority, path), *fields]))


def pseudo(method: str, authority: str, path: str = "/") -> Fields:
    """The fields that every request has."""
    return [(":method", method), (":scheme", "https"), (":authority", authority), (":path", path)]


@contextlib.asynccontextmanager
async def http2_client(plane: Plane, authority: Authority, name: str) -> AsyncIterator[Http2Client]:
    """A fresh connection by TLS and HTTP/2."""
    async with plane.tls_client(name, authority.context("h2", "http/1.1")) as client:
        connection = client.writer.get_extra_info("ssl_object")
        assert connection.selected_alpn_protocol() == "h2"
        opened = Http2Client(client.reader, client.writer)
        opened.flush()
        yield opened
