"""Taking a sandbox back to one of its snapshots, in place: the same id and names, the memory and files of then."""

from __future__ import annotations

import time

import sqlalchemy as sa

from gateway.commands import RestoreSandbox
from gateway.engine.context import STARTED, Context
from gateway.engine.snapshots import SnapshotService
from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError
from gateway.events import sandbox_event
from gateway.resources import Principal, Sandbox, SandboxState, Snapshot
from gateway.store import sandboxes as rows
from vmm.types import MachineInfo

_RESTORE_S = 60.0


class RestoreService:
    """The command that restores."""

    def __init__(self, context: Context, snapshots: SnapshotService) -> None:
        self._context = context
        self._snapshots = snapshots

    async def restore(self, principal: Principal, command: RestoreSandbox) -> Sandbox:
        """Put a sandbox back to a snapshot. On an error it goes on as it was.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, snapshot_not_found, snapshot_not_ready,
        snapshot_incompatible, snapshot_corrupt, no_capacity.
        """
        sandbox = await self._context.started(principal, command.sandbox_id)
        if sandbox.restore_id == command.effect_id:
            return sandbox
        snapshot = await self._snapshots.ready(principal, command.snapshot_id)
        if _shape(snapshot) != _shape(sandbox):
            raise GatewayError("snapshot_incompatible", "The snapshot is of a sandbox of another template or size.")
        with vmm_errors():
            deadline = time.monotonic() + _RESTORE_S
            machine = await self._context.host.restore_machine(
                sandbox.id, snapshot.id, command.effect_id, deadline=deadline
            )
        # In this order: what is noted is not done again, and the host restores once however often it is asked.
        await self._renew_env(sandbox, snapshot)
        await self._note_restored(sandbox, snapshot, machine, command.effect_id)
        return await self._context.sandbox(principal, sandbox.id)

    async def _note_restored(self, sandbox: Sandbox, snapshot: Snapshot, machine: MachineInfo, effect_id: str) -> None:
        at = self._context.clock()

        def job(connection: sa.Connection) -> None:
            values = {"state": SandboxState.RUNNING, "address": machine.address, "snapshot_id": snapshot.id}
            values["restore_id"] = effect_id
            if rows.change(connection, sandbox.id, only_in=STARTED, **values):
                rows.end_pause(connection, sandbox.id, at)
                sandbox_event(connection, "restored", sandbox, at=at, snapshot_id=snapshot.id)

        await self._context.database.write(job)
        self._context.events.announce()
        await self._context.routes.push(sandbox.id)

    async def _renew_env(self, sandbox: Sandbox, snapshot: Snapshot) -> None:
        """Variables belong to the sandbox, not to its memory: what was set since the snapshot still holds."""
        if sandbox.env == snapshot.env:
            return
        forgotten = [name for name in snapshot.env if name not in sandbox.env]
        with vmm_errors():
            await self._context.host.agent(sandbox.id).identity(env=sandbox.env, unset=forgotten)


def _shape(item: Snapshot | Sandbox) -> tuple[str, float, int, int]:
    return item.base_template, item.cpu_count, item.memory_mib, item.disk_mib
