"""TLS: which certificate a client sees, how it is renewed, and what a sandbox learns of it."""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path

import pytest

from native import plane_path
from previews.routes import PortRoute, ShareRule
from previews.tokens import hash_token
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, Client, Exchange, Plane, describe, host, tcp_upstream
from tests.support.certificates import Authority, fingerprint


def shown(client: Client) -> str:
    connection = client.writer.get_extra_info("ssl_object")
    assert isinstance(connection, ssl.SSLObject)
    return fingerprint(connection)


async def seen_by(plane: Plane, name: str, context: ssl.SSLContext) -> str:
    async with plane.tls_client(name, context) as client:
        return shown(client)


async def until_seen(plane: Plane, name: str, context: ssl.SSLContext, wanted: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await seen_by(plane, name, context) != wanted:
            await asyncio.sleep(0.02)


async def test_the_most_specific_certificate_is_shown(start_plane: StartPlane, authority: Authority) -> None:
    wild = authority.issue("wild", "*.sandbox.localhost", "localhost")
    exact = authority.issue("exact", "3000-demo.sandbox.localhost")
    default = authority.issue("default", "127.0.0.1", "default.test")
    plane = await start_plane(*authority.flags)
    context = authority.context()
    assert await seen_by(plane, "8000-demo.sandbox.localhost", context) == wild
    assert await seen_by(plane, "LOCALHOST", context) == wild
    assert await seen_by(plane, "3000-demo.sandbox.localhost", context) == exact
    assert await seen_by(plane, "127.0.0.1", context) == default
    context.check_hostname = False
    assert await seen_by(plane, "a.b.sandbox.localhost", context) == default


async def test_a_name_without_certificate_is_refused(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("only", "localhost")
    plane = await start_plane(*authority.flags)
    context = authority.context()
    with pytest.raises(ssl.SSLError):
        await seen_by(plane, "elsewhere.test", context)
    assert await plane.metric("sandgate_plane_tls_failures_total") == 1
    assert await plane.metric("sandgate_plane_tls_handshakes_total") == 0


async def test_a_sandbox_is_told_of_https(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags)
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        async with plane.tls_client(name, authority.context("http/1.1")) as client:
            connection = client.writer.get_extra_info("ssl_object")
            assert connection.selected_alpn_protocol() == "http/1.1"
            for body in (b"", b"x" * 1_000_000):
                response = await client.request("POST", name, "/", "X-Forwarded-Proto: http", body=body)
                fields = dict(response.json()["fields"])
                assert fields["X-Forwarded-Proto"] == "https"
                assert "proto=https" in fields["Forwarded"]
                assert response.json()["body"] == body.decode()


async def test_large_responses_arrive_whole_and_small_ones_at_once(
    start_plane: StartPlane, authority: Authority
) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags)
    go_on = asyncio.Event()
    large = bytes(range(256)) * 40_000

    async def events(exchange: Exchange) -> None:
        if exchange.head.target == "/large":
            await exchange.answer(large)
            return
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await go_on.wait()
        await exchange.send(b"0\r\n\r\n")

    async with tcp_upstream(events) as upstream:
        name = await plane.open(upstream.port)
        async with plane.tls_client(name, authority.context()) as client:
            assert (await client.request("GET", name, "/large")).body == large
            await client.send(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")
            await client.head()
            async with asyncio.timeout(PATIENCE_S):
                assert await client.reader.readexactly(10) == b"5\r\nfirst\r\n"
            go_on.set()
            assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@pytest.mark.parametrize("by_signal", [True, False])
async def test_a_renewed_certificate_is_shown_to_new_connections_only(
    start_plane: StartPlane, authority: Authority, by_signal: bool
) -> None:
    old = authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags)
    context = authority.context()
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        async with plane.tls_client(name, context) as client:
            assert shown(client) == old
            assert (await client.request("GET", name)).status == 200
            new = authority.issue("wild", "*.sandbox.localhost")
            added = authority.issue("added", "added.test")
            if by_signal:
                plane.process.send_signal(signal.SIGHUP)
            await until_seen(plane, name, context, new)
            assert await seen_by(plane, "added.test", context) == added
            assert (await client.request("GET", name)).status == 200


async def test_a_broken_renewal_leaves_the_certificate_in_force(start_plane: StartPlane, authority: Authority) -> None:
    old = authority.issue("wild", "*.sandbox.localhost")
    key = (authority.directory / "wild.key").read_bytes()
    authority.issue("other", "other.test")
    plane = await start_plane(*authority.flags)
    context = authority.context()
    for breakage in ((authority.directory / "other.key").read_bytes(), b"", b"-----BEGIN PRIVATE KEY-----\nAA"):
        authority.write("wild.key", breakage)
        # Another pair tells when the directory has been read.
        other = authority.issue("other", "other.test")
        await until_seen(plane, "other.test", context, other)
        assert await seen_by(plane, "1-a.sandbox.localhost", context) == old
    authority.write("wild.key", key)
    new = authority.issue("wild", "*.sandbox.localhost")
    await until_seen(plane, "1-a.sandbox.localhost", context, new)


async def test_a_removed_certificate_is_shown_no_more(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("kept", "kept.test")
    authority.issue("removed", "removed.test")
    plane = await start_plane(*authority.flags)
    context = authority.context()
    await seen_by(plane, "removed.test", context)
    (authority.directory / "removed.crt").unlink()
    with pytest.raises(ssl.SSLError):
        await until_seen(plane, "removed.test", context, "never")
    await seen_by(plane, "kept.test", context)


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_it_does_not_start_without_a_certificate(
    run_dir: Path, authority: Authority, content: bytes | None
) -> None:
    if content is not None:
        authority.write("bad.crt", content)
    process = await asyncio.create_subprocess_exec(
        *(plane_path(), "--listen", "127.0.0.1:0", *authority.flags),
        *("--api-socket", run_dir / "api.sock", "--control-socket", run_dir / "plane.sock"),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(PATIENCE_S):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"holds no usable NAME.crt" in said


async def test_plain_requests_are_sent_to_https(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    for port, authority_part in ((443, ""), (8443, ":8443")):
        plane = await start_plane(*authority.flags, "--https-redirect", str(port))
        async with plane.client() as client:
            for method in ("GET", "HEAD", "DELETE"):
                response = await client.request(method, "3000-demo.sandbox.localhost:8080", "/a?b=c%20d")
                assert response.status == 308
                location = f"https://3000-demo.sandbox.localhost{authority_part}/a?b=c%20d"
                assert response.head.get("location") == location
        await plane.control.close()
        await plane.stop()


async def test_requests_by_tls_are_not_redirected_and_their_cookies_are_secure(
    start_plane: StartPlane, authority: Authority
) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags, "--https-redirect", "443")
    token = "miosa_pv_" + "a" * 32
    async with tcp_upstream(describe) as upstream:
        share = ShareRule("s1", hash_token(token), None, "/")
        await plane.put(ports={upstream.port: PortRoute("p1", "private", (share,))})
        name = host(upstream.port)
        async with plane.tls_client(name, authority.context()) as client:
            moved = await client.request("GET", name, f"/?preview_token={token}", "Accept: text/html")
            assert moved.status == 303
            cookie = moved.head.get("set-cookie") or ""
            assert "Secure" in cookie.split("; ")
            assert (await client.request("GET", name, "/", f"Cookie: {cookie.split(';')[0]}")).status == 200


async def test_a_silent_client_does_not_keep_a_handshake_open(start_plane: StartPlane, authority: Authority) -> None:
    authority.issue("only", "localhost")
    plane = await start_plane(*authority.flags, "--head-timeout-s", "0.3")
    reader, writer = await asyncio.open_connection(*plane.tls_addresses[0])
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.close()
    assert await plane.metric("sandgate_plane_tls_failures_total") == 1
