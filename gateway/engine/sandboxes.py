"""The life of sandboxes.

    provisioning ─▶ running ─▶ destroyed(cause)
         └──▶ error(cause)

The row is written first, in state provisioning, so that whatever dies on the way leaves something to resolve: the same
command again goes on from there (hostd answers the same id with the same machine), and so does the reconciler. Changes
of state are conditional updates: of all that see the same machine end, one changes the row and writes the event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from gateway.commands import (
    CreateSandbox,
    DestroySandbox,
    ExtendSandbox,
    GetSandbox,
    GetSandboxByName,
    ListSandboxes,
    UpdateSandbox,
    WaitReady,
)
from gateway.engine.context import Context, not_running, owned, owned_row
from gateway.engine.plan import check_timeout, make_slug, plan
from gateway.engine.templates import TemplateService
from gateway.engine.translate import from_vmm, vmm_errors
from gateway.errors import GatewayError
from gateway.events import sandbox_event
from gateway.resources import Page, Principal, Sandbox, SandboxState
from gateway.store import sandboxes as rows
from vmm.errors import LinkError, VmmError
from vmm.types import MachineInfo, MachineSpec, MachineState, StopCause

_log = logging.getLogger(__name__)

#: How long a caller who destroys waits for a host that does not answer.
_END_TIMEOUT_S = 5.0

LIVING = (SandboxState.PROVISIONING, SandboxState.RUNNING, SandboxState.PAUSED)


class SandboxService:
    """Commands about sandboxes as a whole."""

    def __init__(self, context: Context, templates: TemplateService) -> None:
        self._context = context
        self._templates = templates

    async def create(self, principal: Principal, command: CreateSandbox) -> Sandbox:
        """Make a sandbox and wait until it runs.

        Raises GatewayError: validation_failed, template_not_found, name_taken, conflict (slug), quota_exceeded,
        no_capacity, boot_failed, host_unavailable (it may still come up; the same command again finds out).
        """
        context = self._context
        template = await self._templates.resolve(command.template or context.settings.default_template)
        wanted = plan(principal, command, context.settings, template=template.name, now=context.clock())
        has_slug = command.slug is not None
        sandbox = await context.database.write(lambda connection: self._insert(connection, wanted, has_slug=has_slug))
        owned(sandbox, principal)
        if sandbox.state is SandboxState.PROVISIONING:
            context.events.announce()
            sandbox = await self.finish(sandbox)
        return sandbox

    def _insert(self, connection: sa.Connection, wanted: Sandbox, *, has_slug: bool) -> Sandbox:
        existing = rows.get(connection, wanted.id)
        if existing is not None and not (
            existing.state is SandboxState.ERROR and existing.workspace_id == wanted.workspace_id
        ):
            return existing
        limit = self._context.settings.sandboxes_per_workspace
        if rows.count_living(connection, wanted.workspace_id) >= limit:
            raise GatewayError("quota_exceeded", f"The workspace already has {limit} sandboxes.", retry_after_s=30)
        if wanted.name is not None and rows.is_name_taken(connection, wanted.workspace_id, wanted.name, but=wanted.id):
            raise GatewayError("name_taken", f"Another sandbox is named {wanted.name!r}.")
        while rows.is_slug_taken(connection, wanted.slug):
            if has_slug:
                raise GatewayError("conflict", f"The slug {wanted.slug!r} is in use.")
            wanted = replace(wanted, slug=make_slug())
        if existing is not None:
            # It failed before; nothing of it is left, so the same command may try once more.
            rows.delete(connection, existing.id)
        rows.insert(connection, wanted)
        sandbox_event(connection, "created", wanted, at=wanted.created_at, template=wanted.template)
        return wanted

    async def finish(self, sandbox: Sandbox) -> Sandbox:
        """Take a provisioning sandbox to running, or to error. Any number of callers may try at once."""
        try:
            with vmm_errors():
                machine = await self._context.host.create_machine(_spec(sandbox))
        except GatewayError as error:
            if not isinstance(error.__cause__, LinkError):
                await self._fail(sandbox, error)
            raise
        if machine.state is not MachineState.RUNNING:
            failure = GatewayError("boot_failed", f"The sandbox could not be started: {machine.detail or 'no cause'}.")
            await self._fail(sandbox, failure)
            raise failure
        return await self._mark_running(sandbox, machine)

    async def _mark_running(self, sandbox: Sandbox, machine: MachineInfo) -> Sandbox:
        context = self._context
        started_at = machine.started_at or context.clock()

        def job(connection: sa.Connection) -> tuple[bool, Sandbox | None]:
            changed = rows.change(
                connection,
                sandbox.id,
                only_in=[SandboxState.PROVISIONING],
                state=SandboxState.RUNNING,
                address=machine.address,
                started_at=started_at,
                boot_ms=machine.boot_ms,
            )
            if changed:
                sandbox_event(connection, "running", sandbox, boot_ms=machine.boot_ms)
            return changed, rows.get(connection, sandbox.id)

        changed, current = await context.database.write(job)
        if changed:
            context.events.announce()
            await context.routes.push(sandbox.id)
        if current is None or current.state not in LIVING:
            # Destroyed while it started.
            await self._end_machine(sandbox.id)
        return current or replace(sandbox, state=SandboxState.DESTROYED)

    async def _fail(self, sandbox: Sandbox, error: GatewayError) -> None:
        cause = error.__cause__
        detail = cause.detail or cause.message if isinstance(cause, VmmError) else error.message
        await self.end(sandbox, SandboxState.ERROR, StopCause.BOOT_FAILED, detail)
        await self._end_machine(sandbox.id)

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
        context = self._context
        at = context.clock()

        def job(connection: sa.Connection) -> bool:
            changed = rows.change(
                connection,
                sandbox.id,
                only_in=only_in,
                state=state,
                stop_cause=cause,
                stop_detail=detail,
                destroyed_at=at,
                address=None,
            )
            if changed:
                sandbox_event(connection, state.value, sandbox, at=at, cause=cause.value)
            return changed

        changed = await context.database.write(job)
        if changed:
            context.events.announce()
            await context.routes.push(sandbox.id)
        return changed

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
            before = owned_row(connection, principal, command.sandbox_id)
            if before.state not in LIVING:
                raise not_running(before)
            name = command.name
            if name is not None and rows.is_name_taken(connection, before.workspace_id, name, but=before.id):
                raise GatewayError("name_taken", f"Another sandbox is named {name!r}.")
            rows.change(connection, before.id, **self._changes(before, command, now))
            return owned_row(connection, principal, command.sandbox_id)

        sandbox = await context.database.write(job)
        if command.idle_timeout_s is not None or command.always_on is not None:
            await self._push_timers(sandbox)
        return sandbox

    def _changes(self, before: Sandbox, command: UpdateSandbox, now: float) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if command.name is not None:
            changes["name"] = command.name
        if command.tags is not None:
            changes["tags"] = tuple(dict.fromkeys(command.tags))
        if command.metadata is not None:
            changes["metadata"] = dict(command.metadata)
        if command.idle_timeout_s is not None:
            changes["idle_timeout_s"] = command.idle_timeout_s
        if command.always_on is True:
            changes |= {"always_on": True, "timeout_s": None, "idle_timeout_s": None, "expires_at": None}
        elif command.always_on is False and before.always_on:
            timeout_s = self._context.settings.sandbox_timeout_s
            changes |= {"always_on": False, "timeout_s": timeout_s, "expires_at": now + timeout_s}
        return changes

    async def extend(self, principal: Principal, command: ExtendSandbox) -> Sandbox:
        """Move its end. Raises sandbox_not_found, sandbox_not_running, validation_failed; conflict if always on."""
        context = self._context
        check_timeout("timeout", command.timeout_s, context.settings)
        expires_at = context.clock() + command.timeout_s

        def job(connection: sa.Connection) -> Sandbox:
            before = owned_row(connection, principal, command.sandbox_id)
            if before.state not in LIVING:
                raise not_running(before)
            if before.always_on:
                raise GatewayError("conflict", "The sandbox is always on and has no end to move.")
            rows.change(connection, before.id, timeout_s=command.timeout_s, expires_at=expires_at)
            return owned_row(connection, principal, command.sandbox_id)

        sandbox = await context.database.write(job)
        await self._push_timers(sandbox)
        return sandbox

    async def _push_timers(self, sandbox: Sandbox) -> None:
        try:
            await self._context.host.update_machine(
                sandbox.id, expires_at=sandbox.expires_at, idle_timeout_s=sandbox.idle_timeout_s
            )
        except LinkError as error:
            # What SQL says holds; the reconciler tells the host when it is back.
            _log.warning("the timers of %s could not be set now: %s", sandbox.id, error)
        except VmmError as error:
            raise from_vmm(error) from error

    async def destroy(self, principal: Principal, command: DestroySandbox) -> Sandbox:
        """End a sandbox. Raises sandbox_not_found.

        From the commit on nobody reaches it through us; a host that cannot be told now is told by the reconciler.
        """
        sandbox = await self._context.sandbox(principal, command.sandbox_id)
        if await self.end(sandbox, SandboxState.DESTROYED, StopCause.REQUESTED):
            await self._end_machine(sandbox.id)
        return await self._context.sandbox(principal, command.sandbox_id)

    async def _end_machine(self, sandbox_id: str) -> None:
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


def _spec(sandbox: Sandbox) -> MachineSpec:
    return MachineSpec(
        id=sandbox.id,
        template=sandbox.template,
        hostname=sandbox.slug,
        cpu_count=sandbox.cpu_count,
        memory_mib=sandbox.memory_mib,
        disk_mib=sandbox.disk_mib,
        env=dict(sandbox.env),
        expires_at=sandbox.expires_at,
        idle_timeout_s=sandbox.idle_timeout_s,
    )
