"""How sandboxes come to be.

    machine from the pool ─▶ row running ∥ its agent answers     one commit, when the host has it at hand
    row provisioning ─▶ machine booted or restored ─▶ running    when it takes longer than a glance
                     └─▶ error(cause)

The id is the command's effect id, and creating one id twice yields the same machine. Whatever dies on the way leaves
something to resolve: the same command again goes on from there, a machine without a row is destroyed by the
reconciler, and a row that stays provisioning becomes running or error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace

import sqlalchemy as sa

from gateway.commands import CreateSandbox
from gateway.engine.context import LIVING, Context, owned
from gateway.engine.pausing import PauseService
from gateway.engine.plan import Origin, origin_of_snapshot, origin_of_template, plan
from gateway.engine.sandboxes import SandboxService
from gateway.engine.snapshots import SnapshotService
from gateway.engine.templates import TemplateService
from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError
from gateway.events import sandbox_event
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.store import sandboxes as rows
from vmm.errors import LinkError, VmmError
from vmm.types import IdleAction, MachineInfo, MachineSpec, MachineState, StopCause

#: A machine is mostly there sooner: from the pool within milliseconds, even when many are asked for at once. Until
#: then nobody sees the sandbox; whoever lists them later sees it `provisioning`, at the price of a second commit.
_GLANCE_S = 0.25
#: One that starts from an image is recorded before the image has been read: the row keeps that from being deleted.
_GLANCE_AT_IMAGE_S = 0.02
_DOWN = frozenset({MachineState.PREPARING, MachineState.STOPPING, MachineState.STOPPED, MachineState.FAILED})
#: How long a create waits for its machine. Restoring reads the whole image, and in a burst each waits for its turn.
BOOT_S = 120.0


class CreationService:
    """Commands that make sandboxes, and the finishing of what they left."""

    def __init__(
        self,
        context: Context,
        sandboxes: SandboxService,
        templates: TemplateService,
        snapshots: SnapshotService,
        pausing: PauseService,
    ) -> None:
        self._context = context
        self._pausing = pausing
        self._sandboxes = sandboxes
        self._templates = templates
        self._snapshots = snapshots

    async def create(self, principal: Principal, command: CreateSandbox) -> Sandbox:
        """Make a sandbox and wait until it runs.

        Raises GatewayError: validation_failed, template_not_found, template_not_ready, snapshot_not_found,
        snapshot_not_ready, name_taken, conflict (slug), quota_exceeded, no_capacity, boot_failed, host_unavailable
        (it may still come up; the same command again finds out).
        """
        context = self._context
        origin = await self._origin(principal, command)
        wanted = plan(principal, command, context.settings, origin=origin, now=context.clock())
        existing = await context.database.lookup(lambda connection: self._look(connection, wanted))
        if existing is not None and not _may_try_again(existing, wanted):
            return await self._resume(owned(existing, principal))
        placing = asyncio.ensure_future(self._place(wanted))
        try:
            glance_s = _GLANCE_S if wanted.image_id is None else _GLANCE_AT_IMAGE_S
            await asyncio.wait([placing], timeout=glance_s)
            if placing.done() and placing.exception() is None and is_up(placing.result()):
                booting = asyncio.ensure_future(self._boot(wanted))
                try:
                    return await self._confirm(await self._record_running(wanted, placing.result()), booting)
                finally:
                    booting.cancel()
            sandbox = await self._record_provisioning(wanted)
            return await self._conclude(sandbox, self._boot(wanted, after=placing))
        finally:
            placing.cancel()

    async def _origin(self, principal: Principal, command: CreateSandbox) -> Origin:
        if command.snapshot_id is not None:
            return origin_of_snapshot(await self._snapshots.ready(principal, command.snapshot_id))
        name = command.template or self._context.settings.default_template
        return origin_of_template(await self._templates.startable(principal, name))

    async def _resume(self, sandbox: Sandbox) -> Sandbox:
        return await self.finish(sandbox) if sandbox.state is SandboxState.PROVISIONING else sandbox

    def _look(self, connection: sa.Connection, wanted: Sandbox) -> Sandbox | None:
        """What an earlier attempt left: its sandbox, which stands, or one that failed and may be tried again.

        Raises name_taken, conflict (slug), quota_exceeded if nothing stands and nothing new may.
        """
        room = rows.room(connection, wanted)
        existing = rows.get(connection, wanted.id) if room.is_id_taken else None
        if existing is not None and not _may_try_again(existing, wanted):
            return existing
        limit = self._context.settings.sandboxes_per_workspace
        if room.living >= limit:
            raise GatewayError("quota_exceeded", f"The workspace already has {limit} sandboxes.", retry_after_s=30)
        if room.is_name_taken:
            raise GatewayError("name_taken", f"Another sandbox is named {wanted.name!r}.")
        if room.is_slug_taken:
            raise GatewayError("conflict", f"The slug {wanted.slug!r} is in use.")
        return existing

    def insert(self, connection: sa.Connection, wanted: Sandbox, *, version: int | None = None) -> Sandbox:
        """Add a row, or find what an earlier attempt left. Raises what `_look` raises."""
        existing = self._look(connection, wanted)
        if existing is not None:
            if not _may_try_again(existing, wanted):
                return existing
            # It failed before; nothing of it is left, so the same command may try once more.
            rows.delete(connection, existing.id)
        rows.insert(connection, wanted, version=version)
        sandbox_event(connection, "created", wanted, at=wanted.created_at, template=wanted.template, **_lineage(wanted))
        return wanted

    async def _place(self, sandbox: Sandbox) -> MachineInfo:
        """Its machine as soon as the host answers for it; its agent may have yet to."""
        with vmm_errors():
            deadline = time.monotonic() + BOOT_S
            return await self._context.host.create_machine(_spec(sandbox), is_early=True, deadline=deadline)

    async def _boot(self, sandbox: Sandbox, *, after: Awaitable[object] | None = None) -> MachineInfo:
        """Its machine, once its agent has answered."""
        if after is not None:
            await after
        with vmm_errors():
            return await self._context.host.create_machine(_spec(sandbox), deadline=time.monotonic() + BOOT_S)

    async def _record_running(self, wanted: Sandbox, machine: MachineInfo) -> Sandbox:
        """The short way: the machine is there, so the sandbox is recorded once, as running."""
        running = replace(
            wanted,
            state=SandboxState.RUNNING,
            address=machine.address,
            started_at=machine.started_at or self._context.clock(),
            boot_ms=machine.boot_ms,
        )
        version = rows.version_now()

        def job(connection: sa.Connection) -> Sandbox:
            sandbox = self.insert(connection, running, version=version)
            if sandbox is running:
                sandbox_event(connection, "running", sandbox, boot_ms=machine.boot_ms)
            return sandbox

        context = self._context
        # Nobody knows its names yet, so the plane may be told while the row is being written.
        routing = asyncio.ensure_future(context.routes.push_new(running, version))
        try:
            sandbox = await context.database.write(job)
        except Exception:
            await routing
            await context.routes.drop(wanted.id, version + 1)
            await self._sandboxes.end_machine(wanted.id)
            raise
        context.events.announce()
        await routing
        if sandbox is not running:
            # Another attempt at the same command was faster.
            sandbox = await self.mark_running(sandbox, machine)
            await context.routes.push(sandbox.id)
        return sandbox

    async def _confirm(self, sandbox: Sandbox, booting: Awaitable[MachineInfo]) -> Sandbox:
        """Wait until the machine's agent has answered, for which the sandbox was recorded without waiting."""
        machine = await self._up(sandbox, booting)
        if machine.address != sandbox.address:
            # The unit at hand was no good, and another one has taken over.
            await self._pausing.follow(machine)
        return replace(sandbox, address=machine.address)

    async def _record_provisioning(self, wanted: Sandbox) -> Sandbox:
        try:
            sandbox = await self._context.database.write(lambda connection: self.insert(connection, wanted))
        except GatewayError:
            await self._sandboxes.end_machine(wanted.id)
            raise
        self._context.events.announce()
        return sandbox

    async def finish(self, sandbox: Sandbox) -> Sandbox:
        """Take a provisioning sandbox to running, or to error. Any number of callers may try at once."""
        return await self._conclude(sandbox, self._boot(sandbox))

    async def _up(self, sandbox: Sandbox, booting: Awaitable[MachineInfo]) -> MachineInfo:
        """The machine of a recorded sandbox, once it is there; the sandbox fails with it."""
        try:
            machine = await booting
        except GatewayError as error:
            if not isinstance(error.__cause__, LinkError):
                await self.fail(sandbox, error)
            raise
        if not is_up(machine):
            failure = GatewayError("boot_failed", f"The sandbox could not be started: {machine.detail or 'no cause'}.")
            await self.fail(sandbox, failure)
            raise failure
        return machine

    async def _conclude(self, sandbox: Sandbox, booting: Awaitable[MachineInfo]) -> Sandbox:
        machine = await self._up(sandbox, booting)
        current = await self.mark_running(sandbox, machine)
        if current.state is SandboxState.ERROR:
            # Others gave it up meanwhile, and their word stands.
            raise GatewayError("boot_failed", f"The sandbox could not be started: {current.stop_detail or 'no cause'}.")
        return current

    async def mark_running(self, sandbox: Sandbox, machine: MachineInfo) -> Sandbox:
        """Record that a provisioning sandbox's machine runs."""
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
            await self._sandboxes.end_machine(sandbox.id)
        return current or replace(sandbox, state=SandboxState.DESTROYED)

    async def fail(self, sandbox: Sandbox, error: GatewayError) -> None:
        """Record that a sandbox could not be made, and take away what there is of its machine."""
        cause = error.__cause__
        detail = cause.detail or cause.message if isinstance(cause, VmmError) else error.message
        await self._sandboxes.end(sandbox, SandboxState.ERROR, StopCause.BOOT_FAILED, detail)
        await self._sandboxes.end_machine(sandbox.id)


def is_up(machine: MachineInfo) -> bool:
    """Whether a machine came up, even if it has been paused since."""
    return machine.state not in _DOWN


def _may_try_again(existing: Sandbox, wanted: Sandbox) -> bool:
    return existing.state is SandboxState.ERROR and existing.workspace_id == wanted.workspace_id


def _lineage(sandbox: Sandbox) -> dict[str, str]:
    given = {"snapshot_id": sandbox.snapshot_id, "parent_id": sandbox.parent_id}
    return {name: value for name, value in given.items() if value is not None}


def _spec(sandbox: Sandbox) -> MachineSpec:
    return MachineSpec(
        id=sandbox.id,
        template=sandbox.base_template,
        hostname=sandbox.slug,
        cpu_count=sandbox.cpu_count,
        memory_mib=sandbox.memory_mib,
        disk_mib=sandbox.disk_mib,
        env=dict(sandbox.env),
        expires_at=sandbox.expires_at,
        idle_timeout_s=sandbox.idle_timeout_s,
        snapshot=sandbox.image_id,
        idle_action=IdleAction(sandbox.idle_action),
        auto_resume=sandbox.auto_resume,
        hibernate_after_s=sandbox.hibernate_after_s,
    )
