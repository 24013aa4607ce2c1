"""The life of sandboxes.

    provisioning ─▶ running ◀─▶ paused
         │             └───────────┴─▶ destroyed(cause)
         └─▶ error(cause)

How they come to be is in gateway/engine/creation.py, pauses in pausing.py. Changes of state are conditional updates: of
all that see the same machine end, one changes the row and writes the event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, TypedDict

import sqlalchemy as sa

from gateway.commands import (
    DestroySandbox,
    ExtendSandbox,
    GetSandbox,
    GetSandboxByName,
    ListSandboxes,
    UpdateSandbox,
    WaitReady,
)
from gateway.engine.context import LIVING, Context, owned_row, require
from gateway.engine.plan import check_timeout
from gateway.engine.translate import from_vmm
from gateway.errors import GatewayError
from gateway.events import sandbox_event
from gateway.resources import IdleAction, Page, Principal, Sandbox, SandboxState
from gateway.store import sandboxes as rows
from vmm.errors import LinkError, VmmError
from vmm.types import IdleAction as MachineIdleAction
from vmm.types import MachineInfo, StopCause

_log = logging.getLogger(__name__)

#: How long a caller who destroys waits for a host that does not answer.
_END_TIMEOUT_S = 5.0


class Timers(TypedDict):
    """What the host does by itself, in its words."""

    expires_at: float | None
    idle_timeout_s: float | None
    idle_action: MachineIdleAction
    auto_resume: bool
    hibernate_after_s: float | None


class SandboxService:
    """Commands about sandboxes as a whole."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def end(
        self,
        sandbox: Sandbox,
        state: SandboxState,
        cause: StopCause,
        detail: str | None = None,
        *,
        only_in: tuple[SandboxState, ...] = LIVING,
    ) -> bool:
        """Record that a sandbox ended; False if somebody else already did."""
        version = await self._record_end(sandbox, state, cause, detail, only_in=only_in)
        if version is not None:
            await self._context.routes.drop(sandbox.id, version)
        return version is not None

    async def _record_end(
        self,
        sandbox: Sandbox,
        state: SandboxState,
        cause: StopCause,
        detail: str | None = None,
        *,
        only_in: tuple[SandboxState, ...] = LIVING,
    ) -> int | None:
        """The version of the change, None if there is nothing to change. The route is still to be dropped."""
        context = self._context
        at = context.clock()

        def job(connection: sa.Connection) -> int | None:
            if not rows.change(
                connection,
                sandbox.id,
                only_in=only_in,
                state=state,
                stop_cause=cause,
                stop_detail=detail,
                destroyed_at=at,
                address=None,
            ):
                return None
            rows.end_pause(connection, sandbox.id, at)
            sandbox_event(connection, state.value, sandbox, at=at, cause=cause.value)
            return rows.version_of(connection, sandbox.id)

        version = await context.database.write(job)
        if version is not None:
            context.events.announce()
        return version

    async def list(self, principal: Principal, command: ListSandboxes) -> Page[Sandbox]:
        """One page of the workspace's sandboxes."""
        wanted = rows.Filter(principal.workspace_id, command.state, command.tags, command.attribution)
        offset = (command.page - 1) * command.page_size
        items, total = await self._context.database.read(
            lambda connection: rows.find(connection, wanted, offset=offset, limit=command.page_size)
        )
        return Page(tuple(items), command.page, command.page_size, total)

    async def get(self, principal: Principal, command: GetSandbox) -> Sandbox:
        """By id. Raises sandbox_not_found."""
        return await self._context.sandbox(principal, command.sandbox_id)

    async def get_by_name(self, principal: Principal, command: GetSandboxByName) -> Sandbox:
        """By name or slug, living ones only. Raises sandbox_not_found."""
        found = await self._context.database.lookup(
            lambda connection: rows.get_by_name(connection, principal.workspace_id, command.name)
        )
        if found is None:
            raise GatewayError("sandbox_not_found", f"No living sandbox is named {command.name!r}.")
        return found

    async def update(self, principal: Principal, command: UpdateSandbox) -> Sandbox:
        """Change what is given. Raises sandbox_not_found, sandbox_not_running, name_taken."""
        context = self._context
        now = context.clock()

        def job(connection: sa.Connection) -> Sandbox:
            before = require(owned_row(connection, principal, command.sandbox_id), *LIVING)
            name = command.name
            if name is not None and rows.is_name_taken(connection, before.workspace_id, name, but=before.id):
                raise GatewayError("name_taken", f"Another sandbox is named {name!r}.")
            rows.change(connection, before.id, **self._changes(before, command, now))
            return owned_row(connection, principal, command.sandbox_id)

        sandbox = await context.database.write(job)
        if any(getattr(command, name) is not None for name in _TIMERS):
            await self._push_timers(sandbox)
        if command.auto_resume is not None:
            await context.routes.push(sandbox.id)
        return sandbox

    def _changes(self, before: Sandbox, command: UpdateSandbox, now: float) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if command.name is not None:
            changes["name"] = command.name
        if command.tags is not None:
            changes["tags"] = tuple(dict.fromkeys(command.tags))
        if command.metadata is not None:
            changes["metadata"] = dict(command.metadata)
        if command.always_on is True:
            changes |= {"always_on": True, "timeout_s": None, "expires_at": None}
            changes |= {"idle_timeout_s": None, "idle_action": IdleAction.KEEP}
        elif command.always_on is False and before.always_on:
            settings = self._context.settings
            timeout_s = settings.sandbox_timeout_s
            changes |= {"always_on": False, "timeout_s": timeout_s, "expires_at": now + timeout_s}
            changes["idle_action"] = IdleAction(settings.sandbox_idle_action)
        for name in ("idle_timeout_s", "idle_action", "auto_resume", "hibernate_after_s"):
            if getattr(command, name) is not None:
                changes[name] = getattr(command, name)
        return changes

    async def extend(self, principal: Principal, command: ExtendSandbox) -> Sandbox:
        """Move its end. Raises sandbox_not_found, sandbox_not_running, validation_failed; conflict if always on."""
        context = self._context
        check_timeout("timeout", command.timeout_s, context.settings)
        expires_at = context.clock() + command.timeout_s

        def job(connection: sa.Connection) -> Sandbox:
            before = require(owned_row(connection, principal, command.sandbox_id), *LIVING)
            if before.always_on:
                raise GatewayError("conflict", "The sandbox is always on and has no end to move.")
            moved: dict[str, Any] = {"expires_at": expires_at}
            if before.expires_at is None:
                # One that its timeout pauses has no end; its time without use is what can be extended.
                moved = {"idle_timeout_s": command.timeout_s}
            rows.change(connection, before.id, timeout_s=command.timeout_s, **moved)
            return owned_row(connection, principal, command.sandbox_id)

        sandbox = await context.database.write(job)
        await self._push_timers(sandbox)
        return sandbox

    async def _push_timers(self, sandbox: Sandbox) -> None:
        try:
            await self._context.host.update_machine(sandbox.id, **timers(sandbox))
        except LinkError as error:
            # What SQL says holds; the reconciler tells the host when it is back.
            _log.warning("the timers of %s could not be set now: %s", sandbox.id, error)
        except VmmError as error:
            raise from_vmm(error) from error

    async def destroy(self, principal: Principal, command: DestroySandbox) -> None:
        """End a sandbox. Raises sandbox_not_found.

        When this returns nobody reaches it any more; a host that cannot be told now is told by the reconciler.
        """
        sandbox = await self._context.sandbox(principal, command.sandbox_id)
        version = await self._record_end(sandbox, SandboxState.DESTROYED, StopCause.REQUESTED)
        if version is not None:
            await asyncio.gather(self._context.routes.drop(sandbox.id, version), self.end_machine(sandbox.id))

    async def end_machine(self, sandbox_id: str) -> None:
        """Have the host destroy a machine; one that cannot be told now is told by the reconciler."""
        try:
            deadline = time.monotonic() + _END_TIMEOUT_S
            await self._context.host.destroy_machine(sandbox_id, StopCause.REQUESTED, deadline=deadline)
        except VmmError as error:
            _log.warning("machine %s could not be destroyed now, left to the reconciler: %s", sandbox_id, error)

    async def wait_ready(self, principal: Principal, command: WaitReady) -> Sandbox:
        """The sandbox once it is not provisioning any more. Raises sandbox_not_found, timeout."""
        try:
            async with asyncio.timeout(command.timeout_s):
                while True:
                    mark = self._context.events.mark()
                    sandbox = await self._context.sandbox(principal, command.sandbox_id)
                    if sandbox.state is not SandboxState.PROVISIONING:
                        return sandbox
                    await self._context.events.wait(mark)
        except TimeoutError as error:
            raise GatewayError("timeout", "The sandbox is not ready yet.") from error


#: What of an update concerns the host.
_TIMERS = ("idle_timeout_s", "always_on", "idle_action", "auto_resume", "hibernate_after_s")


def timers(sandbox: Sandbox) -> Timers:
    """What SQL says about when a machine ends or is paused, for `HostClient.update_machine`."""
    return Timers(
        expires_at=sandbox.expires_at,
        idle_timeout_s=sandbox.idle_timeout_s,
        idle_action=MachineIdleAction(sandbox.idle_action),
        auto_resume=sandbox.auto_resume,
        hibernate_after_s=sandbox.hibernate_after_s,
    )


def has_other_timers(sandbox: Sandbox, machine: MachineInfo) -> bool:
    """Whether the host has missed a change of them. It does not tell when it hibernates, so that is not compared."""
    told = (machine.expires_at, machine.idle_timeout_s, machine.idle_action, machine.auto_resume)
    wanted = timers(sandbox)
    return told != (wanted["expires_at"], wanted["idle_timeout_s"], wanted["idle_action"], wanted["auto_resume"])
