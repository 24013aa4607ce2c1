"""Clients that take or send too slowly while they are waited for, and those that only seem to."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.previews.conftest import StartPlane
from tests.previews.harness import Client, Exchange, Plane, host, tcp_upstream

#: Far above what a slow client of these tests reaches, far below what a quick one does on the worst of machines.
FLAGS = ("--client-bytes-per-s-min", "2000000", "--client-rate-window-s", "1", "--send-timeout-s", "60")
CHUNK = b"x" * 65536
#: More than all buffers between two processes of one machine hold.
LARGE_BYTES = 64 * 1024 * 1024


async def counted(plane: Plane, wait: str, count: int) -> None:
    """Wait until so many have been cut for this reason."""
    async with asyncio.timeout(30):
        while await plane.metric(f'sandgate_plane_timeouts_total{{wait="{wait}"}}') != count:
            await asyncio.sleep(0.05)


async def large(exchange: Exchange) -> None:
    """A download; the reader may leave in the middle."""
    await exchange.send(f"HTTP/1.1 200 OK\r\nContent-Length: {LARGE_BYTES}\r\n\r\n".encode())
    with contextlib.suppress(ConnectionError):
        for _ in range(LARGE_BYTES // len(CHUNK)):
            await exchange.send(CHUNK)


async def swallow(exchange: Exchange) -> None:
    """An upload; answered at its end."""
    await exchange.answer(str(len(await exchange.body())).encode())


async def test_a_reader_that_is_too_slow_loses_its_download(start_plane: StartPlane) -> None:
    plane = await start_plane(*FLAGS)
    loop = asyncio.get_running_loop()
    async with tcp_upstream(large) as upstream:
        name = await plane.open(upstream.port)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            reader.setblocking(False)
            await loop.sock_connect(reader, plane.address)
            await loop.sock_sendall(reader, f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
            taken = 0
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(60):
                    # Some all the time, so that it is no stall: 640 kB a second.
                    while data := await loop.sock_recv(reader, 32768):
                        taken += len(data)
                        await asyncio.sleep(0.05)
            assert taken < LARGE_BYTES
        await counted(plane, "slow_send", 1)
        assert await plane.metric('sandgate_plane_timeouts_total{wait="send"}') == 0


async def test_a_quick_reader_is_left_alone(start_plane: StartPlane) -> None:
    plane = await start_plane("--client-bytes-per-s-min", "1000", "--client-rate-window-s", "1")
    async with tcp_upstream(large) as upstream, plane.client() as client:
        response = await client.request("GET", await plane.open(upstream.port))
        assert len(response.body) == LARGE_BYTES
        assert await plane.metric('sandgate_plane_timeouts_total{wait="slow_send"}') == 0


async def drip(client: Client, stop: asyncio.Event) -> None:
    """Send a few bytes now and then, for as long as anybody listens."""
    with contextlib.suppress(ConnectionError):
        while not stop.is_set():
            await client.send(b"x" * 10)
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
async def test_a_sender_that_is_too_slow_is_told_so(start_plane: StartPlane, framing: str) -> None:
    plane = await start_plane(*FLAGS)
    stop = asyncio.Event()
    async with tcp_upstream(swallow) as upstream, plane.client() as client:
        name = await plane.open(upstream.port)
        await client.send(f"POST / HTTP/1.1\r\nHost: {name}\r\n{framing}\r\n\r\n")
        if "chunked" in framing:
            await client.send("f4240\r\n")
        dripping = asyncio.create_task(drip(client, stop))
        response = await client.response()
        stop.set()
        await dripping
        assert (response.status, response.code) == (408, "request_timeout")
        await counted(plane, "slow_body", 1)


async def test_the_api_is_spared_slow_senders_too(start_plane: StartPlane, api: object) -> None:
    plane = await start_plane(*FLAGS)
    stop = asyncio.Event()
    async with plane.client() as client:
        await client.send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        dripping = asyncio.create_task(drip(client, stop))
        assert (await client.response()).code == "request_timeout"
        stop.set()
        await dripping


async def test_a_stream_that_says_little_is_not_slow(start_plane: StartPlane) -> None:
    """The server is the slow one here: 20 bytes a second over several windows."""
    plane = await start_plane(*FLAGS)

    async def events(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(30):
            await exchange.send(b"2\r\n:\n\r\n")
            await asyncio.sleep(0.1)
        await exchange.send(b"0\r\n\r\n")

    async with tcp_upstream(events) as upstream, plane.client() as client:
        response = await client.request("GET", await plane.open(upstream.port))
        assert response.body == b":\n" * 30


async def test_a_conversation_has_pauses(start_plane: StartPlane) -> None:
    """A request that is answered while it goes on, a word at a time."""
    plane = await start_plane(*FLAGS)

    async def echo(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (line := await exchange.reader.readline()) != b"0\r\n":
            size = int(line, 16)
            data = await exchange.reader.readexactly(size + 2)
            await exchange.send(line + data)
        await exchange.send(b"0\r\n\r\n")
        await exchange.reader.readline()

    async with tcp_upstream(echo) as upstream, plane.client() as client:
        name = host(upstream.port)
        await plane.open(upstream.port)
        await client.send(f"POST / HTTP/1.1\r\nHost: {name}\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await client.head()).status == 200
        for _ in range(30):
            await client.send("2\r\nhi\r\n")
            assert await client.reader.readexactly(7) == b"2\r\nhi\r\n"
            await asyncio.sleep(0.1)
        await client.send("0\r\n\r\n")
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"
