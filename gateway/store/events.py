"""Statements about the event log: rows are added and pruned, never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from gateway.resources import Event
from gateway.store.schema import events

_COLUMNS = (
    events.c.seq,
    events.c.type,
    events.c.workspace_id,
    events.c.resource_type,
    events.c.resource_id,
    events.c.at,
    events.c.data,
)
#: Any number, the same everywhere.
_APPEND_LOCK = 0x5A4D47


@dataclass(frozen=True, slots=True)
class Selection:
    """Whose events to read, and about what (None: about anything)."""

    workspace_id: str
    resource_type: str | None = None
    resource_id: str | None = None


def append(
    connection: sa.Connection,
    *,
    kind: str,
    workspace_id: str,
    resource_type: str,
    resource_id: str,
    at: float,
    data: Mapping[str, Any],
) -> None:
    """Add an event in the transaction of the change it tells about."""
    if connection.dialect.name == "postgresql":
        # A sequence gives numbers before the commit: without this lock a reader could see 8 before 7 and pass 7 by.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_APPEND_LOCK)))
    connection.execute(
        sa.insert(events),
        {
            "type": kind,
            "workspace_id": workspace_id,
            "resource_type": resource_type,
            "resource_id": resource_id,
            "at": at,
            "data": dict(data),
        },
    )


def after(connection: sa.Connection, *, seq: int, selection: Selection | None, limit: int) -> list[Event]:
    """The next events after a cursor, oldest first. selection None: everybody's."""
    statement = sa.select(*_COLUMNS).where(events.c.seq > seq)
    if selection is not None:
        statement = statement.where(*_terms(selection))
    return [Event(*row) for row in connection.execute(statement.order_by(events.c.seq).limit(limit))]


def _terms(selection: Selection) -> Iterator[sa.ColumnElement[bool]]:
    yield events.c.workspace_id == selection.workspace_id
    if selection.resource_type is not None:
        yield events.c.resource_type == selection.resource_type
    if selection.resource_id is not None:
        yield events.c.resource_id == selection.resource_id


def last_seq(connection: sa.Connection) -> int:
    """The newest cursor of the whole log; 0 when it is empty."""
    return connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0


def prune(connection: sa.Connection, before: float, *, limit: int) -> int:
    """Drop the oldest events that are older than a time."""
    old = sa.select(events.c.seq).where(events.c.at < before).order_by(events.c.at).limit(limit)
    return connection.execute(sa.delete(events).where(events.c.seq.in_(old.scalar_subquery()))).rowcount
