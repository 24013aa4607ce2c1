"""What sandboxes used, summed from when they ran and were not paused."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.resources import Usage
from gateway.store.schema import pauses, sandboxes

_MIB_PER_GIB = 1024


def between(connection: sa.Connection, workspace_id: str, sandbox_id: str | None, *, start: float, end: float) -> Usage:
    """The share of each sandbox's running time that lies within [start, end], times what it held.

    A paused sandbox uses nothing.
    """
    lives = _overlap(sandboxes.c.started_at, sandboxes.c.destroyed_at, start, end)
    breaks = _overlap(pauses.c.began_at, pauses.c.ended_at, start, end)
    lived = _sums(lives, sandboxes, workspace_id, sandbox_id)
    rested = _sums(breaks, sandboxes.join(pauses, pauses.c.sandbox_id == sandboxes.c.id), workspace_id, sandbox_id)
    lived = lived.where(
        sandboxes.c.started_at < end, sa.or_(sandboxes.c.destroyed_at.is_(None), sandboxes.c.destroyed_at > start)
    )
    rested = rested.where(pauses.c.began_at < end, sa.or_(pauses.c.ended_at.is_(None), pauses.c.ended_at > start))
    ran, idled = connection.execute(lived).one(), connection.execute(rested).one()
    total_s, core_s, mib_s = ((ran[column] or 0.0) - (idled[column] or 0.0) for column in (1, 2, 3))
    return Usage(start, end, ran[0], total_s, core_s, mib_s / _MIB_PER_GIB)


def _overlap(
    began_at: sa.ColumnElement[float], ended_at: sa.ColumnElement[float], start: float, end: float
) -> sa.ColumnElement[float]:
    """Seconds that a span, perhaps still open, and [start, end] have in common."""
    began = sa.case((began_at > start, began_at), else_=start)
    return sa.case((ended_at < end, ended_at), else_=end) - began


def _sums(
    seconds: sa.ColumnElement[float], source: sa.FromClause, workspace_id: str, sandbox_id: str | None
) -> sa.Select[int, float, float, float]:
    statement = (
        sa.select(
            sa.func.count(),
            sa.func.sum(seconds),
            sa.func.sum(seconds * sandboxes.c.cpu_count),
            sa.func.sum(seconds * sandboxes.c.memory_mib),
        )
        .select_from(source)
        .where(sandboxes.c.workspace_id == workspace_id)
    )
    return statement if sandbox_id is None else statement.where(sandboxes.c.id == sandbox_id)
