"""API keys of the caller's workspace, and short-lived keys bound to one of the caller's own users."""

from __future__ import annotations

import time
from typing import Annotated, Literal, TypedDict

import msgspec
from msgspec import Meta

from gateway import commands, resources
from gateway.dialects.miosa import decode, paging
from gateway.dialects.miosa.answers import iso, iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import NOTHING, Route, many, one
from gateway.errors import invalid
from gateway.pipeline import Call

READ = "api-keys:read"
WRITE = "api-keys:write"

SCOPED_TTL_S = 3600
SCOPED_TTL_S_MAX = 86400

Scope = Literal[
    "sandboxes:read",
    "sandboxes:write",
    "computers:read",
    "computers:write",
    "deployments:read",
    "deployments:write",
    "api-keys:read",
    "api-keys:write",
    "usage:read",
    "domains:write",
    "data:write",
    "audit:read",
]
Scopes = Annotated[list[Scope], Meta(max_length=32)]
KeyName = Annotated[str, Meta(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]*$")]


class CreateApiKeyRequest(msgspec.Struct, kw_only=True):
    """A name, and what the key may do; no scopes means everything its maker may."""

    name: KeyName
    scopes: Scopes = []
    expires_at: str | None = None
    environment: Literal["live", "test"] = "live"


class CreateScopedKeyRequest(msgspec.Struct, kw_only=True):
    """A key that acts for one of the caller's own users."""

    external_user_id: decode.Name
    scopes: Scopes
    expires_at: str | None = None


class CreateScopedTokenRequest(msgspec.Struct, kw_only=True):
    """A key that acts for one of the caller's own users, for at most a day."""

    user_id: decode.Name
    workspace_id: decode.Text | None = None
    expires_in_seconds: Annotated[int, Meta(ge=1, le=SCOPED_TTL_S_MAX)] = SCOPED_TTL_S
    scopes: Scopes = []


class ApiKey(TypedDict):
    """A key without its secret."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    external_user_id: str | None
    last_used_at: str | None
    expires_at: str | None
    created_at: str


class ApiKeyCreated(ApiKey):
    """A key with its secret, which is shown here and never again."""

    key: str
    token: str


def api_key(item: resources.ApiKey) -> ApiKey:
    """A key in MIOSA's words."""
    return ApiKey(
        id=item.id,
        name=item.name,
        prefix=item.prefix,
        scopes=list(item.scopes),
        external_user_id=item.external_user_id,
        last_used_at=iso(item.last_used_at),
        expires_at=iso(item.expires_at),
        created_at=iso_time(item.created_at),
    )


async def _create(
    call: Call,
    name: str,
    scopes: Scopes,
    expires_at: float | None,
    *,
    is_test: bool = False,
    external_user_id: str | None = None,
) -> ApiKeyCreated:
    command = commands.CreateApiKey(
        call.effect_id,
        name,
        scopes,
        expires_at,
        is_test=is_test,
        external_user_id=external_user_id,
    )
    item = await call.engine.create_api_key(call.principal, command)
    secret = item.secret or ""
    return ApiKeyCreated(**api_key(item), key=secret, token=secret)


async def create(call: Call, body: CreateApiKeyRequest) -> ApiKeyCreated:
    """Create a key."""
    expires_at = decode.timestamp("expires_at", body.expires_at)
    return await _create(call, body.name, body.scopes, expires_at, is_test=body.environment == "test")


async def create_scoped(call: Call, body: CreateScopedKeyRequest) -> ApiKeyCreated:
    """Create a key bound to one of your own users; for an hour when nothing is said."""
    expires_at = first(decode.timestamp("expires_at", body.expires_at), time.time() + SCOPED_TTL_S)
    user = body.external_user_id
    return await _create(call, f"scoped: {user}"[:80], body.scopes, expires_at, external_user_id=user)


async def create_scoped_token(call: Call, body: CreateScopedTokenRequest) -> ApiKeyCreated:
    """Create a short-lived key bound to one of your own users."""
    if body.workspace_id not in (None, call.principal.workspace_id):
        raise invalid("workspace_id", "must be the workspace of the API key")
    expires_at = time.time() + body.expires_in_seconds
    user = body.user_id
    return await _create(call, f"scoped: {user}"[:80], body.scopes, expires_at, external_user_id=user)


async def list_all(call: Call, query: paging.PageQuery) -> resources.Page[ApiKey]:
    """List keys that are not revoked, newest first."""
    page, page_size = paging.page(call.request, query)
    return paging.encode(
        await call.engine.list_api_keys(call.principal, commands.ListApiKeys(page, page_size)), api_key
    )


async def revoke(call: Call) -> None:
    """Revoke a key; in force within a second."""
    await call.engine.revoke_api_key(call.principal, commands.RevokeApiKey(decode.resource_id(call.request, "key_id")))


ROUTES = (
    Route("POST", "/api-keys", create, one(ApiKeyCreated, status=201), WRITE, CreateApiKeyRequest),
    Route("GET", "/api-keys", list_all, many(ApiKey), READ, query=paging.PageQuery),
    Route("DELETE", "/api-keys/{key_id}", revoke, NOTHING, WRITE),
    Route("POST", "/api-keys/scoped", create_scoped, one(ApiKeyCreated, status=201), WRITE, CreateScopedKeyRequest),
    Route(
        "POST", "/tokens/scoped", create_scoped_token, one(ApiKeyCreated, status=201), WRITE, CreateScopedTokenRequest
    ),
)
