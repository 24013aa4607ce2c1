"""Server-sent events: frames, heartbeats and what happens when a stream fails half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response

from gateway.dialects.miosa.answers import ClosingStream, Source
from gateway.dialects.miosa.errors import describe
from gateway.errors import GatewayError
from gateway.pipeline import Call

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
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return ClosingStream(_body(call, frames), source, headers=headers, media_type="text/event-stream")


async def _body(call: Call, frames: Frames) -> Frames:
    # The first bytes go out at once: without them a client cannot tell a quiet stream from a dead one.
    yield b": open\n\n"
    try:
        async with contextlib.aclosing(frames), contextlib.aclosing(paused(frames, HEARTBEAT_S)) as items:
            async for item in items:
                yield HEARTBEAT if item is None else item
    except GatewayError as error:
        yield frame("error", describe(error, call.request_id))


async def paused(items: AsyncIterator[T], pause_s: float) -> AsyncGenerator[T | None, None]:
    """The items, and None whenever none has come for pause_s."""
    pending: asyncio.Task[T] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(items))
            while not (await asyncio.wait({pending}, timeout=pause_s))[0]:
                yield None
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
