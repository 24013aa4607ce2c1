"""API keys and tickets."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from functools import partial

import pytest

from gateway.commands import CreateApiKey, CreateTicket, ListApiKeys, RevokeApiKey
from gateway.engine import Engine
from gateway.engine.secrets import digest
from gateway.errors import GatewayError
from gateway.resources import Principal
from gateway.store import keys, tickets
from tests.gateway.engine.conftest import Recorder


def new_key(**fields: object) -> CreateApiKey:
    return replace(CreateApiKey(str(uuid.uuid4()), "ci"), **fields)  # type: ignore[arg-type]


async def test_a_key_opens_its_workspace_until_it_is_revoked(
    offline: Engine, principal: Principal, routes: Recorder
) -> None:
    key = await offline.create_api_key(principal, new_key(scopes=["sandboxes:read"]))
    assert key.secret is not None
    assert re.fullmatch(r"msk_live_[0-9A-Za-z]{43}", key.secret)
    assert key.secret.startswith(key.prefix)
    find = partial(keys.get_by_hash, secret_hash=digest(key.secret))
    row = await offline.context.database.lookup(find)
    assert row is not None
    assert (row.workspace_id, row.scopes) == (principal.workspace_id, ("sandboxes:read",))
    assert routes.keys == [key.id]

    await offline.revoke_api_key(principal, RevokeApiKey(key.id))
    assert await offline.context.database.lookup(find) is None
    assert routes.keys == [key.id, key.id]
    with pytest.raises(GatewayError, match="not_found"):
        await offline.revoke_api_key(principal, RevokeApiKey(key.id))


async def test_listed_keys_show_no_secret(offline: Engine, principal: Principal, stranger: Principal) -> None:
    key = await offline.create_api_key(principal, new_key(is_test=True))
    await offline.create_api_key(stranger, new_key())
    page = await offline.list_api_keys(principal, ListApiKeys())
    assert [(item.id, item.secret) for item in page.items] == [(key.id, None)]
    assert page.total == 1
    assert key.prefix.startswith("msk_test_")


async def test_a_key_whose_answer_was_lost_gets_another_secret(offline: Engine, principal: Principal) -> None:
    command = new_key()
    first = await offline.create_api_key(principal, command)
    second = await offline.create_api_key(principal, command)
    assert first.id == second.id
    assert first.secret is not None
    assert second.secret is not None
    lookup = offline.context.database.lookup
    assert await lookup(partial(keys.get_by_hash, secret_hash=digest(first.secret))) is None
    assert await lookup(partial(keys.get_by_hash, secret_hash=digest(second.secret))) is not None
    assert (await offline.list_api_keys(principal, ListApiKeys())).total == 1


async def test_a_key_cannot_grant_what_it_lacks(offline: Engine, principal: Principal) -> None:
    narrow = replace(principal, scopes=frozenset({"sandboxes:write", "api-keys:write"}))
    for scopes in (["usage:read"], ["*"], ["sandboxes:write", "computers:read"]):
        with pytest.raises(GatewayError, match="forbidden"):
            await offline.create_api_key(narrow, new_key(scopes=scopes))
    assert (await offline.create_api_key(narrow, new_key(scopes=["sandboxes:read"]))).scopes == ("sandboxes:read",)
    # Naming no scope means "all of mine", not "everything".
    assert set((await offline.create_api_key(narrow, new_key())).scopes) == narrow.scopes


async def test_a_key_that_is_born_expired_is_refused(offline: Engine, principal: Principal) -> None:
    with pytest.raises(GatewayError, match="validation_failed"):
        await offline.create_api_key(principal, new_key(expires_at=1.0))


async def test_second_use_of_ticket_is_refused(offline: Engine, principal: Principal) -> None:
    caller = replace(principal, scopes=frozenset({"sandboxes:read"}), external_user_id="u1")
    ticket = await offline.create_ticket(caller, CreateTicket("events", 60))
    take = partial(tickets.take, ticket_hash=digest(ticket.ticket), resource_id=None, now=ticket.expires_at - 1)
    assert await offline.context.database.write(partial(take, purpose="terminal")) is None
    assert await offline.context.database.write(partial(take, purpose="events")) == caller
    assert await offline.context.database.write(partial(take, purpose="events")) is None


async def test_an_expired_ticket_is_refused(offline: Engine, principal: Principal) -> None:
    ticket = await offline.create_ticket(principal, CreateTicket("events", 60))
    take = partial(tickets.take, ticket_hash=digest(ticket.ticket), purpose="events", resource_id=None)
    assert await offline.context.database.write(partial(take, now=ticket.expires_at)) is None
