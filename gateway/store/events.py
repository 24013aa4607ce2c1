"""Statements about the event log: rows are added and pruned, never changed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from gateway.resources import Event
from gateway.store.prepared import Prepared
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
_INSERT = Prepared(
    sa.insert(events).values({column.name: sa.bindparam(column.name, type_=column.type) for column in _COLUMNS[1:]})
)
_LAST_SEQ = Prepared(sa.select(sa.func.max(events.c.seq)))
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
    _INSERT.run(
        connection,
        type=kind,
        workspace_id=workspace_id,
        resource_type=resource_type,
        resource_id=resource_id,
        at=at,
        data=dict(data),
    )


def after(connection: sa.Connection, *, seq: int, selection: Selection | None, limit: int) -> list[Event]:
    """The next events after a cursor, oldest first. selection None: everybody's."""
    terms = {} if selection is None else {name: value for name, value in asdict(selection).items() if value is not None}
    return [Event(*row) for row in _after(tuple(terms)).rows(connection, seq_before=seq, at_most=limit, **terms)]


@functools.cache
def _after(terms: tuple[str, ...]) -> Prepared:
    """terms: columns that have to have a given value."""
    statement = sa.select(*_COLUMNS).where(events.c.seq > sa.bindparam("seq_before"))
    statement = statement.where(*(events.c[name] == sa.bindparam(name) for name in terms))
    return Prepared(statement.order_by(events.c.seq).limit(sa.bindparam("at_most", type_=sa.Integer)))


def last_seq(connection: sa.Connection) -> int:
    """The newest cursor of the whole log; 0 when it is empty."""
    found = _LAST_SEQ.first(connection)
    return (found[0] if found else None) or 0


def prune(connection: sa.Connection, before: float, *, limit: int) -> int:
    """Drop the oldest events that are older than a time."""
    old = sa.select(events.c.seq).where(events.c.at < before).order_by(events.c.at).limit(limit)
    return connection.execute(sa.delete(events).where(events.c.seq.in_(old.scalar_subquery()))).rowcount
