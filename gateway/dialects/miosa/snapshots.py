"""Snapshots: take, list, follow, delete, go back to one; and copies of a sandbox."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands, resources
from gateway.dialects.miosa import decode, paging, sandboxes, sse
from gateway.dialects.miosa.answers import iso, iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import EVENT_STREAM, NOTHING, Route, many, one
from gateway.pipeline import Call
from gateway.resources import SnapshotState

READ = sandboxes.READ
WRITE = sandboxes.WRITE

#: The clients' words for the states of the specification.
_STATUSES: dict[SnapshotState, Literal["creating", "ready", "failed"]] = {
    SnapshotState.PENDING: "creating",
    SnapshotState.READY: "ready",
    SnapshotState.ERROR: "failed",
}
#: While its bytes go to the disk clients call it so; the sandbox runs on already.
_STORING = ("hashing", "publishing")

Label = Annotated[str, Meta(max_length=500)]


class SnapshotRequest(msgspec.Struct):
    """What to call it; `label` and `comment` mean the same."""

    label: Label | None = None
    comment: Label | None = None


class ForkRequest(msgspec.Struct, kw_only=True):
    """What the copies differ in. With `snapshot_id` they are copies of a snapshot, not of the sandbox as it is now."""

    count: Annotated[int, Meta(ge=1, le=1000)] | None = None
    snapshot_id: decode.Id | None = None
    name: decode.Name | None = None
    env: decode.Env | None = None
    metadata: decode.Metadata | None = None
    tags: decode.Tags | None = None
    timeout_ms: sandboxes.Milliseconds | None = None
    timeout_sec: sandboxes.Seconds | None = None
    external_user_id: decode.Text | None = None


class ListSnapshotsQuery(paging.PageQuery, kw_only=True):
    """resource_id: only those of this sandbox."""

    resource_id: decode.Id | None = None


class Snapshot(TypedDict):
    """A snapshot. `state` is the specification's word, `status` the clients'."""

    id: str
    snapshot_id: str
    sandbox_id: str
    workspace_id: str
    parent_id: str | None
    label: str | None
    comment: str | None
    state: Literal["pending", "ready", "error"]
    status: Literal["creating", "uploading", "ready", "failed"]
    step: str | None
    progress: float
    template: str
    cpu_count: float
    memory_mb: int
    disk_mb: int
    size_bytes: int | None
    stored_bytes: int | None
    pause_ms: float | None
    error: str | None
    error_code: str | None
    created_at: str
    ready_at: str | None


class Fork(sandboxes.Sandbox):
    """The first copy; `forks` has all of them."""

    forks: list[sandboxes.Sandbox]


def snapshot(item: resources.Snapshot) -> Snapshot:
    """A snapshot in MIOSA's words."""
    is_pending = item.state is SnapshotState.PENDING
    return Snapshot(
        id=item.id,
        snapshot_id=item.id,
        sandbox_id=item.sandbox_id,
        workspace_id=item.workspace_id,
        parent_id=item.parent_id,
        label=item.label,
        comment=item.label,
        state=item.state.value,  # type: ignore[typeddict-item]
        status="uploading" if is_pending and item.step in _STORING else _STATUSES[item.state],
        step=item.step,
        progress=item.progress,
        template=item.template,
        cpu_count=item.cpu_count,
        memory_mb=item.memory_mib,
        disk_mb=item.disk_mib,
        size_bytes=item.size_bytes,
        stored_bytes=item.stored_bytes,
        pause_ms=item.pause_ms,
        error=item.error_detail or item.error_code,
        error_code=item.error_code,
        created_at=iso_time(item.created_at),
        ready_at=iso(item.ready_at),
    )


def _snapshot_id(call: Call) -> str:
    return decode.resource_id(call.request, "snapshot_id", missing="snapshot_not_found")


def _sandbox_id(call: Call) -> str | None:
    return decode.sandbox_id(call) if "sandbox_id" in call.request.path_params else None


async def create(call: Call, body: SnapshotRequest) -> Snapshot:
    """Take a snapshot of memory and files.

    The answer comes once the instant is caught; the snapshot may still be `pending` while it is stored.
    """
    return await _create(call, body, is_awaited=False)


async def create_and_wait(call: Call, body: SnapshotRequest) -> Snapshot:
    """Take a snapshot and wait until it is ready."""
    return await _create(call, body, is_awaited=True)


async def _create(call: Call, body: SnapshotRequest, *, is_awaited: bool) -> Snapshot:
    label = first(body.label, body.comment)
    command = commands.CreateSnapshot(decode.sandbox_id(call), call.effect_id, label, is_awaited)
    return snapshot(await call.engine.create_snapshot(call.principal, command))


async def list_of_sandbox(call: Call, query: paging.PageQuery) -> resources.Page[Snapshot]:
    """List a sandbox's snapshots, newest first."""
    return await _list(call, query, decode.sandbox_id(call))


async def list_all(call: Call, query: ListSnapshotsQuery) -> resources.Page[Snapshot]:
    """List the workspace's snapshots, newest first."""
    return await _list(call, query, query.resource_id)


async def _list(call: Call, query: paging.PageQuery, sandbox_id: str | None) -> resources.Page[Snapshot]:
    page, page_size = paging.page(call.request, query)
    command = commands.ListSnapshots(sandbox_id, page, page_size)
    return paging.encode(await call.engine.list_snapshots(call.principal, command), snapshot)


async def get(call: Call) -> Snapshot:
    """Get a snapshot."""
    command = commands.GetSnapshot(_snapshot_id(call), _sandbox_id(call))
    return snapshot(await call.engine.get_snapshot(call.principal, command))


async def delete(call: Call) -> None:
    """Delete a snapshot; refused while a sandbox is being made from it."""
    await call.engine.delete_snapshot(call.principal, commands.DeleteSnapshot(_snapshot_id(call), _sandbox_id(call)))


async def events(call: Call) -> Response:
    """How far a snapshot is.

    `snapshot_progress` frames, until it is ready or has failed.
    """
    command = commands.FollowSnapshot(_snapshot_id(call), _sandbox_id(call))
    items = await call.engine.follow_snapshot(call.principal, command)

    async def frames() -> sse.Frames:
        async for item in items:
            yield sse.frame("snapshot_progress", snapshot(item))

    return sse.response(call, frames(), source=items)


async def restore(call: Call) -> sandboxes.Sandbox:
    """Put the sandbox back to a snapshot's memory and files; what it did since is gone."""
    command = commands.RestoreSandbox(decode.sandbox_id(call), _snapshot_id(call), call.effect_id)
    return sandboxes.sandbox(await call.engine.restore_sandbox(call.principal, command))


async def fork(call: Call, body: ForkRequest) -> Fork:
    """Copy the sandbox, memory and all, once or `count` times; it runs on.

    The object is the first copy; `forks` has all. A copy that could not be made is in state `error`.
    """
    return await _fork(call, decode.sandbox_id(call), body.snapshot_id, body)


async def fork_snapshot(call: Call, body: ForkRequest) -> Fork:
    """Make sandboxes from a snapshot, one or `count`."""
    found = await call.engine.get_snapshot(call.principal, commands.GetSnapshot(_snapshot_id(call)))
    return await _fork(call, found.sandbox_id, found.id, body)


async def _fork(call: Call, sandbox_id: str, snapshot_id: str | None, body: ForkRequest) -> Fork:
    command = commands.ForkSandbox(
        sandbox_id,
        call.effect_id,
        count=first(body.count, 1),
        snapshot_id=snapshot_id,
        name=body.name,
        env=body.env or {},
        metadata=decode.metadata(body.metadata),
        tags=body.tags,
        timeout_s=sandboxes.seconds(body.timeout_ms, body.timeout_sec),
        external_user_id=body.external_user_id,
    )
    forks = [sandboxes.sandbox(item) for item in await call.engine.fork_sandbox(call.principal, command)]
    return Fork(**forks[0], forks=forks)


_SANDBOX = "/sandboxes/{sandbox_id}"
_ONE = _SANDBOX + "/snapshots/{snapshot_id}"
_STREAM: dict[str, Any] = {"streams_answer": True, "timeout_s": float("inf")}
#: Saving gigabytes takes longer than an ordinary request may.
_PATIENT: dict[str, Any] = {"timeout_s": 310.0}

ROUTES = (
    Route("POST", _SANDBOX + "/snapshots", create, one(Snapshot, status=202), WRITE, SnapshotRequest, terms=_PATIENT),
    Route("POST", _SANDBOX + "/snapshot", create_and_wait, one(Snapshot), WRITE, SnapshotRequest, terms=_PATIENT),
    Route("GET", _SANDBOX + "/snapshots", list_of_sandbox, many(Snapshot), READ, query=paging.PageQuery),
    Route("GET", _ONE, get, one(Snapshot), READ),
    Route("DELETE", _ONE, delete, NOTHING, WRITE),
    Route("GET", _ONE + "/events", events, EVENT_STREAM, READ, terms=_STREAM),
    Route("POST", _SANDBOX + "/restore/{snapshot_id}", restore, one(sandboxes.Sandbox), WRITE, terms=_PATIENT),
    Route("POST", _SANDBOX + "/fork", fork, one(Fork, status=201), WRITE, ForkRequest, terms=_PATIENT),
    Route("GET", "/snapshots", list_all, many(Snapshot), READ, query=ListSnapshotsQuery),
    Route("GET", "/snapshots/{snapshot_id}", get, one(Snapshot), READ),
    Route("DELETE", "/snapshots/{snapshot_id}", delete, NOTHING, WRITE),
    Route("POST", "/snapshots/{snapshot_id}/fork", fork_snapshot, one(Fork, status=201), WRITE, ForkRequest),
)
