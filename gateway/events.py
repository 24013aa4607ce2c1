"""The event log: who appends to it, and how who waits for it learns that it has grown.

An event is written in the transaction of the change it tells about, so neither exists without the other. Whoever
appends wakes those who wait in its own process and pokes the other processes through the plane; since a poke may be
lost, everybody also looks by itself once a second. Clients read the backlog here; what comes after it they get from the
plane, to which one worker publishes the log (gateway/publisher.py).
"""

from __future__ import annotations

import asyncio
import fnmatch
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import sqlalchemy as sa

from gateway.resources import Event, Sandbox, Snapshot
from gateway.store import Database
from gateway.store import events as rows

#: Who waits looks for new events this often even when nobody wakes it.
POLL_S = 1.0

#: Others are poked at once, and then not before this: many small commits are one wake-up of theirs.
_POKE_PACE_S = 0.005

_PAGE = 100


def sandbox_event(
    connection: sa.Connection, kind: str, sandbox: Sandbox, *, at: float | None = None, **data: Any
) -> None:
    """Append `sandbox.<kind>` in the caller's transaction."""
    rows.append(
        connection,
        kind=f"sandbox.{kind}",
        workspace_id=sandbox.workspace_id,
        resource_type="sandbox",
        resource_id=sandbox.id,
        at=time.time() if at is None else at,
        data=data,
    )


def checkpoint_event(
    connection: sa.Connection, kind: str, snapshot: Snapshot, *, at: float | None = None, **data: Any
) -> None:
    """Append `checkpoint.<kind>` in the caller's transaction."""
    rows.append(
        connection,
        kind=f"checkpoint.{kind}",
        workspace_id=snapshot.workspace_id,
        resource_type="snapshot",
        resource_id=snapshot.id,
        at=time.time() if at is None else at,
        data={"snapshot_id": snapshot.id, "sandbox_id": snapshot.sandbox_id, **data},
    )


class EventLog:
    """The log as this process sees it.

    poke: tells the other processes that the log has grown; must not block.
    """

    def __init__(self, database: Database, poke: Callable[[], None]) -> None:
        self._database = database
        self._poke = poke
        self._is_pacing = False
        self._is_poke_due = False
        self._grown = asyncio.Event()

    def announce(self) -> None:
        """Call after a transaction that appended: wakes who waits here and elsewhere."""
        self.wake()
        self._is_poke_due = True
        if not self._is_pacing:
            self._poke_others()

    def _poke_others(self) -> None:
        self._is_pacing = self._is_poke_due
        if self._is_poke_due:
            self._is_poke_due = False
            self._poke()
            asyncio.get_running_loop().call_later(_POKE_PACE_S, self._poke_others)

    def wake(self) -> None:
        """Wake who waits in this process."""
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    def mark(self) -> asyncio.Event:
        """Take before looking at the log or what it tells about: `wait` then misses nothing that comes after."""
        return self._grown

    async def wait(self, mark: asyncio.Event) -> None:
        """Until the log has grown since the mark, or for POLL_S."""
        try:
            async with asyncio.timeout(POLL_S):
                await mark.wait()
        except TimeoutError:
            pass  # time to look without having been woken

    async def backlog(
        self,
        workspace_id: str,
        *,
        after_seq: int | None = None,
        types: Sequence[str] = (),
        resource_type: str | None = None,
        resource_id: str | None = None,
    ) -> Backlog:
        """A workspace's events after the cursor (None: none) that are in the log already.

        types: shell-style patterns such as "sandbox.*", one of which must match; none means all.
        """
        selection = rows.Selection(workspace_id, resource_type, resource_id)
        if after_seq is not None:
            return Backlog(self._database, selection, _matcher(types), after_seq)
        last = await self._database.lookup(rows.last_seq)
        return Backlog(self._database, selection, _matcher(types), last, is_over=True)


class Backlog:
    """Iterates over pages of events, as they are read. When it has ended, `cursor` tells up to where the log was."""

    def __init__(
        self,
        database: Database,
        selection: rows.Selection,
        is_wanted: Callable[[str], object],
        cursor: int,
        *,
        is_over: bool = False,
    ) -> None:
        self._database = database
        self._selection = selection
        self._is_wanted = is_wanted
        self._is_over = is_over
        self.cursor = cursor

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        if self._is_over:
            raise StopAsyncIteration
        last, page = await self._database.lookup(self._read)
        self._is_over = len(page) < _PAGE
        # What the log has beyond the last page is nobody's of this selection: it need not be looked at again.
        self.cursor = max(self.cursor, page[-1].seq if page else 0, last if self._is_over else 0)
        return [event for event in page if self._is_wanted(event.type)]

    def _read(self, connection: sa.Connection) -> tuple[int, list[Event]]:
        # In this order: an event that is committed in between is in the page, or after `last`.
        last = rows.last_seq(connection)
        return last, rows.after(connection, seq=self.cursor, selection=self._selection, limit=_PAGE)


def topic_of(dialect: str, workspace_id: str) -> str:
    """Under which name the plane knows a workspace's events in the words of one dialect."""
    return f"{dialect}/{workspace_id}"


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    if not patterns:
        return lambda _type: True
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)).match
