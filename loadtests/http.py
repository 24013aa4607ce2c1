"""A small HTTP/1.1 client for measuring: one keep-alive connection, little work per request.

A general client spends about a millisecond of its own per request, more than the server for the short ones. This one
knows only what Sandgate answers: bodies with a length, chunked, or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import orjson


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)


class UnexpectedAnswer(Exception):
    """The server answered with another status than the measurement needs."""


class Connection:
    """One connection to the API under `base_url`, with the caller's key on every request."""

    def __init__(self, base_url: str, key: str, *, timeout_s: float = 120.0) -> None:
        parts = urlsplit(base_url)
        host = parts.hostname or ""
        # Every name below `localhost` is this machine (RFC 6761), which not every resolver knows.
        self._host, self._port = "127.0.0.1" if host.endswith(".localhost") else host, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc}\r\nAuthorization: Bearer {key}\r\nAccept: */*\r\n"
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        self._streams = await asyncio.open_connection(self._host, self._port, limit=1024 * 1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open()[1].close()

    async def call(
        self, method: str, path: str, body: Any = None, *, expect: int = 200, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request and its whole answer. Raises UnexpectedAnswer for any other status than `expect`."""
        async with asyncio.timeout(self._timeout_s):
            status, answer_headers = await self._exchange(method, path, body, headers or {})
            data = b"".join([piece async for piece in self._body(status, answer_headers)])
        if status != expect:
            raise UnexpectedAnswer(f"{method} {path}: {status} instead of {expect}: {data[:300]!r}")
        return Answer(status, answer_headers, data)

    async def stream(self, method: str, path: str, body: Any = None) -> AsyncIterator[bytes]:
        """The pieces of a 200 answer's body as they arrive."""
        status, headers = await self._exchange(method, path, body, {})
        pieces = self._body(status, headers)
        if status != 200:
            raise UnexpectedAnswer(f"{method} {path}: {status}: {b''.join([piece async for piece in pieces])[:300]!r}")
        async for piece in pieces:
            yield piece

    async def _exchange(
        self, method: str, path: str, body: Any, extra: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str]]:
        reader, writer = self._open()
        content = b"" if body is None else orjson.dumps(body)
        lines = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        if body is not None:
            lines += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{lines}\r\n".encode() + content)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        return int(head[0].split(" ", 2)[1]), headers

    async def _body(self, status: int, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        reader, _ = self._open()
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        elif status != 204 and (length := int(headers.get("content-length", "0"))):
            yield await reader.readexactly(length)

    def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._streams is not None, "used outside `async with`"
        return self._streams
