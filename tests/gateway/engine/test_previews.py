"""Previews and shares, without machines behind them."""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import partial

import pytest

from gateway.commands import (
    CreatePreview,
    CreateShare,
    DeletePreview,
    GetPreview,
    ListPreviews,
    ListShares,
    RevokeShare,
)
from gateway.engine import Engine
from gateway.engine.secrets import digest
from gateway.errors import GatewayError
from gateway.resources import Principal, SandboxState
from gateway.store import previews
from tests.gateway.engine.conftest import Recorder, put_running


def new_id() -> str:
    return str(uuid.uuid4())


async def test_opening_a_port_again_keeps_its_id_and_changes_its_visibility(
    offline: Engine, principal: Principal, routes: Recorder
) -> None:
    sandbox = await put_running(offline, principal)
    first = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    again = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    public = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000, "public"))
    kept = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    assert [item.id for item in (again, public, kept)] == [first.id] * 3
    assert [item.visibility for item in (first, again, public, kept)] == ["private", "private", "public", "public"]
    assert first.url == f"http://3000-{sandbox.slug}.sandbox.localhost:8080"
    assert await offline.list_previews(principal, ListPreviews(sandbox.id)) == (kept,)
    assert await offline.get_preview(principal, GetPreview(sandbox.id, first.id)) == kept
    assert routes.pushed == [sandbox.id] * 4


@pytest.mark.parametrize("port", [-1, 0, 65_536, 10_700])
async def test_a_port_that_cannot_be_opened_is_refused(offline: Engine, principal: Principal, port: int) -> None:
    sandbox = await put_running(offline, principal)
    with pytest.raises(GatewayError, match="validation_failed"):
        await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), port))


async def test_a_sandbox_of_another_workspace_does_not_exist(
    offline: Engine, principal: Principal, stranger: Principal
) -> None:
    sandbox = await put_running(offline, principal)
    preview = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    for attempt in (
        offline.create_preview(stranger, CreatePreview(sandbox.id, new_id(), 3000, "public")),
        offline.list_previews(stranger, ListPreviews(sandbox.id)),
        offline.get_preview(stranger, GetPreview(sandbox.id, preview.id)),
        offline.delete_preview(stranger, DeletePreview(sandbox.id, preview.id)),
        offline.create_share(stranger, CreateShare(sandbox.id, new_id(), preview.id)),
        offline.list_shares(stranger, ListShares(sandbox.id)),
        offline.revoke_share(stranger, RevokeShare(sandbox.id)),
    ):
        with pytest.raises(GatewayError, match="sandbox_not_found"):
            await attempt
    assert (await offline.get_preview(principal, GetPreview(sandbox.id, preview.id))).visibility == "private"


async def test_a_sandbox_that_ended_opens_nothing(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal, state=SandboxState.DESTROYED, stop_cause="timeout")
    with pytest.raises(GatewayError, match=r"sandbox_not_running: The sandbox is destroyed \(timeout\)\."):
        await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))


async def test_a_share_shows_its_token_once_and_ends_with_its_preview(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    preview = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    share = await offline.create_share(principal, CreateShare(sandbox.id, new_id(), preview.id, path="/a b"))
    whole = await offline.create_share(principal, CreateShare(sandbox.id, new_id(), ttl_s=60))
    assert share.token is not None
    assert share.token.startswith("miosa_pv_")
    assert share.url == f"{preview.url}/a%20b?preview_token={share.token}"
    assert whole.token is not None
    assert whole.token.startswith("mp_")
    assert (whole.port, whole.url) == (None, None)
    listed = await offline.list_shares(principal, ListShares(sandbox.id))
    assert listed == (replace(share, token=None, url=None), replace(whole, token=None))
    await offline.delete_preview(principal, DeletePreview(sandbox.id, preview.id))
    assert [item.id for item in await offline.list_shares(principal, ListShares(sandbox.id))] == [whole.id]
    with pytest.raises(GatewayError, match="preview_not_found"):
        await offline.get_preview(principal, GetPreview(sandbox.id, preview.id))


async def test_a_share_whose_answer_was_lost_is_replaced(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    command = CreateShare(sandbox.id, new_id())
    await offline.create_share(principal, command)
    second = await offline.create_share(principal, command)
    assert second.token is not None
    rows = await offline.context.database.lookup(partial(previews.find_shares, sandbox_id=sandbox.id, now=0.0))
    assert [row.hash for row in rows] == [digest(second.token)]


async def test_shares_are_revoked_one_by_one_or_by_preview(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    preview = await offline.create_preview(principal, CreatePreview(sandbox.id, new_id(), 3000))
    shares = [
        await offline.create_share(principal, CreateShare(sandbox.id, new_id(), preview_id))
        for preview_id in (preview.id, preview.id, preview.id, None)
    ]

    async def left() -> list[str]:
        return [item.id for item in await offline.list_shares(principal, ListShares(sandbox.id))]

    await offline.revoke_share(principal, RevokeShare(sandbox.id, share_id=shares[1].id))
    assert await left() == [shares[index].id for index in (0, 2, 3)]
    with pytest.raises(GatewayError, match="not_found"):
        await offline.revoke_share(principal, RevokeShare(sandbox.id, share_id=shares[1].id))
    await offline.revoke_share(principal, RevokeShare(sandbox.id, preview_id=preview.id))
    assert await left() == [shares[3].id]
    await offline.revoke_share(principal, RevokeShare(sandbox.id, preview_id=preview.id))
    with pytest.raises(GatewayError, match="preview_not_found"):
        await offline.revoke_share(principal, RevokeShare(sandbox.id, preview_id=new_id()))


async def test_an_expired_share_is_not_listed(offline: Engine, principal: Principal) -> None:
    sandbox = await put_running(offline, principal)
    await offline.create_share(principal, CreateShare(sandbox.id, new_id(), ttl_s=3600))
    later = replace(offline.context, clock=lambda: offline.context.clock() + 3601)
    assert await Engine(later).list_shares(principal, ListShares(sandbox.id)) == ()


@pytest.mark.parametrize("fields", [{"ttl_s": 0.5}, {"ttl_s": 31 * 86_400.0}, {"path": "docs"}])
async def test_a_share_that_makes_no_sense_is_refused(
    offline: Engine, principal: Principal, fields: dict[str, object]
) -> None:
    sandbox = await put_running(offline, principal)
    command = replace(CreateShare(sandbox.id, new_id()), **fields)  # type: ignore[arg-type]
    with pytest.raises(GatewayError, match="validation_failed"):
        await offline.create_share(principal, command)
