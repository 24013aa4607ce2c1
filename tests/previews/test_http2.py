"""HTTP/2 towards browsers: the same answers as by HTTP/1.1, and nothing smuggled in between."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import h2.errors
import pytest

from previews.routes import PortRoute
from tests.previews.conftest import StartPlane
from tests.previews.harness import (
    PATIENCE_S,
    PUBLIC,
    Exchange,
    Plane,
    Upstream,
    describe,
    eventually,
    host,
    read_chunks,
    tcp_upstream,
)
from tests.previews.http2 import Answer, Http2Client, http2_client, pseudo
from tests.support.certificates import Authority


@pytest.fixture
async def secure(start_plane: StartPlane, authority: Authority) -> Plane:
    """A plane with a certificate for every preview."""
    authority.issue("wild", "*.sandbox.localhost", "localhost")
    return await start_plane(*authority.flags)


def described(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200
    seen = json.loads(answer.body)
    assert isinstance(seen, dict)
    return seen


async def test_a_request_reaches_the_sandbox_as_one_of_http_1(secure: Plane, authority: Authority) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            answer = await client.request(
                *("GET", name, "/a?b=c"),
                *(("cookie", "one=1"), ("cookie", "two=2"), ("te", "trailers"), ("x-own", "\xe9")),
                *(("x-forwarded-for", "6.6.6.6"), ("x-sandgate-admin", "1")),
            )
            seen = described(answer)
            assert ("content-type", "application/json") in answer.fields
            assert seen["line"] == "GET /a?b=c HTTP/1.1"
            fields = [(field.lower(), value) for field, value in seen["fields"]]
            assert [value for field, value in fields if field == "cookie"] == ["one=1; two=2"]
            assert [value for field, value in fields if field == "host"] == [name]
            assert dict(fields)["x-forwarded-proto"] == "https"
            assert dict(fields)["x-forwarded-for"] == "127.0.0.1"
            assert dict(fields)["x-own"].encode("latin-1").decode() == "\xe9"
            assert not {"te", "x-sandgate-admin", "connection", "transfer-encoding"} & {field for field, _ in fields}
    assert await secure.metric("sandgate_plane_http2_connections_total") == 1


async def test_the_api_answers_too(secure: Plane, authority: Authority, api: Upstream) -> None:
    async with http2_client(secure, authority, "localhost") as client:
        assert described(await client.request("GET", "localhost", "/api/v1/x"))["line"] == "GET /api/v1/x HTTP/1.1"
    assert len(api.requests) == 1


@pytest.mark.parametrize("has_length", [True, False])
async def test_content_is_streamed_both_ways(secure: Plane, authority: Authority, has_length: bool) -> None:
    content = bytes(range(256)) * 12_000

    async def echo(exchange: Exchange) -> None:
        assert (exchange.head.get("content-length") is not None) == has_length
        assert (exchange.head.get("transfer-encoding") is not None) == (not has_length)
        await exchange.answer(await exchange.body())

    async with tcp_upstream(echo) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            length = [("content-length", str(len(content)))] if has_length else []
            stream = client.begin([*pseudo("POST", name), *length], is_over=False)
            await client.send(stream, content, is_over=True)
            answer = await client.finish(stream)
            assert answer.status == 200
            assert bytes(answer.body) == content


async def test_interim_responses_chunks_and_trailers(secure: Plane, authority: Authority) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
        content, trailers = await read_chunks(exchange.reader)
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n")
        await exchange.send(b"%x;note=1\r\n%s\r\n" % (len(content), content))
        await exchange.send(b"0\r\nX-Sum: %s\r\n\r\n" % ",".join(trailers).encode())

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            stream = client.begin(pseudo("POST", name), is_over=False)
            client.h2.send_data(stream, b"")  # not the end, though an empty chunk would be
            await client.send(stream, b"one")
            await client.send(stream, b"two")
            client.h2.send_headers(stream, [("x-in", "7")], end_stream=True)
            client.flush()
            answer = await client.finish(stream)
            assert answer.interim == [{":status": "103", "link": "</a.css>"}]
            assert bytes(answer.body) == b"onetwo"
            assert "transfer-encoding" not in dict(answer.fields)
            assert answer.trailers == {"x-sum": "x-in: 7"}


async def test_responses_without_content_and_until_close(secure: Plane, authority: Authority) -> None:
    async def handler(exchange: Exchange) -> None:
        match exchange.head.target:
            case "/close":
                await exchange.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
                exchange.writer.close()
            case "/cut":
                await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nless")
                exchange.writer.close()
            case "/204":
                await exchange.send(b"HTTP/1.1 204 No Content\r\n\r\n")
            case _:
                await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: X-A\r\nX-A: 1\r\n\r\n")

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            assert bytes((await client.request("GET", name, "/close")).body) == b"all of it"
            assert (await client.request("GET", name, "/204")).status == 204
            head = await client.request("HEAD", name)
            assert (dict(head.fields)["content-length"], bytes(head.body)) == ("100", b"")
            assert not {"connection", "x-a"} & dict(head.fields).keys()
            # Not a whole response, so it must not look like one.
            cut = await client.request("GET", name, "/cut")
            assert cut.reset == h2.errors.ErrorCodes.INTERNAL_ERROR
            assert (await client.request("GET", name, "/204")).status == 204


async def test_streams_do_not_wait_for_each_other(secure: Plane, authority: Authority) -> None:
    released = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if exchange.head.target == "/slow":
            await released.wait()
        await exchange.answer(exchange.head.target.encode())

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            slow = client.begin(pseudo("GET", name, "/slow"))
            quick = [client.begin(pseudo("GET", name, f"/{number}")) for number in range(50)]
            bodies = [bytes((await client.finish(stream)).body) for stream in quick]
            assert bodies == [f"/{number}".encode() for number in range(50)]
            assert not client.answers[slow].is_over
            released.set()
            assert bytes((await client.finish(slow)).body) == b"/slow"


async def test_a_reader_that_stops_holds_up_its_sandbox_and_nobody_else(secure: Plane, authority: Authority) -> None:
    total = 16 * 1024 * 1024
    sent = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal sent
        if exchange.head.target == "/small":
            await exchange.answer(b"ok")
            return
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // 65536):
            await exchange.send(bytes(65536))
            sent += 65536

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client, http2_client(secure, authority, name) as other:
            client.is_reading = False
            stream = client.begin(pseudo("GET", name))
            while not client.answers[stream].fields:
                await client.receive()
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
            assert sent < total
            assert (await other.request("GET", name, "/small")).status == 200
            client.is_reading = True
            client.h2.increment_flow_control_window(total)
            client.h2.increment_flow_control_window(total, stream)
            client.flush()
            assert len((await client.finish(stream)).body) == total


async def test_a_request_taken_back_ends_at_the_sandbox(secure: Plane, authority: Authority) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.reader.read()

    async with tcp_upstream(silent) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            stream = client.begin(pseudo("GET", name))
            await eventually(lambda: len(upstream.requests) == 1, "the request arrives")
            client.h2.reset_stream(stream)
            client.flush()
            await eventually(lambda: not upstream.open_connections, "the plane hangs up")
            assert (await client.request("GET", host(1, "nobody"))).status == 404


async def test_failures_and_revocation(secure: Plane, authority: Authority) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await exchange.reader.read()

    async with tcp_upstream(endless) as upstream:
        await secure.put(ports={upstream.port: PortRoute("p", "private")})
        name = host(upstream.port)
        async with http2_client(secure, authority, name) as client:
            refused = await client.request("GET", name)
            assert refused.status == 401
            assert json.loads(refused.body)["code"] == "preview_token_missing"
            assert "connection" not in dict(refused.fields)
            await secure.put(ports={upstream.port: PUBLIC})
            stream = client.begin(pseudo("GET", name))
            while not client.answers[stream].body:
                await client.receive()
            await secure.put(ports={upstream.port: PortRoute("p", "private")})
            assert (await client.finish(stream)).reset is not None
            assert (await client.request("GET", name)).status == 401


def own(*fields: tuple[str, str]) -> list[tuple[str, str]]:
    return [*pseudo("GET", "{name}"), *fields]


MALFORMED = {
    "connection": own(("connection", "keep-alive")),
    "transfer-encoding": own(("transfer-encoding", "chunked")),
    "upgrade": own(("upgrade", "websocket")),
    "keep-alive": own(("keep-alive", "timeout=5")),
    "proxy-connection": own(("proxy-connection", "keep-alive")),
    "te": own(("te", "gzip")),
    "capital letters": own(("X-Capital", "1")),
    "line end in a value": own(("x-a", "1\r\nx-b: 2")),
    "null in a value": own(("x-a", "1\x00")),
    "line end in a name": own(("x-a\r\nx-b", "2")),
    "colon in a name": own(("x-a:", "2")),
    "two hosts": own(("host", "{name}"), ("host", "{name}")),
    "host against authority": own(("host", "1-other.sandbox.localhost")),
    "no authority and no host": [(":method", "GET"), (":scheme", "https"), (":path", "/")],
    "no path": [(":method", "GET"), (":scheme", "https"), (":authority", "{name}")],
    "no method": [(":scheme", "https"), (":authority", "{name}"), (":path", "/")],
    "two paths": own((":path", "/b")),
    "late pseudo-field": [*own(("x-a", "1")), (":authority", "{name}")],
    "unknown pseudo-field": [(":proto", "x"), *own()],
    "response pseudo-field": [(":status", "200"), *own()],
    "extended connect": [*pseudo("CONNECT", "{name}"), (":protocol", "websocket")],
    "authority with user": pseudo("GET", "user@{name}"),
    "path of another form": pseudo("GET", "{name}", "http://{name}/"),
    "path without slash": pseudo("GET", "{name}", "a"),
    "space in path": pseudo("GET", "{name}", "/a HTTP/1.1"),
    "line end in path": pseudo("GET", "{name}", "/a\r\nx: y"),
    "line end in method": pseudo("GET / HTTP/1.1\r\nx: ", "{name}"),
    "two lengths": own(("content-length", "0"), ("content-length", "5")),
    "length that is none": own(("content-length", "+1")),
    "forged length": own(("content_length", "5")),
    "forged coding": own(("transfer_encoding", "chunked")),
    "length without content": own(("content-length", "5")),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_requests_go_nowhere(secure: Plane, authority: Authority, case: str) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await secure.open(upstream.port)
        fields = [(field, value.replace("{name}", name)) for field, value in MALFORMED[case]]
        async with http2_client(secure, authority, name) as client:
            status = await outcome(client, fields)
            assert status is None or 400 <= status < 600
        # The plane is as it was, and the sandbox has seen nothing.
        assert upstream.requests == []
        async with http2_client(secure, authority, name) as client:
            assert (await client.request("GET", name)).status == 200


async def outcome(client: Http2Client, fields: list[tuple[str, str]]) -> int | None:
    """The status of the answer; none if the stream or the connection was ended."""
    stream = client.begin(fields)
    try:
        answer = await client.finish(stream)
    except ConnectionResetError:
        return None
    return answer.status if answer.fields else None


async def test_content_that_belies_its_length_is_not_passed_on_as_whole(secure: Plane, authority: Authority) -> None:
    bodies: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.body())
        await exchange.answer()

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        for content in (b"123", b"1234567"):
            async with http2_client(secure, authority, name) as client:
                stream = client.begin([*pseudo("POST", name), ("content-length", "5")], is_over=False)
                await client.send(stream, content, is_over=True)
                assert (await client.finish(stream)).reset is not None
        assert bodies == []


async def test_a_large_head_is_refused(secure: Plane, authority: Authority) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            many = [(f"x-{number}", "a" * 800) for number in range(90)]
            assert await outcome(client, [*pseudo("GET", name), *many]) in (431, None)
        assert upstream.requests == []


async def test_a_drain_lets_streams_end(secure: Plane, authority: Authority) -> None:
    released = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await released.wait()
        await exchange.answer(b"whole")

    async with tcp_upstream(handler) as upstream:
        name = await secure.open(upstream.port)
        async with http2_client(secure, authority, name) as client:
            stream = client.begin(pseudo("GET", name))
            await eventually(lambda: len(upstream.requests) == 1, "the request arrives")
            secure.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                while not client.is_ending:
                    await client.receive()
            released.set()
            assert bytes((await client.finish(stream)).body) == b"whole"
            async with asyncio.timeout(PATIENCE_S):
                assert await secure.process.wait() == 0


async def test_an_idle_connection_is_closed(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags, "--idle-timeout-s", "0.3")
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        async with http2_client(plane, authority, name) as client:
            assert (await client.request("GET", name)).status == 200
            await client.until_closed()
            assert client.is_ending
