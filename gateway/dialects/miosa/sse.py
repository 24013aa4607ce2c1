"""Server-sent events: frames, heartbeats and what happens when a stream fails half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.dialects.miosa.answers import Source
from gateway.dialects.miosa.errors import describe
from gateway.errors import GatewayError
from gateway.pipeline import Call

MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
#: The first bytes, sent at once: without them a client cannot tell a quiet stream from a dead one.
OPEN = b": open\n\n"
#: Comment sent when nothing else was, so that proxies and clients keep the connection.
HEARTBEAT = b": heartbeat\n\n"
HEARTBEAT_S = 15.0

Frames = AsyncGenerator[bytes, None]

T = TypeVar("T")


def frame(kind: str, data: Mapping[str, Any], event_id: str | None = None) -> bytes:
    """One event. The kind is also `type` in the data: some clients ignore the `event:` line."""
    head = b"" if event_id is None else b"id: %s\n" % event_id.encode()
    return b"%sevent: %s\ndata: %s\n\n" % (head, kind.encode(), orjson.dumps({"type": kind, **data}))


def response(call: Call, frames: Frames, *, source: Source[Any] | None = None) -> Response:
    """A stream of frames with heartbeats in its pauses. source: closed at the end, whoever ended it."""
    return _EventStream(call, frames, source)


class _EventStream(StreamingResponse):
    """Starlette's own would cancel the stream again and again until it has ended, so that it could not clean up."""

    def __init__(self, call: Call, frames: Frames, source: Source[Any] | None) -> None:
        super().__init__(frames, headers=HEADERS, media_type=MEDIA_TYPE)
        self._call = call
        self._frames = frames
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        leaving = asyncio.ensure_future(_caller_left(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for frame in self._all_frames(leaving):
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            await self._frames.aclose()
            if self._source is not None:
                await self._source.aclose()

    async def _all_frames(self, leaving: asyncio.Future[None]) -> Frames:
        yield OPEN
        try:
            async with contextlib.aclosing(paused(self._frames, HEARTBEAT_S, until=leaving)) as items:
                async for item in items:
                    yield HEARTBEAT if item is None else item
        except GatewayError as error:
            yield frame("error", describe(error, self._call.request_id))


async def _caller_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def paused(
    items: AsyncIterator[T], pause_s: float, *, until: asyncio.Future[None] | None = None
) -> AsyncGenerator[T | None, None]:
    """The items, and None whenever none has come for pause_s; no more once `until` is done."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            waiting: set[asyncio.Future[Any]] = {pending} if until is None else {pending, until}
            await asyncio.wait(waiting, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            if until is not None and until.done():
                return
            if not pending.done():
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
            # Fetching the outcome keeps asyncio from reporting it as forgotten; nobody is left to hear of it.
            _ = pending.cancelled() or pending.exception()
