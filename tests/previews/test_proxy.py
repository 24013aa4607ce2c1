"""Requests and responses on their way through the plane."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from tests.previews.harness import (
    PATIENCE_S,
    Exchange,
    Plane,
    Upstream,
    describe,
    eventually,
    host,
    read_chunks,
    sandbox_id,
    tcp_upstream,
)

OURS = ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Real-IP", "Forwarded"]


async def test_other_hosts_go_to_the_api(plane: Plane, api: Upstream) -> None:
    for name in ["localhost", "127.0.0.1:8080", "api.localhost", "sandboxes.localhost", "example.com", "[::1]:1"]:
        response = await plane.request("GET", name, "/api/v1/x?y=1&preview_token=kept")
        assert response.status == 200
        assert response.json()["line"] == "GET /api/v1/x?y=1&preview_token=kept HTTP/1.1"
        assert dict(response.json()["fields"])["Host"] == name


async def test_a_public_preview_is_reached_by_every_form_of_its_host(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.open(upstream.port)
        whole = sandbox_id("demo")
        short = whole.replace("-", "")[:8]
        for name in [
            host(upstream.port),
            host(upstream.port).upper(),
            host(upstream.port) + ".:8080",
            f"{upstream.port}-{whole}.sandbox.localhost",
            f"sbx-{short}-{upstream.port}.preview.localhost",
        ]:
            response = await plane.request("GET", name, "/a/../b?c=%20")
            assert response.status == 200, name
            assert response.json()["line"] == "GET /a/../b?c=%20 HTTP/1.1"
            assert dict(response.json()["fields"])["Host"] == name


async def test_forwarding_fields_are_ours_and_never_the_clients(plane: Plane, api: Upstream) -> None:
    forged = [f"{name}: 6.6.6.6" for name in OURS]
    forged += ["x_forwarded_for: 6.6.6.6", "X-Forwarded-Port: 1", "X-Sandgate-Admin: 1", "x_sandgate_admin: 1"]
    async with tcp_upstream(describe) as upstream:
        for name in ["localhost", await plane.open(upstream.port)]:
            fields = (await plane.request("GET", name, "/", *forged, "X-Mine: 1")).json()["fields"]
            assert [value for key, value in fields if key == "X-Mine"] == ["1"]
            said = {key.lower().replace("_", "-"): value for key, value in fields}
            assert said["x-forwarded-for"] == said["x-real-ip"] == "127.0.0.1"
            assert said["x-forwarded-proto"] == "http"
            assert said["x-forwarded-host"] == name
            assert said["forwarded"] == f'for=127.0.0.1;proto=http;host="{name}"'
            assert "6.6.6.6" not in str(fields)
            assert not [key for key in said if key.startswith(("x-sandgate", "x-forwarded-port"))]


async def test_hop_by_hop_fields_stop_here(plane: Plane, api: Upstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(
            json.dumps(exchange.head.fields).encode(),
            "200 OK",
            *("Connection: x-hop", "X-Hop: 1", "Keep-Alive: timeout=5", "Proxy-Authenticate: x", "X-Kept: 1"),
            "X-Sandgate-Other: secret",
        )

    api.handler = answer
    response = await plane.request(
        *("GET", "localhost", "/", "Connection: X-Drop, host, X-Forwarded-For", "X-Drop: 1", "TE: trailers"),
        *("Keep-Alive: 5", "Proxy-Authorization: x", "Proxy-Connection: x", "Upgrade: websocket", "X-Kept: 1"),
    )
    sent = {name.lower() for name, _ in response.json()}
    assert sent == {"host", "x-kept", *(name.lower() for name in OURS)}
    assert {name.lower() for name, _ in response.head.fields} == {"content-length", "x-kept"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_bodies_with_a_length_arrive(plane: Plane, api: Upstream, method: str) -> None:
    response = await plane.request(method, "localhost", "/", body=b"\r\n\r\n\x00binary")
    assert response.json()["line"] == f"{method} / HTTP/1.1"
    assert response.json()["body"] == "\r\n\r\n\x00binary"


async def test_chunked_bodies_and_trailers_pass_both_ways(plane: Plane, api: Upstream) -> None:
    async def echo(exchange: Exchange) -> None:
        content, trailers = await read_chunks(exchange.reader)
        said = json.dumps(trailers).encode()
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n")
        for part in [content, said]:
            await exchange.send(b"%x\r\n%b\r\n" % (len(part), part))
        await exchange.send(b"0\r\nX-Sum: 7\r\nContent-Length: 5\r\nX-Sandgate-A: 1\r\n\r\n")

    api.handler = echo
    async with plane.client() as client:
        await client.send("POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in [
            "5",
            "\r",
            "\nhel",
            "lo\r\n",
            "0006;ext=1\r\n",
            " world",
            "\r\n0\r",
            "\nX-T: 1\r\nHost: evil\r\n",
            "\r\n",
        ]:
            await client.send(piece)
            await asyncio.sleep(0.001)
        head = await client.head()
        content, trailers = await read_chunks(client.reader)
        assert content == b'hello world["X-T: 1"]'
        assert trailers == ["X-Sum: 7"]
        assert head.get("Trailer") == "X-Sum"


async def test_a_body_streams_in_both_directions_at_once(plane: Plane, api: Upstream) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while size := int(await exchange.reader.readuntil(b"\r\n"), 16):
            part = await exchange.reader.readexactly(size + 2)
            await exchange.send(b"%x\r\n%b" % (size, part))
        await exchange.reader.readexactly(2)
        await exchange.send(b"0\r\n\r\n")

    api.handler = echo
    async with plane.client() as client, asyncio.timeout(PATIENCE_S):
        await client.send("POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await client.head()).status == 200
        for number in range(20):
            part = b"4\r\n%04d\r\n" % number
            await client.send(part)
            assert await client.reader.readexactly(len(part)) == part
        await client.send("0\r\n\r\n")
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"


async def test_events_are_passed_on_one_by_one(plane: Plane) -> None:
    proceed = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            await exchange.send(b"9\r\ndata: %d\n\n\r\n" % number)
            await proceed.wait()
            proceed.clear()
        await exchange.send(b"0\r\n\r\n")

    async with tcp_upstream(stream) as upstream, plane.client() as client, asyncio.timeout(PATIENCE_S):
        name = await plane.open(upstream.port)
        await client.send(f"GET / HTTP/1.1\r\nHost: {name}\r\nAccept: text/event-stream\r\n\r\n")
        assert (await client.head()).get("content-type") == "text/event-stream"
        for number in range(3):
            # The server says the next only after we have seen this one: nothing is held back.
            assert await client.reader.readuntil(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % number
            proceed.set()
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@pytest.mark.parametrize(("framing", "count"), [("length", 200), ("chunked", 200), ("close", 20)])
async def test_200_mb_pass_each_way_in_bounded_memory(plane: Plane, framing: str, count: int) -> None:
    block = bytes(range(256)) * 4096
    total = len(block) * count
    received = hashlib.sha256()

    async def swallow_and_tell(exchange: Exchange) -> None:
        assert exchange.head.get("content-length") == str(total)
        for _ in range(count):
            received.update(await exchange.reader.readexactly(len(block)))
        if framing == "length":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        elif framing == "chunked":
            await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        else:
            await exchange.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for _ in range(count):
            await exchange.send(b"%x\r\n%b\r\n" % (len(block), block) if framing == "chunked" else block)
        if framing == "chunked":
            await exchange.send(b"0\r\n\r\n")
        elif framing == "close":
            exchange.writer.write_eof()

    async with tcp_upstream(swallow_and_tell) as upstream, plane.client() as client, asyncio.timeout(60):
        name = await plane.open(upstream.port)
        await client.send(f"PUT / HTTP/1.1\r\nHost: {name}\r\nContent-Length: {total}\r\n\r\n")
        for _ in range(count):
            await client.send(block)
        head = await client.head()
        back = hashlib.sha256()
        if framing == "chunked":
            while size := int(await client.reader.readuntil(b"\r\n"), 16):
                back.update((await client.reader.readexactly(size + 2))[:-2])
        else:
            assert head.get("connection") == (None if framing == "length" else "close")
            for _ in range(count):
                back.update(await client.reader.readexactly(len(block)))
        assert received.digest() == back.digest() == hashlib.sha256(block * count).digest()
        assert _resident_bytes(plane) < 32 * 1024 * 1024


def _resident_bytes(plane: Plane) -> int:
    status = Path(f"/proc/{plane.process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


async def test_a_slow_reader_slows_its_own_stream_only(plane: Plane, api: Upstream) -> None:
    sent = 0

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        if exchange.head.target == "/quick":
            return await exchange.answer(b"quick")
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            await exchange.send(bytes(65536))
            sent += 65536

    api.handler = flood
    async with plane.client() as slow:
        await slow.send("GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await slow.head()).status == 200
        before = -1
        while sent != before:
            # Stands still once the socket buffers on the way are full.
            before = sent
            await asyncio.sleep(0.2)
        assert (await plane.request("GET", "localhost", "/quick")).body == b"quick"
        assert sent < 64 * 1024 * 1024
        assert _resident_bytes(plane) < 32 * 1024 * 1024
        await slow.reader.readexactly(32 * 1024 * 1024)
        await eventually(lambda: sent > before, "the stream goes on when the reader does")


async def test_expect_is_the_upstreams_to_answer(plane: Plane, api: Upstream) -> None:
    async def strict(exchange: Exchange) -> None:
        assert exchange.head.get("expect") == "100-continue"
        if exchange.head.target == "/no":
            await exchange.answer(b"", "413 Content Too Large", "Connection: close")
        else:
            await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await exchange.answer(await exchange.body())

    api.handler = strict
    async with plane.client() as client:
        await client.send("PUT /yes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.head()).status == 100
        await client.send("body")
        assert (await client.response()).body == b"body"
    async with plane.client() as client:
        await client.send("PUT /no HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.response()).status == 413
        assert await client.rest() == b""


async def test_interim_responses_pass_to_clients_that_know_them(plane: Plane, api: Upstream) -> None:
    async def hint(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
        await exchange.answer(b"done")

    api.handler = hint
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        hinted = await client.head()
        assert (hinted.status, hinted.get("link")) == (103, "</a.css>")
        assert (await client.response()).body == b"done"
        await client.send("GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert (await client.response()).body == b"done"


@pytest.mark.parametrize(
    ("method", "status", "fields"),
    [
        ("HEAD", "200 OK", ["Content-Length: 1000"]),
        ("HEAD", "200 OK", ["Transfer-Encoding: chunked"]),
        ("GET", "204 No Content", []),
        ("GET", "304 Not Modified", ["Content-Length: 1000", 'ETag: "x"']),
    ],
)
async def test_responses_without_a_body_keep_the_connection(
    plane: Plane, api: Upstream, method: str, status: str, fields: list[str]
) -> None:
    async def bare(exchange: Exchange) -> None:
        if exchange.head.target == "/next":
            await exchange.answer(b"next")
        else:
            await exchange.send("\r\n".join([f"HTTP/1.1 {status}", *fields]).encode() + b"\r\n\r\n")

    api.handler = bare
    async with plane.client() as client:
        response = await client.request(method, "localhost")
        assert response.status == int(status[:3])
        assert [f"{name}: {value}" for name, value in response.head.fields] == fields
        assert (await client.request("GET", "localhost", "/next")).body == b"next"
    assert api.connections == 1


async def test_a_client_connection_serves_many_requests_to_different_targets(plane: Plane, api: Upstream) -> None:
    async with tcp_upstream(describe) as first, tcp_upstream(describe) as second, plane.client() as client:
        names = ["localhost", await plane.open(first.port, "one"), await plane.open(second.port, "two")]
        for number in range(30):
            response = await client.request("POST", names[number % 3], f"/{number}", body=b"x" * number)
            assert response.json()["line"] == f"POST /{number} HTTP/1.1"
            assert dict(response.json()["fields"])["Host"] == names[number % 3]
        # One upstream connection each: they are kept and used again.
        assert (api.connections, first.connections, second.connections) == (1, 1, 1)


async def test_pipelined_requests_are_answered_in_order(plane: Plane, api: Upstream) -> None:
    async with plane.client() as client:
        await client.send(
            "POST /1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"
            "\r\nGET /2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            "POST /3 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
            "GET /4 HTTP/1.1\r\nHost: 1-nope.sandbox.localhost\r\n\r\n"
            "GET /5 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            "GET /6 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        answers = [await client.response() for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 404, 200]
        assert [answers[index].json()["body"] for index in range(3)] == ["abc", "", "x"]
        assert answers[4].head.get("connection") == "close"
        assert await client.rest() == b""
    assert [head.target for head in api.requests] == ["/1", "/2", "/3", "/5"]


async def test_http_1_0_clients_get_what_they_understand(plane: Plane, api: Upstream) -> None:
    async def chunked(exchange: Exchange) -> None:
        assert exchange.head.line == "GET / HTTP/1.1"
        await exchange.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: 1\r\n\r\n"
        )

    async with plane.client() as client:
        await client.send("GET / HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
        response = await client.response()
        assert response.head.get("connection") == "keep-alive"
        api.handler = chunked
        await client.send("GET / HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
        head = await client.head()
        assert (head.get("transfer-encoding"), head.get("connection")) == (None, "close")
        assert await client.rest() == b"abcde"


async def test_http_1_0_servers_are_understood(plane: Plane) -> None:
    async def old(exchange: Exchange) -> None:
        body = b"" if exchange.head.method == "HEAD" else b"until the end"
        await exchange.send(b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\n" + body)
        exchange.writer.write_eof()

    async with tcp_upstream(old) as upstream:
        name = await plane.open(upstream.port)
        response = await plane.request("GET", name)
        assert response.head.line == "HTTP/1.1 200 OK"
        assert response.head.get("connection") == "close"
        assert response.body == b"until the end"


async def test_a_client_that_closes_its_side_still_gets_its_answer(plane: Plane, api: Upstream) -> None:
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.writer.write_eof()
        assert (await client.response()).status == 200
        assert await client.rest() == b""


async def test_a_client_that_leaves_ends_its_stream_at_the_upstream(plane: Plane, api: Upstream) -> None:
    left = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if not await exchange.reader.read(1):
            left.set()

    api.handler = wait
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        client.writer.transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            await left.wait()


async def test_an_early_answer_reaches_a_client_that_is_still_sending(plane: Plane, api: Upstream) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(b"too much", "413 Content Too Large", "Connection: close")
        exchange.writer.close()

    api.handler = refuse
    async with plane.client() as client:
        await client.send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
        await client.send(bytes(1_000_000))
        response = await client.response()
        assert (response.status, response.body) == (413, b"too much")


async def test_large_heads_pass_up_to_the_limit(plane: Plane, api: Upstream) -> None:
    async def large(exchange: Exchange) -> None:
        await exchange.answer(b"ok", "200 OK", "X-Large: " + "b" * 60_000)

    api.handler = large
    response = await plane.request("GET", "localhost", "/" + "a" * 30_000, "X-Large: " + "b" * 30_000)
    assert response.head.get("x-large") == "b" * 60_000
    assert api.requests[0].get("x-large") == "b" * 30_000


async def test_a_sandboxs_cookies_stay_on_its_host(plane: Plane, api: Upstream) -> None:
    async def planter(exchange: Exchange) -> None:
        await exchange.answer(
            *(b"", "200 OK", "Set-Cookie: a=b; Path=/; Domain=localhost; Secure", "Set-Cookie: c=domain=x"),
            "set-cookie: d=e;domain = sandbox.localhost",
        )

    async with tcp_upstream(planter) as upstream:
        response = await plane.request("GET", await plane.open(upstream.port))
        assert response.head.all("set-cookie") == ["a=b; Path=/; Secure", "c=domain=x", "d=e"]
    api.handler = planter
    response = await plane.request("GET", "localhost")
    assert response.head.all("set-cookie")[0] == "a=b; Path=/; Domain=localhost; Secure"
