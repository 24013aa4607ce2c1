"""Hears from hostd that machines ended, and records it.

Every worker listens; the conditional update in `SandboxService.end` lets exactly one of them record each end.
"""

from __future__ import annotations

import asyncio
import logging

from gateway.engine.context import Context
from gateway.engine.sandboxes import SandboxService
from gateway.resources import SandboxState
from gateway.store import sandboxes as rows
from vmm.errors import VmmError
from vmm.types import MachineInfo, MachineState, StopCause

_log = logging.getLogger(__name__)

_OVER = (MachineState.STOPPED, MachineState.FAILED)
#: A sandbox that still starts is the business of who starts it: that call fails and says why.
_STARTED = (SandboxState.RUNNING, SandboxState.PAUSED)
_RETRY_S = 1.0


class MachineWatcher:
    """Follows one host's machines."""

    def __init__(self, context: Context, sandboxes: SandboxService) -> None:
        self._context = context
        self._sandboxes = sandboxes

    async def run(self) -> None:
        """Follow until cancelled. A host that cannot be reached is asked again and again."""
        while True:
            try:
                async for machine in self._context.host.events():
                    await self.note(machine)
            except VmmError as error:
                _log.warning("the host's events ended, asking again: %s", error)
            await asyncio.sleep(_RETRY_S)

    async def note(self, machine: MachineInfo) -> None:
        """Record the end of a machine; anything else is nothing new."""
        if machine.state not in _OVER:
            return
        sandbox = await self._context.database.lookup(lambda connection: rows.get(connection, machine.id))
        if sandbox is not None and sandbox.state in _STARTED:
            cause = machine.cause or StopCause.LOST
            await self._sandboxes.end(sandbox, SandboxState.DESTROYED, cause, machine.detail, only_in=_STARTED)
