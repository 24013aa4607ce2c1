"""What the engine changes is in force at a real plane, in front of a real gVisor sandbox, when the answer comes."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gateway.commands import (
    CreateApiKey,
    CreatePreview,
    CreateShare,
    DeletePreview,
    GetSandbox,
    PauseSandbox,
    ResumeSandbox,
    RevokeApiKey,
    RevokeShare,
    StartProcess,
    UpdateSandbox,
)
from gateway.engine import Engine
from gateway.engine.routes import PlaneRoutes
from gateway.events import EventLog
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.wakes import WakeRelay
from previews.plane import PlaneClient
from tests.gateway.engine.conftest import make_principal, put_running
from tests.previews.harness import Plane
from vmm.types import StopCause

PORT = 8000


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        plane = Plane(Path(directory))
        await plane.start()
        yield plane
        await plane.stop()


@dataclass
class Served:
    """An engine whose routes reach a plane, and one of its sandboxes with an HTTP server inside."""

    engine: Engine
    routes: PlaneRoutes
    principal: Principal
    sandbox: Sandbox
    plane: Plane
    client: PlaneClient

    async def status(self, target: str = "/", *, key: str | None = None) -> int:
        fields = [] if key is None else [f"Authorization: Bearer {key}"]
        host = f"{PORT}-{self.sandbox.slug}.sandbox.localhost"
        return (await self.plane.request("GET", host, target, *fields)).status

    async def open_port(self, visibility: str | None = None) -> str:
        command = CreatePreview(self.sandbox.id, new_id(), PORT, visibility)  # type: ignore[arg-type]
        return (await self.engine.create_preview(self.principal, command)).id


@pytest.fixture
async def served(real: Engine, principal: Principal, machine_id: str, plane: Plane) -> AsyncIterator[Served]:
    context = real.context
    async with AsyncExitStack() as stack:

        async def sync() -> None:
            await client.sync(routes.snapshot)

        async def wake(sandbox_id: str) -> None:
            await engine.pausing.wake(sandbox_id)

        def refuse(sandbox_id: str) -> None:
            client.refuse_wake(sandbox_id)

        wakes = WakeRelay(wake, refuse)
        client = PlaneClient(
            str(plane.control_socket),
            on_poke=lambda _topic, _seq: events.wake(),
            on_wake=wakes.note,
            on_new_epoch=sync,
        )
        routes = PlaneRoutes(context.database, client)
        events = EventLog(context.database, routes.poke)
        engine = Engine(replace(context, routes=routes, events=events))
        await stack.enter_async_context(client)
        await client.wait_connected(10)
        waking = asyncio.create_task(wakes.run())
        stack.callback(waking.cancel)
        address = (await context.host.get_machine(machine_id)).address
        sandbox = await put_running(engine, principal, id=machine_id, address=address)
        await routes.push(sandbox.id)
        command = StartProcess(sandbox.id, "http-server", argv=["python3", "-m", "http.server", str(PORT)], cwd="/etc")
        await engine.start_process(principal, command)
        served = Served(engine, routes, principal, sandbox, plane, client)
        yield served


def new_id() -> str:
    return str(uuid.uuid4())


async def until_status(served: Served, wanted: int, target: str = "/") -> None:
    async with asyncio.timeout(60):
        while await served.status(target) != wanted:
            await asyncio.sleep(0.02)


async def test_a_public_port_is_open_to_all_until_it_is_closed(served: Served) -> None:
    preview_id = await served.open_port("public")
    await until_status(served, 200)
    await served.open_port("private")
    assert await served.status() in {401, 403}
    await served.open_port("public")
    assert await served.status() == 200
    await served.engine.delete_preview(served.principal, DeletePreview(served.sandbox.id, preview_id))
    assert await served.status() in {401, 403}


async def test_a_private_port_opens_for_its_owners_keys_only(served: Served) -> None:
    await served.open_port("public")
    await until_status(served, 200)
    await served.open_port("private")
    engine = served.engine
    mine = await engine.create_api_key(served.principal, CreateApiKey(new_id(), "mine"))
    stranger = await make_principal(engine.context.database, "stranger")
    other = await engine.create_api_key(stranger, CreateApiKey(new_id(), "other"))
    assert await served.status(key=mine.secret) == 200
    assert await served.status(key=other.secret) in {401, 403}
    await engine.revoke_api_key(served.principal, RevokeApiKey(mine.id))
    assert await served.status(key=mine.secret) in {401, 403}


async def test_a_share_opens_its_path_until_it_is_revoked(served: Served) -> None:
    await served.open_port("public")
    await until_status(served, 200)
    preview_id = await served.open_port("private")
    engine, sandbox = served.engine, served.sandbox
    share = await engine.create_share(served.principal, CreateShare(sandbox.id, new_id(), preview_id, path="/passwd"))
    assert share.url is not None
    link = urlsplit(share.url)
    query = f"?{link.query}"
    opened = {200, 302, 303, 307}
    assert await served.status(link.path + query) in opened
    assert await served.status("/group" + query) not in opened
    whole = await engine.create_share(served.principal, CreateShare(sandbox.id, new_id()))
    assert await served.status(f"/group?mt={whole.token}") in opened
    await engine.revoke_share(served.principal, RevokeShare(sandbox.id, share_id=share.id))
    assert await served.status(link.path + query) not in opened
    assert await served.status(f"/group?mt={whole.token}") in opened


async def test_a_plane_that_lost_everything_is_told_everything(served: Served) -> None:
    await served.open_port("public")
    await until_status(served, 200)
    key = await served.engine.create_api_key(served.principal, CreateApiKey(new_id(), "k"))
    await served.plane.kill()
    # The change stands although nobody can be told of it now.
    await served.open_port("private")
    await served.plane.start()
    await served.client.wait_connected(10)
    async with asyncio.timeout(60):
        while await served.status(key=key.secret) != 200:
            await asyncio.sleep(0.02)
    assert await served.status() in {401, 403}


async def test_an_ended_sandbox_is_gone(served: Served) -> None:
    await served.open_port("public")
    await until_status(served, 200)
    await served.engine.sandboxes.end(served.sandbox, SandboxState.DESTROYED, StopCause.REQUESTED)
    assert await served.status() in {404, 410}


async def test_other_workers_are_woken_by_a_poke(served: Served, plane: Plane) -> None:
    woken = asyncio.Event()
    async with PlaneClient(str(plane.control_socket), on_poke=lambda topic, _: woken.set()) as other:
        await other.wait_connected(10)
        served.engine.context.events.announce()
        async with asyncio.timeout(60):
            await woken.wait()


@pytest.mark.parametrize("hibernate", [False, True])
async def test_visitors_of_a_paused_sandbox_wake_it_and_are_served(served: Served, *, hibernate: bool) -> None:
    await served.open_port("public")
    await until_served(served)
    paused = await served.engine.pause_sandbox(served.principal, PauseSandbox(served.sandbox.id, hibernate=hibernate))
    assert paused.state is SandboxState.PAUSED
    assert await asyncio.gather(*(served.status() for _ in range(5))) == [200] * 5
    async with asyncio.timeout(60):
        while await state(served) is not SandboxState.RUNNING:
            await asyncio.sleep(0.01)
    assert await served.status() == 200


async def test_visitors_do_not_wake_one_that_shall_not(served: Served) -> None:
    await served.open_port("public")
    await until_served(served)
    engine, sandbox_id = served.engine, served.sandbox.id
    await engine.pause_sandbox(served.principal, PauseSandbox(sandbox_id))
    await engine.update_sandbox(served.principal, UpdateSandbox(sandbox_id, auto_resume=False))
    assert await served.status() == 409
    assert await state(served) is SandboxState.PAUSED
    await engine.update_sandbox(served.principal, UpdateSandbox(sandbox_id, auto_resume=True))
    assert await served.status() == 200
    await engine.resume_sandbox(served.principal, ResumeSandbox(sandbox_id))


async def state(served: Served) -> SandboxState:
    return (await served.engine.get_sandbox(served.principal, GetSandbox(served.sandbox.id))).state


async def until_served(served: Served) -> None:
    async with asyncio.timeout(60):
        while await served.status() != 200:
            await asyncio.sleep(0.05)
