"""Each cause of failure has its own code, as JSON for programs and as a page for browsers."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest

from previews.routes import PortRoute
from tests.previews.conftest import StartPlane
from tests.previews.harness import (
    PUBLIC,
    Client,
    Exchange,
    Plane,
    Upstream,
    describe,
    eventually,
    host,
    sandbox_id,
    tcp_upstream,
)

BROWSER = "Accept: text/html,*/*;q=0.8"


def closed_port() -> int:
    """A port nobody listens on: it was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_failures_are_json_for_programs_and_a_page_for_browsers(plane: Plane) -> None:
    port = closed_port()
    await plane.put("open", ports={port: PUBLIC})
    await plane.put("private", ports={3000: PortRoute("p", "private")})
    await plane.put("starting", state="starting", ports={3000: PUBLIC})
    await plane.put("gone", ports={3000: PUBLIC})
    await plane.control.drop_sandbox(sandbox_id("gone"), plane.version())
    failures = {
        host(3000, "nobody"): (404, "preview_unknown"),
        "site.localhost": (404, "preview_unknown"),
        "demo.computer.localhost": (404, "preview_unknown"),
        host(3000, "starting"): (503, "sandbox_starting"),
        host(3000, "gone"): (410, "sandbox_gone"),
        host(3000, "private"): (401, "preview_token_missing"),
        host(port, "open"): (502, "port_closed"),
        "localhost": (503, "api_unavailable"),
    }
    async with plane.client() as client:
        for name, (status, code) in failures.items():
            response = await client.request("GET", name)
            body = response.json()
            assert (response.status, body["code"], body["error"]["code"]) == (status, code, code)
            assert body["message"] == body["error"]["message"]
            assert body["request_id"] == body["error"]["request_id"] == response.head.get("x-request-id")
            assert response.head.get("content-type") == "application/json"
            assert response.head.get("retry-after") == ("1" if status == 503 else None)
            assert response.head.get("cache-control") == "no-store"
            if response.head.get("connection") == "close":
                break
    for name, (status, code) in failures.items():
        page = await plane.request("GET", name, "/", BROWSER)
        assert page.status == status
        assert page.head.get("content-type") == "text/html; charset=utf-8"
        assert f"<code>{code}</code>" in page.body.decode()
        bare = await plane.request("HEAD", name)
        assert (bare.status, bare.body) == (status, b"")


async def test_answers_of_the_plane_keep_the_connection_when_they_can(plane: Plane, api: Upstream) -> None:
    async with plane.client() as client:
        for _ in range(3):
            assert (await client.request("GET", host(3000, "nobody"))).status == 404
        assert (await client.request("GET", "localhost")).status == 200
        # A body nobody reads cannot be skipped over.
        response = await client.request("POST", host(3000, "nobody"), body=b"x" * 10)
        assert (response.status, response.head.get("connection")) == (404, "close")
        assert await client.rest() == b""


async def test_request_ids_are_all_different(plane: Plane) -> None:
    ids = [(await plane.request("GET", host(1, "nobody"))).head.get("x-request-id") for _ in range(30)]
    assert len(set(ids)) == 30
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", found or "") for found in ids)


async def test_a_gone_sandbox_is_gone_by_all_its_names_and_its_slug_can_be_taken_again(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.open(upstream.port, "old")
        whole = sandbox_id("old")
        await plane.control.drop_sandbox(whole, plane.version())
        names = [
            host(upstream.port, "old"),
            f"{upstream.port}-{whole}.sandbox.localhost",
            f"sbx-{whole[:8]}-{upstream.port}.preview.localhost",
        ]
        assert [(await plane.request("GET", name)).status for name in names] == [410, 410, 410]
        await plane.put("old", id=sandbox_id("new"), ports={upstream.port: PUBLIC})
        assert [(await plane.request("GET", name)).status for name in names] == [200, 410, 410]
        # A late removal of the old one takes nothing from the new one.
        await plane.control.drop_sandbox(whole, plane.version())
        assert [(await plane.request("GET", name)).status for name in names] == [200, 410, 410]


async def test_a_short_id_that_fits_two_sandboxes_names_neither(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        ids = ["c0ffee00-1111-4000-8000-000000000001", "c0ffee00-2222-4000-8000-000000000002"]
        for number, whole in enumerate(ids):
            await plane.put(f"s{number}", id=whole, ports={upstream.port: PUBLIC})
        statuses = [
            (await plane.request("GET", f"sbx-{prefix}-{upstream.port}.preview.localhost")).status
            for prefix in ["c0ffee00", "c0ffee001", "c0ffee002", "c0ffee003"]
        ]
        assert statuses == [404, 200, 200, 404]
        await plane.control.drop_sandbox(ids[0], plane.version())
        assert (await plane.request("GET", f"sbx-c0ffee00-{upstream.port}.preview.localhost")).status == 200


async def silent(exchange: Exchange) -> None:
    await exchange.reader.read()


async def test_an_upstream_that_does_not_answer_times_out(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--response-timeout-s", "0.2", "--api-response-timeout-s", "0.4")
    api.handler = silent
    async with tcp_upstream(silent) as upstream:
        response = await plane.request("GET", await plane.open(upstream.port))
        assert (response.status, response.code) == (504, "upstream_timeout")
        response = await plane.request("POST", await plane.open(upstream.port), body=b"x")
        assert (response.status, response.code) == (504, "upstream_timeout")
        response = await plane.request("GET", "localhost")
        assert (response.status, response.code) == (503, "api_unavailable")
        await eventually(lambda: not upstream.open_connections, "the upstream's connections are closed")


async def test_an_address_that_swallows_everything_times_out(start_plane: StartPlane) -> None:
    plane = await start_plane("--connect-timeout-s", "0.2")
    # A listener whose queue is full answers no further connection.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        response = await plane.request("GET", await plane.open(address[1]))
        assert (response.status, response.code) == (504, "upstream_timeout")
        for filler in fillers:
            filler.close()


async def test_a_stalled_stream_is_cut(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--stream-timeout-s", "0.2")

    async def stall(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await exchange.reader.read()

    api.handler = stall
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.head()).status == 200
        assert await client.rest() == b"half"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("", b""),
        ("GET / HT", b"HTTP/1.1 408"),
        ("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab", b"HTTP/1.1 408"),
    ],
)
async def test_slow_clients_are_let_go(start_plane: StartPlane, api: Upstream, sent: str, expected: bytes) -> None:
    plane = await start_plane("--head-timeout-s", "0.2", "--idle-timeout-s", "0.2", "--body-timeout-s", "0.2")
    async with plane.client() as client:
        await client.send(sent)
        answer = await client.rest()
        assert answer[:12] == expected


async def test_a_head_that_trickles_in_does_not_last(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--head-timeout-s", "0.3")
    async with plane.client() as client:

        async def trickle(client: Client) -> None:
            for letter in "GET / HTTP/1.1\r\nX-A: " + "a" * 1000:
                await client.send(letter)
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle(client))
        assert (await client.response()).code == "request_timeout"
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def test_a_reader_that_takes_nothing_is_let_go(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--send-timeout-s", "0.3")

    async def flood(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        await exchange.send(bytes(100_000_000))

    api.handler = flood
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.head()
        # The stream's reader stops asking the socket once its own buffer is full.
        await eventually(lambda: not api.open_connections, "the stream is cut")


async def test_a_sandbox_takes_so_many_requests_at_once(start_plane: StartPlane) -> None:
    plane = await start_plane("--sandbox-connections-max", "2")
    gate = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.answer(b"ok")

    async with tcp_upstream(wait) as upstream:
        name, other = await plane.open(upstream.port), await plane.open(upstream.port, "other")
        held = [asyncio.create_task(plane.request("GET", name)) for _ in range(2)]
        await eventually(lambda: len(upstream.requests) == 2, "both have arrived")
        response = await plane.request("GET", name)
        assert (response.status, response.code) == (503, "too_many_connections")
        beside = asyncio.create_task(plane.request("GET", other))
        await eventually(lambda: len(upstream.requests) == 3, "another sandbox is not affected")
        gate.set()
        assert {answer.status for answer in await asyncio.gather(*held, beside)} == {200}
        assert (await plane.request("GET", name)).status == 200


@pytest.mark.parametrize("flag", ["--connections-max", "--client-connections-max"])
async def test_so_many_connections_are_taken_at_once(start_plane: StartPlane, api: Upstream, flag: str) -> None:
    plane = await start_plane(flag, "3")
    async with plane.client() as first, plane.client() as second, plane.client() as third:
        for client in [first, second, third]:
            assert (await client.request("GET", "localhost")).status == 200
        async with plane.client() as fourth:
            response = await fourth.response()
            assert (response.status, response.code) == (503, "too_many_connections")
            assert await fourth.rest() == b""
        await third.close()
        statuses = []
        while 200 not in statuses:
            async with plane.client() as client:
                statuses.append((await client.request("GET", "localhost")).status)
        assert (await first.request("GET", "localhost")).status == 200


async def test_requests_failing_in_bulk_leave_nothing_open(plane: Plane, api: Upstream) -> None:
    async def break_off(exchange: Exchange) -> None:
        exchange.writer.transport.abort()

    async with tcp_upstream(break_off) as upstream:
        name = await plane.open(upstream.port)
        before = len(list(Path(f"/proc/{plane.process.pid}/fd").iterdir()))
        answers = await asyncio.gather(*(plane.request("GET", name) for _ in range(100)))
        assert {answer.code for answer in answers} == {"upstream_broke"}
        await eventually(
            lambda: len(list(Path(f"/proc/{plane.process.pid}/fd").iterdir())) <= before, "descriptors are returned"
        )
