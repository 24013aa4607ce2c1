"""Pausing, and keeping SQL and the plane in step with machines that pause and wake.

Machines pause when they are told to, when they are idle and when memory is short; they wake when they are told to and
when somebody uses them. The host decides alone and says so afterwards, to every worker, and a worker may hear late.
So nobody trusts what it heard: it writes what the host says now, and asks again until both agree.
"""

from __future__ import annotations

import logging
import time

import sqlalchemy as sa

from gateway.commands import PauseSandbox, ResumeSandbox
from gateway.engine.context import STARTED, Context
from gateway.engine.translate import vmm_errors
from gateway.events import sandbox_event
from gateway.resources import PauseKind, Principal, Sandbox, SandboxState
from gateway.store import pauses
from gateway.store import sandboxes as rows
from vmm.errors import VmmError
from vmm.types import MachineInfo, MachineState

_log = logging.getLogger(__name__)

#: Moving a machine's memory to disk or back takes seconds when it is large.
_PAUSE_S = 60.0

#: What each state of a machine means for its sandbox; in any other the sandbox stays as it is.
_KINDS = {
    MachineState.RUNNING: None,
    MachineState.FROZEN: PauseKind.FROZEN,
    MachineState.HIBERNATING: PauseKind.FROZEN,
    MachineState.HIBERNATED: PauseKind.HIBERNATED,
}


class PauseService:
    """Commands that pause and resume, and the following of machines that do so by themselves."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def pause(self, principal: Principal, command: PauseSandbox) -> Sandbox:
        """Stop a sandbox where it is. Raises sandbox_not_found, sandbox_not_running, disk_full, snapshot_failed."""
        sandbox = await self._context.started(principal, command.sandbox_id)
        with vmm_errors():
            machine = await self._context.host.pause_machine(
                sandbox.id, hibernate=command.hibernate, deadline=time.monotonic() + _PAUSE_S
            )
        await self.follow(machine)
        return await self._context.sandbox(principal, sandbox.id)

    async def resume(self, principal: Principal, command: ResumeSandbox) -> Sandbox:
        """Let it go on. Raises sandbox_not_found, sandbox_not_running, no_capacity, wake_timeout."""
        sandbox = await self._context.started(principal, command.sandbox_id)
        await self.wake(sandbox.id)
        return await self._context.sandbox(principal, sandbox.id)

    async def wake(self, sandbox_id: str) -> None:
        """Have its machine run. Its visitors are let through before SQL is told: they wait, the books do not.

        Raises GatewayError as `resume` does.
        """
        with vmm_errors():
            machine = await self._context.host.resume_machine(sandbox_id, deadline=time.monotonic() + _PAUSE_S)
        if machine.state is MachineState.RUNNING and machine.address is not None:
            await self._context.routes.push_running(sandbox_id, machine.address)
        await self.follow(machine)

    async def follow(self, machine: MachineInfo) -> None:
        """Have SQL and the plane say of a started sandbox what the host says of its machine."""
        while await self._record(machine):
            try:
                now = await self._context.host.get_machine(machine.id)
            except VmmError as error:
                _log.info("machine %s cannot be looked at again: %s", machine.id, error)
                return
            if (now.state, now.address) == (machine.state, machine.address):
                return
            machine = now

    async def _record(self, machine: MachineInfo) -> bool:
        """Whether anything had to be changed."""
        if machine.state not in _KINDS:
            return False
        kind = _KINDS[machine.state]
        sandbox = await self._context.database.lookup(lambda connection: rows.get(connection, machine.id))
        if sandbox is None or sandbox.state not in STARTED or _is_so(sandbox, kind, machine.address):
            return False
        at = self._context.clock()

        def job(connection: sa.Connection) -> bool:
            before = rows.get(connection, machine.id)
            if before is None or before.state not in STARTED or _is_so(before, kind, machine.address):
                return False
            if kind is None:
                _note_running(connection, before, machine.address, at)
            else:
                _note_paused(connection, before, kind, at)
            return True

        changed = await self._context.database.write(job)
        if changed:
            self._context.events.announce()
            await self._context.routes.push(machine.id)
        return changed


def _is_so(sandbox: Sandbox, kind: PauseKind | None, address: str | None) -> bool:
    if kind is None:
        return sandbox.state is SandboxState.RUNNING and sandbox.address == address
    return sandbox.state is SandboxState.PAUSED and sandbox.pause_kind is kind


def _note_running(connection: sa.Connection, before: Sandbox, address: str | None, at: float) -> None:
    rows.end_pause(connection, before.id, at)
    rows.change(connection, before.id, state=SandboxState.RUNNING, address=address)
    if before.state is SandboxState.PAUSED:
        sandbox_event(connection, "resumed", before, at=at, pause_kind=before.pause_kind)


def _note_paused(connection: sa.Connection, before: Sandbox, kind: PauseKind, at: float) -> None:
    # The address stays: the plane wants to know where it was.
    if before.state is SandboxState.RUNNING:
        pauses.begin(connection, before.id, at)
        rows.change(connection, before.id, state=SandboxState.PAUSED, pause_kind=kind, paused_at=at)
        sandbox_event(connection, "paused", before, at=at, pause_kind=kind.value)
    else:
        rows.change(connection, before.id, pause_kind=kind)
        sandbox_event(connection, kind.value, before, at=at)
