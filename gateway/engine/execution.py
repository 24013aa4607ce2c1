"""Commands and processes in a sandbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.commands import (
    Exec,
    GetProcess,
    GetProcessOutput,
    ListProcesses,
    SignalProcess,
    StartProcess,
    StopProcess,
    StreamExec,
    StreamProcessOutput,
    WriteStdin,
)
from gateway.engine.context import Context
from gateway.engine.output import exec_result, last_lines, output_chunk, process
from gateway.engine.translate import vmm_errors
from gateway.errors import invalid
from gateway.resources import ExecResult, OutputChunk, Principal, Process
from vmm.agent import Agent
from vmm.errors import AgentError
from vmm.guest import Command, ProcessRecord

#: Where commands start and relative paths begin.
WORKSPACE = "/workspace"

_TIMEOUT_MIN_S = 0.1
#: How often a process that was told to end is looked at.
_STOP_POLL_S = 0.05
#: Time beyond the command's own limit for its SIGTERM, its SIGKILL and the way back.
_START_S = 30.0


class ExecutionService:
    """Commands about processes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def exec(self, principal: Principal, command: Exec) -> ExecResult:
        """Run a command to its end. A caller that leaves takes it along.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, validation_failed, command_invalid,
        agent_unavailable, host_unavailable. A command that fails or times out is a result, not an error.
        """
        self._check_timeout(command.timeout_s)
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            completed = await agent.run(
                command.effect_id,
                _command(command, timeout_s=command.timeout_s, has_stdin=command.stdin is not None),
                stdin=command.stdin,
                output_bytes_max=command.output_bytes_max,
                deadline=time.monotonic() + command.timeout_s + _START_S,
            )
        return exec_result(completed)

    async def stream_exec(self, principal: Principal, command: StreamExec) -> Mapping[str, Any]:
        """What the plane is to ask hostd for; whoever leaves its output early takes the process along.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, validation_failed.
        """
        self._check_timeout(command.timeout_s)
        agent = await self._context.agent(principal, command.sandbox_id)
        spec = _command(command, timeout_s=command.timeout_s)
        return {**agent.exec_op(command.effect_id, spec), "ends_with_client": True}

    async def start_process(self, principal: Principal, command: StartProcess) -> Process:
        """Start a background process. Raises as `exec`."""
        agent = await self._context.agent(principal, command.sandbox_id)
        spec = _command(command, timeout_s=command.timeout_s, name=command.name, background=True)
        with vmm_errors():
            async with await agent.exec(command.effect_id, spec) as execution:
                return process(await agent.process(execution.id))

    async def list_processes(self, principal: Principal, command: ListProcesses) -> tuple[Process, ...]:
        """Processes the agent still knows, newest first."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            records = await agent.processes()
        return tuple(process(record) for record in sorted(records, key=lambda one: one.started_at, reverse=True))

    async def get_process(self, principal: Principal, command: GetProcess) -> Process:
        """One process. Raises process_not_found."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            return process(await agent.process(pid=command.pid))

    async def signal_process(self, principal: Principal, command: SignalProcess) -> Process:
        """Signal its whole group; one that has ended is left as it is. Raises process_not_found."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            return process(await _signal(agent, command.pid, command.signal))

    async def stop_process(self, principal: Principal, command: StopProcess) -> Process:
        """End its whole group, gently at first; how it ended. Raises process_not_found."""
        agent = await self._context.agent(principal, command.sandbox_id)
        until = time.monotonic() + command.grace_s
        with vmm_errors():
            record = await _signal(agent, command.pid, "SIGTERM")
            while record.state == "running" and time.monotonic() < until:
                await asyncio.sleep(_STOP_POLL_S)
                record = await agent.process(pid=command.pid)
            if record.state == "running":
                record = await _signal(agent, command.pid, "SIGKILL")
            return process(record)

    async def write_stdin(self, principal: Principal, command: WriteStdin) -> int:
        """Feed a background process; how many bytes it took. Raises process_not_found, conflict (it has ended)."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            return await agent.write_stdin(command.data, pid=command.pid, eof=command.eof)

    async def get_process_output(self, principal: Principal, command: GetProcessOutput) -> tuple[OutputChunk, ...]:
        """What is kept of a process's output, or its last lines. Raises process_not_found."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            async with await agent.attach(pid=command.pid, follow=False) as execution:
                chunks = [output_chunk(chunk) async for chunk in execution]
        return tuple(chunks if command.tail_lines is None else last_lines(chunks, command.tail_lines))

    async def stream_process_output(self, principal: Principal, command: StreamProcessOutput) -> Mapping[str, Any]:
        """What the plane is to ask hostd for: what is kept, then what comes. Leaving it leaves the process alone."""
        agent = await self._context.agent(principal, command.sandbox_id)
        return agent.attach_op(pid=command.pid)

    def _check_timeout(self, timeout_s: float) -> None:
        most = self._context.settings.exec_timeout_max_s
        if not _TIMEOUT_MIN_S <= timeout_s <= most:
            raise invalid("timeout", f"must be between {_TIMEOUT_MIN_S:g} and {most:g} seconds")


async def _signal(agent: Agent, pid: int, name: str) -> ProcessRecord:
    """Signal a group; one whose leader has ended is left as it is."""
    try:
        return await agent.signal(name, pid=pid)
    except AgentError as error:
        if error.code != "process_exited":
            raise
        return await agent.process(pid=pid)


def _command(
    command: Exec | StreamExec | StartProcess,
    *,
    timeout_s: float | None,
    has_stdin: bool = False,
    name: str | None = None,
    background: bool = False,
) -> Command:
    argv: Sequence[str] | None = command.argv
    if (argv is None) == (command.shell is None):
        raise invalid("command", "give either an argument list or a shell line")
    if argv is not None and not argv:
        raise invalid("command", "must not be empty")
    env: Mapping[str, str] = command.env
    return Command(
        argv=argv,
        shell=command.shell,
        cwd=command.cwd or WORKSPACE,
        env=env,
        user=command.user,
        timeout_s=timeout_s,
        stdin=has_stdin or background,
        background=background,
        name=name,
    )
