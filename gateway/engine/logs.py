"""What a sandbox's processes wrote, all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from gateway.commands import GetLogs, StreamLogs
from gateway.engine.context import Context
from gateway.engine.output import last_lines, output_chunk
from gateway.engine.translate import vmm_errors
from gateway.errors import invalid
from gateway.resources import OutputChunk, Principal
from vmm.agent import Agent
from vmm.errors import VmmError
from vmm.guest import ProcessRecord

_LINES_MAX = 10_000
#: Kept output of more processes than this is too old to be wanted.
_PROCESSES_MAX = 50
_LINE_BYTES_GUESS = 200
#: How often a follower looks for processes that were started since.
_LOOK_S = 1.0
_QUEUE_MAX = 64


class LogService:
    """Commands about logs. The agent notes no times, so processes follow each other in the order they started."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, principal: Principal, command: GetLogs) -> tuple[str, ...]:
        """The last lines, oldest first. Raises sandbox_not_found, sandbox_not_running, validation_failed."""
        agent = await self._agent(principal, command.sandbox_id, command.lines)
        with vmm_errors():
            records = await _recent(agent)
            outputs = [await _kept(agent, record, command.lines) for record in records]
        text = b"".join(_whole_lines(output) for output in outputs).decode("utf-8", "replace")
        return tuple(text.split("\n")[:-1][-command.lines :])

    async def stream(self, principal: Principal, command: StreamLogs) -> AsyncGenerator[OutputChunk, None]:
        """The same, then what comes. Whoever stops calls `aclose`. A slow reader slows itself alone."""
        agent = await self._agent(principal, command.sandbox_id, command.lines)
        return self._follow(agent, command.lines)

    async def _agent(self, principal: Principal, sandbox_id: str, lines: int) -> Agent:
        if not 1 <= lines <= _LINES_MAX:
            raise invalid("lines", f"must be between 1 and {_LINES_MAX}")
        sandbox = await self._context.running(principal, sandbox_id)
        # Passive: watching a sandbox's logs is no reason to keep it from idling out.
        return self._context.host.agent(sandbox.id, passive=True)

    async def _follow(self, agent: Agent, lines: int) -> AsyncGenerator[OutputChunk, None]:
        chunks: asyncio.Queue[OutputChunk | VmmError] = asyncio.Queue(_QUEUE_MAX)
        watcher = asyncio.create_task(_watch(agent, lines, chunks))
        try:
            while True:
                item = await chunks.get()
                if isinstance(item, VmmError):
                    with vmm_errors():
                        raise item
                yield item
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])


async def _watch(agent: Agent, lines: int, chunks: asyncio.Queue[OutputChunk | VmmError]) -> None:
    """Put every process's output into the queue, of those that run now and those to come, until cancelled."""
    seen: set[str] = set()
    tail_bytes = lines * _LINE_BYTES_GUESS
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                for record in await _recent(agent):
                    if record.id not in seen:
                        seen.add(record.id)
                        group.create_task(_pump(agent, record, tail_bytes, chunks))
                await asyncio.sleep(_LOOK_S)
    except* VmmError as errors:
        await chunks.put(_first(errors))


async def _pump(
    agent: Agent, record: ProcessRecord, tail_bytes: int, chunks: asyncio.Queue[OutputChunk | VmmError]
) -> None:
    async with await agent.attach(record.id, tail_bytes=tail_bytes) as execution:
        async for chunk in execution:
            await chunks.put(output_chunk(chunk))


def _first(errors: BaseExceptionGroup[VmmError]) -> VmmError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _recent(agent: Agent) -> list[ProcessRecord]:
    """Background processes, oldest first: what foreground ones write goes to whoever waits for it."""
    records = [record for record in await agent.processes() if record.background]
    return sorted(records, key=lambda record: record.started_at)[-_PROCESSES_MAX:]


async def _kept(agent: Agent, record: ProcessRecord, lines: int) -> list[OutputChunk]:
    async with await agent.attach(record.id, follow=False) as execution:
        return last_lines([output_chunk(chunk) async for chunk in execution], lines)


def _whole_lines(chunks: list[OutputChunk]) -> bytes:
    data = b"".join(chunk.data for chunk in chunks)
    return data if not data or data.endswith(b"\n") else data + b"\n"
