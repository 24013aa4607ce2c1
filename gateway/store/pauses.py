"""Statements about pauses: one row for each, so that use can be summed over any span of time."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.store.prepared import Prepared
from gateway.store.schema import pauses

_IS_OPEN = sa.and_(pauses.c.sandbox_id == sa.bindparam("of"), pauses.c.ended_at.is_(None))
_BEGAN_AT = Prepared(sa.select(pauses.c.began_at).where(_IS_OPEN))
_END = Prepared(sa.update(pauses).where(_IS_OPEN).values(ended_at=sa.bindparam("at")))


def begin(connection: sa.Connection, sandbox_id: str, at: float) -> None:
    """A sandbox has just been paused."""
    connection.execute(sa.insert(pauses), {"sandbox_id": sandbox_id, "began_at": at})


def end(connection: sa.Connection, sandbox_id: str, at: float) -> float | None:
    """It goes on, or has ended; how many seconds the pause took, None if there was none."""
    found = _BEGAN_AT.first(connection, of=sandbox_id)
    if found is None:
        return None
    ended_at = max(at, found[0])
    _END.run(connection, of=sandbox_id, at=ended_at)
    return float(ended_at - found[0])
