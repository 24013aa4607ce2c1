"""Files on their way through a real plane, between a scripted API and a scripted hostd."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from native import frames
from previews.streams import BODY, FILE_ORDER, HEADER, HELD, REPORT, UPLOAD_ORDER
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, Client, Exchange, Head, Plane, unix_upstream
from tests.previews.http2 import http2_client, pseudo
from tests.previews.scripted import STREAM, Hostd, Link
from tests.support.certificates import Authority

READ = {"op": "read", "to": "m1", "path": "/f"}
WRITE = {"op": "write", "to": "m1", "path": "/f"}
FIELDS = "X-Mode: $mode\r\nX-Modified: $modified_at\r\n"
CREDIT = 1024 * 1024
#: Larger than what the plane passes on without asking.
LARGE = 512 * 1024


class Api:
    """Orders a file to be sent or, for a request with a body, to be received; answers reports with what they say."""

    def __init__(self) -> None:
        self.span: list[int | None] | None = None
        self.bytes_max = 10 * CREDIT
        self.reads_body = False
        self.seen: list[Head] = []
        self.bodies: list[bytes] = []

    async def answer(self, exchange: Exchange) -> None:
        head = exchange.head
        self.seen.append(head)
        if (report := head.get(REPORT)) is not None:
            status = "409 Conflict" if "error" in json.loads(report) else "200 OK"
            await exchange.answer(report.encode(), status, "Content-Type: application/json")
        elif head.method == "GET":
            await self._order(exchange, FILE_ORDER, {"op": READ, "span": self.span, "fields": FIELDS})
        elif head.get(BODY) == HELD and not self.reads_body:
            await self._order(exchange, UPLOAD_ORDER, {"op": WRITE, "bytes_max": self.bytes_max})
        else:
            if head.get("expect") is not None:
                await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.bodies.append(await exchange.body())
            await exchange.answer(b"read")
        if head.get("expect") is not None:
            exchange.writer.close()

    async def _order(self, exchange: Exchange, kind: str, order: dict[str, Any]) -> None:
        await exchange.answer(json.dumps(order).encode(), "200 OK", "X-Own: 1", "X-Mode: 0", f"{HEADER}: {kind}")

    def told(self) -> Any:
        """The last report."""
        report = self.seen[-1].get(REPORT)
        assert report is not None
        return json.loads(report)


@pytest.fixture
async def api(run_dir: Path) -> AsyncIterator[Api]:
    api = Api()
    async with unix_upstream(api.answer, run_dir / "api.sock", asks_for_bodies=False):
        yield api


async def opened(hostd: Hostd, size: int, **expected: Any) -> Link:
    """The next link, on which a file of that size has been asked for."""
    link = await hostd.link()
    assert await link.op() == {**READ, "offset": 0, **expected}
    link.tell(frames.REPLY, {"size": size, "mode": 0o640, "modified_at": 1.5, "resolved_path": "/f"})
    return link


async def get(client: Client, version: str = "1.1") -> None:
    await client.send(f"GET /file HTTP/{version}\r\nHost: localhost\r\n\r\n")


@pytest.mark.usefixtures("api")
async def test_a_file_goes_out_as_it_is(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        for size in (0, 5, 3_000_000):
            await get(client)
            content = bytes(range(256)) * (size // 256) + bytes(size % 256)
            link = await opened(hostd, size)
            reading = asyncio.create_task(client.response())
            await send(link, content)
            response = await reading
            assert response.body == content
            assert response.head.all("x-mode") == ["0640"]
            assert response.head.get("x-modified") == "1970-01-01T00:00:01.500Z"
            assert (response.status, response.head.get("x-own"), response.head.get(HEADER)) == (200, "1", None)
    assert await plane.metric('sandgate_plane_stream_file_bytes_total{direction="down"}') == 3_000_005
    assert await plane.metric("sandgate_plane_stream_files") == 0


async def send(link: Link, content: bytes, *, is_all: bool = True) -> None:
    """Send content as far as the plane gives credit, and its end."""
    sent, credit = 0, CREDIT
    while sent < len(content):
        part = content[sent : sent + min(credit, 262_144)]
        link.data(part, sent)
        sent += len(part)
        credit -= len(part)
        while not credit:
            kind, _, _, count, _ = await link.next()
            assert kind == frames.CREDIT
            credit += count
    if is_all:
        link.send(frames.encode_offset(frames.END, 1, STREAM, sent))
        link.send(frames.encode(frames.CLOSE, 0, STREAM))


@pytest.mark.parametrize(
    ("span", "status", "asked", "content", "content_range"),
    [
        ([2, 4], 206, {"offset": 2, "length": 3}, b"234", "bytes 2-4/10"),
        ([8, None], 206, {"offset": 8}, b"89", "bytes 8-9/10"),
        ([8, 99], 206, {"offset": 8, "length": 92}, b"89", "bytes 8-9/10"),
        ([10, None], 416, {"offset": 10}, b"", "bytes */10"),
    ],
)
async def test_a_part_goes_out(
    plane: Plane,
    hostd: Hostd,
    api: Api,
    span: list[int | None],
    status: int,
    asked: dict[str, int],
    content: bytes,
    content_range: str,
) -> None:
    api.span = span
    async with plane.client() as client:
        for _ in range(2):
            await get(client)
            link = await opened(hostd, 10, **asked)
            await send(link, content)
            response = await client.response()
            assert (response.status, response.body) == (status, content)
            assert response.head.get("content-range") == content_range


async def test_the_end_of_a_file_is_looked_for_first(plane: Plane, hostd: Hostd, api: Api) -> None:
    api.span = [None, 3]
    async with plane.client() as client:
        await get(client)
        await opened(hostd, 10, length=0)
        await send(await opened(hostd, 10, offset=7, length=3), b"789")
        response = await client.response()
        assert (response.status, response.body) == (206, b"789")
        assert response.head.get("content-range") == "bytes 7-9/10"


@pytest.mark.usefixtures("api")
async def test_a_file_that_grows_has_what_was_promised(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        for _ in range(2):
            await get(client)
            await send(await opened(hostd, 4), b"promised and more")
            assert (await client.response()).body == b"prom"


@pytest.mark.parametrize(
    "end",
    [
        frames.encode_offset(frames.END, 1, STREAM, 5),
        frames.encode(frames.CLOSE, 0, STREAM),
        frames.encode(frames.ERROR, 0, STREAM, b'{"code":"io_error","message":"x"}'),
        frames.encode_data(2, STREAM, 0, b"x"),
        b"\xff" * 12,
    ],
)
@pytest.mark.usefixtures("api")
async def test_a_file_that_ends_early_cuts_the_connection(plane: Plane, hostd: Hostd, end: bytes) -> None:
    async with plane.client() as client:
        await get(client)
        link = await opened(hostd, 10)
        link.data(b"01234")
        link.send(end)
        head = await client.head()
        assert head.get("content-length") == "10"
        assert await client.rest() == b"01234"
        await link.rest()


@pytest.mark.usefixtures("api")
async def test_a_broken_link_is_made_again_where_it_was(plane: Plane, hostd: Hostd) -> None:
    for is_same in (True, False):
        async with plane.client() as client:
            await get(client)
            link = await opened(hostd, 10)
            link.data(b"01234")
            assert (await client.head()).status == 200
            assert await client.reader.readexactly(5) == b"01234"
            link.close()
            link = await opened(hostd, 10 if is_same else 11, offset=5, length=5)
            await send(link, b"56789")
            assert await client.reader.readexactly(5) == b"56789" if is_same else await client.rest() == b""


async def test_what_cannot_be_read_is_told_by_the_api(plane: Plane, hostd: Hostd, api: Api) -> None:
    async with plane.client() as client:
        for _ in range(2):
            await get(client)
            link = await hostd.link()
            await link.op()
            error = {"code": "not_found", "message": 'no "ü" there', "detail": None}
            link.tell(frames.ERROR, error)
            response = await client.response()
            assert (response.status, response.json()) == (409, {"error": error})
            assert api.seen[-1].line == "GET /file HTTP/1.1"


@pytest.mark.usefixtures("api")
async def test_a_slow_client_holds_up_its_own_file(plane: Plane, hostd: Hostd) -> None:
    content = bytes(40 * CREDIT)
    async with plane.client() as client:
        await get(client)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        link = await opened(hostd, len(content))
        sending = asyncio.create_task(send(link, content))
        # Longer than it takes to give credit back to a client that reads.
        await asyncio.wait({sending}, timeout=1.0)
        assert not sending.done()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await client.head()
        async with asyncio.timeout(PATIENCE_S):
            assert await client.reader.readexactly(len(content)) == content
        await sending


@pytest.mark.usefixtures("api")
async def test_a_client_that_leaves_closes_the_file(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        await get(client)
        link = await opened(hostd, CREDIT)
        link.data(b"0")
        await client.head()
    assert await link.rest() == []


@pytest.mark.usefixtures("api")
async def test_files_by_other_versions_of_http(start_plane: StartPlane, hostd: Hostd, authority: Authority) -> None:
    authority.issue("local", "localhost")
    plane = await start_plane(*authority.flags)
    content = b"x" * 300_000
    async with plane.client() as client:
        await get(client, "1.0")
        await send(await opened(hostd, len(content)), content)
        assert (await client.rest()).endswith(b"\r\n\r\n" + content)
    async with http2_client(plane, authority, "localhost") as client:
        stream = client.begin(pseudo("GET", "localhost", "/file"))
        serving = asyncio.create_task(opened(hostd, len(content)))
        finishing = asyncio.create_task(client.finish(stream))
        await send(await serving, content)
        assert bytes((await finishing).body) == content


async def begin_upload(client: Client, *fields: str) -> None:
    await client.send("\r\n".join(["PUT /file HTTP/1.1", "Host: localhost", *fields]) + "\r\n\r\n")


async def written(link: Link, *, credit: int = CREDIT) -> bytes:
    """Take all that is written, giving credit as the agent does."""
    assert await link.op() == WRITE
    content = b""
    while True:
        kind, channel, _, offset, data = await link.next()
        assert channel == 0
        assert offset == len(content)
        if kind == frames.END:
            return content
        assert kind == frames.DATA
        content += data
        credit -= len(data)
        assert credit >= 0
        credit += len(data)
        link.send(frames.encode_offset(frames.CREDIT, 0, STREAM, len(data)))


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_becomes_a_file(plane: Plane, hostd: Hostd, api: Api, is_chunked: bool) -> None:
    content = bytes(range(256)) * 20_000
    reply = {"path": "/ü", "size": len(content)}
    async with plane.client() as client:
        for _ in range(2):
            if is_chunked:
                await begin_upload(client, "Transfer-Encoding: chunked")
                sending = asyncio.create_task(client.send(in_chunks(content)))
            else:
                await begin_upload(client, f"Content-Length: {len(content)}")
                sending = asyncio.create_task(client.send(content))
            link = await hostd.link()
            assert await written(link) == content
            await sending
            link.tell(frames.REPLY, reply)
            response = await client.response()
            assert (response.status, response.json()) == (200, {"reply": reply})
            assert (api.seen[-2].get(BODY), api.seen[-2].get("expect")) == (HELD, "100-continue")
    assert api.bodies == []
    assert await plane.metric('sandgate_plane_stream_file_bytes_total{direction="up"}') == 2 * len(content)
    assert await plane.metric("sandgate_plane_stream_files") == 0


def in_chunks(content: bytes) -> bytes:
    pieces = [content[start : start + 70_001] for start in range(0, len(content), 70_001)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Trailer: 1\r\n\r\n"


async def test_a_client_may_wait_to_be_told_to_go_on(plane: Plane, hostd: Hostd, api: Api) -> None:
    async with plane.client() as client:
        for reads_body in (False, True):
            api.reads_body = reads_body
            await begin_upload(client, f"Content-Length: {LARGE}", "Expect: 100-continue")
            assert (await client.head()).status == 100
            await client.send(bytes(LARGE))
            if not reads_body:
                link = await hostd.link()
                assert len(await written(link)) == LARGE
                link.tell(frames.REPLY, {})
            assert (await client.response()).status == 200
    assert list(map(len, api.bodies)) == [LARGE]


async def test_a_body_that_the_api_reads_is_passed_on(plane: Plane, api: Api) -> None:
    api.reads_body = True
    for size, is_held in ((10, False), (LARGE, True)):
        response = await plane.request("PUT", "localhost", "/x", body=bytes(size))
        assert (response.status, response.body) == (200, b"read")
        assert (api.seen[-1].get(BODY) == HELD, len(api.bodies[-1])) == (is_held, size)


async def test_what_the_agent_refuses_is_told_before_the_body_is_there(plane: Plane, hostd: Hostd, api: Api) -> None:
    async with plane.client() as client:
        await begin_upload(client, f"Content-Length: {LARGE}")
        await client.send(b"x")
        link = await hostd.link()
        await link.op()
        link.tell(frames.ERROR, {"code": "no_space", "message": "x", "detail": "y"})
        response = await client.response()
        assert (response.status, response.head.get("connection")) == (409, "close")
        assert api.told() == {"error": {"code": "no_space", "message": "x", "detail": "y"}}


@pytest.mark.parametrize("end", [frames.encode(frames.CLOSE, 0, STREAM), b"\xff" * 12, b""])
async def test_a_peer_that_breaks_off_is_told(plane: Plane, hostd: Hostd, api: Api, end: bytes) -> None:
    async with plane.client() as client:
        await begin_upload(client, f"Content-Length: {LARGE}")
        link = await hostd.link()
        await link.op()
        link.send(end)
        link.close()
        assert (await client.response()).status == 409
        assert api.told()["error"]["code"] == ("bad_frame" if end else "link_lost")


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_breaks_off_is_dropped(plane: Plane, hostd: Hostd, api: Api, is_chunked: bool) -> None:
    async with plane.client() as client:
        await begin_upload(client, "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {LARGE}")
        await client.send(b"3\r\nabc\r\n" if is_chunked else b"abc")
        link = await hostd.link()
        await link.op()
        kind, _, _, _, data = await link.next()
        assert (kind, data) == (frames.DATA, b"abc")
    assert await link.rest() == []
    assert len(api.seen) == 1
    # While it was on its way to the metrics page.
    async with asyncio.timeout(PATIENCE_S):
        while await plane.metric("sandgate_plane_stream_files"):
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("api")
async def test_a_malformed_body_is_dropped(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        await begin_upload(client, "Transfer-Encoding: chunked")
        await client.send(b"3\r\nabcd\r\n")
        link = await hostd.link()
        response = await client.response()
        assert (response.status, response.code) == (400, "bad_request")
        assert frames.END not in [kind for kind, _ in await link.rest()]


@pytest.mark.parametrize("surplus", [-1, 0, 1])
async def test_a_body_may_be_as_large_as_ordered(plane: Plane, hostd: Hostd, api: Api, surplus: int) -> None:
    api.bytes_max = LARGE
    async with plane.client() as client:
        await begin_upload(client, "Transfer-Encoding: chunked")
        sending = asyncio.create_task(client.send(in_chunks(bytes(LARGE + surplus))))
        link = await hostd.link()
        with contextlib.suppress(EOFError, ConnectionError):
            await written(link)
            link.tell(frames.REPLY, {})
        assert (await client.response()).status == (409 if surplus > 0 else 200)
        with contextlib.suppress(ConnectionError):
            await sending
        if surplus > 0:
            error = api.told()["error"]
            assert (error["code"], error["message"]) == ("too_large", f"The body may have at most {LARGE} bytes")


@pytest.mark.usefixtures("api")
async def test_a_client_is_as_fast_as_the_agent(plane: Plane, hostd: Hostd) -> None:
    size = 40 * CREDIT
    async with plane.client() as client:
        await begin_upload(client, f"Content-Length: {size}")
        sending = asyncio.create_task(client.send(bytes(size)))
        link = await hostd.link()
        assert await link.op() == WRITE
        got = 0
        while got < CREDIT:
            got += len((await link.next())[4])
        assert got == CREDIT
        await asyncio.wait({sending}, timeout=1.0)
        assert not sending.done()
        link.tell(frames.ERROR, {"code": "no_space", "message": "x"})
        assert (await client.response()).status == 409
        sending.cancel()


@pytest.mark.usefixtures("api")
async def test_a_body_by_http_2(start_plane: StartPlane, hostd: Hostd, authority: Authority) -> None:
    authority.issue("local", "localhost")
    plane = await start_plane(*authority.flags)
    content = b"y" * 200_000
    async with http2_client(plane, authority, "localhost") as client:
        stream = client.begin(pseudo("PUT", "localhost", "/file"), is_over=False)
        sending = asyncio.create_task(client.send(stream, content, is_over=True))
        link = await hostd.link()
        assert await written(link) == content
        await sending
        link.tell(frames.REPLY, {})
        assert (await client.finish(stream)).status == 200


async def test_nobody_outside_can_speak_as_the_plane(plane: Plane, api: Api) -> None:
    fields = [f"{REPORT}: {{}}", f"{BODY}: held", f"{HEADER}: {FILE_ORDER}", "X_Sandgate_Report: {}"]
    await plane.request("PUT", "localhost", "/x", *fields, body=b"small")
    assert [name for name, _ in api.seen[0].fields if "sandgate" in name.lower()] == []


async def test_an_order_to_receive_what_has_come_makes_no_sense(plane: Plane, run_dir: Path) -> None:
    async def order(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.answer(b"{}", "200 OK", f"{HEADER}: {UPLOAD_ORDER}")

    async with unix_upstream(order, run_dir / "api.sock"):
        response = await plane.request("PUT", "localhost", "/x", body=b"small")
        assert (response.status, response.code) == (502, "upstream_broke")


@pytest.mark.parametrize("span", [[None, None], [5, 4], [1], "all"])
async def test_an_order_that_makes_no_sense_is_an_error(plane: Plane, api: Api, span: Any) -> None:
    api.span = span
    response = await plane.request("GET", "localhost")
    assert (response.status, response.code) == (502, "upstream_broke")
