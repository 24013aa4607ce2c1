"""PlaneClient against a real plane, and against peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from previews.errors import PlaneError, PreviewError
from previews.plane import PlaneClient
from previews.routes import KeyRoute, SandboxRoute, Snapshot, TokenRule
from previews.tokens import hash_token, make_token
from tests.previews.harness import PATIENCE_S, PUBLIC, Plane, describe, eventually, host, sandbox_id, tcp_upstream


async def test_a_push_is_in_force_when_it_returns(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        for _ in range(50):
            route = await plane.put(ports={upstream.port: PUBLIC})
            assert (await plane.request("GET", host(upstream.port))).status == 200
            await plane.control.drop_sandbox(route.id, plane.version())
            assert (await plane.request("GET", host(upstream.port))).status == 410


async def test_many_pushes_at_once_are_all_answered(plane: Plane) -> None:
    await asyncio.gather(*(plane.put(f"s{number}") for number in range(500)))
    stats = await plane.control.stats()
    assert (stats.sandboxes, stats.connections) == (500, 0)


async def test_a_refused_record_is_an_error_and_is_not_sent_again(plane: Plane) -> None:
    with pytest.raises(PlaneError, match="plane_refused") as caught:
        await plane.put(address="not an address")
    assert isinstance(caught.value, PreviewError)
    assert not caught.value.is_unavailable
    assert (await plane.control.stats()).sandboxes == 0


async def test_a_sync_replaces_the_table(plane: Plane) -> None:
    await plane.put("old")
    key = hash_token("msk_live_k")
    sandboxes = [SandboxRoute(50, sandbox_id(f"s{n}"), f"s{n}", "w1", "127.0.0.1") for n in range(600)]

    async def snapshot() -> Snapshot:
        return Snapshot(100, sandboxes, [KeyRoute(50, key, "w1", None)])

    await plane.control.sync(snapshot)
    assert (await plane.control.stats()).sandboxes == 600
    assert (await plane.request("GET", host(1, "old"))).status == 410


async def test_pokes_and_activity_are_heard(plane: Plane) -> None:
    pokes: list[tuple[str, Any]] = []
    active: list[str] = []
    await plane.control.close()
    path = str(plane.control_socket)
    async with (
        PlaneClient(path, on_poke=lambda topic, seq: pokes.append((topic, seq)), on_activity=active.extend) as listener,
        PlaneClient(path) as speaker,
        tcp_upstream(describe) as upstream,
    ):
        await listener.wait_connected(PATIENCE_S)
        await speaker.wait_connected(PATIENCE_S)
        plane.control = speaker
        speaker.poke("events", 3)
        await eventually(lambda: pokes == [("events", 3)], "the poke is heard")
        name = await plane.open(upstream.port)
        assert (await plane.request("GET", name)).status == 200
        await eventually(lambda: active == [sandbox_id("demo")], "the activity is heard")


async def test_a_restarted_plane_asks_for_everything(plane: Plane) -> None:
    """The plane keeps its table; what changed while it was away comes with the sync."""
    syncs = 0

    async def snapshot() -> Snapshot:
        return Snapshot(1000, [SandboxRoute(999, sandbox_id("new"), "new", "w1", "127.0.0.1")], [])

    async def renew() -> None:
        nonlocal syncs
        await client.sync(snapshot)
        syncs += 1

    async with PlaneClient(str(plane.control_socket), on_new_epoch=renew) as client:
        await eventually(lambda: syncs == 1, "a new client syncs")
        await plane.put("old", v=900)
        await plane.kill()
        await eventually(lambda: not client.is_connected, "the loss is noticed")
        await plane.start()
        await eventually(lambda: syncs == 2, "a new epoch is synced")
        assert (await plane.request("GET", host(1, "new"))).status == 401
        assert (await plane.request("GET", host(1, "old"))).status == 410


async def test_a_push_while_the_plane_is_away_arrives_when_it_is_back(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, PlaneClient(str(plane.control_socket), push_timeout_s=1) as client:
        await client.wait_connected(PATIENCE_S)
        await plane.kill()
        await eventually(lambda: not client.is_connected, "the loss is noticed")
        for v, ports in [(1, {}), (2, {upstream.port: PUBLIC})]:
            route = plane.route(v=v, ports=ports)
            with pytest.raises(PlaneError, match="plane_unavailable") as caught:
                await client.put_sandbox(route)
            assert caught.value.is_unavailable
        await plane.start()
        await client.wait_connected(PATIENCE_S)
        # A push on the same connection is behind the ones that were sent again.
        await client.put_key(KeyRoute(1, hash_token("k"), "w1", None))
        assert (await plane.request("GET", host(upstream.port))).status == 200


async def test_a_push_waits_for_a_plane_that_is_only_starting(run_dir: Path) -> None:
    plane = Plane(run_dir)
    async with PlaneClient(str(plane.control_socket), push_timeout_s=PATIENCE_S) as client:
        pushing = asyncio.create_task(client.put_sandbox(plane.route()))
        await asyncio.sleep(0.05)
        await plane.start()
        try:
            await pushing
            assert (await client.stats()).sandboxes == 1
        finally:
            await plane.stop()


async def test_without_a_plane_nothing_hangs(run_dir: Path) -> None:
    async with PlaneClient(str(run_dir / "none.sock"), push_timeout_s=0.05) as client:
        client.poke("events", 1)
        with pytest.raises(PlaneError, match="plane_unavailable"):
            await client.wait_connected(0.05)
        with pytest.raises(PlaneError, match="plane_unavailable"):
            await client.stats()

        async def snapshot() -> Snapshot:
            return Snapshot(1, [], [])

        with pytest.raises(PlaneError, match="plane_unavailable"):
            await client.sync(snapshot)


async def test_closing_ends_pushes_under_way(run_dir: Path) -> None:
    client = PlaneClient(str(run_dir / "none.sock"), push_timeout_s=60)
    await client.__aenter__()
    pushing = asyncio.create_task(client.put_key(KeyRoute(1, hash_token("k"), "w1", None)))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(PlaneError, match="plane_unavailable"):
        async with asyncio.timeout(PATIENCE_S):
            await pushing


@contextlib.asynccontextmanager
async def scripted_plane(path: Path, *answers: bytes) -> AsyncIterator[list[list[dict[str, Any]]]]:
    """A peer that says what it is told, a line a connection, and closes on the second line it hears."""
    heard: list[list[dict[str, Any]]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines: list[dict[str, Any]] = []
        heard.append(lines)
        writer.write(answers[min(len(heard), len(answers)) - 1])
        while len(lines) < 2 and (line := await reader.readline()):
            lines.append(json.loads(line))
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield heard
    finally:
        server.close()
        await server.wait_closed()


HELLO = b'{"t":"hello","version":1,"epoch":"e","sandboxes":0}\n'


@pytest.mark.parametrize("answer", [b"", b"junk\n", b"[]\n", b'{"t":"hello","version":2,"epoch":"e"}\n', b"x" * 2**21])
async def test_a_peer_that_is_no_plane_is_left_and_tried_again(run_dir: Path, answer: bytes) -> None:
    path = run_dir / "p.sock"
    async with scripted_plane(path, answer, HELLO) as heard, PlaneClient(str(path), push_timeout_s=0.1) as client:
        await client.wait_connected(PATIENCE_S)
        assert len(heard) >= 2


async def test_only_the_newest_of_unacknowledged_records_is_sent_again(run_dir: Path) -> None:
    path = run_dir / "p.sock"
    async with scripted_plane(path, HELLO) as heard, PlaneClient(str(path), push_timeout_s=0.3) as client:
        await client.wait_connected(PATIENCE_S)
        routes = [SandboxRoute(v, sandbox_id("a"), "a", "w1", "127.0.0.1") for v in (1, 2)]
        outcomes = await asyncio.gather(*map(client.put_sandbox, routes), return_exceptions=True)
        assert all(isinstance(outcome, PlaneError) for outcome in outcomes)
        await eventually(lambda: len(heard) >= 2 and bool(heard[1]), "the next connection")
    assert [line["v"] for line in heard[0]] == [1, 2]
    assert [line["v"] for line in heard[1]] == [2]


@pytest.mark.parametrize("error", [PlaneError("plane_unavailable", "no answer"), RuntimeError("a bug, or no database")])
async def test_a_failed_renewal_is_tried_again(run_dir: Path, error: Exception) -> None:
    renewals = 0

    async def renew() -> None:
        nonlocal renewals
        renewals += 1
        if renewals == 1:
            # The peer closes on hearing two lines.
            client.poke("a", 1)
            client.poke("a", 2)
        if renewals < 4:
            raise error

    path = run_dir / "p.sock"
    client = PlaneClient(str(path), on_new_epoch=renew, push_timeout_s=0.05)
    async with scripted_plane(path, HELLO) as heard, client:
        await eventually(lambda: renewals == 4 and len(heard) == 2, "it is tried again")


def test_tokens_are_told_by_their_form_and_kept_as_hashes() -> None:
    share, browser = make_token("share"), make_token("browser")
    assert share.secret.startswith("miosa_pv_")
    assert browser.secret.startswith("mp_")
    assert share.prefix == share.secret[:12]
    assert share.hash == hash_token(share.secret)
    assert len({make_token("share").secret for _ in range(100)}) == 100
    message = SandboxRoute(1, "i", "s", "w", "a", tokens=[TokenRule(browser.hash, None, 80)]).message()
    assert browser.secret not in json.dumps(message)
