"""The event log: who appends to it, and how followers learn that it has grown.

An event is written in the transaction of the change it tells about, so neither exists without the other. Whoever
appends wakes the followers of its own process and pokes the other processes through the plane; since a poke may be
lost, every follower also looks by itself once a second. A follower reads at its own pace: a slow one holds up nobody.
"""

from __future__ import annotations

import asyncio
import fnmatch
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from gateway.resources import Event, Sandbox, Snapshot
from gateway.store import Database
from gateway.store import events as rows

#: A follower looks for new events this often even when nobody wakes it.
POLL_S = 1.0

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
        self._grown = asyncio.Event()

    def announce(self) -> None:
        """Call after a transaction that appended: wakes followers here and elsewhere."""
        self.wake()
        self._poke()

    def wake(self) -> None:
        """Wake the followers of this process."""
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

    async def follow(
        self,
        workspace_id: str,
        *,
        after_seq: int | None = None,
        types: Sequence[str] = (),
        resource_type: str | None = None,
        resource_id: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        """A workspace's events after the cursor (None: from now on), then each that comes.

        types: shell-style patterns such as "sandbox.*", one of which must match; none means all.
        """
        cursor = await self._database.lookup(rows.last_seq) if after_seq is None else after_seq
        selection = rows.Selection(workspace_id, resource_type, resource_id)
        return self._follow(cursor, selection, _matcher(types))

    async def _follow(
        self, cursor: int, selection: rows.Selection, is_wanted: Callable[[str], object]
    ) -> AsyncGenerator[Event, None]:
        while True:
            mark = self.mark()
            page = await self._database.lookup(partial(rows.after, seq=cursor, selection=selection, limit=_PAGE))
            for event in page:
                cursor = event.seq
                if is_wanted(event.type):
                    yield event
            if not page:
                await self.wait(mark)


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    if not patterns:
        return lambda _type: True
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)).match
