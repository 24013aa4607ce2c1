"""Statements about snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from gateway.resources import Snapshot, SnapshotState
from gateway.store.schema import snapshots
from gateway.store.stretch import newest

_COLUMNS = tuple(column.name for column in snapshots.columns)
_BY_ID = sa.select(snapshots).where(snapshots.c.id == sa.bindparam("snapshot_id"))
#: What callers are shown.
_SHOWN = snapshots.c.state != SnapshotState.DELETING.value


def insert(connection: sa.Connection, snapshot: Snapshot) -> None:
    """Add a row."""
    values = {name: getattr(snapshot, name) for name in _COLUMNS}
    connection.execute(sa.insert(snapshots), values | {"env": dict(snapshot.env), "state": snapshot.state.value})


def get(connection: sa.Connection, snapshot_id: str) -> Snapshot | None:
    """By id, in whatever state and workspace."""
    row = connection.execute(_BY_ID, {"snapshot_id": snapshot_id}).first()
    return _snapshot(row) if row else None


def find(
    connection: sa.Connection, workspace_id: str, sandbox_id: str | None, *, offset: int, limit: int
) -> tuple[list[Snapshot], int]:
    """One stretch of a workspace's or a sandbox's, newest first, and how many there are in all."""
    conditions = [snapshots.c.workspace_id == workspace_id, _SHOWN]
    if sandbox_id is not None:
        conditions.append(snapshots.c.sandbox_id == sandbox_id)
    rows, total = newest(connection, snapshots, conditions, offset=offset, limit=limit)
    return [_snapshot(row) for row in rows], total


def find_in_states(connection: sa.Connection, states: Sequence[SnapshotState]) -> list[Snapshot]:
    """Those of every workspace in one of the states."""
    rows = connection.execute(sa.select(snapshots).where(snapshots.c.state.in_(states)))
    return [_snapshot(row) for row in rows]


def ids(connection: sa.Connection) -> set[str]:
    """All there are: what images on hosts may belong to."""
    return set(connection.execute(sa.select(snapshots.c.id)).scalars())


def count(connection: sa.Connection, workspace_id: str) -> int:
    """How many places of a workspace's limit are taken."""
    statement = sa.select(sa.func.count()).select_from(snapshots)
    return connection.execute(
        statement.where(snapshots.c.workspace_id == workspace_id, snapshots.c.state != SnapshotState.ERROR.value)
    ).scalar_one()


def change(connection: sa.Connection, snapshot_id: str, *, only_in: Sequence[SnapshotState], **values: Any) -> bool:
    """Set columns of one row, if its state is one of `only_in`; whether it was."""
    statement = sa.update(snapshots).where(snapshots.c.id == snapshot_id, snapshots.c.state.in_(only_in))
    return connection.execute(statement.values(**values)).rowcount == 1


def advance(connection: sa.Connection, snapshot_id: str, *, step: str, progress: float) -> bool:
    """Note how far a pending one is; False if that is known already."""
    statement = sa.update(snapshots).where(
        snapshots.c.id == snapshot_id,
        snapshots.c.state == SnapshotState.PENDING.value,
        sa.or_(snapshots.c.step.is_(None), snapshots.c.step != step, snapshots.c.progress < progress),
    )
    return connection.execute(statement.values(step=step, progress=progress)).rowcount == 1


def delete(connection: sa.Connection, snapshot_id: str) -> None:
    """Remove a row."""
    connection.execute(sa.delete(snapshots).where(snapshots.c.id == snapshot_id))


def _snapshot(row: sa.Row[Any]) -> Snapshot:
    values = dict(zip(_COLUMNS, row, strict=True))
    return Snapshot(**values | {"state": SnapshotState(values["state"])})
