"""Statements about builds of templates and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.resources import Build, BuildLine, BuildSpec, BuildState
from gateway.store.schema import build_lines, builds

#: States of a build that somebody works on, or will.
OPEN = (BuildState.QUEUED, BuildState.BUILDING, BuildState.CERTIFYING, BuildState.SNAPSHOTTING)

_COLUMNS = tuple(column.name for column in builds.columns)
_LINE_COLUMNS = (
    build_lines.c.seq,
    build_lines.c.at,
    build_lines.c.step,
    build_lines.c.stream,
    build_lines.c.text,
)


def insert(connection: sa.Connection, build: Build) -> None:
    """Add a row."""
    values = {name: getattr(build, name) for name in _COLUMNS}
    values |= {
        "spec": msgspec.to_builtins(build.spec),
        "metadata": dict(build.metadata),
        "state": build.state.value,
    }
    connection.execute(sa.insert(builds), values)


def get(connection: sa.Connection, build_id: str) -> Build | None:
    """By id, of whatever workspace."""
    row = connection.execute(sa.select(builds).where(builds.c.id == build_id)).first()
    return _build(row) if row else None


def find(connection: sa.Connection, template_id: str, *, limit: int) -> list[Build]:
    """The newest of a template."""
    statement = sa.select(builds).where(builds.c.template_id == template_id)
    rows = connection.execute(statement.order_by(builds.c.created_at.desc(), builds.c.id.desc()).limit(limit))
    return [_build(row) for row in rows]


def find_open(connection: sa.Connection) -> list[Build]:
    """Those of every workspace that have not ended."""
    return [_build(row) for row in connection.execute(sa.select(builds).where(builds.c.state.in_(OPEN)))]


def count_open(connection: sa.Connection, workspace_id: str) -> int:
    """How many of a workspace have not ended."""
    statement = sa.select(sa.func.count()).select_from(builds)
    return connection.execute(
        statement.where(builds.c.workspace_id == workspace_id, builds.c.state.in_(OPEN))
    ).scalar_one()


def change(connection: sa.Connection, build_id: str, *, builder: str | None = None, **values: Any) -> bool:
    """Set columns of a build that has not ended; whether it has not.

    builder: the machine it is made on; one that is made anew on another has ended for whoever works there.
    """
    statement = sa.update(builds).where(builds.c.id == build_id, builds.c.state.in_(OPEN))
    if builder is not None:
        statement = statement.where(builds.c.machine_id == builder)
    return connection.execute(statement.values(**values)).rowcount == 1


def prune(connection: sa.Connection, finished_before: float, *, keep: set[str], limit: int) -> int:
    """Forget builds that ended long ago, but not those in `keep`."""
    old = sa.select(builds.c.id).where(builds.c.finished_at < finished_before, builds.c.id.not_in(keep)).limit(limit)
    return connection.execute(sa.delete(builds).where(builds.c.id.in_(old.scalar_subquery()))).rowcount


def append_lines(connection: sa.Connection, build_id: str, lines: Sequence[BuildLine]) -> None:
    """Add to the log; the lines' own `seq` is not used."""
    if lines:
        rows = [
            {"build_id": build_id, "at": line.at, "step": line.step, "stream": line.stream, "text": line.text}
            for line in lines
        ]
        connection.execute(sa.insert(build_lines), rows)


def lines_after(connection: sa.Connection, build_id: str, seq: int, *, limit: int) -> list[BuildLine]:
    """The next lines after a cursor, oldest first."""
    statement = sa.select(*_LINE_COLUMNS).where(build_lines.c.build_id == build_id, build_lines.c.seq > seq)
    return [BuildLine(*row) for row in connection.execute(statement.order_by(build_lines.c.seq).limit(limit))]


def last_lines(connection: sa.Connection, build_id: str, limit: int) -> list[BuildLine]:
    """The newest lines, oldest first."""
    statement = sa.select(*_LINE_COLUMNS).where(build_lines.c.build_id == build_id)
    rows = connection.execute(statement.order_by(build_lines.c.seq.desc()).limit(limit)).all()
    return [BuildLine(*row) for row in reversed(rows)]


def _build(row: sa.Row[Any]) -> Build:
    values = dict(zip(_COLUMNS, row, strict=True))
    values |= {"state": BuildState(values["state"]), "spec": msgspec.convert(values["spec"], BuildSpec)}
    return Build(**values)
