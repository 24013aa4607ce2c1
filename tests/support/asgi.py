"""Requests to an ASGI application in the same process, with answers that stream and callers that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.types import ASGIApp, Message


class StreamingTransport(httpx.AsyncBaseTransport):
    """Unlike httpx's own, hands the answer over as it comes, and tells the application when the caller leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(request)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.partition(b"?")[0],
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 1),
            "server": (request.url.host, request.url.port or 80),
            "extensions": {},
        }
        exchange.task = asyncio.create_task(self._app(scope, exchange.receive, exchange.send))
        start = await exchange.next_message()
        if start is None:
            raise AssertionError("the application sent no answer")
        return httpx.Response(start["status"], headers=start["headers"], stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request and its answer."""

    task: asyncio.Task[None]

    def __init__(self, request: httpx.Request) -> None:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self._body = aiter(request.stream)
        self._is_body_sent = False
        self._has_left = asyncio.Event()
        self._answer: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self) -> dict[str, Any]:
        if not self._is_body_sent:
            chunk = await anext(self._body, None)
            self._is_body_sent = chunk is None
            return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._has_left.is_set():
            await self._answer.put(message)

    async def next_message(self) -> Message | None:
        """What the application sends next; None if it ended without. Its failure is raised."""
        getting = asyncio.create_task(self._answer.get())
        await asyncio.wait({getting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        getting.cancel()
        await self.task
        return None if self._answer.empty() else self._answer.get_nowait()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.next_message()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                return

    async def aclose(self) -> None:
        self._has_left.set()
        await self.task
