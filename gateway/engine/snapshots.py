"""Snapshots: memory and files of a sandbox at one instant, to go back to or to start others from.

    pending ─▶ ready ─▶ deleting ─▶ (no row)
        └────▶ error ───────┘

The row is written before the host is asked; its id is the image's, and the host takes one id once. Every worker hears
from the host how far it is, and conditional updates let one of them record each step: who asked may be dead by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import sqlalchemy as sa

from gateway.commands import (
    CreateSnapshot,
    DeleteSnapshot,
    FollowSnapshot,
    GetSnapshot,
    ListSnapshots,
)
from gateway.engine.context import STARTED, Context, owned_row, require
from gateway.engine.translate import from_vmm
from gateway.errors import GatewayError
from gateway.events import checkpoint_event
from gateway.resources import Page, Principal, Sandbox, Snapshot, SnapshotState
from gateway.store import snapshots as rows
from gateway.store import templates as template_rows
from vmm.errors import LinkError, VmmError
from vmm.types import SnapshotInfo, SnapshotStep
from vmm.types import SnapshotState as ImageState

_log = logging.getLogger(__name__)

#: Saving, hashing and storing 8 GiB.
_TAKE_S = 600.0
#: How long a caller waits for the instant to be caught, for a snapshot to be ready, and for a restore.
_CATCH_S = 45.0
_READY_S = 300.0
_RESTORE_S = 60.0


class SnapshotService:
    """Commands about snapshots."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._taking: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Leave the snapshots under way to the host; another worker records how they end."""
        for task in self._taking.values():
            task.cancel()
        await asyncio.gather(*self._taking.values(), return_exceptions=True)

    async def create(self, principal: Principal, command: CreateSnapshot) -> Snapshot:
        """Take a snapshot; returns once the sandbox's memory and files of the instant are saved.

        Raises GatewayError: sandbox_not_found, sandbox_not_running, quota_exceeded, snapshot_too_large,
        snapshot_failed, disk_full, host_unavailable.
        """
        snapshot = await self._context.database.write(lambda connection: self._insert(connection, principal, command))
        if snapshot.state is SnapshotState.PENDING:
            self._context.events.announce()
            self._take(snapshot)
        snapshot = await self._wait(snapshot.id, _READY_S if command.is_awaited else _CATCH_S, command.is_awaited)
        if snapshot.state is SnapshotState.ERROR:
            raise _failure(snapshot)
        return snapshot

    def _insert(self, connection: sa.Connection, principal: Principal, command: CreateSnapshot) -> Snapshot:
        existing = rows.get(connection, command.effect_id)
        if existing is not None and existing.state is not SnapshotState.ERROR:
            return existing
        sandbox = require(owned_row(connection, principal, command.sandbox_id), *STARTED)
        limit = self._context.settings.snapshots_per_workspace
        if rows.count(connection, principal.workspace_id) >= limit:
            raise GatewayError("quota_exceeded", f"The workspace already has {limit} snapshots.")
        if existing is not None:
            rows.delete(connection, existing.id)
        snapshot = _pending(sandbox, command, self._context.clock())
        rows.insert(connection, snapshot)
        checkpoint_event(connection, "created", snapshot, at=snapshot.created_at, label=snapshot.label)
        return snapshot

    def _take(self, snapshot: Snapshot) -> None:
        if snapshot.id not in self._taking:
            task = asyncio.create_task(self._have_taken(snapshot), name=f"snapshot {snapshot.id}")
            self._taking[snapshot.id] = task
            task.add_done_callback(lambda _: self._taking.pop(snapshot.id, None))

    async def _have_taken(self, snapshot: Snapshot) -> None:
        try:
            deadline = time.monotonic() + _TAKE_S
            info = await self._context.host.create_snapshot(snapshot.id, snapshot.sandbox_id, deadline=deadline)
        except LinkError as error:
            # It may be under way: the host's events, or the reconciler, tell what became of it.
            _log.warning("snapshot %s: the host has been lost: %s", snapshot.id, error)
        except VmmError as error:
            await self.fail(snapshot, from_vmm(error).code, error.detail or error.message)
        else:
            await self.note(info)

    def is_taking(self, snapshot_id: str) -> bool:
        """Whether this process waits for the host to take it."""
        return snapshot_id in self._taking

    async def note_lost(self, snapshot: Snapshot) -> None:
        """Record that the image of a ready snapshot is not there any more."""
        values = {"state": SnapshotState.ERROR, "error_code": "snapshot_corrupt", "error_detail": "its image is gone"}
        await self._conclude(snapshot, "failed", values, {"error": "snapshot_corrupt"}, only_in=SnapshotState.READY)

    async def note(self, info: SnapshotInfo) -> None:
        """Record what the host says of an image, if it is a pending snapshot's."""
        snapshot = await self._context.database.lookup(lambda connection: rows.get(connection, info.id))
        if snapshot is None or snapshot.state is not SnapshotState.PENDING:
            return
        if info.state is ImageState.PENDING:
            await self._note_progress(snapshot, info)
        elif info.state is ImageState.ERROR:
            await self.fail(snapshot, "snapshot_failed", info.detail)
        elif info.size_bytes > self._context.settings.snapshot_bytes_max:
            await self.fail(snapshot, "snapshot_too_large", f"{info.size_bytes} bytes")
            await self._remove_image(snapshot.id)
        else:
            await self._note_ready(snapshot, info)

    async def _note_progress(self, snapshot: Snapshot, info: SnapshotInfo) -> None:
        step = info.step.value if info.step is not None else None
        if step is None or (step, info.progress) == (snapshot.step, snapshot.progress):
            return

        def job(connection: sa.Connection) -> bool:
            changed = rows.advance(connection, snapshot.id, step=step, progress=info.progress)
            if changed:
                checkpoint_event(connection, "progress", snapshot, step=step, progress=info.progress)
            return changed

        if await self._context.database.write(job):
            self._context.events.announce()

    async def _note_ready(self, snapshot: Snapshot, info: SnapshotInfo) -> None:
        values = {
            "state": SnapshotState.READY,
            "step": None,
            "progress": 1.0,
            "size_bytes": info.size_bytes,
            "stored_bytes": info.stored_bytes,
            "pause_ms": info.pause_ms,
            "ready_at": info.ready_at or self._context.clock(),
        }
        told = {"size_bytes": info.size_bytes, "pause_ms": info.pause_ms}
        await self._conclude(snapshot, "ready", values, told)

    async def fail(self, snapshot: Snapshot, code: str, detail: str | None) -> None:
        """Record that a pending snapshot will not come about. code: one of `gateway.errors.CODES`."""
        values = {"state": SnapshotState.ERROR, "error_code": code, "error_detail": detail}
        await self._conclude(snapshot, "failed", values, {"error": code})

    async def _conclude(
        self,
        snapshot: Snapshot,
        kind: str,
        values: dict[str, Any],
        told: dict[str, Any],
        *,
        only_in: SnapshotState = SnapshotState.PENDING,
    ) -> None:
        def job(connection: sa.Connection) -> bool:
            changed = rows.change(connection, snapshot.id, only_in=[only_in], **values)
            if changed:
                checkpoint_event(connection, kind, snapshot, **told)
            return changed

        if await self._context.database.write(job):
            self._context.events.announce()

    async def _wait(self, snapshot_id: str, timeout_s: float, until_ready: bool) -> Snapshot:
        """The snapshot once its instant is caught, or once it is ready. Raises snapshot_not_found, timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    mark = self._context.events.mark()
                    snapshot = await self._context.database.lookup(lambda connection: rows.get(connection, snapshot_id))
                    if snapshot is None:
                        raise _not_found()
                    if snapshot.state is not SnapshotState.PENDING:
                        return snapshot
                    if not until_ready and snapshot.step not in {None, SnapshotStep.SAVING.value}:
                        return snapshot
                    await self._context.events.wait(mark)
        except TimeoutError as error:
            raise GatewayError("timeout", "The snapshot takes longer than this request may.") from error

    async def list(self, principal: Principal, command: ListSnapshots) -> Page[Snapshot]:
        """One page of them, newest first. Raises sandbox_not_found."""
        if command.sandbox_id is not None:
            await self._context.sandbox(principal, command.sandbox_id)
        items, total = await self._context.database.read(
            lambda connection: rows.find(
                connection,
                principal.workspace_id,
                command.sandbox_id,
                offset=(command.page - 1) * command.page_size,
                limit=command.page_size,
            )
        )
        return Page(tuple(items), command.page, command.page_size, total)

    async def get(self, principal: Principal, command: GetSnapshot) -> Snapshot:
        """By id. Raises snapshot_not_found."""
        return await self._owned(principal, command.snapshot_id, command.sandbox_id)

    async def _owned(self, principal: Principal, snapshot_id: str, sandbox_id: str | None = None) -> Snapshot:
        found = await self._context.database.lookup(lambda connection: rows.get(connection, snapshot_id))
        return _owned(found, principal, sandbox_id)

    async def ready(self, principal: Principal, snapshot_id: str) -> Snapshot:
        """A snapshot to start from; one that is being taken is waited for. Raises snapshot_not_found and _not_ready."""
        snapshot = await self._owned(principal, snapshot_id)
        if snapshot.state is SnapshotState.PENDING:
            snapshot = await self._wait(snapshot_id, _CATCH_S, until_ready=True)
        if snapshot.state is not SnapshotState.READY:
            raise GatewayError("snapshot_not_ready", f"The snapshot's state is {snapshot.state.value}.")
        return snapshot

    async def follow(self, principal: Principal, command: FollowSnapshot) -> AsyncGenerator[Snapshot, None]:
        """The snapshot now and after each change, until it is pending no more. Raises snapshot_not_found."""
        first = await self._owned(principal, command.snapshot_id, command.sandbox_id)
        return self._follow(first)

    async def _follow(self, snapshot: Snapshot) -> AsyncGenerator[Snapshot, None]:
        yield snapshot
        while snapshot.state is SnapshotState.PENDING:
            mark = self._context.events.mark()
            now = await self._context.database.lookup(partial(rows.get, snapshot_id=snapshot.id))
            if now is None:
                return
            if now == snapshot:
                await self._context.events.wait(mark)
            else:
                snapshot = now
                yield snapshot

    async def delete(self, principal: Principal, command: DeleteSnapshot) -> Snapshot:
        """Remove a snapshot; what it was. Raises snapshot_not_found, snapshot_not_ready, snapshot_in_use.

        From the commit on nobody sees it; a host that cannot be told now is told by the reconciler.
        """

        def job(connection: sa.Connection) -> Snapshot:
            snapshot = _owned(rows.get(connection, command.snapshot_id), principal, command.sandbox_id)
            if snapshot.state is SnapshotState.PENDING:
                raise GatewayError("snapshot_not_ready", "The snapshot is still being taken.", retry_after_s=1)
            if template_rows.is_image_in_use(connection, snapshot.id):
                raise GatewayError("snapshot_in_use", "A sandbox is being made from the snapshot.", retry_after_s=1)
            rows.change(connection, snapshot.id, only_in=_ENDED, state=SnapshotState.DELETING)
            return snapshot

        snapshot = await self._context.database.write(job)
        try:
            await self.finish_deleting(snapshot)
        except LinkError as error:
            _log.warning("the image of snapshot %s is left to the reconciler: %s", snapshot.id, error)
        except VmmError as error:
            back = {"state": snapshot.state}
            await self._context.database.write(
                lambda connection: rows.change(connection, snapshot.id, only_in=[SnapshotState.DELETING], **back)
            )
            raise from_vmm(error) from error
        return snapshot

    async def finish_deleting(self, snapshot: Snapshot) -> None:
        """Remove the image, then the row. Raises VmmError."""
        await self._context.host.delete_snapshot(snapshot.id)

        def job(connection: sa.Connection) -> None:
            rows.delete(connection, snapshot.id)
            checkpoint_event(connection, "deleted", snapshot)

        await self._context.database.write(job)
        self._context.events.announce()

    async def _remove_image(self, snapshot_id: str) -> None:
        try:
            await self._context.host.delete_snapshot(snapshot_id)
        except VmmError as error:
            _log.warning("the image of snapshot %s is left to the reconciler: %s", snapshot_id, error)


_ENDED = (SnapshotState.READY, SnapshotState.ERROR, SnapshotState.DELETING)


def _pending(sandbox: Sandbox, command: CreateSnapshot, now: float) -> Snapshot:
    return Snapshot(
        id=command.effect_id,
        workspace_id=sandbox.workspace_id,
        sandbox_id=sandbox.id,
        parent_id=sandbox.snapshot_id,
        label=command.label,
        state=SnapshotState.PENDING,
        step=None,
        progress=0.0,
        template=sandbox.template,
        base_template=sandbox.base_template,
        cpu_count=sandbox.cpu_count,
        memory_mib=sandbox.memory_mib,
        disk_mib=sandbox.disk_mib,
        env=sandbox.env,
        size_bytes=None,
        stored_bytes=None,
        pause_ms=None,
        created_at=now,
        ready_at=None,
        error_code=None,
        error_detail=None,
    )


def _owned(snapshot: Snapshot | None, principal: Principal, sandbox_id: str | None) -> Snapshot:
    if (
        snapshot is None
        or snapshot.workspace_id != principal.workspace_id
        or snapshot.state is SnapshotState.DELETING
        or (sandbox_id is not None and snapshot.sandbox_id != sandbox_id)
    ):
        raise _not_found()
    return snapshot


def _not_found() -> GatewayError:
    return GatewayError("snapshot_not_found", "No snapshot with that id.")


def _failure(snapshot: Snapshot) -> GatewayError:
    detail = f" ({snapshot.error_detail})" if snapshot.error_detail else ""
    return GatewayError(snapshot.error_code or "snapshot_failed", f"The snapshot could not be taken{detail}.")
