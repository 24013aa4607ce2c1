"""Makes SQL and the host agree again after anything that died half-way.

One worker at a time does it, the holder of a lease. Each difference has one right answer:

    machine without a living sandbox          destroy it
    sandbox running without a machine         record it as destroyed (lost, or the machine's own cause)
    sandbox provisioning, creator gone        running if its machine runs, else error
    sandbox past its end                      destroy it
    sandbox running, machine paused, or v. v. record what the machine is
    build whose builder fell silent           begun again, once; failed the second time
    machine with other timers than SQL has    tell the host
    snapshot pending, nobody taking it        what the host has of it; error if that is nothing
    snapshot ready without an image           error
    snapshot deleting                         delete its image, then its row
    image that belongs to nothing             delete it

Nothing here is needed while all goes well: creating, destroying and the host's own timers do the same at once.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from gateway.engine import Engine
from gateway.engine.creation import BOOT_S, is_up
from gateway.engine.images import ImageReconciler
from gateway.engine.sandboxes import has_other_timers, timers
from gateway.errors import GatewayError
from gateway.resources import Sandbox, SandboxState
from gateway.store import builds, events, leases, previews, sandboxes, templates, tickets
from vmm.errors import MachineError, VmmError
from vmm.types import MachineInfo, MachineState, StopCause

_log = logging.getLogger(__name__)

_LEASE = "reconciler"
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how patiently. All in seconds.

    arrival_s: after this a sandbox whose machine runs has been left by its creator, who would have recorded it.
    provisioning_s: after this nobody can be starting a sandbox any more.
    orphan_s: age below which a machine or an image is left alone.  overdue_s: how late the host's own timer may be.
    silent_s: after this long without a sign of life a build has no builder.
    """

    interval_s: float = 5.0
    lease_s: float = 15.0
    arrival_s: float = 15.0
    provisioning_s: float = BOOT_S + 15.0
    orphan_s: float = 10.0
    overdue_s: float = 5.0
    silent_s: float = 30.0
    prune_interval_s: float = 600.0
    event_retention_s: float = 7 * _DAY_S
    sandbox_retention_s: float = 90 * _DAY_S


class Reconciler:
    """Runs in every worker; works in one."""

    def __init__(self, engine: Engine, pace: Pace | None = None) -> None:
        self._engine = engine
        self._context = engine.context
        self._pace = pace or Pace()
        self._images = ImageReconciler(engine, young_s=self._pace.orphan_s)
        self._holder = str(uuid.uuid4())
        self._pruned_at = 0.0

    async def run(self) -> None:
        """Reconcile now and then, until cancelled."""
        try:
            while True:
                await self._turn()
                await asyncio.sleep(self._pace.interval_s)
        finally:
            # Shielded: the next holder should not have to wait for the lease to end by itself.
            await asyncio.shield(self._release())

    async def _turn(self) -> None:
        try:
            if await self._acquire():
                await self.reconcile()
                await self._prune_if_due()
        except VmmError as error:
            _log.warning("the host cannot be reconciled now: %s", error)
        except sa.exc.SQLAlchemyError:
            _log.exception("the database cannot be reconciled now")

    async def reconcile(self) -> None:
        """One pass. Raises VmmError when the host cannot be asked."""
        # Machines first: one that is listed has been recorded by the time the rows are read, or has lost its creator.
        machines = {machine.id: machine for machine in await self._context.host.list_machines()}
        living = await self._context.database.read(
            lambda connection: sandboxes.find_in_states(
                connection, [SandboxState.PROVISIONING, SandboxState.RUNNING, SandboxState.PAUSED]
            )
        )
        builders = await self._settle_builds()
        await self._destroy_orphans(machines, {sandbox.id for sandbox in living} | builders)
        for sandbox in living:
            await self._settle(sandbox, machines.get(sandbox.id))
        await self._images.reconcile()

    async def _destroy_orphans(self, machines: Mapping[str, MachineInfo], living: set[str]) -> None:
        now = self._context.clock()
        for machine in machines.values():
            is_young = now - machine.created_at < self._pace.orphan_s
            if machine.id in living or is_young or not _is_there(machine):
                continue
            _log.warning("machine %s has no sandbox, destroying it", machine.id)
            try:
                await self._context.host.destroy_machine(machine.id, StopCause.LOST, unwanted_for_s=self._pace.orphan_s)
            except MachineError as error:
                if error.code != "in_use":
                    raise
                # Its create came again, and will record it.

    async def _settle_builds(self) -> set[str]:
        """Take up builds that nobody works on any more; the machines of the others."""
        machines = set()
        for build in await self._context.database.read(builds.find_open):
            if self._context.clock() - build.alive_at < self._pace.silent_s:
                machines.add(build.machine_id)
            else:
                _log.warning("build %s has been left by its builder", build.id)
                await self._engine.builds.take_up(build)
        return machines

    async def _settle(self, sandbox: Sandbox, machine: MachineInfo | None) -> None:
        now = self._context.clock()
        if sandbox.state is SandboxState.PROVISIONING:
            await self._settle_provisioning(sandbox, machine, now - sandbox.created_at)
        elif machine is None or not _is_there(machine):
            await self._settle_without_machine(sandbox)
        elif sandbox.expires_at is not None and sandbox.expires_at + self._pace.overdue_s < now:
            _log.warning("sandbox %s outlived its end, destroying it", sandbox.id)
            await self._engine.sandboxes.end(sandbox, SandboxState.DESTROYED, StopCause.TIMEOUT)
            await self._context.host.destroy_machine(sandbox.id, StopCause.TIMEOUT)
        else:
            await self._engine.pausing.follow(machine)
            if has_other_timers(sandbox, machine):
                await self._context.host.update_machine(sandbox.id, **timers(sandbox))

    async def _settle_provisioning(self, sandbox: Sandbox, machine: MachineInfo | None, age_s: float) -> None:
        has_arrived = machine is not None and is_up(machine)
        if age_s <= (self._pace.arrival_s if has_arrived else self._pace.provisioning_s):
            return
        if machine is not None and _is_there(machine):
            _log.info("sandbox %s came up after its creator left", sandbox.id)
            try:
                await self._engine.creation.finish(sandbox)
            except GatewayError as error:
                _log.warning("sandbox %s could not be finished: %s", sandbox.id, error)
        else:
            detail = "the server stopped while the sandbox was starting"
            await self._engine.sandboxes.end(sandbox, SandboxState.ERROR, StopCause.BOOT_FAILED, detail)

    async def _settle_without_machine(self, sandbox: Sandbox) -> None:
        # It may have been made after the list was: only its own answer counts.
        try:
            machine = await self._context.host.get_machine(sandbox.id)
        except MachineError as error:
            if error.code != "machine_not_found":
                raise
            cause, detail = StopCause.LOST, None
        else:
            if _is_there(machine):
                return
            cause, detail = machine.cause or StopCause.LOST, machine.detail
        _log.warning("sandbox %s has lost its machine (%s)", sandbox.id, cause.value)
        await self._engine.sandboxes.end(sandbox, SandboxState.DESTROYED, cause, detail)

    async def _prune_if_due(self) -> None:
        now = self._context.clock()
        if now - self._pruned_at < self._pace.prune_interval_s:
            return
        await self._context.database.write(lambda connection: prune(connection, now, self._pace))
        self._pruned_at = now

    async def _acquire(self) -> bool:
        now = self._context.clock()
        return await self._context.database.write(
            lambda connection: leases.acquire(connection, _LEASE, self._holder, now=now, duration_s=self._pace.lease_s)
        )

    async def _release(self) -> None:
        await self._context.database.write(lambda connection: leases.release(connection, _LEASE, self._holder))


#: Rows forgotten at a time: a few milliseconds of the writer's time.
_PRUNE_MAX = 1000


def prune(connection: sa.Connection, now: float, pace: Pace) -> None:
    """Forget what has been kept long enough."""
    events.prune(connection, now - pace.event_retention_s, limit=_PRUNE_MAX)
    sandboxes.prune(connection, now - pace.sandbox_retention_s, limit=_PRUNE_MAX)
    serving = templates.image_ids(connection)
    builds.prune(connection, now - pace.sandbox_retention_s, keep=serving, limit=_PRUNE_MAX)
    previews.prune_shares(connection, now - _DAY_S)
    tickets.prune(connection, now)


def _is_there(machine: MachineInfo) -> bool:
    return machine.state not in {MachineState.STOPPING, MachineState.STOPPED, MachineState.FAILED}
