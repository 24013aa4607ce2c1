"""The database under many callers, and its migrations."""

from __future__ import annotations

import asyncio
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from gateway.store import Database, migrate, open_database, workspaces
from gateway.store.database import sqlite_engine
from gateway.store.schema import leases, metadata


def put(connection: sa.Connection, name: str) -> None:
    connection.execute(sa.insert(leases), {"name": name, "holder": "h", "expires_at": 1.0})


def names(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(leases.c.name)).scalars())


async def test_what_was_written_is_seen_by_both_kinds_of_reading(database: Database) -> None:
    await database.write(partial(put, name="a"))
    assert await database.lookup(names) == {"a"}
    assert await database.read(names) == {"a"}


async def test_a_failing_job_undoes_nothing_of_its_neighbours(database: Database) -> None:
    def put_and_fail(connection: sa.Connection) -> None:
        put(connection, "bad")
        raise ValueError("no")

    results = await asyncio.gather(
        database.write(partial(put, name="a")),
        database.write(put_and_fail),
        database.write(partial(put, name="b")),
        database.write(partial(put, name="a")),
        database.write(partial(put, name="c")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [
        type(None),
        ValueError,
        type(None),
        sa.exc.IntegrityError,
        type(None),
    ]
    assert await database.lookup(names) == {"a", "b", "c"}


async def test_a_cancelled_caller_does_not_stop_the_rest_of_its_batch(database: Database) -> None:
    tasks = [asyncio.create_task(database.write(partial(put, name=str(number)))) for number in range(100)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert {str(number) for number in range(1, 100, 2)} <= await database.read(names)


async def test_closing_finishes_what_was_asked_before(url: str) -> None:
    database = open_database(url)
    waiting = [asyncio.ensure_future(database.write(partial(put, name=str(number)))) for number in range(10)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*waiting)
    with pytest.raises(RuntimeError):
        await database.write(partial(put, name="late"))


def write_many(url: str, prefix: str, count: int) -> None:
    async def main() -> None:
        database = open_database(url)
        await asyncio.gather(*(database.write(partial(put, name=f"{prefix}{number}")) for number in range(count)))
        await database.close()

    asyncio.run(main())


async def test_processes_write_at_the_same_time_without_losing_anything(url: str, database: Database) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(url, prefix, 30)) for prefix in "ab"]
    for writer in writers:
        writer.start()
    for number in range(30):
        await database.write(partial(put, name=f"c{number}"))
    for writer in writers:
        await asyncio.to_thread(writer.join, 60)
        assert writer.exitcode == 0
    assert len(await database.lookup(names)) == 90


async def test_a_workspace_is_made_once(database: Database) -> None:
    ids = await asyncio.gather(*(database.write(partial(workspaces.ensure, name="default")) for _ in range(5)))
    assert len(set(ids)) == 1


def test_migrating_twice_changes_nothing(url: str) -> None:
    migrate(url)


def test_the_migrations_make_the_tables_of_the_schema(tmp_path: Path, url: str) -> None:
    engine = sqlite_engine(tmp_path / "sandgate.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_another_kind_of_database_is_refused() -> None:
    with pytest.raises(ValueError, match="unsupported database: mysql"):
        migrate("mysql://localhost/x")
