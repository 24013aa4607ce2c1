"""The frame codec once more, in plain Python and as docs/protocol.md reads: the oracle of `native.frames`.

It buffers everything and slices; slow and obvious is the point.
"""

from __future__ import annotations

import struct

DATA, END, CREDIT, CLOSE, PING, PONG, ACK = 5, 6, 7, 10, 11, 12, 13
KINDS = range(1, 14)

_HEAD = struct.Struct("<IBBHI")
_OFFSET = struct.Struct("<Q")


class FrameError(ValueError):
    """The bytes are no frame."""


def lengths(kind: int) -> tuple[int, int]:
    """The least and the most payload bytes of a type, offset included."""
    if kind == DATA:
        return 8, 8 + 256 * 1024
    if kind in (END, CREDIT, PING, PONG):
        return 8, 8
    if kind in (CLOSE, ACK):
        return 0, 0
    return 0, 8 * 1024 * 1024


def check(kind: int, length: int) -> None:
    if kind not in KINDS:
        raise FrameError(f"unknown frame type {kind}")
    least, most = lengths(kind)
    if not least <= length <= most:
        raise FrameError(f"a frame of type {kind} cannot have {length} bytes")


class FrameDecoder:
    def __init__(self) -> None:
        self._buffer = b""
        self._is_broken = False

    def feed(self, data: bytes) -> list[tuple[int, int, int, int, bytes]]:
        if self._is_broken:
            raise FrameError("an earlier frame on this connection was malformed")
        self._buffer += data
        frames = []
        try:
            while (frame := self._next()) is not None:
                frames.append(frame)
        except FrameError:
            self._is_broken = True
            raise
        return frames

    @property
    def is_idle(self) -> bool:
        return not self._buffer

    def _next(self) -> tuple[int, int, int, int, bytes] | None:
        if len(self._buffer) < _HEAD.size:
            return None
        length, kind, channel, reserved, stream = _HEAD.unpack_from(self._buffer)
        if reserved:
            raise FrameError("the reserved field of a frame is not zero")
        check(kind, length)
        if len(self._buffer) < _HEAD.size + length:
            return None
        payload = self._buffer[_HEAD.size : _HEAD.size + length]
        self._buffer = self._buffer[_HEAD.size + length :]
        if kind in (DATA, END, CREDIT):
            return kind, channel, stream, _OFFSET.unpack_from(payload)[0], payload[_OFFSET.size :]
        return kind, channel, stream, 0, payload


def encode(kind: int, channel: int, stream: int, payload: bytes = b"") -> bytes:
    check(kind, len(payload))
    return _HEAD.pack(len(payload), kind, channel, 0, stream) + payload


def encode_offset(kind: int, channel: int, stream: int, offset: int, payload: bytes = b"") -> bytes:
    if kind not in (DATA, END, CREDIT):
        raise FrameError(f"a frame of type {kind} carries no offset")
    return encode(kind, channel, stream, _OFFSET.pack(offset) + payload)


def data_head(channel: int, stream: int, offset: int, size: int) -> bytes:
    check(DATA, _OFFSET.size + size)
    return _HEAD.pack(_OFFSET.size + size, DATA, channel, 0, stream) + _OFFSET.pack(offset)
