"""UUIDs that sort by time."""

from __future__ import annotations

import os
import time
import uuid


def uuid7(*, now_ns: int | None = None) -> uuid.UUID:
    """A version 7 UUID (RFC 9562, method 3: the 12 bits after the milliseconds hold a fraction of one).

    now_ns: Unix nanoseconds. Ids made by one process in one microsecond may come in any order.
    """
    now = time.time_ns() if now_ns is None else now_ns
    milliseconds, rest_ns = divmod(now, 1_000_000)
    fraction = rest_ns * 4096 // 1_000_000
    tail = int.from_bytes(os.urandom(8)) >> 2
    return uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | tail)


def uuid7_unix_s(value: uuid.UUID | bytes) -> float:
    """When it was made, in Unix seconds, to the millisecond."""
    raw = value.bytes if isinstance(value, uuid.UUID) else value
    return int.from_bytes(raw[:6]) / 1000
