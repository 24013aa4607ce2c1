import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from gateway.dialects.miosa import transfer
from gateway.dialects.miosa.transfer import ByteRange, requested_range
from gateway.errors import GatewayError
from gateway.resources import FileEntry
from tests.support.calls import make_request

BOUNDARY = "b0undary"


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """A multipart body: (name, file name, content)."""
    lines = []
    for name, filename, data in parts:
        disposition = f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
        lines += [f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode(), data, b"\r\n"]
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()])


async def receive(body, path=None, media_type=f"multipart/form-data; boundary={BOUNDARY}"):
    request = make_request(body, headers={"content-type": media_type} if media_type else {})
    target, chunks = await transfer.incoming(request, path)
    return target, b"".join([chunk async for chunk in chunks])


async def test_raw_body_is_the_file():
    assert await receive([b"ab", b"", b"c"], "/a", "application/octet-stream") == ("/a", b"abc")
    assert await receive(b"abc", "/a", None) == ("/a", b"abc")


async def test_raw_body_needs_a_path():
    with pytest.raises(GatewayError, match="path"):
        await receive(b"abc", None, "application/octet-stream")


async def test_form_says_the_path_ahead_of_the_file():
    body = form(("path", None, b"/workspace/\xc3\xa4"), ("file", "x.bin", b"\x00\r\n--b0"))
    assert await receive(body) == ("/workspace/ä", b"\x00\r\n--b0")


async def test_query_wins_over_the_form():
    assert await receive(form(("path", None, b"/b"), ("file", "x", b"1")), "/a") == ("/a", b"1")


async def test_only_the_first_file_counts():
    assert await receive(form(("file", "x", b"1"), ("other", "y", b"2"), ("z", None, b"3")), "/a") == ("/a", b"1")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (form(("path", None, b"/a")), "validation_failed"),
        (form(("file", "x", b"1"), ("path", None, b"/a")), "validation_failed"),
        (form(("path", None, b"\xff"), ("file", "x", b"1")), "validation_failed"),
        (form(("path", None, b""), ("file", "x", b"1")), "validation_failed"),
        (form(("path", None, b"a\0b"), ("file", "x", b"1")), "validation_failed"),
        (form(("path", None, b"/" + b"x" * 9000), ("file", "x", b"1")), "too_large"),
        (b"", "malformed"),
        (b"nonsense", "malformed"),
        (form(("path", None, b"/a"), ("file", "x", b"1"))[:-6], "malformed"),
    ],
)
async def test_bad_forms(body, code):
    with pytest.raises(GatewayError) as caught:
        await receive(body)
    assert caught.value.code == code


async def test_form_without_boundary():
    with pytest.raises(GatewayError, match="boundary"):
        await receive(b"", "/a", "multipart/form-data")


@given(data=st.binary(max_size=300), size=st.integers(1, 40))
async def test_file_is_the_same_however_the_form_is_cut(data, size):
    body = form(("path", None, b"/a"), ("file", "x", data))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    assert await receive(pieces) == ("/a", data)


@given(data=st.binary(max_size=200), end=st.integers(0, 350))
async def test_form_that_breaks_off_never_looks_whole(data, end):
    body = form(("file", "x", data))
    cut = body[: min(end, len(body) - 4)]
    with pytest.raises(GatewayError):
        await receive([cut], "/a")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", ByteRange(0, 9)),
        ("bytes=5-", ByteRange(5, None)),
        ("bytes=-3", ByteRange(None, 3)),
        ("bytes=-", None),
        ("bytes=9-0", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=0-" + "9" * 30, None),
        ("", None),
    ],
)
def test_requested_range(header, expected):
    assert requested_range(make_request(headers={"range": header})) == expected


class File:
    """Ten bytes behind `open_part`, which counts what is open."""

    data = b"0123456789"

    def __init__(self) -> None:
        self.open = 0

    async def part(self, offset: int, length: int | None):
        self.open += 1
        data = self.data[offset:] if length is None else self.data[offset : offset + length]
        return FileEntry("ä b.txt", "/ä b.txt", "file", len(self.data), 0o644, 0.0), _Chunks(self, data)


class _Chunks:
    def __init__(self, file: File, data: bytes) -> None:
        self._file = file
        self._left = [data[index : index + 4] for index in range(0, len(data), 4)]

    def __aiter__(self):
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        self._file.open -= 1


async def deliver(response: Response) -> bytes:
    sent = []

    async def send(message):
        sent.append(message)

    async def never():
        import asyncio

        await asyncio.Event().wait()

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, never, send)
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    ("header", "status", "body", "content_range"),
    [
        ("", 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=9-9", 206, b"9", "bytes 9-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
    ],
)
async def test_outgoing_ranges(header, status, body, content_range):
    file = File()
    response = await transfer.outgoing(requested_range(make_request(headers={"range": header})), file.part)
    assert (response.status_code, response.headers.get("content-range")) == (status, content_range)
    assert int(response.headers["content-length"]) == len(body)
    assert await deliver(response) == body
    assert file.open == 0


async def test_outgoing_is_an_attachment_of_bytes():
    response = await transfer.outgoing(None, File().part)
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%A4%20b.txt"
