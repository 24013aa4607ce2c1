"""What every part of the engine is given: the database, the host, the plane and the settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from gateway.engine.routes import Routes
from gateway.errors import GatewayError
from gateway.events import EventLog
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.settings import Settings
from gateway.store import Database
from gateway.store import sandboxes as rows
from vmm.agent import Agent
from vmm.client import HostClient

#: In these a sandbox may still be used some day.
LIVING = (SandboxState.PROVISIONING, SandboxState.RUNNING, SandboxState.PAUSED)
#: In these a sandbox has a machine.
STARTED = (SandboxState.RUNNING, SandboxState.PAUSED)


@dataclass(frozen=True, slots=True)
class Context:
    """The engine's surroundings. `clock` gives Unix seconds."""

    database: Database
    host: HostClient
    routes: Routes
    events: EventLog
    settings: Settings
    clock: Callable[[], float] = field(default=time.time)

    async def sandbox(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """A sandbox of the caller's workspace in any state. Raises sandbox_not_found."""
        found = await self.database.lookup(lambda connection: rows.get(connection, sandbox_id))
        return owned(found, principal)

    async def running(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """One that runs. Raises sandbox_not_found, sandbox_not_running or sandbox_paused."""
        return require(await self.sandbox(principal, sandbox_id), SandboxState.RUNNING)

    async def started(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """One that runs or is paused. Raises sandbox_not_found or sandbox_not_running."""
        return require(await self.sandbox(principal, sandbox_id), *STARTED)

    async def agent(self, principal: Principal, sandbox_id: str, *, roots: Sequence[str] | None = None) -> Agent:
        """The agent of one that runs or wakes when it is used, confined to `roots` if given.

        Raises sandbox_not_found, sandbox_not_running, sandbox_paused.
        """
        sandbox = await self.sandbox(principal, sandbox_id)
        require_usable(sandbox)
        return self.host.agent(sandbox.id, roots=roots)


def owned(sandbox: Sandbox | None, principal: Principal) -> Sandbox:
    """The sandbox, if it is there and the caller's: a stranger's is as good as none. Raises sandbox_not_found."""
    if sandbox is None or sandbox.workspace_id != principal.workspace_id:
        raise GatewayError("sandbox_not_found", "No sandbox with that id.")
    return sandbox


def owned_row(connection: sa.Connection, principal: Principal, sandbox_id: str) -> Sandbox:
    """The same within a transaction."""
    return owned(rows.get(connection, sandbox_id), principal)


def require(sandbox: Sandbox, *states: SandboxState) -> Sandbox:
    """The sandbox, if it is in one of the states. Raises sandbox_not_running or sandbox_paused."""
    if sandbox.state not in states:
        raise not_running(sandbox)
    return sandbox


def require_usable(sandbox: Sandbox) -> None:
    """Raise unless it runs, or is paused and wakes by itself: the host does that for whoever uses it."""
    require(sandbox, *(STARTED if sandbox.auto_resume else (SandboxState.RUNNING,)))


def not_running(sandbox: Sandbox) -> GatewayError:
    """The error for an operation on a sandbox that does not run, with the reason if there is one."""
    if sandbox.state is SandboxState.PAUSED:
        return GatewayError("sandbox_paused", "The sandbox is paused; resume it first.")
    reason = f" ({sandbox.stop_cause})" if sandbox.stop_cause else ""
    return GatewayError("sandbox_not_running", f"The sandbox is {sandbox.state.value}{reason}.")
