"""Statements about sandboxes.

`version` grows with every change of a sandbox, its previews or its shares; it orders what the plane is told.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from gateway.resources import Attribution, IdleAction, PauseKind, Sandbox, SandboxState
from gateway.store import pauses
from gateway.store.prepared import Prepared
from gateway.store.schema import IS_LIVING, LIVING, sandboxes
from gateway.store.stretch import newest
from gateway.store.types import has_label

_ATTRIBUTION = ("project_id", "external_workspace_id", "external_user_id", "external_project_id")
_COLUMNS = tuple(column.name for column in sandboxes.columns)
_PLAIN = tuple(name for name in _COLUMNS if name not in {*_ATTRIBUTION, "state", "version"})
_VERSION = _COLUMNS.index("version")
_BY_ID = Prepared(sa.select(sandboxes).where(sandboxes.c.id == sa.bindparam("sandbox_id")))
_VERSION_OF = Prepared(sa.select(sandboxes.c.version).where(sandboxes.c.id == sa.bindparam("sandbox_id")))
_INSERT = Prepared(sa.insert(sandboxes))
_BY_NAME = Prepared(
    sa.select(sandboxes)
    .where(
        sandboxes.c.workspace_id == sa.bindparam("workspace_id"),
        IS_LIVING,
        sa.or_(sandboxes.c.name == sa.bindparam("name"), sandboxes.c.slug == sa.bindparam("name")),
    )
    # A name wins over a slug that looks like it.
    .order_by(sa.case((sandboxes.c.name == sa.bindparam("name"), 0), else_=1))
    .limit(1)
)
#: Everything that can stand in the way of a new sandbox, in one statement.
_ROOM = Prepared(
    sa.select(
        sa.select(sa.func.count())
        .where(sandboxes.c.workspace_id == sa.bindparam("workspace_id"), IS_LIVING)
        .scalar_subquery(),
        sa.exists().where(
            sandboxes.c.workspace_id == sa.bindparam("workspace_id"),
            sandboxes.c.name == sa.bindparam("name"),
            sandboxes.c.id != sa.bindparam("but"),
            IS_LIVING,
        ),
        sa.exists().where(sandboxes.c.slug == sa.bindparam("slug"), sandboxes.c.id != sa.bindparam("but"), IS_LIVING),
        sa.exists().where(sandboxes.c.id == sa.bindparam("but")),
    )
)
_UPDATE = sa.update(sandboxes).where(sandboxes.c.id == sa.bindparam("sandbox_id"))
_NOW: sa.BindParameter[int] = sa.bindparam("now", type_=sa.BigInteger)
#: Two changes in one microsecond, or a clock set back, must still count up.
_NEXT_VERSION = sa.case((sandboxes.c.version >= _NOW, sandboxes.c.version + 1), else_=_NOW)
_RESTED = Prepared(
    _UPDATE.values(
        paused_at=None,
        pause_kind=None,
        paused_s=sandboxes.c.paused_s + sa.bindparam("rested_s", type_=sa.Double),
    )
)


@dataclass(frozen=True, slots=True)
class Room:
    """How many living sandboxes a workspace has, whether one of them has the name, or any at all the slug or the id."""

    living: int
    is_name_taken: bool
    is_slug_taken: bool
    is_id_taken: bool


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list is narrowed to; all that is given must hold. state None: living ones."""

    workspace_id: str
    state: SandboxState | None = None
    tags: Sequence[str] = ()
    attribution: Attribution = field(default_factory=Attribution)


def get(connection: sa.Connection, sandbox_id: str) -> Sandbox | None:
    """By id, in whatever state and workspace."""
    row = _BY_ID.first(connection, sandbox_id=sandbox_id)
    return _sandbox(row) if row else None


def get_by_name(connection: sa.Connection, workspace_id: str, name: str) -> Sandbox | None:
    """The living sandbox with that name or slug."""
    row = _BY_NAME.first(connection, workspace_id=workspace_id, name=name)
    return _sandbox(row) if row else None


def find(connection: sa.Connection, wanted: Filter, *, offset: int, limit: int) -> tuple[list[Sandbox], int]:
    """One stretch of those that match, newest first, and how many match in all."""
    rows, total = newest(connection, sandboxes, _conditions(wanted), offset=offset, limit=limit)
    return [_sandbox(row) for row in rows], total


def find_in_states(connection: sa.Connection, states: Sequence[SandboxState]) -> list[Sandbox]:
    """Those of every workspace in one of the states."""
    rows = connection.execute(sa.select(sandboxes).where(sandboxes.c.state.in_(states)))
    return [_sandbox(row) for row in rows]


def room(connection: sa.Connection, wanted: Sandbox) -> Room:
    """What a new sandbox would collide with."""
    row = _ROOM.first(connection, workspace_id=wanted.workspace_id, name=wanted.name, slug=wanted.slug, but=wanted.id)
    return Room(*(row or (0, False, False, False)))


def is_name_taken(connection: sa.Connection, workspace_id: str, name: str, *, but: str) -> bool:
    """Whether a living sandbox other than `but` has the name."""
    statement = sa.select(sandboxes.c.id).where(
        sandboxes.c.workspace_id == workspace_id,
        sandboxes.c.name == name,
        IS_LIVING,
        sandboxes.c.id != but,
    )
    return connection.execute(statement).first() is not None


def insert(connection: sa.Connection, sandbox: Sandbox, *, version: int | None = None) -> None:
    """Add a row. version: as told to the plane already, if it has been."""
    values: dict[str, Any] = {name: getattr(sandbox, name) for name in _PLAIN}
    values |= {name: getattr(sandbox.attribution, name) for name in _ATTRIBUTION}
    values |= {"env": dict(sandbox.env), "metadata": dict(sandbox.metadata), "state": sandbox.state.value}
    _INSERT.run(connection, **values, version=version or version_now())


def delete(connection: sa.Connection, sandbox_id: str) -> None:
    """Remove a row and what hangs on it."""
    connection.execute(sa.delete(sandboxes).where(sandboxes.c.id == sandbox_id))


def change(
    connection: sa.Connection, sandbox_id: str, *, only_in: Sequence[SandboxState] | None = None, **values: Any
) -> bool:
    """Set columns of one row, if its state is one of `only_in`; whether it was.

    The condition is part of the statement: of several processes that see a machine end, one gets True.
    """
    statement = _update(tuple(values), None if only_in is None else tuple(only_in))
    return statement.run(connection, sandbox_id=sandbox_id, now=version_now(), **_prefixed(values)) == 1


@functools.cache
def _update(names: tuple[str, ...], only_in: tuple[SandboxState, ...] | None) -> Prepared:
    given = {name: sa.bindparam(f"new_{name}", type_=sandboxes.c[name].type) for name in names}
    statement = _UPDATE.values(**given, version=_NEXT_VERSION)
    if only_in is not None:
        statement = statement.where(sa.or_(*(sandboxes.c.state == state for state in only_in)))
    return Prepared(statement)


def _prefixed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": value for name, value in values.items()}


def end_pause(connection: sa.Connection, sandbox_id: str, at: float) -> None:
    """Close the books on a sandbox's present pause, if there is one."""
    rested_s = pauses.end(connection, sandbox_id, at)
    if rested_s is not None:
        _RESTED.run(connection, sandbox_id=sandbox_id, rested_s=rested_s)


def touch(connection: sa.Connection, sandbox_id: str) -> None:
    """Note that something below the sandbox (a preview, a share) changed."""
    change(connection, sandbox_id)


def get_version(connection: sa.Connection, sandbox_id: str) -> tuple[Sandbox, int] | None:
    """A sandbox with its version."""
    row = _BY_ID.first(connection, sandbox_id=sandbox_id)
    return (_sandbox(row), row[_VERSION]) if row else None


def version_of(connection: sa.Connection, sandbox_id: str) -> int | None:
    """The version alone."""
    row = _VERSION_OF.first(connection, sandbox_id=sandbox_id)
    return None if row is None else row[0]


def find_versions(connection: sa.Connection, states: Sequence[SandboxState]) -> list[tuple[Sandbox, int]]:
    """Sandboxes of every workspace in one of the states, with their versions."""
    rows = connection.execute(sa.select(sandboxes).where(sandboxes.c.state.in_(states)))
    return [(_sandbox(row), row[_VERSION]) for row in rows]


def prune(connection: sa.Connection, destroyed_before: float, *, limit: int) -> int:
    """Forget sandboxes that ended long ago, with what hangs on them."""
    old = (
        sa.select(sandboxes.c.id)
        .where(sandboxes.c.state.not_in(LIVING), sandboxes.c.destroyed_at < destroyed_before)
        .limit(limit)
    )
    return connection.execute(sa.delete(sandboxes).where(sandboxes.c.id.in_(old.scalar_subquery()))).rowcount


def _conditions(wanted: Filter) -> list[sa.ColumnElement[bool]]:
    states = LIVING if wanted.state is None else (wanted.state,)
    conditions = [sandboxes.c.workspace_id == wanted.workspace_id, sandboxes.c.state.in_(states)]
    conditions += [has_label(sandboxes.c.tags, tag) for tag in wanted.tags]
    for name in _ATTRIBUTION:
        value = getattr(wanted.attribution, name)
        if value is not None:
            conditions.append(sandboxes.c[name] == value)
    return conditions


def version_now() -> int:
    """A version greater than any that was given out before, unless the clock was set back."""
    return time.time_ns() // 1000


def _sandbox(row: Sequence[Any]) -> Sandbox:
    values = dict(zip(_COLUMNS, row, strict=True))
    del values["version"]
    attribution = Attribution(*(values.pop(name) for name in _ATTRIBUTION))
    kind = values["pause_kind"]
    values |= {
        "state": SandboxState(values["state"]),
        "idle_action": IdleAction(values["idle_action"]),
        "pause_kind": None if kind is None else PauseKind(kind),
        "attribution": attribution,
    }
    return Sandbox(**values)
