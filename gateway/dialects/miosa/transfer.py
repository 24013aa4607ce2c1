"""File bytes on their way in (raw or multipart) and out (whole or a range), passed on as they come."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from gateway.dialects.miosa.answers import ClosingStream, Source, iso_time
from gateway.errors import GatewayError, invalid
from gateway.resources import FileEntry

_MEDIA_TYPE = "application/octet-stream"
_PATH_BYTES_MAX = 4096
_RANGE = re.compile(r"^bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})$")

Chunks = AsyncIterator[bytes]
#: Opens `length` bytes (None: to the end) from `offset` of the file that is asked for.
OpenPart = Callable[[int, int | None], Awaitable[tuple[FileEntry, Source[bytes]]]]


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


async def outgoing(wanted: ByteRange | None, open_part: OpenPart) -> Response:
    """A file's bytes, or the part that was asked for."""
    if wanted is None:
        entry, chunks = await open_part(0, None)
        return _stream(entry, chunks, 200, entry.size)
    if wanted.first is None:
        entry, chunks = await open_part(0, 0)
        await chunks.aclose()
        offset, length = max(0, entry.size - (wanted.last or 0)), wanted.last
    else:
        offset, length = wanted.first, None if wanted.last is None else wanted.last - wanted.first + 1
    entry, chunks = await open_part(offset, length)
    if offset >= entry.size:
        await chunks.aclose()
        return Response(status_code=416, headers={"content-range": f"bytes */{entry.size}"})
    size = entry.size - offset if length is None else min(length, entry.size - offset)
    response = _stream(entry, chunks, 206, size)
    response.headers["content-range"] = f"bytes {offset}-{offset + size - 1}/{entry.size}"
    return response


def _stream(entry: FileEntry, chunks: Source[bytes], status: int, size: int) -> Response:
    headers = {
        "content-length": str(size),
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(entry.name, safe='')}",
        "x-file-mode": f"{entry.mode:04o}",
        "x-file-modified-at": iso_time(entry.modified_at),
    }
    return ClosingStream(chunks, chunks, status, headers=headers, media_type=_MEDIA_TYPE)
