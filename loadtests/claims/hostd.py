"""As much of the host service's protocol as a claim takes: one request after the other over its Unix socket.

The frames are those of docs/protocol.md, written out here because a measurement shares no code with what it measures.
"""

from __future__ import annotations

import asyncio
import struct
import uuid
from pathlib import Path
from typing import Any, Self

import orjson

_HEADER = struct.Struct("<IBBHI")
_HELLO, _OPEN, _REPLY, _ERROR = 1, 2, 3, 4


class Refused(Exception):
    """The host service answered with an error."""


class HostConnection:
    """One connection; its calls wait for each other."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._last_stream = 0

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        self._send(_HELLO, 0, {"version": 1, "role": "api"})
        await self._answer(0, _HELLO)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def create(self) -> str:
        """Claim a machine of the default shape; its id."""
        spec = {"id": str(uuid.uuid4()), "template": "default", "hostname": "claimed"}
        await self._call({"op": "machine.create", **spec})
        return spec["id"]

    async def destroy(self, machine_id: str) -> None:
        await self._call({"op": "machine.destroy", "id": machine_id, "cause": "requested"})

    async def _call(self, op: dict[str, Any]) -> None:
        self._last_stream += 1
        self._send(_OPEN, self._last_stream, op)
        await self._answer(self._last_stream, _REPLY)

    def _send(self, kind: int, stream: int, message: dict[str, Any]) -> None:
        payload = orjson.dumps(message)
        self._writer.write(_HEADER.pack(len(payload), kind, 0, 0, stream) + payload)

    async def _answer(self, stream: int, wanted: int) -> None:
        while True:
            length, kind, _, _, found = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            payload = await self._reader.readexactly(length)
            if found == stream and kind == _ERROR:
                raise Refused(payload.decode())
            if found == stream and kind == wanted:
                return
