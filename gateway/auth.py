"""Who makes a request, and what they may do.

A key is looked up by its SHA-256 on every request (18 µs on SQLite), so a revocation works at once in every worker and
nothing about keys is cached. A ticket stands for a key where a browser cannot send headers: once, briefly, for one
purpose, and only while its key is valid.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from gateway.errors import GatewayError
from gateway.limits import Budget, Limits, address_subject
from gateway.observability import metrics
from gateway.resources import Principal
from gateway.store import Database, keys, tickets

#: Longer strings are no keys of ours, and hashing megabytes of header is work for nothing.
_SECRET_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request offers as proof: an API key, or a ticket."""

    key: str | None = None
    ticket: str | None = None


class Authenticator:
    """Checks keys and tickets.

    failures: how many refused attempts one address may make; None for no limit. A valid key is never held up by it.
    clock: Unix seconds.
    """

    def __init__(
        self, database: Database, limits: Limits, *, failures: Budget | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._limits = limits
        self._failures = failures
        self._clock = clock
        self._used_at: dict[str, float] = {}

    async def authenticate(
        self, credentials: Credentials, *, address: str, ticket_purpose: str | None, ticket_resource: str | None
    ) -> Principal:
        """The caller behind a key, or behind a ticket where one is accepted.

        Raises GatewayError unauthenticated, or rate_limited when the address has failed too often.
        """
        if credentials.key is not None:
            principal = await self._by_key(credentials.key)
        elif credentials.ticket is not None and ticket_purpose is not None:
            principal = await self._by_ticket(credentials.ticket, ticket_purpose, ticket_resource)
        else:
            metrics.AUTH_FAILURES.labels(reason="missing").inc()
            raise GatewayError("unauthenticated", "Send an API key: `Authorization: Bearer <key>`.")
        if principal is None:
            raise self._refusal(address)
        return principal

    async def flush(self) -> None:
        """Write down when keys were last used; called every few seconds and at the end."""
        if not self._used_at:
            return
        used_at, self._used_at = self._used_at, {}
        await self._database.write(partial(keys.mark_used, used_at=used_at))

    async def _by_key(self, secret: str) -> Principal | None:
        if not secret or len(secret) > _SECRET_CHARS_MAX:
            return None
        row = await self._database.lookup(partial(keys.get_by_hash, secret_hash=_sha256(secret)))
        now = self._clock()
        if row is None or (row.expires_at is not None and row.expires_at <= now):
            return None
        self._used_at[row.id] = now
        return Principal(row.workspace_id, row.id, frozenset(row.scopes), row.is_test, row.external_user_id)

    async def _by_ticket(self, ticket: str, purpose: str, resource: str | None) -> Principal | None:
        now = self._clock()
        take = partial(
            tickets.take,
            ticket_hash=_sha256(ticket[:_SECRET_CHARS_MAX]),
            purpose=purpose,
            resource_id=resource,
            now=now,
        )
        principal = await self._database.write(take)
        if principal is None or principal.key_id is None:
            return principal
        find = partial(keys.get, workspace_id=principal.workspace_id, key_id=principal.key_id)
        key = await self._database.lookup(find)
        return None if key is None or (key.expires_at is not None and key.expires_at <= now) else principal

    def _refusal(self, address: str) -> GatewayError:
        metrics.AUTH_FAILURES.labels(reason="refused").inc()
        if self._failures is not None:
            decision = self._limits.take("auth", address_subject(address), self._failures)
            if not decision.is_granted:
                return GatewayError(
                    "rate_limited", "Too many refused keys from this address.", retry_after_s=decision.retry_after_s
                )
        return GatewayError("unauthenticated", "The API key or ticket is unknown, expired or revoked.")


def allows(scopes: Collection[str], wanted: str) -> bool:
    """Whether a key with these scopes may do what needs `wanted`, e.g. "sandboxes:read". No scopes: everything.

    Writing includes reading of the same area; `area:*` and `*` are understood.
    """
    if not scopes or wanted in scopes or "*" in scopes:
        return True
    area, _, action = wanted.partition(":")
    return f"{area}:*" in scopes or (action == "read" and f"{area}:write" in scopes)


def require_scope(principal: Principal, wanted: str | None) -> None:
    """Raises GatewayError forbidden if the caller's key lacks the scope."""
    if wanted is not None and not allows(principal.scopes, wanted):
        raise GatewayError("forbidden", f"The API key lacks the scope {wanted}.")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
