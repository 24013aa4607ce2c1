"""One stretch of a long list, as its pages are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa


def newest(
    connection: sa.Connection,
    table: sa.Table,
    conditions: Sequence[sa.ColumnElement[bool]],
    *,
    offset: int,
    limit: int,
    columns: Sequence[sa.Column[Any]] | None = None,
) -> tuple[Sequence[Any], int]:
    """Rows that match, newest first, and how many match in all. columns: which of theirs; all unless given."""
    total = connection.execute(sa.select(sa.func.count()).select_from(table).where(*conditions)).scalar_one()
    statement = sa.select(*(columns or table.c)).where(*conditions)
    ordered = statement.order_by(table.c.created_at.desc(), table.c.id)
    return connection.execute(ordered.offset(offset).limit(limit)).all(), total
