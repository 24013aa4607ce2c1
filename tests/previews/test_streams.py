"""Event streams: the backlog from the API, what comes after it from the plane, and nothing lost or sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from previews.plane import PlaneClient
from previews.routes import KeyRoute
from previews.streams import HEADER, EventsOrder
from tests.previews.conftest import StartPlane
from tests.previews.event_log import HEARTBEAT, OPEN, EventLog, Reader, reading, serving
from tests.previews.harness import PATIENCE_S, Exchange, Plane, unix_upstream
from tests.previews.http2 import http2_client, pseudo
from tests.support.certificates import Authority

VECTORS = Path(__file__).resolve().parents[1] / "vectors"


@pytest.fixture
async def log(run_dir: Path) -> AsyncIterator[EventLog]:
    async with serving(run_dir) as log:
        yield log


@pytest.fixture
async def worker(plane: Plane, log: EventLog) -> AsyncIterator[PlaneClient]:
    """The one API worker, which publishes the log."""
    async with log.worker(plane) as client:
        yield client


async def subscribers(plane: Plane) -> float:
    return await plane.metric("sandgate_plane_stream_subscribers")


async def has_subscribers(plane: Plane, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await subscribers(plane) != count:
            await asyncio.sleep(0.02)


async def ends(plane: Plane, reason: str) -> float:
    return await plane.metric(f'sandgate_plane_stream_ends_total{{reason="{reason}"}}')


@pytest.mark.usefixtures("worker")
async def test_events_follow_on_the_backlog(plane: Plane, log: EventLog) -> None:
    log.add(3)
    async with reading(plane, 1) as old, reading(plane) as new, reading(plane, 0, "1.0") as plain:
        assert await old.until(2) == [2, 3]
        await has_subscribers(plane, 3)
        log.add(2)
        assert await old.until(4) == [2, 3, 4, 5]
        assert await new.until(2) == [4, 5]
        assert await plain.until(5) == [1, 2, 3, 4, 5]
        assert new.text == OPEN + b"".join(one.frame.encode() for one in log.events[3:])
        assert new.head.get("content-type") == "text/event-stream"
        assert new.head.get("connection") == "close"
        assert await plane.metric("sandgate_plane_stream_events_total") == 6
    await has_subscribers(plane, 0)
    assert await ends(plane, "left") == 3


def test_patterns_match_as_in_python() -> None:
    """The plane's own test reads the same table."""
    for pattern, name, expected in json.loads((VECTORS / "patterns.json").read_bytes()):
        assert fnmatch.fnmatchcase(name, pattern) == expected


@pytest.mark.usefixtures("worker")
async def test_what_comes_between_backlog_and_stream_is_not_lost(plane: Plane, log: EventLog) -> None:
    log.add(2)
    log.on_backlog = lambda: log.add(3)
    async with reading(plane, 0) as reader:
        assert await reader.until(5) == [1, 2, 3, 4, 5]


async def test_many_readers_that_come_and_go_miss_and_repeat_nothing(plane: Plane, log: EventLog) -> None:
    async def follow(last: int) -> list[int]:
        ids: list[int] = []
        while not ids or ids[-1] < last:
            async with reading(plane, ids[-1] if ids else 0) as reader:
                ids += await reader.until(7)
        return ids

    async with log.worker(plane), log.worker(plane):
        readers = [asyncio.create_task(follow(500)) for _ in range(20)]
        while log.last < 510:
            log.add(5)
            await asyncio.sleep(0.002)
        for reader in readers:
            seen = await reader
            assert seen == list(range(1, len(seen) + 1))


@pytest.mark.usefixtures("worker")
async def test_only_what_is_asked_for_is_sent(plane: Plane, log: EventLog) -> None:
    log.terms = {"types": ["sandbox.*", "key.made"], "resource_type": "thing", "resource_id": "r1"}
    async with reading(plane) as reader:
        await has_subscribers(plane, 1)
        log.add(kind="sandbox.created")
        log.add(kind="sandbox.created", topic="other")
        log.add(kind="sandbox.created", of="r2")
        log.add(kind="key.made.not")
        log.add(kind="key.made")
        assert await reader.until(2) == [1, 5]


async def test_a_reader_that_comes_before_the_first_publisher(plane: Plane, log: EventLog) -> None:
    async with reading(plane) as reader:
        await has_subscribers(plane, 1)
        async with log.worker(plane):
            await asyncio.sleep(0)
            log.add(1)
            assert await reader.until(1) == [1]


async def test_another_worker_goes_on_where_a_dead_one_left(plane: Plane, log: EventLog) -> None:
    async with reading(plane) as reader, contextlib.AsyncExitStack() as stack:
        async with log.worker(plane):
            await has_subscribers(plane, 1)
            log.add(1)
            assert await reader.until(1) == [1]
        log.add(2)
        await stack.enter_async_context(log.worker(plane))
        assert await reader.until(3) == [1, 2, 3]
        await stack.enter_async_context(log.worker(plane))
        log.add(1)
        assert await reader.until(4) == [1, 2, 3, 4]


async def test_a_publisher_that_hangs_is_replaced(plane: Plane, log: EventLog) -> None:
    relieved = asyncio.Event()
    silent = PlaneClient(str(plane.control_socket), on_tail=lambda _: None, on_relieved=relieved.set)
    async with silent, reading(plane) as reader:
        await silent.wait_connected(PATIENCE_S)
        async with log.worker(plane):
            async with asyncio.timeout(PATIENCE_S):
                await relieved.wait()
            await asyncio.sleep(0.05)
            log.add(1)
            assert await reader.until(1) == [1]


async def test_a_stretch_that_does_not_fit_is_refused_or_ignored(plane: Plane, log: EventLog) -> None:
    async with reading(plane) as reader, log.worker(plane) as first, log.worker(plane) as second:
        await has_subscribers(plane, 1)
        log.add(2)
        assert await reader.until(2) == [1, 2]
        event = log.events[0]
        await second.publish(2, 3, [], is_start=False)
        await first.publish(1, 2, [log.events[1]], is_start=False)
        await first.publish(5, 7, [event], is_start=False)
        log.add(1)
        assert await reader.until(3) == [1, 2, 3]


async def test_a_slow_reader_loses_its_stream_and_nobody_elses(start_plane: StartPlane, log: EventLog) -> None:
    plane = await start_plane("--stream-events-max", "50")
    async with log.worker(plane), plane.client() as stalled, reading(plane) as reader:
        stalled.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await Reader(stalled).open()
        await has_subscribers(plane, 2)
        stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for count in range(1, 400):
            log.add(1, size=64 * 1024)
            assert len(await reader.until(count)) == count
            if await ends(plane, "slow"):
                break
        assert await ends(plane, "slow") == 1
        assert await subscribers(plane) == 1


async def test_a_reader_that_takes_nothing_for_too_long_is_cut(start_plane: StartPlane, log: EventLog) -> None:
    plane = await start_plane("--send-timeout-s", "0.5", "--stream-events-max", "100000")
    async with log.worker(plane), plane.client() as stalled:
        await Reader(stalled).open()
        await has_subscribers(plane, 1)
        stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
        log.add(100, size=128 * 1024)
        await has_subscribers(plane, 0)
        assert await ends(plane, "slow") == 1


async def test_who_is_too_far_behind_must_resume(plane: Plane, log: EventLog) -> None:
    assert log.upstream is not None
    async with log.worker(plane):
        log.add(20_000)
        async with reading(plane) as reader:
            log.add(1)
            assert await reader.until(1) == [20_001]
        log.upstream.handler = EventLog(log.events[:100]).answer
        async with reading(plane, 50) as reader:
            assert await reader.until_over()
            assert reader.ids == list(range(51, 101))
        assert await ends(plane, "behind") == 1


@pytest.mark.usefixtures("worker")
async def test_a_stream_ends_with_its_key(plane: Plane, log: EventLog) -> None:
    hashes = [hashlib.sha256(name).hexdigest() for name in (b"revoked", b"expiring", b"unknown")]
    await plane.control.put_key(KeyRoute(plane.version(), hashes[0], "w1", None))
    await plane.control.put_key(KeyRoute(plane.version(), hashes[1], "w1", time.time() + 0.7))
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for key in hashes:
            log.terms = {"key_hash": key}
            readers.append(await stack.enter_async_context(reading(plane)))
        await has_subscribers(plane, 3)
        await plane.control.drop_key(hashes[0], plane.version())
        assert await readers[0].until_over()
        assert await readers[1].until_over()
        log.add(1)
        assert await readers[2].until(1) == [1]
        assert await ends(plane, "revoked") == 2


async def test_a_quiet_stream_is_kept_alive(start_plane: StartPlane, log: EventLog) -> None:
    plane = await start_plane("--stream-heartbeat-s", "1")
    async with log.worker(plane), reading(plane) as reader:
        await reader.until_text(HEARTBEAT * 2)
        log.add(1)
        assert await reader.until(1) == [1]


@pytest.mark.usefixtures("worker")
async def test_streams_end_in_order_when_the_plane_does(plane: Plane, log: EventLog) -> None:
    async with reading(plane) as reader:
        await has_subscribers(plane, 1)
        log.add(1)
        await reader.until(1)
        plane.process.send_signal(signal.SIGTERM)
        assert await reader.until_over()
        async with asyncio.timeout(PATIENCE_S):
            assert await plane.process.wait() == 0


async def test_a_killed_plane_loses_nothing(run_dir: Path, start_plane: StartPlane, log: EventLog) -> None:
    plane = await start_plane()
    async with log.worker(plane), contextlib.AsyncExitStack() as stack:
        reader = await stack.enter_async_context(reading(plane))
        await has_subscribers(plane, 1)
        log.add(2)
        seen = list(await reader.until(2))
        await plane.kill()
        assert not await reader.until_over()
        log.add(2)
        again = Plane(run_dir)
        await again.start()
        stack.push_async_callback(again.stop)
        reader = await stack.enter_async_context(reading(again, seen[-1]))
        seen += await reader.until(2)
        # The worker has found the new plane by itself.
        log.add(1)
        assert seen + (await reader.until(3))[2:] == [1, 2, 3, 4, 5]


async def test_streams_end_at_a_hand_over_and_go_on_at_the_successor(
    run_dir: Path, plane: Plane, log: EventLog
) -> None:
    async with log.worker(plane), reading(plane) as reader:
        await has_subscribers(plane, 1)
        log.add(1)
        assert await reader.until(1) == [1]
        after = Plane(run_dir)
        await after.start("--take-over")
        try:
            assert await reader.until_over()
            log.add(1)
            async with reading(after, 1) as resumed:
                assert await resumed.until(1) == [2]
                log.add(1)
                assert await resumed.until(2) == [2, 3]
        finally:
            await after.stop()


async def test_by_http_2(start_plane: StartPlane, log: EventLog, authority: Authority) -> None:
    authority.issue("local", "localhost")
    plane = await start_plane(*authority.flags)
    async with log.worker(plane), http2_client(plane, authority, "localhost") as client:
        log.add(1)
        fields = [*pseudo("GET", "localhost", "/events"), ("last-event-id", "0")]
        streams = [client.begin(fields) for _ in range(3)]
        await has_subscribers(plane, 3)
        log.add(2, size=100_000)
        expected = OPEN + b"".join(one.frame.encode() for one in log.events)
        async with asyncio.timeout(PATIENCE_S):
            while any(len(client.answers[stream].body) < len(expected) for stream in streams):
                await client.receive()
        assert all(bytes(client.answers[stream].body) == expected for stream in streams)
        client.h2.reset_stream(streams[0])
        client.flush()
        await has_subscribers(plane, 2)
        assert (await client.request("HEAD", "localhost", "/events")).status == 200
        plane.process.send_signal(signal.SIGTERM)
        assert (await client.finish(streams[1])).is_over


async def test_by_tls(start_plane: StartPlane, log: EventLog, authority: Authority) -> None:
    authority.issue("local", "localhost")
    plane = await start_plane(*authority.flags)
    async with log.worker(plane), plane.tls_client("localhost", authority.context()) as client:
        reader = await Reader(client).open(0)
        await has_subscribers(plane, 1)
        log.add(30, size=100_000)
        assert await reader.until(30) == list(range(1, 31))


async def test_an_order_from_outside_or_from_a_sandbox_is_none(plane: Plane, run_dir: Path) -> None:
    order = EventsOrder("t").header()
    seen: list[str | None] = []

    async def answer(exchange: Exchange) -> None:
        seen.append(exchange.head.get(HEADER))
        await exchange.send(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{HEADER}: {order}\r\n\r\n".encode())
        await exchange.send(b"2\r\nhi\r\n0\r\n\r\n")

    async with unix_upstream(answer, run_dir / "api.sock"):
        async with plane.client() as client:
            # No cursor at the end: the API itself makes a mistake.
            await client.send(f"GET / HTTP/1.1\r\nHost: localhost\r\n{HEADER}: {order}\r\n\r\n")
            head = await client.head()
            assert (head.status, await client.rest()) == (200, b"")
        assert seen == [None]
    server = await asyncio.start_server(lambda r, w: _serve_once(r, w, order), "127.0.0.1", 0)
    async with server:
        name = await plane.open(server.sockets[0].getsockname()[1])
        response = await plane.request("GET", name)
        assert response.body == b"hi"
        assert response.head.get(HEADER) is None
    assert await subscribers(plane) == 0


async def _serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: str) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{HEADER}: {order}\r\n\r\n2\r\nhi\r\n".encode())
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    "order", ["", "{}", '{"kind":"other"}', '{"kind":"events"}', '{"kind":"events","topic":"t","key":"x"}']
)
async def test_an_order_that_makes_no_sense_is_an_error(plane: Plane, run_dir: Path, order: str) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{HEADER}: {order}\r\n\r\n".encode())
        await exchange.send(b"0\r\n\r\n")

    async with unix_upstream(answer, run_dir / "api.sock"):
        response = await plane.request("GET", "localhost")
        assert (response.status, response.code) == (502, "upstream_broke")


async def test_an_idle_subscriber_costs_little(start_plane: StartPlane, log: EventLog) -> None:
    plane = await start_plane("--client-connections-max", "20000")
    statm = Path(f"/proc/{plane.process.pid}/statm")
    async with log.worker(plane), contextlib.AsyncExitStack() as stack:

        async def memory_with(more: int) -> int:
            for _ in range(more):
                await stack.enter_async_context(reading(plane))
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        before = await memory_with(200)
        assert (await memory_with(1500) - before) / 1500 < 4096
