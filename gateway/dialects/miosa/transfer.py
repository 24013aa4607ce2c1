"""File bytes on their way in (raw or multipart) and out (whole or a range).

The plane moves them, told here what to do; forms and small bodies are read here and passed on as they come.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from gateway.dialects.miosa.answers import iso_time
from gateway.errors import GatewayError, invalid
from gateway.pipeline import BODY_BYTES_MAX
from gateway.resources import FileEntry
from previews.streams import BODY, FILE_ORDER, HEADER, HELD, REPORT, UPLOAD_ORDER

_MEDIA_TYPE = "application/octet-stream"
_PATH_BYTES_MAX = 4096
_RANGE = re.compile(r"^bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})$")

#: What an answer says of the file as it is when it is opened.
_OF_FILE = {"x-file-mode": "$mode", "x-file-modified-at": "$modified_at"}

Chunks = AsyncIterator[bytes]


async def incoming(request: Request, path: str | None) -> tuple[str, Chunks]:
    """Where an upload goes and its bytes. Raises `malformed` from the iterator when a form breaks off."""
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type == b"multipart/form-data":
        return await _Form(request, options.get(b"boundary", b"")).open(path)
    if path is None:
        raise invalid("path", "is required")
    return path, _raw(request)


async def _raw(request: Request) -> AsyncGenerator[bytes, None]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


class _Form:
    """A multipart form with one file, read as it arrives. Fields ahead of the file are kept, small as they must be."""

    def __init__(self, request: Request, boundary: bytes) -> None:
        if not boundary:
            raise GatewayError("malformed", "The multipart form has no boundary.")
        self._body = aiter(request.stream())
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._header_name = b""
        self._header_value = b""
        self._disposition: dict[bytes, bytes] = {}
        self._fields: dict[bytes, bytes] = {}
        self._ready: list[bytes] = []
        self._file_seen = False
        self._in_file = False
        self._is_complete = False

    async def open(self, path: str | None) -> tuple[str, Chunks]:
        """Read up to the file part."""
        while not self._file_seen:
            await self._feed()
            if self._is_complete and not self._file_seen:
                raise invalid("file", "is required")
        field = self._fields.get(b"path")
        if path is None and field is not None:
            path = _text(field)
        if path is None or not 0 < len(path) <= _PATH_BYTES_MAX or "\x00" in path:
            raise invalid("path", "must come before the file, as a field or in the query")
        return path, self._chunks()

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        while True:
            ready, self._ready = self._ready, []
            for chunk in ready:
                yield chunk
            if self._is_complete:
                return
            await self._feed()

    async def _feed(self) -> None:
        chunk = await anext(self._body, None)
        if chunk is None:
            raise GatewayError("malformed", "The multipart form breaks off.")
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise GatewayError("malformed", f"The multipart form is broken: {error}") from error

    def _on_part_begin(self) -> None:
        self._disposition = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, self._disposition = parse_options_header(self._header_value)
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        self._in_file = b"filename" in self._disposition and not self._file_seen
        self._file_seen = self._file_seen or self._in_file

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._ready.append(data[start:end])
        elif not self._file_seen:
            name = self._disposition.get(b"name", b"")
            self._fields[name] = self._fields.get(name, b"") + data[start:end]
            if sum(map(len, self._fields.values())) > 2 * _PATH_BYTES_MAX:
                raise GatewayError("too_large", "The fields ahead of the file are too large.")

    def _on_part_end(self) -> None:
        self._in_file = False

    def _on_end(self) -> None:
        self._is_complete = True


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise invalid("path", "must be UTF-8") from None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """From `first` up to and including `last`; last None: to the end; first None: the last `last` bytes."""

    first: int | None
    last: int | None


def requested_range(request: Request) -> ByteRange | None:
    """What `Range` asks for. Several ranges, or none that makes sense, count as no range (RFC 9110, 14.2)."""
    match = _RANGE.match(request.headers.get("range", ""))
    if match is None:
        return None
    first, last = (int(text) if text else None for text in (match["first"], match["last"]))
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        return None
    return ByteRange(first, last)


def report_of(request: Request) -> str | None:
    """What came of an order, on the request by which the plane tells it."""
    return request.headers.get(REPORT)


def can_be_ordered(request: Request) -> bool:
    """Whether the plane can be ordered to receive the body: it waits, and is the file's bytes and nothing else."""
    media_type, _ = parse_options_header(request.headers.get("content-type"))
    return request.headers.get(BODY) == HELD and media_type != b"multipart/form-data"


def receiving(op: Mapping[str, Any], request: Request) -> Response:
    """Have the plane receive the body. The status is for the log; the plane asks again for the client's answer."""
    return _ordered(UPLOAD_ORDER, {"op": op, "bytes_max": request.scope[BODY_BYTES_MAX]}, {}, 202)


def sending(op: Mapping[str, Any], wanted: ByteRange | None) -> Response:
    """Have the plane send a file's bytes, or the part that was asked for."""
    name = op["path"].rpartition("/")[2]
    fields = "".join(f"{key}: {value}\r\n" for key, value in _OF_FILE.items())
    span = None if wanted is None else (wanted.first, wanted.last)
    return _ordered(FILE_ORDER, {"op": op, "span": span, "fields": fields}, _headers(name))


def described(entry: FileEntry) -> Response:
    """The answer to HEAD: the head of the whole file's."""
    known = {"$mode": f"{entry.mode:04o}", "$modified_at": iso_time(entry.modified_at)}
    headers = {key: known[value] for key, value in _OF_FILE.items()}
    length = {"content-length": str(entry.size)}
    return Response(headers={**_headers(entry.name), **headers, **length}, media_type=_MEDIA_TYPE)


def _headers(name: str) -> dict[str, str]:
    return {"accept-ranges": "bytes", "content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


def _ordered(kind: str, order: Mapping[str, Any], headers: Mapping[str, str], status: int = 200) -> Response:
    # Whole, not as a stream: Starlette would watch for the caller's leaving, and so ask for the body that is held.
    return Response(orjson.dumps(order), status, {**headers, HEADER: kind}, media_type=_MEDIA_TYPE)
