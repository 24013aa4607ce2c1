"""Statements about previews (open ports) and shares (links that open them).

The engine calls `sandboxes.touch` in the same transaction, so that the plane takes the new set for newer than the old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from gateway.store.prepared import Prepared
from gateway.store.schema import previews, shares

_SELECT = sa.select(previews).order_by(previews.c.port)
_ALL = Prepared(_SELECT)
_OF_SANDBOX = Prepared(_SELECT.where(previews.c.sandbox_id == sa.bindparam("sandbox_id")))
_SELECT_SHARES = sa.select(shares).where(shares.c.expires_at > sa.bindparam("now")).order_by(shares.c.created_at)
_ALL_SHARES = Prepared(_SELECT_SHARES)
_SHARES_OF_SANDBOX = Prepared(_SELECT_SHARES.where(shares.c.sandbox_id == sa.bindparam("sandbox_id")))


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """An open port. policy: the fields of `resources.PreviewPolicy`; None like one that says nothing."""

    id: str
    sandbox_id: str
    port: int
    visibility: str
    created_at: float
    policy: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ShareRow:
    """A link; preview_id and port are None when it opens every port."""

    id: str
    sandbox_id: str
    preview_id: str | None
    port: int | None
    path: str
    scope: str
    hash: str
    prefix: str
    created_at: float
    expires_at: float


def put(
    connection: sa.Connection, preview: PreviewRow, *, visibility: str | None, policy: Mapping[str, Any] | None = None
) -> PreviewRow:
    """Open a port, or change visibility and policy, if given, of one that is open. Returns what holds then."""
    found = connection.execute(
        sa.select(previews).where(previews.c.sandbox_id == preview.sandbox_id, previews.c.port == preview.port)
    ).first()
    if found is None:
        connection.execute(sa.insert(previews), _values(preview))
        return preview
    given: dict[str, Any] = {"visibility": visibility, "policy": policy}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes:
        connection.execute(sa.update(previews).where(previews.c.id == found.id).values(changes))
    return replace(PreviewRow(*found), **changes)


def get(connection: sa.Connection, sandbox_id: str, preview_id: str) -> PreviewRow | None:
    """By id, within its sandbox."""
    row = connection.execute(
        sa.select(previews).where(previews.c.id == preview_id, previews.c.sandbox_id == sandbox_id)
    ).first()
    return PreviewRow(*row) if row else None


def find(connection: sa.Connection, sandbox_id: str | None) -> list[PreviewRow]:
    """The open ports of a sandbox, or of all, by port."""
    statement = _ALL if sandbox_id is None else _OF_SANDBOX
    return [PreviewRow(*row) for row in statement.rows(connection, sandbox_id=sandbox_id)]


def delete(connection: sa.Connection, sandbox_id: str, preview_id: str) -> bool:
    """Close a port; its shares go with it. Whether it was open."""
    statement = sa.delete(previews).where(previews.c.id == preview_id, previews.c.sandbox_id == sandbox_id)
    return connection.execute(statement).rowcount == 1


def put_share(connection: sa.Connection, share: ShareRow) -> None:
    """Add a share; one with the same id (whose token never reached anybody) is replaced."""
    connection.execute(sa.delete(shares).where(shares.c.id == share.id, shares.c.sandbox_id == share.sandbox_id))
    connection.execute(sa.insert(shares), _values(share))


def find_shares(connection: sa.Connection, sandbox_id: str | None, *, now: float) -> list[ShareRow]:
    """The shares of a sandbox, or of all, that have not expired, oldest first."""
    statement = _ALL_SHARES if sandbox_id is None else _SHARES_OF_SANDBOX
    return [ShareRow(*row) for row in statement.rows(connection, sandbox_id=sandbox_id, now=now)]


def revoke_shares(connection: sa.Connection, sandbox_id: str, *, share_id: str | None, preview_id: str | None) -> int:
    """End one share, or all of a preview. How many ended."""
    statement = sa.delete(shares).where(shares.c.sandbox_id == sandbox_id)
    if share_id is not None:
        statement = statement.where(shares.c.id == share_id)
    if preview_id is not None:
        statement = statement.where(shares.c.preview_id == preview_id)
    return connection.execute(statement).rowcount


def prune_shares(connection: sa.Connection, before: float) -> int:
    """Forget shares that expired before a time."""
    return connection.execute(sa.delete(shares).where(shares.c.expires_at < before)).rowcount


def _values(row: PreviewRow | ShareRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}
