"""Frames of the agent and hostd protocol: encode them, decode them from a byte stream of any chunking.

A frame is `(type, channel, stream, offset, payload)`. `offset` is the u64 with which the payloads of DATA, END and
CREDIT begin; it is split off here, so that the bytes of a DATA frame are copied once, from the received chunk into the
object handed on. For every other type it is 0. Flow control and the meaning of a frame are not this module's business:
see `vmm.link`. The layout and every limit come from docs/protocol.md ("Frames").
"""

from __future__ import annotations

from native._frames import (
    DATA_BYTES_MAX,
    HEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameDecoder,
    FrameError,
    data_head,
    encode,
    encode_offset,
)

__all__ = [
    "ACK",
    "CLOSE",
    "CONTROL",
    "CREDIT",
    "DATA",
    "DATA_BYTES_MAX",
    "END",
    "ERROR",
    "EVENT",
    "HEAD_BYTES",
    "HELLO",
    "OPEN",
    "PAYLOAD_BYTES_MAX",
    "PING",
    "PONG",
    "REPLY",
    "Frame",
    "FrameDecoder",
    "FrameError",
    "data_head",
    "encode",
    "encode_data",
    "encode_offset",
]

Frame = tuple[int, int, int, int, bytes]

HELLO = 1
OPEN = 2
REPLY = 3
ERROR = 4
DATA = 5
END = 6
CREDIT = 7
EVENT = 8
CONTROL = 9
CLOSE = 10
PING = 11
PONG = 12
ACK = 13


def encode_data(channel: int, stream: int, offset: int, data: bytes) -> bytes:
    """One DATA frame with at most DATA_BYTES_MAX bytes; for large `data`, `data_head` avoids the copy."""
    return encode_offset(DATA, channel, stream, offset, data)
