"""Statements about leases: one holder per name, until it stops renewing."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.store.schema import leases


def acquire(connection: sa.Connection, name: str, holder: str, *, now: float, duration_s: float) -> bool:
    """Take the lease or renew it; False while somebody else holds it."""
    mine_or_over = sa.or_(leases.c.holder == holder, leases.c.expires_at < now)
    changed = connection.execute(
        sa.update(leases).where(leases.c.name == name, mine_or_over).values(holder=holder, expires_at=now + duration_s)
    )
    if changed.rowcount:
        return True
    if connection.execute(sa.select(leases.c.name).where(leases.c.name == name)).first() is not None:
        return False
    connection.execute(sa.insert(leases), {"name": name, "holder": holder, "expires_at": now + duration_s})
    return True


def release(connection: sa.Connection, name: str, holder: str) -> None:
    """Give the lease up, if held."""
    connection.execute(sa.delete(leases).where(leases.c.name == name, leases.c.holder == holder))
