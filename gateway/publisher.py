"""Publishes the event log to the plane, which delivers it to every open event stream.

    idle ──the plane asks (on_tail)──▶ publishing ──relieved, or the connection is lost──▶ idle

The plane asks one worker at a time and says how far it has got, so whatever happens to a worker or to the plane, the
log goes on without gap or repetition. A look at the log that finds nothing is told too: it shows that the worker lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from gateway.events import EventLog, topic_of
from gateway.resources import Event
from gateway.store import Database
from gateway.store import events as rows
from previews.errors import PlaneError
from previews.plane import PlaneClient
from previews.streams import PublishedEvent

_log = logging.getLogger(__name__)

_PAGE = 200
#: Events that a plane which knows nothing is told of first: its clients' backlogs may have ended a little back.
_LOOK_BACK = 1000
#: After a message, before the next look at the log: what many small commits append goes out in a few messages.
_PACE_S = 0.005
#: Frames in one message to the plane, whose lines are bounded.
_FRAME_CHARS_MAX = 256 * 1024

#: How a dialect's streams spell an event, by the dialect's name.
Frames = Mapping[str, Callable[[Event], bytes]]


class _Task:
    """To publish what comes after a position (None: the latest). Two that say the same are still two."""

    def __init__(self, after: int | None) -> None:
        self.after = after


class EventPublisher:
    """Give `on_tail` and `on_relieved` to the plane's client, and keep `run` running."""

    def __init__(self, database: Database, events: EventLog, plane: PlaneClient, frames: Frames) -> None:
        self._database = database
        self._events = events
        self._plane = plane
        self._frames = frames
        self._task: _Task | None = None
        self._has_changed = asyncio.Event()

    def on_tail(self, after: int | None) -> None:
        """Publish what comes after a position; None: the plane knows nothing."""
        self._change(_Task(after))

    def on_relieved(self) -> None:
        """Somebody else does it."""
        self._change(None)

    def _change(self, task: _Task | None) -> None:
        self._task = task
        self._has_changed.set()
        self._events.wake()

    async def run(self) -> None:
        """Publish whenever asked to, until cancelled."""
        while True:
            await self._has_changed.wait()
            self._has_changed.clear()
            if self._task is not None:
                try:
                    await self._publish(self._task)
                except PlaneError as error:
                    _log.info("the plane is away; it asks again when it is back: %s", error)

    async def _publish(self, task: _Task) -> None:
        last = await self._database.lookup(rows.last_seq)
        # A plane that has seen more than there is knows another database's log.
        is_start = task.after is None or task.after > last
        cursor = max(0, last - _LOOK_BACK) if task.after is None or is_start else task.after
        while self._task is task:
            mark = self._events.mark()
            page = await self._database.lookup(partial(rows.after, seq=cursor, selection=None, limit=_PAGE))
            for part in _parts(self._published(page)):
                through = part[-1].seq if part else cursor
                await self._plane.publish(cursor, through, part, is_start=is_start)
                cursor, is_start = through, False
            if not page:
                await self._events.wait(mark)
            elif len(page) < _PAGE:
                await asyncio.sleep(_PACE_S)

    def _published(self, page: Sequence[Event]) -> Iterator[list[PublishedEvent]]:
        """Each event in the words of every dialect."""
        for event in page:
            yield [
                PublishedEvent(
                    event.seq,
                    topic_of(dialect, event.workspace_id),
                    event.type,
                    event.resource_type,
                    event.resource_id,
                    frame(event).decode(),
                )
                for dialect, frame in self._frames.items()
            ]


def _parts(events: Iterator[list[PublishedEvent]]) -> Iterator[list[PublishedEvent]]:
    """Messages of bounded size that keep what has one number together; one empty message for nothing."""
    part: list[PublishedEvent] = []
    chars = 0
    for frames in events:
        size = sum(len(one.frame) for one in frames)
        if part and chars + size > _FRAME_CHARS_MAX:
            yield part
            part, chars = [], 0
        part += frames
        chars += size
    yield part
