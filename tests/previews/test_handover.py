"""A plane that is replaced while it serves: no request fails, and nothing that was pushed is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from previews.plane import PlaneClient
from previews.routes import PortRoute
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, Exchange, Plane, describe, eventually, host, sandbox_id, tcp_upstream
from tests.previews.http2 import http2_client, pseudo
from tests.support.certificates import Authority


@contextlib.asynccontextmanager
async def successor(run_dir: Path, *flags: str, workers: int = 2) -> AsyncIterator[Plane]:
    """Another plane at the same control socket, which has taken over once this is entered."""
    plane = Plane(run_dir, workers)
    await plane.start("--take-over", *flags)
    try:
        async with PlaneClient(str(plane.control_socket)) as plane.control:
            await plane.control.wait_connected(PATIENCE_S)
            yield plane
    finally:
        await plane.stop()


async def ended(plane: Plane) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await plane.process.wait()


async def visit(plane: Plane, name: str, stop: asyncio.Event, per_connection: int) -> int:
    """Ask again and again, on connections that are used as long as the plane agrees; how often."""
    count = 0
    while not stop.is_set():
        async with plane.client() as client:
            for _ in range(per_connection):
                response = await client.request("GET", name)
                assert response.status == 200
                count += 1
                if stop.is_set() or response.head.get("connection") == "close":
                    break
    return count


async def test_no_request_fails_while_planes_replace_each_other(run_dir: Path, plane: Plane) -> None:
    async with contextlib.AsyncExitStack() as planes, tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        stop = asyncio.Event()
        visitors = [asyncio.create_task(visit(plane, name, stop, count)) for count in (1, 1, 1, 10, 10_000, 10_000)]
        before = plane
        for workers in (3, 1, 2):
            after = await planes.enter_async_context(successor(run_dir, workers=workers))
            assert after.address == plane.address
            assert after.admin == plane.admin
            assert await ended(before) == 0
            before = after
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            counts = await asyncio.gather(*visitors)
        assert min(counts) > 4


async def test_what_is_under_way_ends_where_it_began(
    run_dir: Path, start_plane: StartPlane, authority: Authority
) -> None:
    authority.issue("wild", "*.sandbox.localhost")
    plane = await start_plane(*authority.flags)
    released = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        if exchange.head.target == "/slow":
            await released.wait()
        await exchange.answer(b"whole")

    async with tcp_upstream(slow) as upstream:
        name = await plane.open(upstream.port)
        async with plane.client() as idle, plane.client() as busy, http2_client(plane, authority, name) as newer:
            assert (await idle.request("GET", name)).status == 200
            await busy.send(f"GET /slow HTTP/1.1\r\nHost: {name}\r\n\r\n")
            stream = newer.begin(pseudo("GET", name, "/slow"))
            await eventually(lambda: len(upstream.requests) == 3, "the requests arrive")
            async with successor(run_dir, *authority.flags) as after:
                assert after.tls_addresses == plane.tls_addresses
                # An idle connection gets one more answer, and is told that it is the last.
                last = await idle.request("GET", name)
                assert (last.status, last.head.get("connection")) == (200, "close")
                assert plane.process.returncode is None
                released.set()
                assert (await busy.response()).body == b"whole"
                assert bytes((await newer.finish(stream)).body) == b"whole"
                await idle.close()
                await busy.close()
                assert await ended(plane) == 0
                async with http2_client(after, authority, name) as client:
                    assert (await client.request("GET", name)).status == 200


async def test_pushes_reach_the_successor_and_revocations_both(run_dir: Path, plane: Plane) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await exchange.reader.read()

    async with tcp_upstream(endless) as upstream:
        name = await plane.open(upstream.port)
        async with plane.client() as watching:
            await watching.send(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")
            assert (await watching.head()).status == 200
            async with successor(run_dir) as after:
                # The connection to the first one leads to the second by itself.
                await plane.put(ports={upstream.port: PortRoute("p", "private")})
                assert (await after.request("GET", name)).status == 401
                assert b"0\r\n\r\n" not in await watching.rest()
                assert await ended(plane) == 0
                assert after.control_socket.exists()
    assert not plane.control_socket.exists()


@pytest.mark.parametrize("said", ["nothing", "something else"])
async def test_a_successor_that_comes_to_nothing_changes_nothing(plane: Plane, said: str) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        reader, writer = await asyncio.open_unix_connection(plane.control_socket)
        writer.write(b'{"t":"hand_over"}\n')
        async with asyncio.timeout(PATIENCE_S):
            while json.loads(await reader.readline())["t"] != "handed_over":
                pass
            assert (await plane.request("GET", name)).status == 200
            if said == "something else":
                writer.write(b'{"t":"stats","n":1}\n')
                await writer.drain()
        writer.close()
        # The control socket is there again, and what it is told counts.
        await plane.put(ports={upstream.port: PortRoute("p", "private")})
        assert (await plane.request("GET", name)).status == 401
        await plane.kill()
        await plane.start()
        assert (await plane.request("GET", name)).status == 401


async def test_traffic_at_the_one_before_is_activity_still(run_dir: Path, plane: Plane) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := await exchange.reader.read(100):
            await exchange.send(data)

    active: list[str] = []
    await plane.control.close()
    path = str(plane.control_socket)
    async with tcp_upstream(echo) as upstream, PlaneClient(path, on_activity=active.extend) as plane.control:
        await plane.control.wait_connected(PATIENCE_S)
        name = await plane.open(upstream.port)
        async with plane.client() as tunnel:
            await tunnel.send(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
            assert (await tunnel.head()).status == 101
            await eventually(lambda: sandbox_id("demo") in active, "the tunnel counts")
            after = Plane(run_dir)
            await after.start("--take-over")
            try:
                await eventually(lambda: plane.control.is_connected, "the client finds the successor")
                active.clear()
                await tunnel.send("still here")
                assert await tunnel.reader.readexactly(10) == b"still here"
                await eventually(lambda: sandbox_id("demo") in active, "the tunnel counts still")
            finally:
                await after.stop()


async def test_without_a_predecessor_it_just_starts(run_dir: Path) -> None:
    async with successor(run_dir) as plane:
        assert (await plane.request("GET", host(1))).status == 404


async def test_a_stop_during_a_hand_over_is_a_stop(run_dir: Path, plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        async with plane.client() as idle:
            assert (await idle.request("GET", name)).status == 200
            async with successor(run_dir):
                plane.process.terminate()
                assert await ended(plane) == 0
                assert await idle.rest() == b""
