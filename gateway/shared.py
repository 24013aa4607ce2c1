"""LMDB environments: small state that every API worker reads and writes.

`Volatile` is for what may be lost with the machine (rate limits, tickets): never flushed, a write costs microseconds
and is made in place. `Durable` is for what must survive a power cut: one thread per process commits whatever waits as
one transaction with one flush, so that many small writes cost little more than one.

Both survive kill -9 of any process at any point: LMDB never overwrites a page that a committed state uses, and its
writer lock is a robust mutex that the next writer recovers.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import lmdb

from gateway.settings import make_private_dir

T = TypeVar("T")

#: Most writes in one commit; more would delay the first of them without making the flush cheaper.
_BATCH_MAX = 512

_MAP_BYTES = 256 * 1024**2


class _Environment:
    """An environment with named databases, whose map grows when it is full and follows growth by other processes."""

    def __init__(self, path: Path, databases: tuple[str, ...], *, map_bytes: int, **flags: bool) -> None:
        make_private_dir(path)
        self._env = lmdb.open(
            str(path), map_size=map_bytes, max_dbs=len(databases), max_readers=1024, mode=0o600, **flags
        )
        # Slots of readers that were killed would keep old pages from being used again.
        self._env.reader_check()
        self._databases = {name: self._env.open_db(name.encode()) for name in databases}
        # The map must not be resized under a reader of this process.
        self._resize_lock = threading.Lock()

    def database(self, name: str) -> Any:
        """The handle to pass as `db=`."""
        return self._databases[name]

    def read(self, action: Callable[[lmdb.Transaction], T]) -> T:
        """Run `action` on a snapshot; it must not keep the transaction or buffers from it."""
        while True:
            try:
                with self._resize_lock, self._env.begin() as transaction:
                    return action(transaction)
            except lmdb.MapResizedError:
                self._resize(0)

    def _commit(self, actions: list[Callable[[lmdb.Transaction], Any]]) -> list[Any]:
        """Run all actions in one transaction; grows the map and starts again when it is full."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    return [action(transaction) for action in actions]
            except lmdb.MapFullError:
                self._resize(2 * self._env.info()["map_size"])
            except lmdb.MapResizedError:
                self._resize(0)

    def _resize(self, map_bytes: int) -> None:
        """0: take over the size another process has set."""
        with self._resize_lock:
            self._env.set_mapsize(map_bytes)


class Volatile(_Environment):
    """State that may be lost when the machine stops. Writes block the caller for microseconds."""

    def __init__(self, path: Path, databases: tuple[str, ...], *, map_bytes: int = _MAP_BYTES) -> None:
        super().__init__(path, databases, map_bytes=map_bytes, sync=False, metasync=False, writemap=True)

    def write(self, action: Callable[[lmdb.Transaction], T]) -> T:
        """Run `action` in a transaction of its own, seen by every process when this returns."""
        return cast(T, self._commit([action])[0])

    def close(self) -> None:
        """Close the environment of this process."""
        self._env.close()


class _Write(Generic[T]):
    """One waiting write and where its result goes."""

    def __init__(self, action: Callable[[lmdb.Transaction], T], loop: asyncio.AbstractEventLoop) -> None:
        self.action = action
        self.loop = loop
        self.future: asyncio.Future[T] = loop.create_future()

    def finish(self, result: T | None, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._set, result, error)

    def _set(self, result: T | None, error: BaseException | None) -> None:
        if self.future.done():  # the waiter was cancelled
            return
        if error is None:
            self.future.set_result(cast(T, result))
        else:
            self.future.set_exception(error)


class Durable(_Environment):
    """State that survives a power cut."""

    def __init__(self, path: Path, databases: tuple[str, ...], *, map_bytes: int = _MAP_BYTES) -> None:
        super().__init__(path, databases, map_bytes=map_bytes)
        self._queue: queue.SimpleQueue[_Write[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lmdb-writer", daemon=True)
        self._thread.start()

    async def write(self, action: Callable[[lmdb.Transaction], T]) -> T:
        """Run `action` in the writer thread; returns once its effect is on disk.

        `action` may run more than once (each time on a fresh transaction) and must not wait for anything.
        """
        write = _Write(action, asyncio.get_running_loop())
        self._queue.put(write)
        return await write.future

    def close(self) -> None:
        """Commit what waits, end the thread and close the environment of this process."""
        self._queue.put(None)
        self._thread.join()
        self._env.close()

    def _run(self) -> None:
        while True:
            batch, is_last = self._take()
            if batch:
                self._commit_batch(batch)
            if is_last:
                return

    def _take(self) -> tuple[list[_Write[Any]], bool]:
        batch: list[_Write[Any]] = []
        item = self._queue.get()
        while item is not None:
            batch.append(item)
            if len(batch) == _BATCH_MAX:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit_batch(self, batch: list[_Write[Any]]) -> None:
        try:
            results = self._commit([write.action for write in batch])
        except BaseException as error:  # noqa: BLE001 - it belongs to the waiter, and must not end the thread
            if len(batch) == 1:
                batch[0].finish(None, error)
                return
            # One of them failed and took the transaction with it: each gets its own.
            for write in batch:
                self._commit_batch([write])
            return
        for write, result in zip(batch, results, strict=True):
            write.finish(result, None)
