"""What sandboxes use now and have used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import sqlalchemy as sa

from gateway.commands import GetMetrics, GetUsage
from gateway.engine.context import Context
from gateway.engine.translate import vmm_errors
from gateway.errors import invalid
from gateway.resources import Load, Metrics, Principal, Usage
from gateway.store import usage as rows
from vmm.types import Sample


class InsightService:
    """Commands about resource use."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def metrics(self, principal: Principal, command: GetMetrics) -> Metrics:
        """Use now and lately. Raises sandbox_not_found, sandbox_not_running, agent_unavailable. It is no activity."""
        context = self._context
        sandbox = await context.running(principal, command.sandbox_id)
        with vmm_errors():
            stats, guest = await asyncio.gather(
                context.host.stats(sandbox.id), context.host.agent(sandbox.id, passive=True).metrics()
            )
            now = context.clock()
            samples = []
            if command.window_s is not None:
                samples = await context.host.history(sandbox.id, now - command.window_s)
        newest = Sample(now, stats.cpu_seconds, stats.memory_bytes)
        return Metrics(
            at=now,
            cpu_seconds=stats.cpu_seconds,
            cpu_count=sandbox.cpu_count,
            memory_used_bytes=stats.memory_bytes,
            memory_limit_bytes=stats.memory_limit_bytes,
            disk_used_bytes=guest.disk_used_bytes,
            # The guest's own total is that of an overlay without a size.
            disk_total_bytes=sandbox.disk_mib * 1024**2,
            processes=guest.processes,
            uptime_s=guest.uptime_s,
            series=loads([*samples, newest], sandbox.cpu_count),
        )

    async def usage(self, principal: Principal, command: GetUsage) -> Usage:
        """What was used between two times: running time, and the resources held while running.

        Raises sandbox_not_found, validation_failed (the end lies before the start).
        """
        start, end = command.period_start, min(command.period_end, self._context.clock())
        if command.period_end < start:
            raise invalid("period_end", "lies before period_start")
        if command.sandbox_id is not None:
            await self._context.sandbox(principal, command.sandbox_id)

        def job(connection: sa.Connection) -> Usage:
            return rows.between(connection, principal.workspace_id, command.sandbox_id, start=start, end=end)

        return await self._context.database.read(job)


def loads(samples: Sequence[Sample], cpu_count: float) -> tuple[Load, ...]:
    """What was used from each sample to the next, oldest first."""
    loads = []
    for before, after in pairwise(samples):
        # A sandbox that woke from disk counts from zero again.
        used_s = after.cpu_seconds - (before.cpu_seconds if before.cpu_seconds <= after.cpu_seconds else 0.0)
        possible_s = max(after.at - before.at, 0.001) * cpu_count
        loads.append(Load(after.at, round(100 * used_s / possible_s, 2), after.memory_bytes))
    return tuple(loads)
