"""Keeps the plane told what to route where, and hears from it.

SQL is the truth. After each change the sandbox's whole route is read back and pushed with its row's version, so pushes
may overtake each other or be repeated without harm. A plane that is down or slow holds nobody up for long: the change
stands, and a plane that comes back asks for everything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from gateway.events import EventLog
from gateway.resources import Sandbox, SandboxState
from gateway.store import Database, keys, previews, sandboxes
from gateway.store.previews import PreviewRow, ShareRow
from previews.errors import PlaneError
from previews.plane import PlaneClient
from previews.routes import KeyRoute, PortRoute, SandboxRoute, ShareRule, Snapshot, TokenRule
from vmm.client import HostClient
from vmm.errors import VmmError

_log = logging.getLogger(__name__)

#: Topic of the pokes that say: the event log has grown.
_EVENTS_TOPIC = "events"
_ROUTED = (SandboxState.RUNNING, SandboxState.PAUSED)


class PlaneRoutes:
    """Implements `Routes`. Use as an async context manager; connecting goes on in the background.

    socket_path: the plane's control socket.  host: told of preview traffic, which it cannot see by itself.
    """

    def __init__(
        self,
        socket_path: str,
        database: Database,
        host: HostClient,
        events: EventLog,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._host = host
        self._events = events
        self._clock = clock
        self._active: set[str] = set()
        self._was_active = asyncio.Event()
        self._reporting: asyncio.Task[None] | None = None
        self._plane = PlaneClient(
            socket_path, on_poke=self._hear_poke, on_activity=self._hear_activity, on_new_epoch=self._sync
        )

    async def __aenter__(self) -> Self:
        await self._plane.__aenter__()
        self._reporting = asyncio.create_task(self._report_activity(), name="preview activity")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.wait([self._reporting])
        await self._plane.close()

    @property
    def is_connected(self) -> bool:
        """Whether the plane listens now."""
        return self._plane.is_connected

    async def push(self, sandbox_id: str) -> None:
        """See `Routes.push`."""

        def job(connection: sa.Connection) -> tuple[list[SandboxRoute], int]:
            found = sandboxes.find_versions(connection, sandbox_id=sandbox_id)
            return _routes(connection, found, sandbox_id, self._clock()), max((v for _, v in found), default=0)

        routes, version = await self._database.lookup(job)
        try:
            if routes:
                await self._plane.put_sandbox(routes[0])
            else:
                await self._plane.drop_sandbox(sandbox_id, version)
        except PlaneError as error:
            _note(error)

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

    def _hear_poke(self, topic: str, _seq: Any) -> None:
        if topic == _EVENTS_TOPIC:
            self._events.wake()

    def _hear_activity(self, sandbox_ids: Sequence[str]) -> None:
        self._active.update(sandbox_ids)
        self._was_active.set()

    async def _report_activity(self) -> None:
        while True:
            await self._was_active.wait()
            self._was_active.clear()
            active, self._active = self._active, set()
            try:
                await self._host.touch(sorted(active))
            except VmmError as error:
                _log.warning("preview traffic could not be reported to the host: %s", error)

    async def _sync(self) -> None:
        await self._plane.sync(self.snapshot)

    async def snapshot(self) -> Snapshot:
        """Everything, for a plane that has lost its table."""
        now = self._clock()

        def job(connection: sa.Connection) -> Snapshot:
            # Taken first: what changes while we read has a greater version and outlives the sync.
            version = _version_now()
            running = sandboxes.find_versions(connection, states=_ROUTED)
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
        ports={
            preview.port: PortRoute(
                preview.id,
                "public" if preview.visibility == "public" else "private",
                [
                    ShareRule(share.id, share.hash, share.expires_at, share.path)
                    for share in shares
                    if share.preview_id == preview.id
                ],
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
