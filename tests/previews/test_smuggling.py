"""Messages that two servers could read differently are refused, and never reach an upstream."""

from __future__ import annotations

import asyncio
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.previews.harness import Exchange, Plane, Upstream, describe, tcp_upstream

START = "POST / HTTP/1.1\r\nHost: localhost\r\n"

REFUSED = {
    "length and chunked": START + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": START + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": START + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "two equal lengths": START + "Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "length list": START + "Content-Length: 4, 4\r\n\r\nabcd",
    "length sign": START + "Content-Length: +4\r\n\r\nabcd",
    "negative length": START + "Content-Length: -1\r\n\r\n",
    "hex length": START + "Content-Length: 0x4\r\n\r\nabcd",
    "empty length": START + "Content-Length:\r\n\r\n",
    "length with blank": START + "Content-Length: 4 4\r\n\r\nabcd",
    "length overflow": START + "Content-Length: 99999999999999999999\r\n\r\n",
    "length with underscore": START + "Content_Length: 4\r\nContent-Length: 0\r\n\r\nabcd",
    "chunked twice": START + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked list": START + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": START + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": START + "Transfer-Encoding: identity\r\n\r\n",
    "unknown coding": START + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "vertical tab in coding": START + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked with underscore": START + "Transfer_Encoding: chunked\r\nContent-Length: 4\r\n\r\nabcd",
    "chunked in 1.0": "POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "blank before colon": START + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "tab before colon": START + "Content-Length\t: 4\r\n\r\nabcd",
    "folded": START + "X-A: 1\r\n Transfer-Encoding: chunked\r\n\r\n",
    "folded with tab": START + "X-A: 1\r\n\t2\r\n\r\n",
    "folded first": "GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "bare LF head": "GET / HTTP/1.1\nHost: localhost\n\n",
    "bare LF line": "GET / HTTP/1.1\r\nHost: localhost\nX-A: 1\r\n\r\n",
    "bare LF last": "GET / HTTP/1.1\r\nHost: localhost\r\nX-A: 1\n\r\n\r\n",
    "bare CR in value": START + "X-A: 1\rX-B: 2\r\n\r\n",
    "bare CR line": "GET / HTTP/1.1\r\nHost: localhost\r\n\rX-A: 1\r\n\r\n",
    "NUL in value": START + "X-A: \x00\r\n\r\n",
    "NUL in name": START + "X-\x00A: 1\r\n\r\n",
    "DEL in value": START + "X-A: \x7f\r\n\r\n",
    "blank in name": START + "X A: 1\r\n\r\n",
    "bracket in name": START + "X(A): 1\r\n\r\n",
    "non-ASCII name": START + "X-\xe4: 1\r\n\r\n",
    "empty name": START + ": 1\r\n\r\n",
    "no colon": START + "X-A\r\n\r\n",
    "no host": "GET / HTTP/1.1\r\n\r\n",
    "no host in 1.0": "GET / HTTP/1.0\r\n\r\n",
    "two hosts": "GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "empty host": "GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "host with path": "GET / HTTP/1.1\r\nHost: localhost/evil\r\n\r\n",
    "host with user": "GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
    "host list": "GET / HTTP/1.1\r\nHost: localhost, evil\r\n\r\n",
    "host with quote": 'GET / HTTP/1.1\r\nHost: local"host\r\n\r\n',
    "host with bad port": "GET / HTTP/1.1\r\nHost: localhost:x\r\n\r\n",
    "absolute form, other host": "GET http://evil.test/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute form, no path": "GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute form, other scheme": "GET ftp://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "authority form": "GET localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "asterisk": "GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "relative target": "GET x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "fragment": "GET /a#b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "empty target": "GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "blank in target": "GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tab in target": "GET /a\tb HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "control in target": "GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two blanks": "GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "blank after version": "GET / HTTP/1.1 \r\nHost: localhost\r\n\r\n",
    "leading blank": " GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "lower-case version": "GET / http/1.1\r\nHost: localhost\r\n\r\n",
    "no version": "GET /\r\nHost: localhost\r\n\r\n",
    "bad method": "G(T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long method": "A" * 25 + " / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two upgrades": START + "Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n\r\n",
    "garbage": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}

CHUNKED = START + "Transfer-Encoding: chunked\r\n\r\n"

BAD_BODIES = {
    "no size": "\r\n\r\n",
    "bad digit": "g\r\n",
    "signed": "+1\r\na\r\n0\r\n\r\n",
    "hex prefix": "0x1\r\na\r\n0\r\n\r\n",
    "leading blank": " 1\r\na\r\n0\r\n\r\n",
    "blank after size": "1 \r\na\r\n0\r\n\r\n",
    "overflow": "1" + "0" * 16 + "\r\n",
    "bare LF after size": "1\na\r\n0\r\n\r\n",
    "bare LF after data": "1\r\na\n0\r\n\r\n",
    "no CRLF after data": "1\r\nab\r\n0\r\n\r\n",
    "bare CR in extension": "1;a=\rb\r\na\r\n0\r\n\r\n",
    "NUL in extension": "1;\x00\r\na\r\n0\r\n\r\n",
    "extension without semicolon": "1 a\r\na\r\n0\r\n\r\n",
    "endless extension": "1;" + "a" * 300,
    "bare LF in trailers": "0\r\nX-A: 1\n\r\n\r\n",
    "bad trailer name": "0\r\nX A: 1\r\n\r\n",
    "endless trailers": "0\r\nX-A: " + "a" * 9000,
}


#: Status, code, `Connection` and what followed the answer.
Outcome = tuple[int, str, str | None, bytes]


async def outcomes(plane: Plane, messages: dict[str, str]) -> dict[str, Outcome]:
    """What becomes of each message with a second request behind it, each on a connection of its own."""

    async def outcome(message: str) -> Outcome:
        async with plane.client() as client:
            await client.send(message + "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
            response = await client.response()
            return response.status, response.code, response.head.get("connection"), await client.rest()

    return dict(zip(messages, await asyncio.gather(*map(outcome, messages.values())), strict=True))


def all_of(messages: dict[str, str], status: int, code: str) -> dict[str, Outcome]:
    return dict.fromkeys(messages, (status, code, "close", b""))


async def test_ambiguous_heads_are_refused(plane: Plane, api: Upstream) -> None:
    assert await outcomes(plane, REFUSED) == all_of(REFUSED, 400, "bad_request")
    assert api.requests == []


async def test_malformed_chunks_end_the_connection(plane: Plane, api: Upstream) -> None:
    messages = {name: CHUNKED + body for name, body in BAD_BODIES.items()}

    assert await outcomes(plane, messages) == all_of(messages, 400, "bad_request")
    assert "/smuggled" not in [head.target for head in api.requests]


async def test_what_is_not_spoken_here_is_refused(plane: Plane, api: Upstream) -> None:
    lines = ["GET / HTTP/2.0", "GET / HTTP/0.9", "GET / HTTP/1.2", "PRI * HTTP/2.0"]
    messages = {line: f"{line}\r\nHost: localhost\r\n\r\n" for line in lines}

    assert await outcomes(plane, messages) == all_of(messages, 505, "version_unsupported")
    messages = {"CONNECT": "CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n\r\n"}
    assert await outcomes(plane, messages) == all_of(messages, 501, "method_unsupported")
    assert api.requests == []


async def test_heads_beyond_the_limits_are_refused(plane: Plane, api: Upstream) -> None:
    start, host = "GET / HTTP/1.1\r\n", "Host: localhost\r\n"
    pad = 65_536 - len(f"{start}{host}X-Pad: \r\n\r\n")
    fits = {
        "bytes": f"{start}{host}X-Pad: {'a' * pad}\r\n\r\n",
        "fields": start + host + "".join(f"X-{number}: 1\r\n" for number in range(127)) + "\r\n",
    }
    beyond = {name: message.replace(host, host + "X: 1\r\n") for name, message in fits.items()}

    for message in fits.values():
        async with plane.client() as client:
            await client.send(message)
            assert (await client.response()).status == 200
    seen = len(api.requests)
    assert await outcomes(plane, beyond) == all_of(beyond, 431, "head_too_large")
    assert len(api.requests) == seen


async def test_a_matching_absolute_target_is_reduced_to_its_path(plane: Plane, api: Upstream) -> None:
    async with plane.client() as client:
        await client.send("GET http://LocalHost:8080/a?b HTTP/1.1\r\nHost: localhost:8080\r\n\r\n")
        assert (await client.response()).json()["line"] == "GET /a?b HTTP/1.1"
        await client.send("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.response()).json()["line"] == "OPTIONS * HTTP/1.1"


async def test_an_upgrade_to_http_2_is_not_passed_on(plane: Plane, api: Upstream) -> None:
    response = await plane.request(
        *("GET", "localhost", "/", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    )
    sent = {name.lower() for name, _ in response.json()["fields"]}
    assert sent.isdisjoint({"upgrade", "http2-settings", "connection"})


BAD_RESPONSES = {
    "no HTTP": b"hello\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX-A: 1\r\n 2\r\nContent-Length: 0\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "bare CR": b"HTTP/1.1 200 OK\r\nX-A: 1\r2\r\nContent-Length: 0\r\n\r\n",
    "bad status": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "huge head": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 70_000,
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "unasked switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "endless hints": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20,
    "nothing": b"",
}


async def test_malformed_responses_are_not_passed_on(plane: Plane) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(BAD_RESPONSES[unquote(exchange.head.target[1:])])
        exchange.writer.close()

    async def outcome(host: str, name: str) -> tuple[int, str]:
        async with plane.client() as client:
            await client.send(f"GET /{quote(name)} HTTP/1.1\r\nHost: {host}\r\n\r\n")
            response = await client.response()
            while response.status == 103:
                response = await client.response()
            return response.status, response.code

    async with tcp_upstream(answer) as upstream:
        host = await plane.open(upstream.port)
        seen = {name: await outcome(host, name) for name in BAD_RESPONSES}
    assert seen == dict.fromkeys(BAD_RESPONSES, (502, "upstream_broke"))


@pytest.mark.parametrize(
    "message",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nbad\r\n",
    ],
)
async def test_a_response_cut_short_is_cut_short_for_the_client_too(plane: Plane, message: bytes) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(message)
        exchange.writer.close()

    async with tcp_upstream(answer) as upstream, plane.client() as client:
        await client.send(f"GET / HTTP/1.1\r\nHost: {await plane.open(upstream.port)}\r\n\r\n")
        assert (await client.head()).status == 200
        rest = await client.rest()
        assert b"half" in rest
        assert not rest.endswith(b"0\r\n\r\n")


@given(st.binary(max_size=200), st.integers(0, 100), st.integers(0, 100))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_is_sent_the_plane_answers_or_closes(
    plane: Plane, api: Upstream, junk: bytes, at: int, end: int
) -> None:
    api.handler = describe
    whole = b"POST /a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with plane.client() as client:
        await client.send(whole[:at] + junk + whole[end:])
        client.writer.write_eof()
        answer = await client.rest()
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert plane.process.returncode is None
