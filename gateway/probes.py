"""Asks the server's own processes how they are, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

_TIMEOUT_S = 2.0
_ANSWER_BYTES_MAX = 64 * 1024


async def status_of(where: Path | tuple[str, int], path: str) -> int | None:
    """The status a GET is answered with; None if there is no answer. where: a Unix socket, or host and port."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _status_of(where, path)
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError):
        return None


async def _status_of(where: Path | tuple[str, int], path: str) -> int:
    if isinstance(where, Path):
        reader, writer = await asyncio.open_unix_connection(str(where))
    else:
        reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Sandgate-Admin: 1\r\nConnection: close\r\n\r\n".encode()
        )
        answer = await reader.read(_ANSWER_BYTES_MAX)
        return int(answer.split(b" ", 2)[1])
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
