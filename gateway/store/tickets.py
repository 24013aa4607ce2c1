"""Statements about tickets: single-use stand-ins for a key. Only the SHA-256 of a ticket is stored."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.resources import Principal
from gateway.store.schema import tickets


def insert(
    connection: sa.Connection,
    principal: Principal,
    *,
    ticket_hash: str,
    purpose: str,
    resource_id: str | None,
    expires_at: float,
) -> None:
    """Add a ticket that stands for the principal."""
    connection.execute(
        sa.insert(tickets),
        {
            "hash": ticket_hash,
            "purpose": purpose,
            "resource_id": resource_id,
            "workspace_id": principal.workspace_id,
            "key_id": principal.key_id,
            "scopes": tuple(sorted(principal.scopes)),
            "is_test": principal.is_test,
            "external_user_id": principal.external_user_id,
            "expires_at": expires_at,
        },
    )


def take(
    connection: sa.Connection, *, ticket_hash: str, purpose: str, resource_id: str | None, now: float
) -> Principal | None:
    """Use a ticket up; None if there is none for this purpose and resource that has not expired."""
    row = connection.execute(
        sa.delete(tickets)
        .where(
            tickets.c.hash == ticket_hash,
            tickets.c.purpose == purpose,
            tickets.c.resource_id.is_not_distinct_from(resource_id),
            tickets.c.expires_at > now,
        )
        .returning(
            tickets.c.workspace_id,
            tickets.c.key_id,
            tickets.c.scopes,
            tickets.c.is_test,
            tickets.c.external_user_id,
        )
    ).first()
    if row is None:
        return None
    return Principal(row.workspace_id, row.key_id, frozenset(row.scopes), row.is_test, row.external_user_id)


def prune(connection: sa.Connection, before: float) -> int:
    """Forget tickets that expired unused."""
    return connection.execute(sa.delete(tickets).where(tickets.c.expires_at < before)).rowcount
