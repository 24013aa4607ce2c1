"""Sandboxes: create, find, change, extend, destroy, and how they are doing."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands, resources
from gateway.dialects.miosa import decode, paging, sse
from gateway.dialects.miosa.answers import iso, iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import EVENT_STREAM, NOTHING, Route, many, one
from gateway.errors import GatewayError, invalid
from gateway.pipeline import Call
from gateway.resources import Attribution, IdleAction, SandboxState

READ = "sandboxes:read"
WRITE = "sandboxes:write"

#: What `extend` without a value means.
LIFE_S = 300.0
LIFE_S_MAX = 30 * 24 * 3600
_READY_WAIT_S = 60.0

Seconds = Annotated[float, Meta(ge=1, le=LIFE_S_MAX)]
Milliseconds = Annotated[int, Meta(ge=1000, le=LIFE_S_MAX * 1000)]

#: Named sizes of the clients: vCPUs and MiB of memory.
SIZES = {"xs": (1.0, 2048), "small": (2.0, 4096), "medium": (4.0, 8192)}


class CreateSandboxRequest(msgspec.Struct, kw_only=True):
    """What to run. `template`, `template_id` and `image` mean the same; so do the spellings of the other fields.

    With `snapshot_id` it starts from a snapshot, whatever the template. `persistent`: its timeout pauses it.
    """

    template: decode.Name | None = None
    template_id: decode.Name | None = None
    image: decode.Name | None = None
    snapshot_id: decode.Id | None = None
    name: decode.Name | None = None
    slug: decode.Slug | None = None
    size: Literal["xs", "small", "medium"] | None = None
    cpu_count: Annotated[float, Meta(ge=0.1, le=8)] | None = None
    memory_mb: Annotated[int, Meta(ge=128, le=8192)] | None = None
    disk_mb: Annotated[int, Meta(ge=64, le=10240)] | None = None
    disk_size_mb: Annotated[int, Meta(ge=64, le=10240)] | None = None
    timeout_ms: Milliseconds | None = None
    timeout_sec: Seconds | None = None
    idle_timeout_ms: Milliseconds | None = None
    idle_timeout_sec: Seconds | None = None
    always_on: bool | None = None
    persistent: bool | None = None
    idle_action: IdleAction | None = None
    on_idle: IdleAction | None = None
    auto_resume: bool | None = None
    hibernate_after_ms: Milliseconds | None = None
    hibernate_after_sec: Seconds | None = None
    env: decode.Env | None = None
    metadata: decode.Metadata | None = None
    tags: decode.Tags | None = None
    region: decode.Name | None = None
    workspace_id: decode.Text | None = None
    project_id: decode.Text | None = None
    external_workspace_id: decode.Text | None = None
    external_user_id: decode.Text | None = None
    external_project_id: decode.Text | None = None


class UpdateSandboxRequest(msgspec.Struct, kw_only=True):
    """What to change; what is absent stays."""

    name: decode.Name | None = None
    tags: decode.Tags | None = None
    metadata: decode.Metadata | None = None
    idle_timeout_ms: Milliseconds | None = None
    idle_timeout_sec: Seconds | None = None
    always_on: bool | None = None
    idle_action: IdleAction | None = None
    on_idle: IdleAction | None = None
    auto_resume: bool | None = None
    hibernate_after_ms: Milliseconds | None = None
    hibernate_after_sec: Seconds | None = None


class SetTagsRequest(msgspec.Struct):
    """The whole new list."""

    tags: decode.Tags


class ExtendSandboxRequest(msgspec.Struct, kw_only=True):
    """How long it lives from now; 300 s when nothing is said."""

    timeout_ms: Milliseconds | None = None
    timeout_sec: Seconds | None = None


class PauseSandboxRequest(msgspec.Struct):
    """How to pause."""

    hibernate: bool | None = None


class ListSandboxesQuery(paging.PageQuery, kw_only=True):
    """Filters; all given ones must hold. tags: a comma-separated list."""

    state: SandboxState | None = None
    status: SandboxState | None = None
    tags: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    external_workspace_id: str | None = None
    external_user_id: str | None = None
    external_project_id: str | None = None


class Sandbox(TypedDict):
    """A sandbox. `timeout_sec` is 0 when it is always on; `boot_path` tells what it started from.

    `parent_id` is the sandbox it is a copy of, `snapshot_id` the snapshot it was made from or last restored to.
    """

    id: str
    workspace_id: str
    tenant_id: str
    owner_id: str
    project_id: str | None
    external_workspace_id: str | None
    external_user_id: str | None
    external_project_id: str | None
    name: str | None
    slug: str
    state: Literal["provisioning", "running", "paused", "destroyed", "error"]
    status: Literal["provisioning", "running", "paused", "destroyed", "error"]
    ready: bool
    template: str
    template_id: str
    image_id: str
    cpu_count: float
    memory_mb: int
    disk_mb: int
    disk_size_mb: int
    timeout_sec: int
    timeout_ms: int
    timeout_remaining_ms: int | None
    idle_timeout_sec: int | None
    always_on: bool
    persistent: bool
    idle_action: Literal["destroy", "pause", "keep"]
    auto_resume: bool
    hibernate_after_sec: int | None
    parent_id: str | None
    snapshot_id: str | None
    paused_at: str | None
    pause_kind: Literal["frozen", "hibernated"] | None
    checkpoint_pending: bool
    metadata: dict[str, Any]
    tags: list[str]
    region: str
    ipv4: str | None
    preview_url: str | None
    boot_path: Literal["template", "snapshot", "fork"]
    boot_ms: int | None
    created_at: str
    inserted_at: str
    started_at: str | None
    ready_at: str | None
    destroyed_at: str | None
    expires_at: str | None
    total_runtime_sec: int
    stop_cause: str | None
    stop_detail: str | None


class Readiness(TypedDict):
    """Whether commands can run; `status` is `ready` or the sandbox's state."""

    ready: bool
    status: str
    state: str
    sandbox_id: str


class Load(TypedDict):
    """What a sandbox used until a time, from the one before on."""

    timestamp: str
    cpu_percent: float
    memory_used_bytes: int


class Metrics(TypedDict):
    """What a sandbox uses now."""

    sandbox_id: str
    timestamp: str
    cpu_count: float
    cpu_seconds: float
    cpu_percent: float
    memory_used_bytes: int
    memory_limit_bytes: int
    memory_used_mb: float
    disk_used_bytes: int
    disk_total_bytes: int
    processes: int
    uptime_sec: float
    window: NotRequired[str]
    series: NotRequired[list[Load]]


def sandbox(item: resources.Sandbox) -> Sandbox:
    """A sandbox in MIOSA's words."""
    now = time.time()
    created_at = iso_time(item.created_at)
    started_at = iso(item.started_at)
    timeout_s = 0.0 if item.timeout_s is None or item.always_on else item.timeout_s
    remaining_ms = None if item.expires_at is None else max(0, int((item.expires_at - now) * 1000))
    who = item.attribution
    return Sandbox(
        id=item.id,
        workspace_id=item.workspace_id,
        tenant_id=item.workspace_id,
        owner_id=item.owner_key_id or item.workspace_id,
        project_id=who.project_id,
        external_workspace_id=who.external_workspace_id,
        external_user_id=who.external_user_id,
        external_project_id=who.external_project_id,
        name=item.name,
        slug=item.slug,
        state=item.state.value,
        status=item.state.value,
        ready=item.state is SandboxState.RUNNING,
        template=item.template,
        template_id=item.template,
        image_id=item.template,
        cpu_count=int(item.cpu_count) if item.cpu_count == int(item.cpu_count) else item.cpu_count,
        memory_mb=item.memory_mib,
        disk_mb=item.disk_mib,
        disk_size_mb=item.disk_mib,
        timeout_sec=int(timeout_s),
        timeout_ms=int(timeout_s * 1000),
        timeout_remaining_ms=remaining_ms,
        idle_timeout_sec=None if item.idle_timeout_s is None else int(item.idle_timeout_s),
        always_on=item.always_on,
        persistent=item.idle_action is IdleAction.PAUSE and item.auto_resume,
        idle_action=item.idle_action.value,
        auto_resume=item.auto_resume,
        hibernate_after_sec=None if item.hibernate_after_s is None else int(item.hibernate_after_s),
        parent_id=item.parent_id,
        snapshot_id=item.snapshot_id,
        paused_at=iso(item.paused_at),
        pause_kind=None if item.pause_kind is None else item.pause_kind.value,
        # A pause is answered once it is complete.
        checkpoint_pending=False,
        metadata=dict(item.metadata),
        tags=list(item.tags),
        region=item.region,
        ipv4=item.address,
        preview_url=item.preview_url,
        boot_path=_boot_path(item),
        boot_ms=None if item.boot_ms is None else round(item.boot_ms),
        created_at=created_at,
        inserted_at=created_at,
        started_at=started_at,
        ready_at=started_at,
        destroyed_at=iso(item.destroyed_at),
        expires_at=iso(item.expires_at),
        total_runtime_sec=int(_ran_s(item, now)),
        stop_cause=item.stop_cause,
        stop_detail=item.stop_detail,
    )


def _boot_path(item: resources.Sandbox) -> Literal["template", "snapshot", "fork"]:
    if item.image_id is not None and item.image_id == item.snapshot_id:
        return "snapshot"
    return "template" if item.parent_id is None else "fork"


def _ran_s(item: resources.Sandbox, now: float) -> float:
    """Seconds it has run, without its pauses."""
    if item.started_at is None:
        return 0.0
    end: float = first(item.destroyed_at, item.paused_at, now)
    return max(0.0, end - item.started_at - item.paused_s)


def seconds(milliseconds: int | None, given_s: float | None) -> float | None:
    """A duration that has two spellings."""
    return milliseconds / 1000 if milliseconds is not None else given_s


def _attribution(source: CreateSandboxRequest | ListSandboxesQuery) -> Attribution:
    return Attribution(
        project_id=source.project_id,
        external_workspace_id=source.external_workspace_id,
        external_user_id=source.external_user_id,
        external_project_id=source.external_project_id,
    )


def _check_workspace(call: Call, workspace_id: str | None) -> None:
    if workspace_id is not None and workspace_id != call.principal.workspace_id:
        raise invalid("workspace_id", "must be the workspace of the API key")


def create_command(call: Call, body: CreateSandboxRequest) -> commands.CreateSandbox:
    """The request as a command."""
    _check_workspace(call, body.workspace_id)
    timeout_s = seconds(body.timeout_ms, body.timeout_sec)
    cpu_count, memory_mib = SIZES[body.size] if body.size is not None else (None, None)
    return commands.CreateSandbox(
        effect_id=call.effect_id,
        template=first(body.template, body.template_id, body.image),
        name=body.name,
        slug=body.slug,
        cpu_count=first(body.cpu_count, cpu_count),
        memory_mib=first(body.memory_mb, memory_mib),
        disk_mib=first(body.disk_mb, body.disk_size_mb),
        snapshot_id=body.snapshot_id,
        timeout_s=timeout_s,
        idle_timeout_s=seconds(body.idle_timeout_ms, body.idle_timeout_sec),
        always_on=bool(body.always_on),
        is_persistent=bool(body.persistent) and not body.always_on,
        idle_action=first(body.idle_action, body.on_idle),
        auto_resume=body.auto_resume,
        hibernate_after_s=seconds(body.hibernate_after_ms, body.hibernate_after_sec),
        env=body.env or {},
        metadata=decode.metadata(body.metadata) or {},
        tags=tuple(body.tags or ()),
        region=body.region,
        attribution=_attribution(body),
    )


async def create(call: Call, body: CreateSandboxRequest) -> Sandbox:
    """Create a sandbox.

    The answer comes once it runs, because older clients never look again.
    """
    return sandbox(await call.engine.create_sandbox(call.principal, create_command(call, body)))


async def list_all(call: Call, query: ListSandboxesQuery) -> resources.Page[Sandbox]:
    """List sandboxes, newest first; destroyed ones only when `state` asks for them."""
    _check_workspace(call, query.workspace_id)
    page, page_size = paging.page(call.request, query)
    command = commands.ListSandboxes(
        page=page,
        page_size=page_size,
        state=first(query.state, query.status),
        tags=tuple(tag for tag in (query.tags or "").split(",") if tag),
        attribution=_attribution(query),
    )
    return paging.encode(await call.engine.list_sandboxes(call.principal, command), sandbox)


async def get(call: Call) -> Sandbox:
    """Get a sandbox."""
    command = commands.GetSandbox(decode.sandbox_id(call))
    return sandbox(await call.engine.get_sandbox(call.principal, command))


async def get_by_name(call: Call) -> Sandbox:
    """Get a living sandbox by its name or slug."""
    command = commands.GetSandboxByName(call.request.path_params["name"])
    return sandbox(await call.engine.get_sandbox_by_name(call.principal, command))


async def update(call: Call, body: UpdateSandboxRequest) -> Sandbox:
    """Change a sandbox."""
    command = commands.UpdateSandbox(
        decode.sandbox_id(call),
        name=body.name,
        tags=body.tags,
        metadata=decode.metadata(body.metadata),
        idle_timeout_s=seconds(body.idle_timeout_ms, body.idle_timeout_sec),
        always_on=body.always_on,
        idle_action=first(body.idle_action, body.on_idle),
        auto_resume=body.auto_resume,
        hibernate_after_s=seconds(body.hibernate_after_ms, body.hibernate_after_sec),
    )
    return sandbox(await call.engine.update_sandbox(call.principal, command))


async def set_tags(call: Call, body: SetTagsRequest) -> Sandbox:
    """Replace the tags."""
    command = commands.UpdateSandbox(decode.sandbox_id(call), tags=body.tags)
    return sandbox(await call.engine.update_sandbox(call.principal, command))


async def extend(call: Call, body: ExtendSandboxRequest) -> Sandbox:
    """Move the end of its life."""
    timeout_s = seconds(body.timeout_ms, body.timeout_sec)
    command = commands.ExtendSandbox(decode.sandbox_id(call), LIFE_S if timeout_s is None else timeout_s)
    return sandbox(await call.engine.extend_sandbox(call.principal, command))


async def pause(call: Call, body: PauseSandboxRequest) -> Sandbox:
    """Stop its processes where they are; it wakes when it is used.

    With `hibernate` its memory moves to the host's disk as well.
    """
    command = commands.PauseSandbox(decode.sandbox_id(call), hibernate=bool(body.hibernate))
    return sandbox(await call.engine.pause_sandbox(call.principal, command))


async def stop(call: Call) -> Sandbox:
    """Pause it and free its memory; processes go on where they were when it is resumed."""
    command = commands.PauseSandbox(decode.sandbox_id(call), hibernate=True)
    return sandbox(await call.engine.pause_sandbox(call.principal, command))


async def resume(call: Call) -> Sandbox:
    """Let a paused sandbox go on."""
    return sandbox(await call.engine.resume_sandbox(call.principal, commands.ResumeSandbox(decode.sandbox_id(call))))


async def destroy(call: Call) -> None:
    """Destroy a sandbox; doing it twice is fine."""
    await call.engine.destroy_sandbox(call.principal, commands.DestroySandbox(decode.sandbox_id(call)))


def _readiness(item: resources.Sandbox) -> Readiness:
    is_ready = item.state is SandboxState.RUNNING
    return Readiness(
        ready=is_ready,
        status="ready" if is_ready else item.state.value,
        state=item.state.value,
        sandbox_id=item.id,
    )


async def readiness(call: Call) -> Readiness:
    """Whether commands can run."""
    command = commands.GetSandbox(decode.sandbox_id(call))
    return _readiness(await call.engine.get_sandbox(call.principal, command))


async def readiness_stream(call: Call) -> Response:
    """Wait until commands can run.

    One `ready` or `timeout` frame; clients match the `event:` line.
    """
    sandbox_id = decode.sandbox_id(call)
    await call.engine.get_sandbox(call.principal, commands.GetSandbox(sandbox_id))

    async def frames() -> sse.Frames:
        try:
            command = commands.WaitReady(sandbox_id, _READY_WAIT_S)
            item = await call.engine.wait_ready(call.principal, command)
        except GatewayError as error:
            if error.code != "timeout":
                raise
            yield sse.frame("timeout", {"ready": False, "sandbox_id": sandbox_id})
            return
        state = _readiness(item)
        yield sse.frame("ready" if state["ready"] else "timeout", state)

    return sse.response(call, frames())


class MetricsQuery(msgspec.Struct):
    """window: as `90s`, `15m`, `1h` or `7d`; the host remembers two hours."""

    window: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,5}[smhd]$")] | None = None


_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


async def metrics(call: Call, query: MetricsQuery) -> Metrics:
    """Resource use now; with `window` also what it was in that time, sample by sample."""
    sandbox_id = decode.sandbox_id(call)
    window_s = None if query.window is None else float(int(query.window[:-1]) * _UNIT_S[query.window[-1]])
    item = await call.engine.get_metrics(call.principal, commands.GetMetrics(sandbox_id, window_s))
    answer = _metrics(sandbox_id, item)
    if query.window is not None:
        answer["window"] = query.window
        answer["series"] = [
            Load(timestamp=iso_time(load.at), cpu_percent=load.cpu_percent, memory_used_bytes=load.memory_used_bytes)
            for load in item.series
        ]
    return answer


def _metrics(sandbox_id: str, item: resources.Metrics) -> Metrics:
    lived_core_s = item.uptime_s * item.cpu_count
    return Metrics(
        sandbox_id=sandbox_id,
        timestamp=iso_time(item.at),
        cpu_count=item.cpu_count,
        cpu_seconds=item.cpu_seconds,
        cpu_percent=round(100 * item.cpu_seconds / lived_core_s, 2) if lived_core_s > 0 else 0.0,
        memory_used_bytes=item.memory_used_bytes,
        memory_limit_bytes=item.memory_limit_bytes,
        memory_used_mb=round(item.memory_used_bytes / 1048576, 1),
        disk_used_bytes=item.disk_used_bytes,
        disk_total_bytes=item.disk_total_bytes,
        processes=item.processes,
        uptime_sec=item.uptime_s,
    )


_ONE = "/sandboxes/{sandbox_id}"
_WAIT = {"streams_answer": True, "timeout_s": _READY_WAIT_S + 10}

ROUTES = (
    Route("POST", "/sandboxes", create, one(Sandbox, status=201), WRITE, CreateSandboxRequest),
    Route("GET", "/sandboxes", list_all, many(Sandbox), READ, query=ListSandboxesQuery),
    Route("GET", "/sandboxes/by-name/{name}", get_by_name, one(Sandbox), READ),
    Route("GET", _ONE, get, one(Sandbox), READ),
    Route("PATCH", _ONE, update, one(Sandbox), WRITE, UpdateSandboxRequest),
    Route("DELETE", _ONE, destroy, NOTHING, WRITE),
    Route("PATCH", _ONE + "/tags", set_tags, one(Sandbox), WRITE, SetTagsRequest),
    Route("POST", _ONE + "/extend", extend, one(Sandbox), WRITE, ExtendSandboxRequest),
    Route("POST", _ONE + "/pause", pause, one(Sandbox), WRITE, PauseSandboxRequest),
    Route("POST", _ONE + "/stop", stop, one(Sandbox), WRITE),
    Route("POST", _ONE + "/resume", resume, one(Sandbox), WRITE),
    Route("GET", _ONE + "/readiness", readiness, one(Readiness), READ),
    Route("GET", _ONE + "/readiness/stream", readiness_stream, EVENT_STREAM, READ, terms=_WAIT),
    Route("GET", _ONE + "/metrics", metrics, one(Metrics), READ, query=MetricsQuery),
)
