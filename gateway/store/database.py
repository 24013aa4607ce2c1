"""Runs work against the database.

On SQLite a process has three connections of its own:

- `write`: one thread that owns the writing connection. It takes all jobs that wait (at most 64), runs each in a
  savepoint and commits them together, so that one fsync answers many callers. `synchronous=FULL`: a commit that was
  answered survives a power cut. Measured on a 2-core box: 0.55 ms for an update with two events, of which the fsync
  is 0.2; the same over aiosqlite, whose every step is a thread switch, 1.9 ms. Processes take turns by a file lock:
  SQLite's own way of waiting is to sleep and try again, up to 100 ms a time, while others overtake.
- `lookup`: on the event loop itself, for reads by an index that touch a few rows: 18 µs, against 900 µs over aiosqlite.
  In WAL mode a reader never waits for a writer, so the loop is not held up.
- `read`: a thread for lists and sums whose cost grows with the data.

All three see every commit of every process at once; nothing is cached here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

T = TypeVar("T")
Job = Callable[[sa.Connection], T]

_BATCH_MAX = 64
_BUSY_TIMEOUT_MS = 10_000


class Database(Protocol):
    """What the engine needs of any database. Jobs only execute statements: no waiting, no other effect."""

    async def write(self, job: Job[T]) -> T:
        """Run a job in a transaction; when this returns, it is durable. What the job raises undoes it alone."""

    async def read(self, job: Job[T]) -> T:
        """Run a job that only reads and whose cost grows with the data."""

    async def lookup(self, job: Job[T]) -> T:
        """Run a job that only reads a few rows by an index."""

    async def close(self) -> None:
        """Finish what waits and close every connection."""


def open_database(url: str) -> Database:
    """Open a migrated database, e.g. `sqlite:////var/lib/sandgate/sandgate.db`. Needs a running event loop."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise ValueError(f"unsupported database: {parsed.get_backend_name()} (use sqlite:///<path>)")
    return SqliteDatabase(Path(parsed.database))


def sqlite_engine(path: Path, *, read_only: bool = False) -> sa.Engine:
    """An engine with one connection.

    A writer's transactions take the write lock at BEGIN. A reader has no transactions: each statement sees what is
    committed when it starts, and a forgotten one can hold up nobody.
    """
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        poolclass=StaticPool,
        # None: the driver starts no transaction by itself.
        connect_args={"check_same_thread": False, "isolation_level": None, "cached_statements": 256},
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
    )
    sa.event.listen(engine, "connect", _set_pragmas)
    if read_only:
        sa.event.listen(engine, "connect", _refuse_writes)
    else:
        sa.event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # First: switching to WAL takes the write lock, and workers starting together would fail without patience.
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _refuse_writes(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA query_only=ON")


def _begin(connection: sa.Connection) -> None:
    # IMMEDIATE: a transaction that reads before it writes would otherwise fail, not wait, when another commits between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


class SqliteDatabase:
    """One SQLite file. Several processes may have it open."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer = _Writer(path, self._loop)
        self._reader = sqlite_engine(path, read_only=True)
        self._read_connection = self._reader.connect()
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="sql-read")
        self._lookup = sqlite_engine(path, read_only=True)
        self._lookup_connection = self._lookup.connect()

    async def write(self, job: Job[T]) -> T:
        """See `Database.write`."""
        return await self._writer.submit(job)

    async def read(self, job: Job[T]) -> T:
        """See `Database.read`."""
        return await self._loop.run_in_executor(self._read_thread, job, self._read_connection)

    async def lookup(self, job: Job[T]) -> T:
        """See `Database.lookup`."""
        return job(self._lookup_connection)

    async def close(self) -> None:
        """See `Database.close`."""
        await asyncio.to_thread(self._writer.stop)
        await asyncio.to_thread(self._read_thread.shutdown)
        self._read_connection.close()
        self._reader.dispose()
        self._lookup_connection.close()
        self._lookup.dispose()


class _Writer:
    """The writing thread and its queue."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = sqlite_engine(path)
        self._connection: sa.Connection | None = None
        self._turns = os.open(f"{path}-turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._loop = loop
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="sql-write", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T]) -> asyncio.Future[T]:
        """Queue a job. Cancelling the answer does not stop the job."""
        if self._is_stopped:
            raise RuntimeError("the database is closed")
        work = _Work(job, self._loop.create_future())
        self._queue.put(work)
        return work.future

    def stop(self) -> None:
        """Run what is queued and end. Blocks."""
        self._is_stopped = True
        self._queue.put(None)
        self._thread.join()
        self._disconnect()
        self._engine.dispose()
        os.close(self._turns)

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch: list[_Work] = []
            work = self._queue.get()
            while work is not None:
                batch.append(work)
                if len(batch) == _BATCH_MAX or self._queue.empty():
                    break
                work = self._queue.get()
            is_open = work is not None
            if batch:
                self._commit(batch)
                self._loop.call_soon_threadsafe(_answer, batch)

    def _commit(self, batch: Sequence[_Work]) -> None:
        try:
            # Kept: taking it from the pool and giving it back costs more than a small job.
            connection = self._connection = self._connection or self._engine.connect()
            with self._turn(), connection.begin():
                for work in batch:
                    work.run(connection)
        except Exception as error:  # noqa: BLE001 - whatever it is goes to those who wait
            # The transaction as a whole failed (disk full, file gone): nobody's work is durable.
            for work in batch:
                work.error = error
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process writes. The kernel wakes us, and ends the turn of a process that dies."""
        fcntl.flock(self._turns, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)


class _Work:
    """A job, what came of it, and who waits for it."""

    __slots__ = ("error", "future", "job", "result")

    def __init__(self, job: Job[Any], future: asyncio.Future[Any]) -> None:
        self.job = job
        self.future = future
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, connection: sa.Connection) -> None:
        """Run the job in a savepoint, so that its failure undoes nothing of its neighbours."""
        driver: Any = connection.connection.driver_connection
        driver.execute("SAVEPOINT job")
        try:
            self.result = self.job(connection)
        except Exception as error:  # noqa: BLE001 - whatever it is goes to whoever waits
            self.error = error
            driver.execute("ROLLBACK TO job")
        driver.execute("RELEASE job")


def _answer(batch: Sequence[_Work]) -> None:
    for work in batch:
        if work.future.done():
            continue
        if work.error is not None:
            work.future.set_exception(work.error)
        else:
            work.future.set_result(work.result)
