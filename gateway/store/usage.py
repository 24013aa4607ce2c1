"""What sandboxes used, summed from when they ran."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.resources import Usage
from gateway.store.schema import sandboxes

_MIB_PER_GIB = 1024


def between(connection: sa.Connection, workspace_id: str, sandbox_id: str | None, *, start: float, end: float) -> Usage:
    """The share of each sandbox's running time that lies within [start, end], times what it held."""
    began = sa.case((sandboxes.c.started_at > start, sandboxes.c.started_at), else_=start)
    ended = sa.case((sandboxes.c.destroyed_at < end, sandboxes.c.destroyed_at), else_=end)
    running_s = ended - began
    statement = sa.select(
        sa.func.count(),
        sa.func.sum(running_s),
        sa.func.sum(running_s * sandboxes.c.cpu_count),
        sa.func.sum(running_s * sandboxes.c.memory_mib),
    ).where(
        sandboxes.c.workspace_id == workspace_id,
        sandboxes.c.started_at < end,
        sa.or_(sandboxes.c.destroyed_at.is_(None), sandboxes.c.destroyed_at > start),
    )
    if sandbox_id is not None:
        statement = statement.where(sandboxes.c.id == sandbox_id)
    count, total_s, core_s, mib_s = connection.execute(statement).one()
    return Usage(start, end, count, total_s or 0.0, core_s or 0.0, (mib_s or 0.0) / _MIB_PER_GIB)
