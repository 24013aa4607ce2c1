"""As much of the plane's control protocol as pushing routes takes (docs/protocol.md, "Plane control")."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import orjson

_TIMEOUT_S = 10.0
_LINE_BYTES_MAX = 1024 * 1024
#: Good for every sandbox of the benchmark.
TOKEN = "mp_" + "b" * 40
_EXPIRES_IN_S = 24 * 3600


def sandbox_record(slug: str, address: str = "127.0.0.1") -> dict[str, Any]:
    """A private sandbox that `TOKEN` opens. Its version is the present moment, so a later one replaces it."""
    digest = hashlib.sha256(slug.encode()).hexdigest()
    return {
        "t": "sandbox",
        "v": time.time_ns() // 1000,
        "id": f"{digest[:8]}-{digest[8:12]}-4{digest[12:15]}-8{digest[15:18]}-{digest[18:30]}",
        "slug": slug,
        "owner": "5f9f1cc4-9d1c-4e3f-8d6c-1f0a5d6f9a11",
        "address": address,
        "state": "running",
        "ports": {},
        "tokens": [
            {"hash": hashlib.sha256(TOKEN.encode()).hexdigest(), "expires_at": time.time() + _EXPIRES_IN_S, "path": "/"}
        ],
    }


class Control:
    """A connection to the plane's control socket. Not for several tasks at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._n = 0

    async def push(self, records: Sequence[dict[str, Any]]) -> None:
        """Have the records in force. Raises RuntimeError when the plane refuses one."""
        self._n += 1
        lines = [orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records[:-1]]
        lines.append(orjson.dumps({**records[-1], "n": self._n}, option=orjson.OPT_APPEND_NEWLINE))
        async with asyncio.timeout(_TIMEOUT_S):
            # Both ways at once: of many records the plane may have something to say before it has read them all.
            _, answer = await asyncio.gather(self._send(lines), self._answer())
        if answer["t"] == "error":
            raise RuntimeError(f"the plane refused a record: {answer['message']}")

    async def tell(self, message: dict[str, Any]) -> None:
        """Send a message that is not acknowledged."""
        await self._send([orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)])

    async def hear(self, kind: str) -> dict[str, Any]:
        """Wait for a message of that kind; others are passed over."""
        async with asyncio.timeout(_TIMEOUT_S):
            while line := await self._reader.readline():
                message: dict[str, Any] = orjson.loads(line)
                if message["t"] == kind:
                    return message
        raise ConnectionError("the plane closed the control connection")

    async def _send(self, lines: Sequence[bytes]) -> None:
        self._writer.write(b"".join(lines))
        await self._writer.drain()

    async def _answer(self) -> dict[str, Any]:
        while line := await self._reader.readline():
            message: dict[str, Any] = orjson.loads(line)
            if message["t"] == "error" or message.get("n") == self._n:
                return message
        raise ConnectionError("the plane closed the control connection")


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Control]:
    """A control connection for the length of a block."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=_LINE_BYTES_MAX + 1)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            hello = orjson.loads(await reader.readline())
        if hello.get("version") != 1:
            raise ConnectionError("the plane speaks another version of the control protocol")
        yield Control(reader, writer)
    finally:
        writer.close()
