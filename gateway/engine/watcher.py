"""Hears from hostd what machines and snapshots do by themselves, and records it.

Every worker listens; conditional updates let exactly one of them record each change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from gateway.engine.context import STARTED
from gateway.engine.engine import Engine
from gateway.resources import SandboxState
from gateway.store import sandboxes as rows
from vmm.errors import VmmError
from vmm.types import MachineInfo, MachineState, StopCause

_log = logging.getLogger(__name__)

T = TypeVar("T")

_OVER = (MachineState.STOPPED, MachineState.FAILED)
#: What a sandbox's row can say; what a machine is on its way to is of no interest.
_TOLD = (MachineState.RUNNING, MachineState.FROZEN, MachineState.HIBERNATED, *_OVER)
_RETRY_S = 1.0


class HostWatcher:
    """Follows one host."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context = engine.context

    async def run(self) -> None:
        """Follow until cancelled. A host that cannot be reached is asked again and again."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_follow(partial(self._context.host.events, _TOLD), self.note), name="machines")
            tasks.create_task(
                _follow(self._context.host.snapshot_events, self._engine.snapshots.note), name="snapshots"
            )

    async def note(self, machine: MachineInfo) -> None:
        """Record that a machine ended, was paused or has woken."""
        if machine.state not in _OVER:
            await self._engine.pausing.follow(machine)
            return
        sandbox = await self._context.database.lookup(lambda connection: rows.get(connection, machine.id))
        # A sandbox that still starts is the business of who starts it: that call fails and says why.
        if sandbox is not None and sandbox.state in STARTED:
            cause = machine.cause or StopCause.LOST
            await self._engine.sandboxes.end(sandbox, SandboxState.DESTROYED, cause, machine.detail, only_in=STARTED)


async def _follow(events: Callable[[], AsyncIterator[T]], note: Callable[[T], Awaitable[None]]) -> None:
    while True:
        try:
            async for event in events():
                await note(event)
        except VmmError as error:
            _log.warning("the host's events ended, asking again: %s", error)
        await asyncio.sleep(_RETRY_S)
