"""Forks: copies of a sandbox, all of one instant, each with its own name, variables and end.

The rows of all copies are written first. Their ids are made from the command's effect id, and the host makes one id
once, so the same command again finds what is there and makes what is missing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from gateway.commands import ForkSandbox
from gateway.engine.context import STARTED, Context, require
from gateway.engine.creation import CreationService, is_up
from gateway.engine.plan import check_timeout, make_slug
from gateway.engine.snapshots import SnapshotService
from gateway.engine.translate import from_vmm
from gateway.errors import GatewayError, invalid
from gateway.resources import Principal, Sandbox, SandboxState, Snapshot
from gateway.store import sandboxes as rows
from vmm.errors import LinkError, MachineError, VmmError
from vmm.types import ChildSpec, ForkFailure, IdleAction, MachineInfo

_FORK_S = 60.0


class ForkService:
    """The command that forks."""

    def __init__(self, context: Context, creation: CreationService, snapshots: SnapshotService) -> None:
        self._context = context
        self._creation = creation
        self._snapshots = snapshots

    async def fork(self, principal: Principal, command: ForkSandbox) -> tuple[Sandbox, ...]:
        """Copy a sandbox as it is now, or one of its snapshots; the copies, in order, once they run.

        A copy that failed is in state error, unless all did. Raises GatewayError: sandbox_not_found,
        sandbox_not_running, snapshot_not_found, snapshot_not_ready, validation_failed, quota_exceeded, name_taken,
        snapshot_failed, no_capacity, boot_failed, host_unavailable.
        """
        self._check(command)
        parent = await self._context.sandbox(principal, command.sandbox_id)
        snapshot = None
        if command.snapshot_id is not None:
            snapshot = await self._snapshots.ready(principal, command.snapshot_id)
        wanted = [self._child(principal, command, parent, snapshot, index) for index in range(command.count)]
        children = await self._insert(parent, wanted, needs_parent=snapshot is None)
        missing = [child for child in children if child.state is SandboxState.PROVISIONING]
        if missing and snapshot is None:
            await self._copy(parent, missing)
        elif missing:
            outcomes = await asyncio.gather(*map(self._creation.finish, missing), return_exceptions=True)
            _raise_if_none(outcomes)
        return tuple([await self._context.sandbox(principal, child.id) for child in children])

    def _check(self, command: ForkSandbox) -> None:
        settings = self._context.settings
        if not 1 <= command.count <= settings.forks_max:
            raise invalid("count", f"must be between 1 and {settings.forks_max}")
        if command.timeout_s is not None:
            check_timeout("timeout", command.timeout_s, settings)

    def _child(
        self, principal: Principal, command: ForkSandbox, parent: Sandbox, snapshot: Snapshot | None, index: int
    ) -> Sandbox:
        now = self._context.clock()
        timeout_s = command.timeout_s if command.timeout_s is not None else parent.timeout_s
        has_end = timeout_s is not None and (parent.expires_at is not None or command.timeout_s is not None)
        name = command.name if command.name is None or command.count == 1 else f"{command.name}-{index + 1}"
        user = command.external_user_id or parent.attribution.external_user_id
        origin = snapshot or parent
        return replace(
            parent,
            id=child_id(command.effect_id, index),
            owner_key_id=principal.key_id,
            name=name,
            slug=make_slug(),
            state=SandboxState.PROVISIONING,
            template=origin.template,
            base_template=origin.base_template,
            cpu_count=origin.cpu_count,
            memory_mib=origin.memory_mib,
            disk_mib=origin.disk_mib,
            image_id=None if snapshot is None else snapshot.id,
            snapshot_id=parent.snapshot_id if snapshot is None else snapshot.id,
            parent_id=parent.id,
            restore_id=None,
            env={**origin.env, **command.env},
            metadata=parent.metadata if command.metadata is None else command.metadata,
            tags=parent.tags if command.tags is None else tuple(dict.fromkeys(command.tags)),
            attribution=replace(parent.attribution, external_user_id=user),
            address=None,
            timeout_s=timeout_s,
            always_on=parent.always_on and command.timeout_s is None,
            created_at=now,
            started_at=None,
            destroyed_at=None,
            expires_at=now + timeout_s if has_end and timeout_s is not None else None,
            stop_cause=None,
            stop_detail=None,
            boot_ms=None,
            paused_at=None,
            pause_kind=None,
            paused_s=0.0,
        )

    async def _insert(self, parent: Sandbox, wanted: Sequence[Sandbox], *, needs_parent: bool) -> list[Sandbox]:
        def job(connection: sa.Connection) -> list[Sandbox]:
            children = [self._creation.insert(connection, child) for child in wanted]
            if needs_parent and any(child.state is SandboxState.PROVISIONING for child in children):
                require(rows.get(connection, parent.id) or parent, *STARTED)
            return children

        children = await self._context.database.write(job)
        self._context.events.announce()
        return children

    async def _copy(self, parent: Sandbox, missing: Sequence[Sandbox]) -> None:
        try:
            deadline = time.monotonic() + _FORK_S
            fork = await self._context.host.fork_machine(
                parent.id, [_spec(child) for child in missing], deadline=deadline
            )
        except VmmError as error:
            failure = from_vmm(error)
            failure.__cause__ = error
            if not isinstance(error, LinkError):
                await asyncio.gather(*(self._creation.fail(child, failure) for child in missing))
            raise failure from error
        outcomes = await asyncio.gather(*map(self._settle, missing, fork.machines), return_exceptions=True)
        _raise_if_none(outcomes)

    async def _settle(self, child: Sandbox, outcome: MachineInfo | ForkFailure) -> Sandbox:
        if isinstance(outcome, MachineInfo) and is_up(outcome):
            return await self._creation.mark_running(child, outcome)
        if isinstance(outcome, MachineInfo):
            failure = GatewayError("boot_failed", f"The copy could not be started: {outcome.detail or 'no cause'}.")
        else:
            cause = MachineError(outcome.code, outcome.message, detail=outcome.detail)
            failure = from_vmm(cause)
            failure.__cause__ = cause
        await self._creation.fail(child, failure)
        raise failure


def child_id(effect_id: str, index: int) -> str:
    """The id of a fork's copy: the effect's own for the first, made from it for the others."""
    return effect_id if index == 0 else str(uuid.uuid5(uuid.UUID(effect_id), str(index)))


def _raise_if_none(outcomes: Sequence[Sandbox | BaseException]) -> None:
    """Raise the first error if nothing else came out, or what is no error of a copy's own."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    unexpected = [error for error in errors if not isinstance(error, GatewayError)]
    if unexpected or len(errors) == len(outcomes):
        raise (unexpected or errors)[0]


def _spec(child: Sandbox) -> ChildSpec:
    return ChildSpec(
        id=child.id,
        hostname=child.slug,
        env=dict(child.env),
        expires_at=child.expires_at,
        idle_timeout_s=child.idle_timeout_s,
        idle_action=IdleAction(child.idle_action),
        auto_resume=child.auto_resume,
        hibernate_after_s=child.hibernate_after_s,
    )
