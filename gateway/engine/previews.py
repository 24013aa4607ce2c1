"""Previews (ports opened on hosts of their own) and the links that share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sa

from gateway.commands import (
    CreatePreview,
    CreateShare,
    DeletePreview,
    GetPreview,
    ListPreviews,
    ListShares,
    RevokeShare,
    UpdatePreview,
)
from gateway.engine.context import STARTED, Context, owned_row, require
from gateway.engine.urls import preview_url
from gateway.errors import GatewayError, invalid
from gateway.events import sandbox_event
from gateway.resources import Preview, PreviewPolicy, Principal, Sandbox, Share
from gateway.settings import Settings
from gateway.store import previews as rows
from gateway.store import sandboxes as sandbox_rows
from gateway.store.previews import PreviewRow, ShareRow
from previews.hosts import AGENT_PORT
from previews.tokens import QUERY_PARAMETERS, make_token

T = TypeVar("T")

_TTL_MAX_S = 30 * 86_400.0


class PreviewService:
    """Commands about previews and shares."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, principal: Principal, command: CreatePreview) -> Preview:
        """Open a port; opening it again changes its visibility and policy, if given, and keeps its id.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, validation_failed.
        """
        if not 1 <= command.port <= 65_535 or command.port == AGENT_PORT:
            raise invalid("port", f"must be between 1 and 65535, and not {AGENT_PORT}")
        now = self._context.clock()
        policy = _policy_record(command.policy)

        def job(connection: sa.Connection, sandbox: Sandbox) -> tuple[Sandbox, PreviewRow]:
            visibility = command.visibility or command.visibility_if_new
            wanted = PreviewRow(command.effect_id, sandbox.id, command.port, visibility, now, policy)
            row = rows.put(connection, wanted, visibility=command.visibility, policy=policy)
            sandbox_event(connection, "preview.ready", sandbox, at=now, port=row.port, preview_id=row.id)
            return sandbox, row

        sandbox, row = await self._change(principal, command.sandbox_id, job)
        return _preview(row, sandbox, self._context.settings)

    async def list(self, principal: Principal, command: ListPreviews) -> tuple[Preview, ...]:
        """A sandbox's open ports, in order of port. Raises sandbox_not_found."""
        sandbox = await self._context.sandbox(principal, command.sandbox_id)
        found = await self._context.database.lookup(lambda connection: rows.find(connection, sandbox.id))
        return tuple(_preview(row, sandbox, self._context.settings) for row in found)

    async def get(self, principal: Principal, command: GetPreview) -> Preview:
        """One preview. Raises sandbox_not_found, preview_not_found."""
        sandbox = await self._context.sandbox(principal, command.sandbox_id)
        row = await self._context.database.lookup(lambda connection: _existing(connection, sandbox, command.preview_id))
        return _preview(row, sandbox, self._context.settings)

    async def update(self, principal: Principal, command: UpdatePreview) -> Preview:
        """Change visibility and policy, if given.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, preview_not_found, validation_failed.
        """
        policy = _policy_record(command.policy)

        def job(connection: sa.Connection, sandbox: Sandbox) -> tuple[Sandbox, PreviewRow]:
            row = _existing(connection, sandbox, command.preview_id)
            return sandbox, rows.put(connection, row, visibility=command.visibility, policy=policy)

        sandbox, row = await self._change(principal, command.sandbox_id, job)
        return _preview(row, sandbox, self._context.settings)

    async def delete(self, principal: Principal, command: DeletePreview) -> None:
        """Close a port. Raises sandbox_not_found, sandbox_not_running, preview_not_found."""

        def job(connection: sa.Connection, sandbox: Sandbox) -> None:
            if not rows.delete(connection, sandbox.id, command.preview_id):
                raise _preview_not_found()

        await self._change(principal, command.sandbox_id, job)

    async def create_share(self, principal: Principal, command: CreateShare) -> Share:
        """Make a link; `token` and `url` are in this answer and nowhere else.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, preview_not_found, validation_failed.
        """
        if not 1 <= command.ttl_s <= _TTL_MAX_S:
            raise invalid("ttl_seconds", f"must be between 1 and {_TTL_MAX_S:g}")
        if not command.path.startswith("/"):
            raise invalid("path", "must start with /")
        token = make_token("browser" if command.preview_id is None else "share")
        now = self._context.clock()

        def job(connection: sa.Connection, sandbox: Sandbox) -> tuple[Sandbox, ShareRow]:
            port = None
            if command.preview_id is not None:
                port = _existing(connection, sandbox, command.preview_id).port
            row = ShareRow(
                id=command.effect_id,
                sandbox_id=sandbox.id,
                preview_id=command.preview_id,
                port=port,
                path=command.path,
                scope=command.scope,
                hash=token.hash,
                prefix=token.prefix,
                created_at=now,
                expires_at=now + command.ttl_s,
            )
            rows.put_share(connection, row)
            return sandbox, row

        sandbox, row = await self._change(principal, command.sandbox_id, job)
        return _share(row, sandbox, self._context.settings, token.secret)

    async def list_shares(self, principal: Principal, command: ListShares) -> tuple[Share, ...]:
        """The links that still open something, oldest first. Raises sandbox_not_found."""
        sandbox = await self._context.sandbox(principal, command.sandbox_id)
        now = self._context.clock()
        found = await self._context.database.lookup(
            lambda connection: rows.find_shares(connection, sandbox.id, now=now)
        )
        return tuple(_share(row, sandbox, self._context.settings) for row in found)

    async def revoke_share(self, principal: Principal, command: RevokeShare) -> None:
        """End one link, or all of a preview. Raises sandbox_not_found, sandbox_not_running, not_found."""

        def job(connection: sa.Connection, sandbox: Sandbox) -> None:
            if command.preview_id is not None:
                _existing(connection, sandbox, command.preview_id)
            ended = rows.revoke_shares(connection, sandbox.id, share_id=command.share_id, preview_id=command.preview_id)
            if command.share_id is not None and not ended:
                raise GatewayError("not_found", "No share with that id.")

        await self._change(principal, command.sandbox_id, job)

    async def _change(self, principal: Principal, sandbox_id: str, job: Callable[[sa.Connection, Sandbox], T]) -> T:
        """Run a job on the routes of a sandbox with a machine, and have the plane know before this returns."""

        def whole(connection: sa.Connection) -> T:
            sandbox = require(owned_row(connection, principal, sandbox_id), *STARTED)
            result = job(connection, sandbox)
            sandbox_rows.touch(connection, sandbox.id)
            return result

        result = await self._context.database.write(whole)
        self._context.events.announce()
        await self._context.routes.push(sandbox_id)
        return result


def _existing(connection: sa.Connection, sandbox: Sandbox, preview_id: str) -> PreviewRow:
    row = rows.get(connection, sandbox.id, preview_id)
    if row is None:
        raise _preview_not_found()
    return row


def _preview_not_found() -> GatewayError:
    return GatewayError("preview_not_found", "No preview with that id.")


def _policy_record(policy: PreviewPolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    if policy.allow_credentials and "*" in (policy.allowed_origins or ()):
        raise invalid("policy.allow_credentials", "cannot be given to every origin; list the allowed ones")
    return asdict(policy)


def _preview(row: PreviewRow, sandbox: Sandbox, settings: Settings) -> Preview:
    return Preview(
        id=row.id,
        sandbox_id=row.sandbox_id,
        port=row.port,
        visibility="public" if row.visibility == "public" else "private",
        policy=PreviewPolicy(**(row.policy or {})),
        url=preview_url(settings, sandbox.slug, row.port),
        created_at=row.created_at,
    )


def _share(row: ShareRow, sandbox: Sandbox, settings: Settings, token: str | None = None) -> Share:
    url = None
    if token is not None and row.port is not None:
        path = quote(row.path, safe="/%-._~!$&'()*+,;=:@")
        url = f"{preview_url(settings, sandbox.slug, row.port)}{path}?{QUERY_PARAMETERS['share']}={token}"
    return Share(
        id=row.id,
        sandbox_id=row.sandbox_id,
        preview_id=row.preview_id,
        port=row.port,
        path=row.path,
        scope=row.scope,
        prefix=row.prefix,
        created_at=row.created_at,
        expires_at=row.expires_at,
        token=token,
        url=url,
    )
