"""Events for the subscribers of a fan-out: what the API does for the plane, and a publisher for nchan.

An event's data holds the monotonic clock at its publication, from which the load generator, on the same machine, tells
how long it was under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from loadtests.proxy import control
from loadtests.proxy.peers import Endpoint, Site

#: For both, and in the address of both.
TOPIC = "bench"
_HEAD = b"\r\n".join(
    [
        b"HTTP/1.1 200 OK",
        b"Content-Type: text/event-stream",
        b"Cache-Control: no-cache",
        b"Transfer-Encoding: chunked",
        b'X-Sandgate-Stream: {"kind":"events","topic":"' + TOPIC.encode() + b'","types":[]}',
        b"\r\n",
    ]
)

Background = Callable[[Site, Endpoint], AbstractAsyncContextManager[dict[str, float]]]


def data(data_bytes: int) -> str:
    """An event's data as JSON, about so many bytes of it."""
    return f'{{"t":{time.monotonic_ns()},"pad":"{"x" * max(0, data_bytes - 32)}"}}'


class Log:
    """The API's side of the plane's event streams (docs/protocol.md, "Streams"): a log without a past.

    after: where the plane wants it to go on; none for a plane that knows no log yet.
    """

    def __init__(self, after: int | None) -> None:
        self.seq = after or 0
        self._is_new = after is None

    @contextlib.asynccontextmanager
    async def answering(self, path: Path) -> AsyncIterator[None]:
        """Answer every request on a Unix socket by the order to subscribe from now on."""
        connections: set[asyncio.StreamWriter] = set()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(writer)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await reader.readuntil(b"\r\n\r\n"):
                    mark = b"%020d" % self.seq
                    writer.write(_HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(mark), mark))
                    await writer.drain()
            connections.discard(writer)
            writer.close()

        server = await asyncio.start_unix_server(answer, path, backlog=1024)
        try:
            yield
        finally:
            server.close()
            for writer in connections:
                writer.close()

    async def publish(self, api: control.Control, frame: str) -> None:
        """Append an event to the log and have the plane deliver it."""
        after = self.seq
        self.seq += 1
        words = dict.fromkeys(("topic", "type", "resource_type", "resource_id"), TOPIC)
        records = [{"seq": self.seq, **words, "frame": frame}]
        is_start, self._is_new = self._is_new, False
        await api.tell({"t": "publish", "after": after, "through": self.seq, "start": is_start, "events": records})


def to_plane(events_per_s: float, data_bytes: int) -> Background:
    """Publish to the plane at a fixed rate."""

    @contextlib.asynccontextmanager
    async def background(site: Site, endpoint: Endpoint) -> AsyncIterator[dict[str, float]]:
        del site
        assert endpoint.control is not None
        assert endpoint.api is not None
        async with control.connected(endpoint.control) as api:
            await api.tell({"t": "volunteer"})
            log = Log((await api.hear("tail"))["after"])

            async def publish() -> None:
                await log.publish(api, f"id: {log.seq + 1}\nevent: bench\ndata: {data(data_bytes)}\n\n")

            async with log.answering(endpoint.api), _steadily(publish, events_per_s) as figures:
                yield figures

    return background


def to_nchan(events_per_s: float, data_bytes: int) -> Background:
    """Publish to nchan at a fixed rate."""

    @contextlib.asynccontextmanager
    async def background(site: Site, endpoint: Endpoint) -> AsyncIterator[dict[str, float]]:
        del site
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)

        async def publish() -> None:
            body = data(data_bytes).encode()
            writer.write(b"POST /publish HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.splitlines() if line.lower().startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))

        try:
            async with _steadily(publish, events_per_s) as figures:
                yield figures
        finally:
            writer.close()

    return background


@contextlib.asynccontextmanager
async def _steadily(publish: Callable[[], Any], events_per_s: float) -> AsyncIterator[dict[str, float]]:
    """Publish at a fixed rate until the block ends; what is late is caught up with."""
    figures: dict[str, float] = {}

    async def go_on() -> None:
        started, count = time.monotonic(), 0
        while True:
            await publish()
            count += 1
            elapsed = time.monotonic() - started
            figures["published_per_s"] = count / max(elapsed, 1 / events_per_s)
            await asyncio.sleep(max(0.0, count / events_per_s - elapsed))

    publishing = asyncio.create_task(go_on())
    try:
        yield figures
    finally:
        publishing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await publishing
