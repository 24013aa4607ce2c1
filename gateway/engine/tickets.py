"""Tickets: short-lived, single-use stand-ins for a key, for browsers that cannot send headers.

They are redeemed in `gateway.auth`.
"""

from __future__ import annotations

from gateway.commands import CreateTicket
from gateway.engine.context import Context
from gateway.engine.secrets import digest, make_secret
from gateway.errors import invalid
from gateway.resources import Principal, Ticket
from gateway.store import tickets as rows

_TTL_MAX_S = 3600.0
_PREFIXES = {"events": "sset_", "terminal": "miosa_term_"}


class TicketService:
    """Issues tickets."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, principal: Principal, command: CreateTicket) -> Ticket:
        """A ticket for any stream of the purpose. Raises validation_failed."""
        if not 1 <= command.ttl_s <= _TTL_MAX_S:
            raise invalid("ttl_seconds", f"must be between 1 and {_TTL_MAX_S:g}")
        return await self.issue(principal, purpose=command.purpose, resource_id=None, ttl_s=command.ttl_s)

    async def issue(self, principal: Principal, *, purpose: str, resource_id: str | None, ttl_s: float) -> Ticket:
        """A ticket for one resource, or for any when resource_id is None."""
        secret = make_secret(_PREFIXES[purpose])
        expires_at = self._context.clock() + ttl_s
        await self._context.database.write(
            lambda connection: rows.insert(
                connection,
                principal,
                ticket_hash=digest(secret),
                purpose=purpose,
                resource_id=resource_id,
                expires_at=expires_at,
            )
        )
        return Ticket(secret, purpose, expires_at)
