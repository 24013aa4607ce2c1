"""The event log and its followers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

import pytest

from gateway.commands import StreamEvents
from gateway.engine import Engine
from gateway.events import sandbox_event
from gateway.resources import Event, Principal, Sandbox
from gateway.store import events
from tests.gateway.engine.conftest import Recorder, put_running


async def append(engine: Engine, sandbox: Sandbox, kind: str) -> None:
    await engine.context.database.write(partial(sandbox_event, kind=kind, sandbox=sandbox))
    engine.context.events.announce()


async def take(stream: AsyncGenerator[Event, None], count: int) -> list[str]:
    async with asyncio.timeout(10):
        return [(await anext(stream)).type for _ in range(count)]


async def test_a_follower_sees_what_was_and_then_what_comes(
    offline: Engine, principal: Principal, routes: Recorder
) -> None:
    sandbox = await put_running(offline, principal)
    await append(offline, sandbox, "created")
    stream = await offline.stream_events(principal, StreamEvents(after_seq=0))
    assert await take(stream, 1) == ["sandbox.created"]
    waiting = asyncio.create_task(take(stream, 2))
    await append(offline, sandbox, "running")
    await append(offline, sandbox, "destroyed")
    assert await waiting == ["sandbox.running", "sandbox.destroyed"]
    assert routes.pokes == 3
    await stream.aclose()


async def test_without_a_cursor_only_new_events_come(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    await append(offline, sandbox, "created")
    stream = await offline.stream_events(principal, StreamEvents())
    await append(offline, sandbox, "running")
    assert await take(stream, 1) == ["sandbox.running"]
    await stream.aclose()


async def test_a_follower_that_nobody_wakes_looks_by_itself(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    stream = await offline.stream_events(principal, StreamEvents())
    waiting = asyncio.create_task(take(stream, 1))
    await asyncio.sleep(0)
    await offline.context.database.write(partial(sandbox_event, kind="running", sandbox=sandbox))
    assert await waiting == ["sandbox.running"]
    await stream.aclose()


async def test_a_cursor_resumes_without_loss_or_repetition(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    for number in range(250):
        await offline.context.database.write(partial(sandbox_event, kind=str(number), sandbox=sandbox))
    seen: list[str] = []
    cursor = 0
    while len(seen) < 250:
        stream = await offline.stream_events(principal, StreamEvents(after_seq=cursor))
        for _ in range(50):
            event = await anext(stream)
            seen.append(event.type)
            assert event.seq > cursor
            cursor = event.seq
        await stream.aclose()
    assert seen == [f"sandbox.{number}" for number in range(250)]


async def test_events_are_filtered(offline: Engine, principal: Principal, stranger: Principal) -> None:
    mine = await put_running(offline, principal)
    other = await put_running(offline, principal)
    foreign = await put_running(offline, stranger)
    for sandbox in (foreign, other, mine):
        await append(offline, sandbox, "created")
        await append(offline, sandbox, "preview.ready")
    every = await offline.stream_events(principal, StreamEvents(after_seq=0))
    assert len(await take(every, 4)) == 4
    one = await offline.stream_events(principal, StreamEvents(0, resource_type="sandbox", resource_id=mine.id))
    assert [(await anext(one)).resource_id for _ in range(2)] == [mine.id] * 2
    kinds = await offline.stream_events(principal, StreamEvents(0, types=["sandbox.preview.*", "computer.*"]))
    assert await take(kinds, 2) == ["sandbox.preview.ready"] * 2
    for stream in (every, one, kinds):
        await stream.aclose()


@pytest.mark.parametrize("limit", [2, 10])
async def test_numbers_of_pruned_events_are_not_used_again(offline: Engine, principal: Principal, limit: int) -> None:
    sandbox = await put_running(offline, principal)
    for _ in range(3):
        await append(offline, sandbox, "created")
    database = offline.context.database
    last = await database.lookup(events.last_seq)
    assert await database.write(partial(events.prune, before=float("inf"), limit=limit)) == min(limit, 3)
    await append(offline, sandbox, "running")
    assert await database.lookup(events.last_seq) == last + 1
