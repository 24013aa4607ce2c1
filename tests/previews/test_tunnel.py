"""Upgraded connections."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from previews.routes import PortRoute, ShareRule
from previews.tokens import make_token
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, PUBLIC, Exchange, Plane, Upstream, eventually, host, tcp_upstream

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-Sandgate-A: 1\r\n\r\n"
ASK = "GET / HTTP/1.1\r\nHost: {}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: echo\r\n\r\n"


async def test_websockets_carry_messages_both_ways(plane: Plane) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, max_size=None) as server, asyncio.timeout(30):
        port = server.sockets[0].getsockname()[1]
        await plane.put(ports={port: PUBLIC})
        url = f"ws://{host(port)}:{plane.address[1]}/chat"
        async with connect(url, host=plane.address[0], port=plane.address[1], max_size=None, proxy=None) as client:
            messages: list[str | bytes] = ["hello", b"\x00\xff", "ü" * 100_000, bytes(3_000_000)]
            for message in messages:
                await client.send(message)
                assert await client.recv() == message
            pong = await client.ping()
            await pong
        assert client.close_code == 1000


async def test_a_private_websocket_opens_with_a_token_in_its_address(plane: Plane) -> None:
    seen = []

    async def note(connection: ServerConnection) -> None:
        assert connection.request is not None
        seen.append(connection.request.path)

    token = make_token("share")
    async with serve(note, "127.0.0.1", 0) as server, asyncio.timeout(PATIENCE_S):
        port = server.sockets[0].getsockname()[1]
        await plane.put(ports={port: PortRoute("p", "private", [ShareRule("s", token.hash, None)])})
        address: dict[str, Any] = {"host": plane.address[0], "port": plane.address[1], "proxy": None}
        async with connect(f"ws://{host(port)}/a?preview_token={token.secret}&b=1", **address) as client:
            await client.wait_closed()
        assert seen == ["/a?b=1"]
        with pytest.raises(websockets.InvalidStatus, match="401"):
            await connect(f"ws://{host(port)}/a", **address)


async def test_half_closed_tunnels_go_on_the_other_way(plane: Plane, api: Upstream) -> None:
    async def collect(exchange: Exchange) -> None:
        await exchange.send(SWITCH + b"first,")
        received = await exchange.reader.read()
        await exchange.send(b"got " + received)
        exchange.writer.write_eof()

    api.handler = collect
    async with plane.client() as client:
        await client.send(ASK.format("localhost") + "sent ahead,")
        head = await client.head()
        assert (head.status, head.get("upgrade"), head.get("connection")) == (101, "echo", "Upgrade")
        assert head.get("x-sandgate-a") is None
        await client.send("and later")
        client.writer.write_eof()
        assert await client.rest() == b"first,got sent ahead,and later"


async def test_a_refused_upgrade_is_a_plain_response(plane: Plane, api: Upstream) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(b"no", "426 Upgrade Required")

    api.handler = refuse
    async with plane.client() as client:
        for _ in range(2):
            await client.send(ASK.format("localhost"))
            assert (await client.response()).body == b"no"
    assert api.connections == 1


async def test_bulk_passes_both_ways_at_once(plane: Plane) -> None:
    block, count = bytes(range(256)) * 1024, 64

    async def mirror(exchange: Exchange) -> None:
        await exchange.send(SWITCH)
        while data := await exchange.reader.read(65536):
            await exchange.send(data)
        exchange.writer.write_eof()

    async with tcp_upstream(mirror) as upstream, plane.client() as client, asyncio.timeout(30):
        await client.send(ASK.format(await plane.open(upstream.port)))
        assert (await client.head()).status == 101

        async def send() -> None:
            for _ in range(count):
                await client.send(block)
            client.writer.write_eof()

        sending = asyncio.create_task(send())
        received = await client.reader.read()
        await sending
        while more := await client.reader.read():
            received += more
        assert hashlib.sha256(received).digest() == hashlib.sha256(block * count).digest()
        assert await plane.metric("sandgate_plane_upload_bytes_total") == len(block) * count


async def test_a_flood_is_spliced_and_what_follows_still_passes(plane: Plane) -> None:
    block = random.Random(7).randbytes(1024 * 1024)

    async def flood(exchange: Exchange) -> None:
        await exchange.send(SWITCH)
        for _ in range(64):
            await exchange.send(block)
        while line := await exchange.reader.readline():
            await exchange.send(line)
        await exchange.send(block)
        exchange.writer.write_eof()

    async with tcp_upstream(flood) as upstream, plane.client() as client, asyncio.timeout(60):
        await client.send(ASK.format(await plane.open(upstream.port)))
        assert (await client.head()).status == 101
        for _ in range(64):
            assert await client.reader.readexactly(len(block)) == block
        assert await plane.metric("sandgate_plane_spliced_bytes_total") > len(block)
        # Many small pieces make the plane copy again.
        for number in range(100):
            await client.send(f"{number}\n")
            assert await client.reader.readline() == f"{number}\n".encode()
        client.writer.write_eof()
        assert await client.rest() == block
        assert await plane.metric("sandgate_plane_download_bytes_total") == 65 * len(block) + 290


async def test_a_reset_on_one_side_ends_the_other(plane: Plane) -> None:
    gone = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await exchange.send(SWITCH)
        if exchange.connection == 0:
            await exchange.reader.readexactly(1)
            exchange.writer.transport.abort()
        elif not await exchange.reader.read():
            gone.set()

    async with tcp_upstream(hold) as upstream:
        name = await plane.open(upstream.port)
        async with plane.client() as client:
            await client.send(ASK.format(name))
            await client.head()
            await client.send("x")
            assert await client.rest() == b""
        async with plane.client() as client:
            await client.send(ASK.format(name))
            await client.head()
            client.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                await gone.wait()
    await eventually(lambda: not upstream.open_connections, "nothing is left open")
    assert await plane.metric("sandgate_plane_tunnels") == 0


async def test_a_tunnel_that_talks_one_way_is_not_idle(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--stream-timeout-s", "0.6")

    async def talk(exchange: Exchange) -> None:
        await exchange.send(SWITCH)
        for _ in range(15):
            await exchange.send(b".")
            await asyncio.sleep(0.1)
        # Now both sides are silent.
        await exchange.reader.read()

    api.handler = talk
    async with plane.client() as client:
        await client.send(ASK.format("localhost"))
        await client.head()
        assert await client.rest() == b"." * 15
