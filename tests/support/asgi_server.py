"""An ASGI application on a Unix socket, for a plane in front of it. Just enough HTTP/1.1 for what the plane sends."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, path: Path) -> AsyncIterator[None]:
    """Serve until left; connections are closed after one request."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(_Connection(app, reader, writer).run())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(accept, path, limit=2**20)
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    def __init__(self, app: ASGIApp, reader: StreamReader, writer: StreamWriter) -> None:
        self._app, self._reader, self._writer = app, reader, writer
        self._left = 0
        self._is_chunked_body = False
        self._is_awaited = False
        self._is_over = False

    async def run(self) -> None:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            await self._app(self._scope(head), self._receive, self._send)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the plane has left
        finally:
            self._writer.close()

    def _scope(self, head: bytes) -> dict[str, Any]:
        line, *rows = head[:-4].split(b"\r\n")
        method, target, _ = line.split(b" ")
        path, _, query = target.partition(b"?")
        headers = [(name.lower(), value.strip()) for name, _, value in (row.partition(b":") for row in rows)]
        fields = dict(headers)
        self._left = int(fields.get(b"content-length", 0))
        self._is_chunked_body = b"transfer-encoding" in fields
        self._is_awaited = b"expect" in fields
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method.decode(),
            "scheme": "http",
            "path": path.decode(),
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("api.test", 80),
            "extensions": {},
        }

    async def _receive(self) -> dict[str, Any]:
        if self._is_over:
            await self._reader.read()
            return {"type": "http.disconnect"}
        if self._is_awaited:
            self._is_awaited = False
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await (self._read_chunk() if self._is_chunked_body else self._read_part())
        return {"type": "http.request", "body": body, "more_body": not self._is_over}

    async def _read_part(self) -> bytes:
        body = await self._reader.readexactly(min(self._left, 65536))
        self._left -= len(body)
        self._is_over = not self._left
        return body

    async def _read_chunk(self) -> bytes:
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        body = await self._reader.readexactly(size)
        await self._reader.readexactly(2)
        self._is_over = not size
        return body

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            lines = [b"HTTP/1.1 %d Any" % message["status"], b"connection: close"]
            lines += [name + b": " + value for name, value in message["headers"]]
            self._is_chunked = b"content-length" not in dict(message["headers"])
            lines += [b"transfer-encoding: chunked"] if self._is_chunked else []
            self._writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        else:
            body = message.get("body", b"")
            self._writer.write(b"%x\r\n%b\r\n" % (len(body), body) if self._is_chunked and body else body)
            if self._is_chunked and not message.get("more_body"):
                self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
