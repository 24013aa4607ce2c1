"""Snapshots on their way out of and into the host, as one file each, with the credits of docs/protocol.md.

A slow reader or writer holds up its own transfer only. One that leaves, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO, Protocol

import orjson

from native import frames
from native.frames import Frame
from vmm.errors import LinkError, MachineError, VmmError
from vmm.stream import CREDIT_BYTES, INPUT, STDOUT
from vmm.types import SnapshotInfo
from vmm.wire import FrameProtocol

logger = logging.getLogger(__name__)

#: A snapshot and the file that it can be read from while the context lasts.
Export = Callable[[], AbstractAsyncContextManager[tuple[SnapshotInfo, BinaryIO]]]
#: A file to write a snapshot into; what came of it is known once the context has ended and `info` is called.
Import = Callable[[], AbstractAsyncContextManager[BinaryIO]]


class _Client(Protocol):
    wire: FrameProtocol

    def forget(self, stream_id: int) -> None: ...

    def send_json(self, kind: int, stream_id: int, message: object) -> None: ...

    def send_error(self, stream_id: int, error: VmmError) -> None: ...


class _Transfer:
    """A stream that a task serves."""

    def __init__(self, client: _Client, stream_id: int, name: str) -> None:
        self._client = client
        self._id = stream_id
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._serve(), name=f"{name} {stream_id}")

    def leave(self) -> None:
        """The client has lost interest or its connection."""
        self._client.forget(self._id)
        self._task.cancel()

    async def _serve(self) -> None:
        try:
            await self._run()
            self._client.wire.send(frames.encode(frames.CLOSE, 0, self._id))
        except LinkError:
            logger.info("%s was cut off", self._task.get_name())
        except VmmError as error:
            self._client.send_error(self._id, error)
        except OSError as error:
            self._client.send_error(self._id, MachineError("no_space", "the host's disk failed", detail=str(error)))
        finally:
            self._client.forget(self._id)

    async def _run(self) -> None:
        raise NotImplementedError

    def _reply(self, info: SnapshotInfo) -> None:
        self._client.wire.send(frames.encode(frames.REPLY, 0, self._id, orjson.dumps(info)))


class Download(_Transfer):
    """`snapshot.export`: the reply, then the file on channel 1."""

    def __init__(self, client: _Client, stream_id: int, export: Export) -> None:
        self._export = export
        self._credit = CREDIT_BYTES
        super().__init__(client, stream_id, "export")

    def send(self, frame: Frame) -> None:
        """From the client."""
        if frame[0] == frames.CREDIT:
            self._credit += frame[3]
            self._changed.set()
        elif frame[0] == frames.CLOSE:
            self.leave()

    async def _run(self) -> None:
        async with self._export() as (info, file):
            self._reply(info)
            sent = await self._send(file)
        self._client.wire.send(frames.encode_offset(frames.END, STDOUT, self._id, sent))

    async def _send(self, file: BinaryIO) -> int:
        sent, wire = 0, self._client.wire
        while True:
            while self._credit <= 0:
                self._changed.clear()
                await self._changed.wait()
            part = await asyncio.to_thread(file.read, min(self._credit, frames.DATA_BYTES_MAX))
            if not part:
                return sent
            await wire.drain()
            wire.send_data(STDOUT, self._id, sent, part)
            sent += len(part)
            self._credit -= len(part)


class Upload(_Transfer):
    """`snapshot.import`: the file on channel 0, then the reply."""

    def __init__(self, client: _Client, stream_id: int, import_: Import, info: Callable[[], SnapshotInfo]) -> None:
        self._import = import_
        self._info = info
        self._received: list[bytes] = []
        self._granted = CREDIT_BYTES
        self._is_ended = False
        super().__init__(client, stream_id, "import")

    def send(self, frame: Frame) -> None:
        """From the client. Raises LinkError when it sends more than it was granted."""
        if frame[0] == frames.DATA:
            self._granted -= len(frame[4])
            if self._granted < 0 or self._is_ended:
                raise LinkError("bad_frame", "more data than was granted")
            self._received.append(frame[4])
        elif frame[0] == frames.END:
            self._is_ended = True
        elif frame[0] == frames.CLOSE:
            self.leave()
        self._changed.set()

    async def _run(self) -> None:
        async with self._import() as file:
            while await self._write(file):
                pass
        self._reply(self._info())

    async def _write(self, file: BinaryIO) -> bool:
        """Put what has arrived into the file; False at the end."""
        while not self._received and not self._is_ended:
            self._changed.clear()
            await self._changed.wait()
        parts, self._received = self._received, []
        for part in parts:
            await asyncio.to_thread(file.write, part)
        size = sum(map(len, parts))
        if size and not self._is_ended:
            self._granted += size
            self._client.wire.send(frames.encode_offset(frames.CREDIT, INPUT, self._id, size))
        return bool(parts) or not self._is_ended
