import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
    ("headers", "can_be"),
    [
        ({"x-sandgate-body": "held"}, True),
        ({"x-sandgate-body": "held", "content-type": "text/plain"}, True),
        ({"x-sandgate-body": "held", "content-type": f"multipart/form-data; boundary={BOUNDARY}"}, False),
        ({"content-type": "text/plain"}, False),
    ],
)
def test_a_body_that_waits_and_is_no_form_can_be_ordered(headers, can_be):
    assert transfer.can_be_ordered(make_request(headers=headers)) is can_be


@pytest.mark.parametrize(
    ("header", "span"),
    [("", None), ("bytes=2-4", [2, 4]), ("bytes=8-", [8, None]), ("bytes=-3", [None, 3]), ("bytes=4-2", None)],
)
def test_a_download_is_ordered(header, span):
    request = make_request(headers={"range": header})
    response = transfer.sending({"op": "read", "path": "/a/ä b.txt"}, requested_range(request))
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%A4%20b.txt"
    assert (response.status_code, response.headers["x-sandgate-stream"]) == (200, '{"kind":"file"}')
    order = orjson.loads(response.body)
    assert (order["op"], order["span"]) == ({"op": "read", "path": "/a/ä b.txt"}, span)


def test_head_tells_what_get_would():
    response = transfer.described(FileEntry("ä b.txt", "/ä b.txt", "file", 10, 0o640, 0.0))
    assert response.headers["content-length"] == "10"
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%A4%20b.txt"
    assert (response.headers["x-file-mode"], response.headers["accept-ranges"]) == ("0640", "bytes")
    assert response.headers["x-file-modified-at"] == "1970-01-01T00:00:00.000Z"
