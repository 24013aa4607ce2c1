"""An event log with its API: answers with orders and backlogs, and publishes when the plane asks."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from previews.errors import PlaneError
from previews.plane import PlaneClient
from previews.streams import HEADER, EventsOrder, PublishedEvent, cursor_mark
from tests.previews.harness import PATIENCE_S, Client, Exchange, Plane, Upstream, read_head, unix_upstream

OPEN = b": open\n\n"
HEARTBEAT = b": heartbeat\n\n"
#: Events published to a plane that knows none.
LOOK_BACK = 1000
#: Less than the plane takes in one message.
MESSAGE_BYTES = 500_000
_ID = re.compile(rb"^id: (\d+)$", re.MULTILINE)


@dataclass
class EventLog:
    """The log of topic "t". Each API worker that publishes it is a `PlaneClient` of its own."""

    events: list[PublishedEvent] = field(default_factory=list)
    #: What an order says besides its topic.
    terms: dict[str, Any] = field(default_factory=dict)
    #: Called once an order's cursor is known and before it is sent.
    on_backlog: Any = None
    upstream: Upstream | None = None
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> int:
        return self.events[-1].seq if self.events else 0

    def add(self, count: int = 1, *, topic: str = "t", kind: str = "kind", of: str = "r1", size: int = 0) -> None:
        """Append events; whoever publishes hears of it."""
        for _ in range(count):
            seq = self.last + 1
            frame = f"id: {seq}\nevent: {kind}\ndata: {'x' * size}\n\n"
            self.events.append(PublishedEvent(seq, topic, kind, "thing", of, frame))
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def answer(self, exchange: Exchange) -> None:
        """The API: the backlog after `Last-Event-ID`, or nothing, and where the rest begins."""
        after = exchange.head.get("last-event-id")
        cursor = self.last
        backlog = [] if after is None else [one for one in self.events if one.topic == "t" and one.seq > int(after)]
        if self.on_backlog is not None:
            self.on_backlog()
        order = EventsOrder("t", **self.terms).header()
        lines = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked"]
        await exchange.send("\r\n".join([*lines, f"{HEADER}: {order}"]).encode() + b"\r\n\r\n")
        body = OPEN + b"".join(one.frame.encode() for one in backlog) + cursor_mark(cursor)
        for piece in (body[:11], body[11:]):
            await exchange.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await exchange.send(b"0\r\n\r\n")

    @contextlib.asynccontextmanager
    async def worker(self, plane: Plane) -> AsyncIterator[PlaneClient]:
        """An API worker's connection to the plane."""
        publishing: set[asyncio.Task[None]] = set()

        def on_tail(after: int | None) -> None:
            on_relieved()
            publishing.add(asyncio.create_task(self._publish(client, after)))

        def on_relieved() -> None:
            while publishing:
                publishing.pop().cancel()

        client = PlaneClient(str(plane.control_socket), on_tail=on_tail, on_relieved=on_relieved)
        try:
            async with client:
                await client.wait_connected(PATIENCE_S)
                yield client
        finally:
            on_relieved()

    async def _publish(self, client: PlaneClient, after: int | None) -> None:
        is_start, cursor = after is None, max(0, self.last - LOOK_BACK) if after is None else after
        with contextlib.suppress(PlaneError):
            while True:
                grown = self._grown
                events = [one for one in self.events if one.seq > cursor]
                count = max(1, MESSAGE_BYTES // max([200 + len(one.frame) for one in events], default=1))
                for part in [events[at : at + count] for at in range(0, len(events), count)] or [[]]:
                    through = part[-1].seq if part else cursor
                    await client.publish(cursor, through, part, is_start=is_start)
                    is_start, cursor = False, through
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(grown.wait(), 0.5)


@contextlib.asynccontextmanager
async def serving(directory: Path, log: EventLog | None = None) -> AsyncIterator[EventLog]:
    """A log behind the plane's API socket."""
    log = log or EventLog()
    async with unix_upstream(log.answer, directory / "api.sock") as log.upstream:
        yield log


class Reader:
    """A client of the event stream."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._text = bytearray()
        self._parsed = 0
        #: The events that have come, as far as they are whole.
        self.ids: list[int] = []
        self.is_over = False

    async def open(self, after: int | None = None, version: str = "1.1") -> Reader:
        lines = [f"GET /events HTTP/{version}", "Host: localhost"]
        lines += [] if after is None else [f"Last-Event-ID: {after}"]
        await self._client.send("\r\n".join(lines) + "\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            self.head = await read_head(self._client.reader)
        assert self.head.status == 200
        assert self.head.get(HEADER) is None
        return self

    @property
    def text(self) -> bytes:
        """Everything that has come."""
        return bytes(self._text)

    async def until(self, count: int) -> list[int]:
        """Wait until so many events have come."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.ids) < count and not self.is_over:
                await self._more()
        return self.ids

    async def until_text(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while text not in self._text and not self.is_over:
                await self._more()
        assert text in self._text

    async def until_over(self) -> bool:
        """Wait for the end; whether it came in order."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while not self.is_over:
                    await self._more()
            except (asyncio.IncompleteReadError, ConnectionError):
                return False
        return True

    async def _more(self) -> None:
        reader = self._client.reader
        if self.head.get("transfer-encoding") is None:
            data = await reader.read(65536)
            self.is_over = not data
        else:
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
            self.is_over = size == 0
        self._text += data
        whole = self._text.rfind(b"\n\n") + 2
        if whole > self._parsed:
            self.ids += [int(found) for found in _ID.findall(self._text, self._parsed, whole)]
            self._parsed = whole


@contextlib.asynccontextmanager
async def reading(plane: Plane, after: int | None = None, version: str = "1.1") -> AsyncIterator[Reader]:
    """An open event stream."""
    async with plane.client() as client:
        yield await Reader(client).open(after, version)
