"""Terminals: login shells on a PTY that outlive the connection showing them."""

from __future__ import annotations

from typing import Self

from gateway.commands import CloseTerminal, OpenTerminal
from gateway.engine.context import Context
from gateway.engine.execution import WORKSPACE
from gateway.engine.output import process_exit
from gateway.engine.tickets import TicketService
from gateway.engine.translate import vmm_errors
from gateway.errors import invalid
from gateway.resources import Principal, ProcessExit, TerminalSession
from vmm.errors import AgentError
from vmm.execution import Execution
from vmm.guest import Command

_TICKET_TTL_S = 60.0
#: What a terminal shows again to whoever comes back to it.
_SCROLLBACK_BYTES = 64 * 1024
_SIZE_MAX = 1000
_LOGIN_SHELL = 'exec "$(command -v bash || command -v sh)" -l'


class TerminalService:
    """Commands about terminals."""

    def __init__(self, context: Context, tickets: TicketService) -> None:
        self._context = context
        self._tickets = tickets

    async def open(self, principal: Principal, command: OpenTerminal) -> TerminalSession:
        """Start a login shell; it runs until it exits or is closed, whoever looks at it.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, validation_failed, agent_unavailable.
        """
        check_size(command.rows, command.cols)
        agent = await self._context.agent(principal, command.sandbox_id)
        shell = Command(
            shell=_LOGIN_SHELL,
            cwd=command.cwd or WORKSPACE,
            env={"TERM": "xterm-256color", **command.env},
            stdin=True,
            pty=(command.rows, command.cols),
            background=True,
            name="terminal",
        )
        with vmm_errors():
            (await agent.exec(command.effect_id, shell)).close()
        ticket = await self._tickets.issue(
            principal, purpose="terminal", resource_id=command.effect_id, ttl_s=_TICKET_TTL_S
        )
        return TerminalSession(command.effect_id, command.sandbox_id, ticket.ticket, ticket.expires_at)

    async def attach(self, principal: Principal, sandbox_id: str, session_id: str) -> Terminal:
        """Join a terminal. Raises sandbox_not_found, sandbox_not_running, process_not_found."""
        agent = await self._context.agent(principal, sandbox_id)
        with vmm_errors():
            return Terminal(await agent.attach(session_id, tail_bytes=_SCROLLBACK_BYTES))

    async def close(self, principal: Principal, command: CloseTerminal) -> None:
        """End a terminal's shell and what runs in it. Raises process_not_found."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            try:
                await agent.signal("SIGHUP", command.session_id)
                await agent.signal("SIGKILL", command.session_id)
            except AgentError as error:
                if error.code != "process_exited":
                    raise


class Terminal:
    """One viewer of a terminal: iterate over what it shows; `exit` is set when the shell has ended."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    @property
    def exit(self) -> ProcessExit | None:
        """How the shell ended; None while it runs."""
        ended = self._execution.exit
        return None if ended is None else process_exit(ended)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with vmm_errors():
            return (await anext(self._execution)).data

    async def write(self, data: bytes) -> None:
        """Type; waits while the shell does not read. Raises conflict when it has ended."""
        with vmm_errors():
            await self._execution.write(data)

    async def resize(self, rows: int, cols: int) -> None:
        """Change its size."""
        check_size(rows, cols)
        with vmm_errors():
            await self._execution.resize(rows, cols)

    async def close(self) -> None:
        """Leave; the shell goes on."""
        self._execution.close()


def check_size(rows: int, cols: int) -> None:
    """Raise validation_failed unless a terminal can have that size."""
    for field, value in (("rows", rows), ("cols", cols)):
        if not 1 <= value <= _SIZE_MAX:
            raise invalid(field, f"must be between 1 and {_SIZE_MAX}")
