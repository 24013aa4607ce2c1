"""Statements of the store: conditions, filters, sums and what is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from gateway.resources import Attribution, Sandbox, SandboxState
from gateway.store import Database, leases, previews, sandboxes, usage, workspaces
from gateway.store.types import Labels

RUNNING = SandboxState.RUNNING
DESTROYED = SandboxState.DESTROYED

Put = Callable[..., Awaitable[Sandbox]]


@pytest.fixture
async def workspace_id(database: Database) -> str:
    return await database.write(partial(workspaces.ensure, name="w"))


@pytest.fixture
def put(database: Database, workspace_id: str) -> Put:
    async def put(number: int, **fields: object) -> Sandbox:
        sandbox = Sandbox(
            id=f"{number:036d}",
            workspace_id=workspace_id,
            owner_key_id=None,
            name=None,
            slug=f"slug{number}",
            state=RUNNING,
            template="base",
            base_template="base",
            cpu_count=2.0,
            memory_mib=512,
            disk_mib=1024,
            env={"A": "ä"},
            metadata={"nested": [1, None, {"x": True}]},
            tags=("one", "two"),
            attribution=Attribution(project_id="p"),
            region="local",
            address="10.0.0.2",
            timeout_s=300.0,
            idle_timeout_s=None,
            always_on=False,
            created_at=float(number),
            started_at=float(number),
            destroyed_at=None,
            expires_at=None,
            stop_cause=None,
            stop_detail=None,
            boot_ms=1.5,
        )
        sandbox = replace(sandbox, **fields)  # type: ignore[arg-type]
        await database.write(partial(sandboxes.insert, sandbox=sandbox))
        return sandbox

    return put


async def test_a_sandbox_comes_back_as_it_was_put(database: Database, put: Put) -> None:
    sandbox = await put(1)
    assert await database.lookup(partial(sandboxes.get, sandbox_id=sandbox.id)) == sandbox
    assert await database.lookup(partial(sandboxes.get, sandbox_id="nobody")) is None


async def test_of_many_who_see_it_end_one_records_it(database: Database, put: Put) -> None:
    sandbox = await put(1)
    end = partial(sandboxes.change, sandbox_id=sandbox.id, only_in=[RUNNING], state=DESTROYED)
    assert sorted(await asyncio.gather(*(database.write(end) for _ in range(5)))) == [False] * 4 + [True]


async def test_versions_grow_with_every_change(database: Database, put: Put) -> None:
    sandbox = await put(1)
    seen = []
    for _ in range(20):
        await database.write(partial(sandboxes.touch, sandbox_id=sandbox.id))
        found = await database.lookup(partial(sandboxes.get_version, sandbox_id=sandbox.id))
        assert found is not None
        seen.append(found[1])
    assert len(seen) == 20
    assert seen == sorted(set(seen))


async def test_a_name_wins_over_a_slug_and_the_dead_have_neither(
    database: Database, put: Put, workspace_id: str
) -> None:
    await put(1, slug="web")
    named = await put(2, name="web")
    await put(3, name="old", slug="older", state=DESTROYED)
    find = partial(sandboxes.get_by_name, workspace_id=workspace_id)
    assert await database.lookup(partial(find, name="web")) == named
    assert await database.lookup(partial(find, name="old")) is None
    assert await database.lookup(partial(find, name="older")) is None
    taken = partial(sandboxes.is_name_taken, workspace_id=workspace_id, but="")
    assert [await database.lookup(partial(taken, name=name)) for name in ("web", "old")] == [True, False]


async def test_lists_are_filtered_paged_and_newest_first(database: Database, put: Put, workspace_id: str) -> None:
    for number in range(5):
        await put(number)
    await put(5, state=DESTROYED)
    await put(6, tags=("one two", "ONE"), attribution=Attribution(external_user_id="u"))

    async def ids(offset: int = 0, limit: int = 100, **fields: object) -> tuple[list[int], int]:
        wanted = sandboxes.Filter(workspace_id, **fields)  # type: ignore[arg-type]
        found, total = await database.read(partial(sandboxes.find, wanted=wanted, offset=offset, limit=limit))
        return [int(sandbox.id) for sandbox in found], total

    assert await ids() == ([6, 4, 3, 2, 1, 0], 6)
    assert await ids(offset=1, limit=2) == ([4, 3], 6)
    assert await ids(state=DESTROYED) == ([5], 1)
    assert await ids(tags=["one"]) == ([4, 3, 2, 1, 0], 5)
    assert await ids(tags=["one", "ONE"]) == ([], 0)
    assert await ids(tags=["one two"]) == ([6], 1)
    assert await ids(attribution=Attribution(external_user_id="u")) == ([6], 1)
    assert await ids(attribution=Attribution(project_id="p", external_user_id="u")) == ([], 0)


@given(st.lists(st.text(st.characters(exclude_characters="\n"), min_size=1)))
def test_labels_survive_their_way_through_the_database(labels: list[str]) -> None:
    kind, dialect = Labels(), sqlite.dialect()  # type: ignore[no-untyped-call]
    assert kind.process_result_value(kind.process_bind_param(labels, dialect), dialect) == tuple(labels)


async def test_usage_counts_only_what_lies_within_the_period(database: Database, put: Put, workspace_id: str) -> None:
    await put(0, started_at=0.0, destroyed_at=10.0, state=DESTROYED)
    await put(1, started_at=50.0)
    await put(2, started_at=90.0, destroyed_at=95.0, state=DESTROYED)
    await put(3, started_at=None, state=SandboxState.ERROR)
    between = partial(usage.between, workspace_id=workspace_id)
    whole = await database.read(partial(between, sandbox_id=None, start=5.0, end=100.0))
    assert (whole.sandbox_count, whole.running_s) == (3, 5.0 + 50.0 + 5.0)
    assert (whole.cpu_core_s, whole.memory_gib_s) == (120.0, 30.0)
    one = await database.read(partial(between, sandbox_id=f"{1:036d}", start=60.0, end=70.0))
    assert (one.sandbox_count, one.running_s) == (1, 10.0)
    none = await database.read(partial(between, sandbox_id=None, start=20.0, end=30.0))
    assert (none.sandbox_count, none.running_s) == (0, 0.0)


async def test_forgetting_a_sandbox_takes_its_previews_and_shares_along(database: Database, put: Put) -> None:
    old = await put(1, state=DESTROYED, destroyed_at=10.0)
    living = await put(2, destroyed_at=None)
    for sandbox in (old, living):
        preview = previews.PreviewRow(f"p{sandbox.id[2:]}", sandbox.id, 3000, "public", 0.0)
        await database.write(partial(previews.put, preview=preview, visibility=None))
    assert await database.write(partial(sandboxes.prune, destroyed_before=11.0, limit=10)) == 1
    left = await database.lookup(partial(previews.find, sandbox_id=None))
    assert [row.sandbox_id for row in left] == [living.id]


async def test_a_lease_has_one_holder_until_it_ends(database: Database) -> None:
    async def acquire(holder: str, now: float) -> bool:
        return await database.write(partial(leases.acquire, name="l", holder=holder, now=now, duration_s=10.0))

    assert await acquire("a", 0.0)
    assert not await acquire("b", 9.0)
    assert await acquire("a", 9.0)
    assert not await acquire("b", 18.0)
    assert await acquire("b", 19.5)
    await database.write(partial(leases.release, name="l", holder="a"))
    assert not await acquire("a", 20.0)
    await database.write(partial(leases.release, name="l", holder="b"))
    assert await acquire("a", 20.0)
