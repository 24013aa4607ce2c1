"""Statements about API keys. Only the SHA-256 of a secret is stored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from gateway.resources import ApiKey
from gateway.store.prepared import Prepared
from gateway.store.schema import api_keys
from gateway.store.stretch import newest

_RESOURCE = tuple(
    api_keys.c[name]
    for name in (
        "id",
        "workspace_id",
        "name",
        "prefix",
        "scopes",
        "created_at",
        "expires_at",
        "last_used_at",
        "external_user_id",
    )
)
_BY_HASH = Prepared(
    sa.select(
        api_keys.c.id,
        api_keys.c.workspace_id,
        api_keys.c.scopes,
        api_keys.c.is_test,
        api_keys.c.expires_at,
        api_keys.c.external_user_id,
    ).where(api_keys.c.hash == sa.bindparam("hash"), api_keys.c.revoked_at.is_(None))
)
_STATE = (
    api_keys.c.hash,
    api_keys.c.workspace_id,
    api_keys.c.expires_at,
    api_keys.c.version,
    api_keys.c.revoked_at.is_not(None),
)
_ALIVE = (api_keys.c.revoked_at.is_(None),)


@dataclass(frozen=True, slots=True)
class ApiKeyRow:
    """What authentication needs to know of a key that is not revoked; expires_at is still to be compared."""

    id: str
    workspace_id: str
    scopes: tuple[str, ...]
    is_test: bool
    expires_at: float | None
    external_user_id: str | None


@dataclass(frozen=True, slots=True)
class KeyState:
    """What the plane needs to know of a key."""

    hash: str
    workspace_id: str
    expires_at: float | None
    version: int
    is_revoked: bool


def get_by_hash(connection: sa.Connection, secret_hash: str) -> ApiKeyRow | None:
    """The unrevoked key with that hex SHA-256."""
    row = _BY_HASH.first(connection, hash=secret_hash)
    return ApiKeyRow(*row) if row else None


def insert(connection: sa.Connection, key: ApiKey, *, secret_hash: str, is_test: bool) -> None:
    """Add a key."""
    connection.execute(
        sa.insert(api_keys),
        {
            "id": key.id,
            "workspace_id": key.workspace_id,
            "name": key.name,
            "hash": secret_hash,
            "prefix": key.prefix,
            "scopes": key.scopes,
            "is_test": is_test,
            "created_at": key.created_at,
            "expires_at": key.expires_at,
            "external_user_id": key.external_user_id,
            "version": _version_now(),
        },
    )


def get_state(connection: sa.Connection, key_id: str) -> KeyState | None:
    """A key in any workspace, revoked or not."""
    row = connection.execute(sa.select(*_STATE).where(api_keys.c.id == key_id)).first()
    return KeyState(*row) if row else None


def replace_secret(connection: sa.Connection, key_id: str, *, secret_hash: str, prefix: str) -> None:
    """Give a key whose secret never reached anybody another one."""
    connection.execute(
        sa.update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(hash=secret_hash, prefix=prefix, version=_version_now())
    )


def get(connection: sa.Connection, workspace_id: str, key_id: str) -> ApiKey | None:
    """An unrevoked key of the workspace."""
    row = connection.execute(
        sa.select(*_RESOURCE).where(api_keys.c.id == key_id, api_keys.c.workspace_id == workspace_id, *_ALIVE)
    ).first()
    return ApiKey(*row) if row else None


def find(connection: sa.Connection, workspace_id: str, *, offset: int, limit: int) -> tuple[list[ApiKey], int]:
    """One stretch of the unrevoked keys, newest first, and how many there are."""
    conditions = (api_keys.c.workspace_id == workspace_id, *_ALIVE)
    rows, total = newest(connection, api_keys, conditions, offset=offset, limit=limit, columns=_RESOURCE)
    return [ApiKey(*row) for row in rows], total


def revoke(connection: sa.Connection, workspace_id: str, key_id: str, *, at: float) -> bool:
    """End a key; False if the workspace has no such unrevoked key."""
    changed = connection.execute(
        sa.update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.workspace_id == workspace_id, *_ALIVE)
        .values(revoked_at=at, version=_version_now())
    )
    return changed.rowcount == 1


def mark_used(connection: sa.Connection, used_at: Mapping[str, float]) -> None:
    """Note when keys were last used, by id."""
    connection.execute(
        sa.update(api_keys).where(api_keys.c.id == sa.bindparam("key_id")).values(last_used_at=sa.bindparam("at")),
        [{"key_id": key_id, "at": at} for key_id, at in used_at.items()],
    )


def valid(connection: sa.Connection, *, now: float) -> list[KeyState]:
    """Every key that still opens something."""
    rows = connection.execute(
        sa.select(*_STATE).where(*_ALIVE, sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now))
    )
    return [KeyState(*row) for row in rows]


def _version_now() -> int:
    return time.time_ns() // 1000
