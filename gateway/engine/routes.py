"""Keeps the plane told what to route where.

SQL is the truth. After each change the sandbox's whole route is read back and pushed with its row's version, so pushes
may overtake each other or be repeated without harm. A plane that is down or slow holds nobody up for long: the change
stands, and a plane that comes back asks for everything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import sqlalchemy as sa

from gateway.resources import Sandbox, SandboxState
from gateway.store import Database, keys, previews, sandboxes
from gateway.store.previews import PreviewRow, ShareRow
from previews.errors import PlaneError
from previews.plane import PlaneClient
from previews.routes import KeyRoute, PolicyRule, PortRoute, SandboxRoute, ShareRule, Snapshot, TokenRule

_log = logging.getLogger(__name__)

#: Topic of the pokes that say: the event log has grown.
_EVENTS_TOPIC = "events"
_ROUTED = (SandboxState.RUNNING, SandboxState.PAUSED)


class Routes(Protocol):
    """What the engine asks. None of these raises: a route that cannot be in force now is put in force later."""

    async def push(self, sandbox_id: str) -> None:
        """Have what SQL says about a sandbox in force, or dropped when it runs no more."""

    async def push_new(self, sandbox: Sandbox, version: int) -> None:
        """Have the route of a sandbox in force that is being recorded with that version, without asking SQL."""

    async def drop(self, sandbox_id: str, version: int) -> None:
        """Have nothing lead to a sandbox that has ended with that version, without asking SQL."""

    async def push_running(self, sandbox_id: str, address: str) -> None:
        """Let visitors in to a sandbox that has woken at an address, before SQL says so. `push` has to follow."""

    async def push_key(self, key_id: str) -> None:
        """Have a key open its workspace's previews, or nothing when it is revoked."""

    def poke(self) -> None:
        """Tell the other workers that the event log has grown."""


class PlaneRoutes:
    """Tells a plane."""

    def __init__(self, database: Database, plane: PlaneClient, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._plane = plane
        self._clock = clock

    async def push(self, sandbox_id: str) -> None:
        """See `Routes.push`."""
        route, version = await self._route(sandbox_id)
        if route is not None:
            await self._put(route)
        else:
            await self.drop(sandbox_id, version)

    async def push_new(self, sandbox: Sandbox, version: int) -> None:
        """See `Routes.push_new`."""
        await self._put(_route(sandbox, version, [], []))

    async def drop(self, sandbox_id: str, version: int) -> None:
        """See `Routes.drop`."""
        try:
            await self._plane.drop_sandbox(sandbox_id, version)
        except PlaneError as error:
            _note(error)

    async def push_running(self, sandbox_id: str, address: str) -> None:
        """See `Routes.push_running`."""
        route, version = await self._route(sandbox_id)
        if route is None or (route.state, route.address) == ("running", address):
            return
        # Older than any change that is still to be committed, so none of those is lost.
        await self._put(replace(route, v=version + 1, state="running", address=address))

    async def _put(self, route: SandboxRoute) -> None:
        try:
            await self._plane.put_sandbox(route)
        except PlaneError as error:
            _note(error)

    async def _route(self, sandbox_id: str) -> tuple[SandboxRoute | None, int]:
        """What SQL says now, and the version of it."""

        def job(connection: sa.Connection) -> tuple[SandboxRoute | None, int]:
            found = sandboxes.get_version(connection, sandbox_id)
            if found is None:
                return None, 0
            routes = _routes(connection, [found], sandbox_id, self._clock())
            return routes[0] if routes else None, found[1]

        return await self._database.lookup(job)

    async def push_key(self, key_id: str) -> None:
        """See `Routes.push_key`."""
        key = await self._database.lookup(lambda connection: keys.get_state(connection, key_id))
        if key is None:
            return
        try:
            if key.is_revoked:
                await self._plane.drop_key(key.hash, key.version)
            else:
                await self._plane.put_key(_key_route(key))
        except PlaneError as error:
            _note(error)

    def poke(self) -> None:
        """See `Routes.poke`."""
        self._plane.poke(_EVENTS_TOPIC, 0)

    async def snapshot(self) -> Snapshot:
        """Everything, for a plane that has lost its table."""
        now = self._clock()

        def job(connection: sa.Connection) -> Snapshot:
            # Taken first: what changes while we read has a greater version and outlives the sync.
            version = _version_now()
            running = sandboxes.find_versions(connection, _ROUTED)
            valid = keys.valid(connection, now=now)
            return Snapshot(version, _routes(connection, running, None, now), [_key_route(key) for key in valid])

        return await self._database.read(job)


def _routes(
    connection: sa.Connection, found: Sequence[tuple[Sandbox, int]], only: str | None, now: float
) -> list[SandboxRoute]:
    """The routes of those that run. only: the one sandbox it is about, if it is one."""
    opened: dict[str, list[PreviewRow]] = {}
    for preview in previews.find(connection, only):
        opened.setdefault(preview.sandbox_id, []).append(preview)
    shared: dict[str, list[ShareRow]] = {}
    for share in previews.find_shares(connection, only, now=now):
        shared.setdefault(share.sandbox_id, []).append(share)
    return [
        _route(sandbox, version, opened.get(sandbox.id, []), shared.get(sandbox.id, []))
        for sandbox, version in found
        if sandbox.state in _ROUTED
    ]


def _route(sandbox: Sandbox, version: int, opened: Sequence[PreviewRow], shares: Sequence[ShareRow]) -> SandboxRoute:
    return SandboxRoute(
        v=version,
        id=sandbox.id,
        slug=sandbox.slug,
        owner=sandbox.workspace_id,
        address=sandbox.address or "",
        state=sandbox.pause_kind.value if sandbox.pause_kind is not None else "running",
        auto_resume=sandbox.auto_resume,
        ports={
            preview.port: PortRoute(
                preview.id,
                "public" if preview.visibility == "public" else "private",
                [
                    ShareRule(share.id, share.hash, share.expires_at, share.path)
                    for share in shares
                    if share.preview_id == preview.id
                ],
                None if preview.policy is None else PolicyRule(**preview.policy),
            )
            for preview in opened
        },
        tokens=[
            TokenRule(share.hash, share.expires_at, path=share.path) for share in shares if share.preview_id is None
        ],
    )


def _key_route(key: keys.KeyState) -> KeyRoute:
    return KeyRoute(key.version, key.hash, key.workspace_id, key.expires_at)


def _version_now() -> int:
    return time.time_ns() // 1000


def _note(error: PlaneError) -> None:
    if error.is_unavailable:
        _log.info("the plane is away; it asks for everything when it is back")
    else:
        _log.error("the plane refused a route: %s", error)
