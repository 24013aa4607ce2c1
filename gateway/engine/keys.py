"""API keys: made, listed, revoked. Looking one up for a request is `gateway.auth`."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from gateway.auth import allows
from gateway.commands import CreateApiKey, ListApiKeys, RevokeApiKey
from gateway.engine.context import Context
from gateway.engine.secrets import PREFIX_LENGTH, digest, make_secret
from gateway.errors import GatewayError, invalid
from gateway.resources import ApiKey, Page, Principal
from gateway.store import events as event_rows
from gateway.store import keys as rows


class KeyService:
    """Commands about API keys."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, principal: Principal, command: CreateApiKey) -> ApiKey:
        """Make a key; `secret` is in this answer and nowhere else.

        Raises GatewayError: forbidden (a scope its maker lacks), validation_failed (it would be expired already).
        """
        context = self._context
        _check_scopes(principal, command.scopes)
        now = context.clock()
        if command.expires_at is not None and command.expires_at <= now:
            raise invalid("expires_at", "lies in the past")
        secret = make_secret("msk_test_" if command.is_test else "msk_live_")
        key = ApiKey(
            id=command.effect_id,
            workspace_id=principal.workspace_id,
            name=command.name,
            prefix=secret[:PREFIX_LENGTH],
            scopes=tuple(dict.fromkeys(command.scopes)) or tuple(sorted(principal.scopes)),
            created_at=now,
            expires_at=command.expires_at,
            last_used_at=None,
            external_user_id=command.external_user_id,
            secret=secret,
        )

        def job(connection: sa.Connection) -> ApiKey:
            existing = rows.get(connection, principal.workspace_id, key.id)
            if existing is not None:
                # Made before, but the answer with its secret was lost: nobody has it, so it gets a new one.
                rows.replace_secret(connection, key.id, secret_hash=digest(secret), prefix=key.prefix)
            else:
                rows.insert(connection, key, secret_hash=digest(secret), is_test=command.is_test)
                _key_event(connection, "created", principal, key.id, now)
            return key

        created = await context.database.write(job)
        context.events.announce()
        await context.routes.push_key(created.id)
        return created

    async def list(self, principal: Principal, command: ListApiKeys) -> Page[ApiKey]:
        """One page of the workspace's keys."""
        offset = (command.page - 1) * command.page_size
        items, total = await self._context.database.read(
            lambda connection: rows.find(connection, principal.workspace_id, offset=offset, limit=command.page_size)
        )
        return Page(tuple(items), command.page, command.page_size, total)

    async def hash_of(self, principal: Principal) -> str | None:
        """The hash of the key behind a caller, by which the plane knows it; None without one."""
        key_id = principal.key_id
        if key_id is None:
            return None
        state = await self._context.database.lookup(lambda connection: rows.get_state(connection, key_id))
        return None if state is None else state.hash

    async def revoke(self, principal: Principal, command: RevokeApiKey) -> None:
        """End a key. Raises not_found."""
        context = self._context
        now = context.clock()

        def job(connection: sa.Connection) -> bool:
            is_revoked = rows.revoke(connection, principal.workspace_id, command.key_id, at=now)
            if is_revoked:
                _key_event(connection, "revoked", principal, command.key_id, now)
            return is_revoked

        if not await context.database.write(job):
            raise GatewayError("not_found", "No key with that id.")
        context.events.announce()
        await context.routes.push_key(command.key_id)


def _check_scopes(principal: Principal, scopes: Sequence[str]) -> None:
    lacking = [scope for scope in scopes if not allows(principal.scopes, scope)]
    if lacking:
        raise GatewayError("forbidden", f"Your key cannot grant: {', '.join(sorted(lacking))}.")


def _key_event(connection: sa.Connection, kind: str, principal: Principal, key_id: str, at: float) -> None:
    event_rows.append(
        connection,
        kind=f"api_key.{kind}",
        workspace_id=principal.workspace_id,
        resource_type="api_key",
        resource_id=key_id,
        at=at,
        data={},
    )
