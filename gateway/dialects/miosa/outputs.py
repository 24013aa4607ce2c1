"""A process's output as an event stream: frames of one line each, at last how it ended.

The plane makes the frames of one process (`ordered`) and is told here which words to use. The output of several
processes together is put into frames here (`frames`), by the same rules.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import cache
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse

from gateway.dialects.miosa import errors, sse
from gateway.engine.translate import spellings
from gateway.pipeline import Call
from gateway.resources import OutputChunk
from previews.streams import HEADER, OUTPUT_ORDER

#: Output without a line end is passed on after this pause, so that a progress bar moves.
_PARTIAL_LINE_S = 0.05


def ordered(call: Call, op: Mapping[str, Any]) -> Response:
    """Have the plane run or follow a process and pass its output on. op: what it asks hostd for."""
    said = {"code": "$code", "message": "$message", "request_id": call.request_id}
    order = {
        "op": op,
        "error": sse.frame("error", said).decode(),
        "refusal": orjson.dumps({"error": said, **said}).decode(),
        **_words(),
    }

    async def body() -> AsyncGenerator[bytes, None]:
        yield orjson.dumps(order)

    return StreamingResponse(body(), headers={**sse.HEADERS, HEADER: OUTPUT_ORDER}, media_type=sse.MEDIA_TYPE)


@cache
def _words() -> dict[str, Any]:
    """What is the same in every order."""
    ended = {name: f"${name}" for name in ("exit_code", "signal", "reason", "duration_ms")}
    exit_frame = sse.frame("exit", ended).decode()
    for number in ("exit_code", "signal", "duration_ms"):
        exit_frame = exit_frame.replace(f'"${number}"', f"${number}")
    spelt = {}
    for code, (own, message, with_cause) in spellings().items():
        status, name = errors.TABLE[own]
        spelt[code] = {"status": status, "code": name, "message": message, "with_cause": with_cause}
    return {
        "opening": sse.OPEN.decode(),
        "heartbeat": sse.HEARTBEAT.decode(),
        "stdout": _frame("stdout", "$line").decode().split("$line"),
        "stderr": _frame("stderr", "$line").decode().split("$line"),
        "exit": exit_frame,
        "errors": spelt,
    }


async def frames(output: AsyncIterator[OutputChunk]) -> sse.Frames:
    """Output as one frame per line; an unfinished line goes out when nothing follows it for a moment."""
    channels = {name: _Lines(name) for name in ("stdout", "stderr", "pty")}
    async with contextlib.aclosing(sse.paused(output, _PARTIAL_LINE_S)) as items:
        async for item in items:
            if item is None:
                found = b"".join(lines.flush() for lines in channels.values())
            else:
                found = channels[item.stream].feed(item.data)
            if found:
                yield found
    if rest := b"".join(lines.flush(is_final=True) for lines in channels.values()):
        yield rest


class _Lines:
    """Cuts one channel's bytes into frames of one line, whatever the chunks' borders."""

    def __init__(self, name: str) -> None:
        self._kind = "stderr" if name == "stderr" else "stdout"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""

    def feed(self, data: bytes) -> bytes:
        text = self._partial + self._decoder.decode(data)
        lines = text.split("\n")
        self._partial = lines.pop()
        return b"".join(_frame(self._kind, line + "\n") for line in lines)

    def flush(self, *, is_final: bool = False) -> bytes:
        text = self._partial + (self._decoder.decode(b"", final=True) if is_final else "")
        self._partial = ""
        return _frame(self._kind, text) if text else b""


def _frame(kind: str, line: str) -> bytes:
    return sse.frame(kind, {"line": line, "stream": kind})
