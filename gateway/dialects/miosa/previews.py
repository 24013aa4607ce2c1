"""Previews (ports on hosts of their own), the links that share them, and tokens for browsers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from gateway import commands, resources
from gateway.dialects.miosa import answers, decode
from gateway.dialects.miosa.answers import iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import NOTHING, Route, many, one
from gateway.pipeline import Call

READ = "sandboxes:read"
WRITE = "sandboxes:write"

#: The port of a sandbox's web application when `expose` names none.
DEFAULT_PORT = 3000
SHARE_TTL_S = 3600.0

Ttl = Annotated[float, Meta(ge=1, le=30 * 24 * 3600)]
Visibility = Literal["public", "private"]


class PolicyRequest(msgspec.Struct, kw_only=True):
    """What pages of other sites may do; what is null is left to the server in the sandbox.

    allowed_origins: whose scripts may read it.  frame_ancestors: who may show it in a frame; empty for nobody.
    """

    allowed_origins: Annotated[list[decode.Origin], Meta(max_length=50)] | None = None
    allow_credentials: bool = False
    frame_ancestors: Annotated[list[decode.FrameSource], Meta(max_length=50)] | None = None

    def policy(self) -> resources.PreviewPolicy:
        """The same for the engine."""
        return resources.PreviewPolicy(self.allowed_origins, self.allow_credentials, self.frame_ancestors)


class CreatePreviewRequest(msgspec.Struct):
    """Which port, and for whom; private when nothing is said."""

    port: decode.Port
    visibility: Visibility | None = None
    policy: PolicyRequest | None = None


class UpdatePreviewRequest(msgspec.Struct):
    """What to change; what is absent stays."""

    visibility: Visibility | None = None
    policy: PolicyRequest | None = None


class ExposeRequest(msgspec.Struct):
    """Which port; 3000 when nothing is said."""

    port: decode.Port = DEFAULT_PORT
    visibility: Visibility | None = None


class ShareRequest(msgspec.Struct, kw_only=True):
    """How long the link opens, and below which path."""

    ttl_seconds: Ttl | None = None
    expires_in: Ttl | None = None
    expires_in_sec: Ttl | None = None
    path: decode.UrlPath = "/"
    scope: Literal["read", "write"] = "read"
    port: decode.Port | None = None

    @property
    def ttl_s(self) -> float:
        """Seconds, an hour when nothing is said."""
        seconds: float = first(self.ttl_seconds, self.expires_in, self.expires_in_sec, SHARE_TTL_S)
        return seconds


class Policy(TypedDict):
    """What pages of other sites may do."""

    allowed_origins: list[str] | None
    allow_credentials: bool
    frame_ancestors: list[str] | None


class Preview(TypedDict):
    """A port opened on a host of its own."""

    id: str
    sandbox_id: str
    port: int
    url: str
    preview_url: str
    visibility: Visibility
    policy: Policy
    state: Literal["ready"]
    status: Literal["ready"]
    created_at: str


class Share(TypedDict):
    """A link for strangers, without its token."""

    id: str
    share_id: str
    sandbox_id: str
    preview_id: str | None
    port: int | None
    path: str
    scope: str
    share_token_prefix: str
    share_token_expires_at: str
    created_at: str
    expires_at: str


class ShareCreated(Share):
    """A link for strangers; the token is shown here and never again."""

    share_url: str | None
    url: str | None
    preview_token: str | None
    token: str | None
    preview: Any


def policy(item: resources.PreviewPolicy) -> Policy:
    """A policy in MIOSA's words."""
    return Policy(
        allowed_origins=None if item.allowed_origins is None else list(item.allowed_origins),
        allow_credentials=item.allow_credentials,
        frame_ancestors=None if item.frame_ancestors is None else list(item.frame_ancestors),
    )


def preview(item: resources.Preview) -> Preview:
    """A preview in MIOSA's words."""
    return Preview(
        id=item.id,
        sandbox_id=item.sandbox_id,
        port=item.port,
        url=item.url,
        preview_url=item.url,
        visibility=item.visibility,
        policy=policy(item.policy),
        state="ready",
        status="ready",
        created_at=iso_time(item.created_at),
    )


def share(item: resources.Share) -> Share:
    """A share in MIOSA's words."""
    return Share(
        id=item.id,
        share_id=item.id,
        sandbox_id=item.sandbox_id,
        preview_id=item.preview_id,
        port=item.port,
        path=item.path,
        scope=item.scope,
        share_token_prefix=item.prefix[:12],
        share_token_expires_at=iso_time(item.expires_at),
        created_at=iso_time(item.created_at),
        expires_at=iso_time(item.expires_at),
    )


def share_created(item: resources.Share, of: Preview | None) -> ShareCreated:
    """A share with its token."""
    return ShareCreated(
        **share(item), share_url=item.url, url=item.url, preview_token=item.token, token=item.token, preview=of
    )


async def _open_port(
    call: Call,
    port: int,
    visibility: Visibility | None,
    *,
    if_new: Visibility = "private",
    policy: PolicyRequest | None = None,
) -> Preview:
    command = commands.CreatePreview(
        decode.sandbox_id(call), call.effect_id, port, visibility, if_new, _given_policy(policy)
    )
    return preview(await call.engine.create_preview(call.principal, command))


async def create(call: Call, body: CreatePreviewRequest) -> Preview:
    """Open a port; opening it again keeps its id."""
    return await _open_port(call, body.port, body.visibility, policy=body.policy)


async def expose(call: Call, body: ExposeRequest) -> Preview:
    """Open a port and get its address.

    A port that was not open becomes public unless `visibility` says otherwise: clients use the address as it is.
    """
    return await _open_port(call, body.port, body.visibility, if_new="public")


async def list_all(call: Call) -> resources.Page[Preview]:
    """List open ports."""
    found = await call.engine.list_previews(call.principal, commands.ListPreviews(decode.sandbox_id(call)))
    return answers.whole([preview(item) for item in found])


async def _preview(call: Call) -> Preview:
    preview_id = decode.resource_id(call.request, "preview_id", missing="preview_not_found")
    command = commands.GetPreview(decode.sandbox_id(call), preview_id)
    return preview(await call.engine.get_preview(call.principal, command))


async def get(call: Call) -> Preview:
    """Get a preview."""
    return await _preview(call)


async def update(call: Call, body: UpdatePreviewRequest) -> Preview:
    """Change who may open a port, and what pages of other sites may do with it."""
    preview_id = decode.resource_id(call.request, "preview_id", missing="preview_not_found")
    command = commands.UpdatePreview(decode.sandbox_id(call), preview_id, body.visibility, _given_policy(body.policy))
    return preview(await call.engine.update_preview(call.principal, command))


def _given_policy(body: PolicyRequest | None) -> resources.PreviewPolicy | None:
    return None if body is None else body.policy()


async def delete(call: Call) -> None:
    """Close a port again; its links end."""
    preview_id = decode.resource_id(call.request, "preview_id", missing="preview_not_found")
    await call.engine.delete_preview(call.principal, commands.DeletePreview(decode.sandbox_id(call), preview_id))


async def share_preview(call: Call, body: ShareRequest) -> ShareCreated:
    """Make a link that opens a private preview for strangers."""
    of = await _preview(call)
    command = commands.CreateShare(
        of["sandbox_id"], call.effect_id, of["id"], ttl_s=body.ttl_s, path=body.path, scope=body.scope
    )
    return share_created(await call.engine.create_share(call.principal, command), of)


async def revoke_preview_shares(call: Call) -> None:
    """End every link of a preview."""
    preview_id = decode.resource_id(call.request, "preview_id", missing="preview_not_found")
    command = commands.RevokeShare(decode.sandbox_id(call), preview_id=preview_id)
    await call.engine.revoke_share(call.principal, command)


async def create_share(call: Call, body: ShareRequest) -> ShareCreated:
    """Make a link to every port of a sandbox, or to one `port`."""
    sandbox_id = decode.sandbox_id(call)
    of = None if body.port is None else await _open_port(call, body.port, None)
    command = commands.CreateShare(
        sandbox_id,
        call.effect_id,
        None if of is None else of["id"],
        ttl_s=body.ttl_s,
        path=body.path,
        scope=body.scope,
    )
    return share_created(await call.engine.create_share(call.principal, command), of)


async def list_shares(call: Call) -> resources.Page[Share]:
    """List links that still open something."""
    found = await call.engine.list_shares(call.principal, commands.ListShares(decode.sandbox_id(call)))
    return answers.whole([share(item) for item in found])


async def revoke_share(call: Call) -> None:
    """End a link."""
    command = commands.RevokeShare(decode.sandbox_id(call), share_id=decode.resource_id(call.request, "share_id"))
    await call.engine.revoke_share(call.principal, command)


_ONE = "/sandboxes/{sandbox_id}"
_PREVIEW = _ONE + "/previews/{preview_id}"

ROUTES = (
    Route("POST", _ONE + "/previews", create, one(Preview, status=201), WRITE, CreatePreviewRequest),
    Route("GET", _ONE + "/previews", list_all, many(Preview), READ),
    Route("GET", _PREVIEW, get, one(Preview), READ),
    Route("PATCH", _PREVIEW, update, one(Preview), WRITE, UpdatePreviewRequest),
    Route("DELETE", _PREVIEW, delete, NOTHING, WRITE),
    Route("POST", _PREVIEW + "/share", share_preview, one(ShareCreated, status=201), WRITE, ShareRequest),
    Route("DELETE", _PREVIEW + "/share", revoke_preview_shares, NOTHING, WRITE),
    Route("POST", _ONE + "/expose", expose, one(Preview), WRITE, ExposeRequest),
    Route("POST", _ONE + "/shares", create_share, one(ShareCreated, status=201), WRITE, ShareRequest),
    Route("GET", _ONE + "/shares", list_shares, many(Share), READ),
    Route("DELETE", _ONE + "/shares/{share_id}", revoke_share, NOTHING, WRITE),
    Route("POST", _ONE + "/preview-token", create_share, one(ShareCreated, status=201), WRITE, ShareRequest),
)
