"""The event log: what a client gets of it before the plane goes on, and how those who wait for it are woken."""

from __future__ import annotations

import asyncio
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


async def backlog(engine: Engine, principal: Principal, command: StreamEvents) -> tuple[list[Event], int]:
    """The events of a backlog, and its cursor."""
    found = await engine.stream_events(principal, command)
    return [event async for page in found for event in page], found.cursor


async def test_a_backlog_ends_where_the_log_did(offline: Engine, principal: Principal, stranger: Principal) -> None:
    sandbox = await put_running(offline, principal)
    await append(offline, sandbox, "created")
    await append(offline, await put_running(offline, stranger), "created")
    last = await offline.context.database.lookup(events.last_seq)
    found, cursor = await backlog(offline, principal, StreamEvents(after_seq=0))
    assert [event.type for event in found] == ["sandbox.created"]
    assert cursor == last
    assert await backlog(offline, principal, StreamEvents(after_seq=last)) == ([], last)
    assert await backlog(offline, principal, StreamEvents(after_seq=last + 5)) == ([], last + 5)


async def test_without_a_cursor_there_is_no_backlog(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    await append(offline, sandbox, "created")
    last = await offline.context.database.lookup(events.last_seq)
    assert await backlog(offline, principal, StreamEvents()) == ([], last)


async def test_a_long_backlog_comes_in_pages_and_takes_in_what_happens_meanwhile(
    offline: Engine, principal: Principal
) -> None:
    sandbox = await put_running(offline, principal)
    for number in range(250):
        await offline.context.database.write(partial(sandbox_event, kind=str(number), sandbox=sandbox))
    found = await offline.stream_events(principal, StreamEvents(after_seq=0))
    seen = [event.seq for event in await anext(found)]
    await append(offline, sandbox, "late")
    rest = [event async for page in found for event in page]
    assert rest[-1].type == "sandbox.late"
    seen += [event.seq for event in rest]
    assert seen == sorted(set(seen))
    assert len(seen) == 251
    assert found.cursor == seen[-1]


async def test_a_backlog_is_filtered(offline: Engine, principal: Principal, stranger: Principal) -> None:
    mine = await put_running(offline, principal)
    other = await put_running(offline, principal)
    foreign = await put_running(offline, stranger)
    for sandbox in (foreign, other, mine):
        await append(offline, sandbox, "created")
        await append(offline, sandbox, "preview.ready")
    every, cursor = await backlog(offline, principal, StreamEvents(after_seq=0))
    assert len(every) == 4
    one = StreamEvents(0, resource_type="sandbox", resource_id=mine.id)
    assert [event.resource_id for event in (await backlog(offline, principal, one))[0]] == [mine.id] * 2
    kinds = StreamEvents(0, types=["sandbox.preview.*", "computer.*"])
    found, same = await backlog(offline, principal, kinds)
    assert [event.type for event in found] == ["sandbox.preview.ready"] * 2
    assert same == cursor


async def test_who_waits_is_woken_here_and_others_are_poked(
    offline: Engine, principal: Principal, routes: Recorder
) -> None:
    sandbox = await put_running(offline, principal)
    log = offline.context.events
    waiting = asyncio.create_task(log.wait(log.mark()))
    await asyncio.sleep(0)
    await append(offline, sandbox, "created")
    async with asyncio.timeout(0.5):
        await waiting
    assert routes.pokes == 1


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
