"""The control socket as a peer sees it that speaks the protocol by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from typing import Any

import pytest

from previews.tokens import hash_token
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, Plane, describe, eventually, host, sandbox_id, tcp_upstream

KEY = hash_token("msk_live_k")


class Wire:
    """A control connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.hello: dict[str, Any] = {}

    async def send(self, *messages: dict[str, Any] | bytes) -> None:
        for message in messages:
            self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def hear(self, kind: str | None = None) -> dict[str, Any]:
        """The next message, of that kind if told."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message: dict[str, Any] = json.loads(await self.reader.readline())
                if kind in (None, message["t"]):
                    return message

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send and have the answer."""
        await self.send({**message, "n": 7})
        while (answer := await self.hear()).get("n") != 7:
            pass
        return answer


@contextlib.asynccontextmanager
async def wire(plane: Plane) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_unix_connection(plane.control_socket)
    connection = Wire(reader, writer)
    try:
        connection.hello = await connection.hear()
        yield connection
    finally:
        writer.close()
        await writer.wait_closed()


def sandbox(name: str, v: int, **changes: Any) -> dict[str, Any]:
    return {
        "t": "sandbox",
        "v": v,
        "id": sandbox_id(name),
        "slug": name,
        "owner": "w1",
        "address": "127.0.0.1",
        "state": "running",
        "ports": {},
        "tokens": [],
        **changes,
    }


def public(port: int) -> dict[str, Any]:
    return {str(port): {"preview_id": "p", "visibility": "public", "shares": []}}


async def status(plane: Plane, name: str, *fields: str) -> int:
    return (await plane.request("GET", name, "/", *fields)).status


async def test_the_socket_is_ours_alone(plane: Plane) -> None:
    assert stat.S_IMODE(plane.control_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE((plane.directory / "plane.routes").stat().st_mode) == 0o600


async def test_hello_tells_version_epoch_and_size(plane: Plane) -> None:
    async with wire(plane) as first:
        pid = plane.process.pid
        assert first.hello == {"t": "hello", "version": 1, "epoch": first.hello["epoch"], "pid": pid, "sandboxes": 0}
        assert await first.ask(sandbox("a", 1)) == {"t": "ack", "n": 7}
    async with wire(plane) as second:
        assert second.hello == {**first.hello, "sandboxes": 1}


async def test_an_older_record_never_replaces_a_newer_one(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, wire(plane) as control:
        name = host(upstream.port, "a")
        await control.ask(sandbox("a", 10, ports=public(upstream.port)))
        await control.ask(sandbox("a", 9))
        assert await status(plane, name) == 200
        await control.ask({"t": "sandbox_gone", "v": 9, "id": sandbox_id("a")})
        assert await status(plane, name) == 200
        await control.ask({"t": "sandbox_gone", "v": 11, "id": sandbox_id("a")})
        assert await status(plane, name) == 410
        await control.ask(sandbox("a", 10, ports=public(upstream.port)))
        assert await status(plane, name) == 410

        bearer = "X-API-Key: msk_live_k"
        await control.ask(sandbox("b", 1))
        key = {"t": "key", "hash": KEY, "owner": "w1", "expires_at": None}
        await control.ask({**key, "v": 5})
        assert await status(plane, host(upstream.port, "b"), bearer) == 200
        await control.ask({"t": "key_gone", "v": 6, "hash": KEY})
        await control.ask({**key, "v": 5})
        assert await status(plane, host(upstream.port, "b"), bearer) == 403


async def test_a_changed_slug_moves_the_host(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, wire(plane) as control:
        await control.ask(sandbox("a", 1, ports=public(upstream.port)))
        await control.ask(sandbox("a", 2, slug="b", ports=public(upstream.port)))
        assert await status(plane, host(upstream.port, "a")) == 404
        assert await status(plane, host(upstream.port, "b")) == 200


async def test_a_sync_drops_what_it_does_not_repeat(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, wire(plane) as control, wire(plane) as other:
        for number, slug in enumerate(["kept", "old", "repeated"]):
            await control.ask(sandbox(slug, number + 1, ports=public(upstream.port)))
        await control.ask({"t": "key", "v": 1, "hash": KEY, "owner": "w1", "expires_at": None})
        await control.send({"t": "sync_begin"}, sandbox("repeated", 3, ports=public(upstream.port)))
        # A push of another worker meanwhile is newer than the sync.
        await other.ask(sandbox("kept", 101, ports=public(upstream.port)))
        assert await status(plane, host(upstream.port, "old")) == 200
        assert (await control.ask({"t": "sync_end", "v": 100}))["t"] == "ack"
        statuses = [await status(plane, host(upstream.port, slug)) for slug in ["kept", "old", "repeated"]]
        assert statuses == [200, 410, 200]
        await control.ask(sandbox("repeated", 4))
        assert await status(plane, host(upstream.port, "repeated"), "X-API-Key: msk_live_k") == 403
        # What it dropped comes back with a newer record only.
        await control.ask(sandbox("old", 99, ports=public(upstream.port)))
        assert await status(plane, host(upstream.port, "old")) == 410
        await control.ask(sandbox("old", 101, ports=public(upstream.port)))
        assert await status(plane, host(upstream.port, "old")) == 200


async def test_a_sync_keeps_what_was_pushed_after_it_began(plane: Plane) -> None:
    """The push of a row that was written while the snapshot was being read, with a version from before."""
    async with tcp_upstream(describe) as upstream, wire(plane) as control, wire(plane) as other:
        await control.ask(sandbox("before", 1, ports=public(upstream.port)))
        await control.send({"t": "sync_begin"})
        assert (await control.ask({"t": "stats"}))["sandboxes"] == 1
        await other.ask(sandbox("meanwhile", 99))
        await other.ask({"t": "key", "v": 99, "hash": KEY, "owner": "w1", "expires_at": None})
        await control.ask({"t": "sync_end", "v": 100})
        assert await status(plane, host(upstream.port, "before")) == 410
        assert await status(plane, host(upstream.port, "meanwhile"), "X-API-Key: msk_live_k") == 200


async def test_a_sync_cut_off_drops_nothing(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        async with wire(plane) as control:
            await control.ask(sandbox("a", 1, ports=public(upstream.port)))
            await control.send({"t": "sync_begin"})
            assert (await control.ask({"t": "stats"}))["sandboxes"] == 1
        async with wire(plane) as control:
            assert (await control.ask({"t": "sync_end", "v": 9}))["t"] == "error"
        assert await status(plane, host(upstream.port, "a")) == 200


REFUSED = {
    "no JSON": b"{\n",
    "not an object": b"[]\n",
    "unknown type": b'{"t":"shout","n":7}\n',
    "missing field": b'{"t":"sandbox_gone","v":1,"n":7}\n',
    "address": json.dumps({**sandbox("x", 1, address="localhost"), "n": 7}).encode() + b"\n",
    "state": json.dumps({**sandbox("x", 1, state="happy"), "n": 7}).encode() + b"\n",
    "agent's port": json.dumps({**sandbox("x", 1, ports=public(10700)), "n": 7}).encode() + b"\n",
    "port 0": json.dumps({**sandbox("x", 1, ports=public(0)), "n": 7}).encode() + b"\n",
    "port 65536": json.dumps({**sandbox("x", 1, ports=public(65536)), "n": 7}).encode() + b"\n",
    "short hash": b'{"t":"key_gone","v":1,"hash":"ab","n":7}\n',
    "odd hash": b'{"t":"key_gone","v":1,"hash":"' + b"zz" * 32 + b'","n":7}\n',
    "relative path": json.dumps(
        {**sandbox("x", 1, tokens=[{"hash": KEY, "expires_at": None, "path": "x"}]), "n": 7}
    ).encode()
    + b"\n",
    "path that ends a cookie": json.dumps(
        {**sandbox("x", 1, tokens=[{"hash": KEY, "expires_at": None, "path": "/;Domain=x"}]), "n": 7}
    ).encode()
    + b"\n",
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
async def test_a_bad_message_is_refused_and_the_connection_goes_on(plane: Plane, line: bytes) -> None:
    async with wire(plane) as control:
        await control.send(line)
        answer = await control.hear()
        assert (answer["t"], answer["code"]) == ("error", "bad_request")
        assert answer["message"]
        assert answer["n"] == (7 if b'"n": 7' in line or b'"n":7' in line else None)
        assert (await control.ask({"t": "stats"}))["sandboxes"] == 0


@pytest.mark.parametrize("junk", [b"x" * (1024 * 1024 + 1), b'{"t":"\xff"}\n'], ids=["endless line", "no UTF-8"])
async def test_what_is_no_line_of_text_ends_the_connection(plane: Plane, junk: bytes) -> None:
    async with wire(plane) as control:
        with contextlib.suppress(ConnectionError):
            await control.send(junk)
            async with asyncio.timeout(PATIENCE_S):
                assert await control.reader.read() == b""
    assert (await plane.control.stats()).sandboxes == 0


async def test_pokes_reach_every_other_connection(plane: Plane) -> None:
    async with wire(plane) as first, wire(plane) as second, wire(plane) as third:
        await second.send({"t": "poke", "topic": "events", "seq": 41})
        for connection in [first, third]:
            assert await connection.hear("poke") == {"t": "poke", "topic": "events", "seq": 41}
        assert (await second.ask({"t": "stats"}))["t"] == "stats"


async def test_activity_is_reported_once_to_one_connection(start_plane: StartPlane) -> None:
    plane = await start_plane()
    await plane.control.close()
    async with tcp_upstream(describe) as upstream:
        async with wire(plane) as first, wire(plane) as second:
            for slug in ["a", "b", "quiet"]:
                await first.ask(sandbox(slug, 1, ports=public(upstream.port)))
            for _ in range(3):
                await status(plane, host(upstream.port, "a"))
                await status(plane, host(upstream.port, "b"))
            told: list[str] = []

            async def listen(connection: Wire) -> None:
                while True:
                    told.extend((await connection.hear("activity"))["ids"])

            listeners = [asyncio.create_task(listen(connection)) for connection in [first, second]]
            await eventually(lambda: len(told) >= 2, "both are reported")
            # Another report is due after a second; there must be nothing in it.
            await asyncio.sleep(1.2)
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
            assert sorted(told) == sorted([sandbox_id("a"), sandbox_id("b")])
        # With nobody listening, the marks wait.
        await status(plane, host(upstream.port, "a"))
        await asyncio.sleep(1.2)
        async with wire(plane) as late:
            assert (await late.hear("activity"))["ids"] == [sandbox_id("a")]


async def test_a_thousand_changes_a_second_fail_no_request(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, wire(plane) as control:
        await control.ask(sandbox("steady", 1, ports=public(upstream.port)))
        done = asyncio.Event()

        async def change() -> None:
            for number in range(2000):
                slug = f"s{number % 50}"
                message = sandbox(slug, number + 2, ports=public(upstream.port))
                if number % 3 == 2:
                    message = {"t": "sandbox_gone", "v": number + 2, "id": sandbox_id(slug)}
                await control.send(message, sandbox("steady", number + 2, ports=public(upstream.port)))
            assert (await control.ask({"t": "stats"}))["sandboxes"] <= 51
            done.set()

        changing = asyncio.create_task(change())
        async with plane.client() as client:
            while not done.is_set():
                assert (await client.request("GET", host(upstream.port, "steady"))).status == 200
        await changing
