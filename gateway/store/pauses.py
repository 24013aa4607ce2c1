"""Statements about pauses: one row for each, so that use can be summed over any span of time."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.store.schema import pauses


def begin(connection: sa.Connection, sandbox_id: str, at: float) -> None:
    """A sandbox has just been paused."""
    connection.execute(sa.insert(pauses), {"sandbox_id": sandbox_id, "began_at": at})


def end(connection: sa.Connection, sandbox_id: str, at: float) -> float:
    """It goes on, or has ended; how many seconds the pause took, 0 if there was none."""
    is_open = sa.and_(pauses.c.sandbox_id == sandbox_id, pauses.c.ended_at.is_(None))
    began_at = connection.execute(sa.select(pauses.c.began_at).where(is_open)).scalar()
    if began_at is None:
        return 0.0
    ended_at = max(at, began_at)
    connection.execute(sa.update(pauses).where(is_open).values(ended_at=ended_at))
    return float(ended_at - began_at)
