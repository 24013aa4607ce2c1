"""Builds of templates: start, list, cancel, and what they write."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands, resources
from gateway.dialects.miosa import build_spec, decode, sse, templates
from gateway.dialects.miosa.answers import iso, iso_time, whole
from gateway.dialects.miosa.route import EVENT_STREAM, Route, many, one
from gateway.errors import GatewayError
from gateway.pipeline import Call

READ = templates.READ
WRITE = templates.WRITE


class BuildRequest(msgspec.Struct):
    """A new specification, if it is to change."""

    build_spec: dict[str, Any] | None = None
    metadata: decode.Metadata | None = None


class LogQuery(msgspec.Struct):
    """How many lines, from the end."""

    lines: Annotated[int, Meta(ge=1, le=10_000)] = 1000


class LogStreamQuery(msgspec.Struct):
    """last_event_id: as the header of that name."""

    last_event_id: decode.Text | None = None


class Build(TypedDict):
    """A build. `error_code` says why it failed, `failed_step` in which step."""

    id: str
    sandbox_template_id: str
    template_id: str
    source_type: Literal["build_spec"]
    state: Literal["queued", "building", "certifying", "snapshotting", "ready", "failed", "cancelled"]
    status: Literal["queued", "building", "certifying", "snapshotting", "ready", "failed", "cancelled"]
    step: int
    step_name: str | None
    steps: int
    failed_step: str | None
    image_id: str | None
    size_bytes: int | None
    log_url: str
    error_code: str | None
    error_message: str | None
    build_spec: dict[str, Any]
    metadata: dict[str, Any]
    created_at: str
    inserted_at: str
    updated_at: str
    started_at: str | None
    finished_at: str | None
    duration_ms: int | None


class Line(TypedDict):
    """One line of a log."""

    id: str
    timestamp: str
    step: int
    stream: str
    line: str


class Log(TypedDict):
    """The end of a log, as plain lines and with all there is to tell of each."""

    build_id: str
    state: str
    lines: list[str]
    entries: list[Line]


def build(item: resources.Build) -> Build:
    """A build in MIOSA's words."""
    created_at = iso_time(item.created_at)
    has_failed = item.state is resources.BuildState.FAILED
    took_s = None
    if item.started_at is not None and item.finished_at is not None:
        took_s = item.finished_at - item.started_at
    return Build(
        id=item.id,
        sandbox_template_id=item.template_id,
        template_id=item.template_id,
        source_type="build_spec",
        state=item.state.value,
        status=item.state.value,
        step=item.step,
        step_name=item.step_name,
        steps=item.steps,
        failed_step=item.step_name if has_failed else None,
        image_id=item.id if item.state is resources.BuildState.READY else None,
        size_bytes=item.size_bytes,
        log_url=f"/sandbox-template-builds/{item.id}/logs",
        error_code=item.error_code,
        error_message=item.error_detail,
        build_spec=build_spec.as_json(item.spec),
        metadata=dict(item.metadata),
        created_at=created_at,
        inserted_at=created_at,
        updated_at=iso_time(item.finished_at or item.alive_at),
        started_at=iso(item.started_at),
        finished_at=iso(item.finished_at),
        duration_ms=None if took_s is None else int(took_s * 1000),
    )


def line(item: resources.BuildLine) -> Line:
    """A line in MIOSA's words."""
    return Line(id=str(item.seq), timestamp=iso_time(item.at), step=item.step, stream=item.stream, line=item.text)


def _build_id(call: Call) -> str:
    return decode.resource_id(call.request, "build_id", missing="build_not_found")


async def create(call: Call, body: BuildRequest) -> Build:
    """Build a template again; the build before serves until this one is ready."""
    spec = None if body.build_spec is None else templates.parse(call, body.build_spec)
    name = call.request.path_params["name"]
    command = commands.BuildTemplate(name, call.effect_id, spec, decode.metadata(body.metadata) or {})
    return build(await call.engine.build_template(call.principal, command))


async def list_all(call: Call) -> resources.Page[Build]:
    """List a template's builds, newest first."""
    found = await call.engine.list_builds(call.principal, commands.ListBuilds(call.request.path_params["name"]))
    return whole([build(item) for item in found])


async def get(call: Call) -> Build:
    """Get a build."""
    return build(await call.engine.get_build(call.principal, commands.GetBuild(_build_id(call))))


async def cancel(call: Call) -> Build:
    """Stop a build; one that has ended stays as it is."""
    return build(await call.engine.cancel_build(call.principal, commands.CancelBuild(_build_id(call))))


async def log(call: Call, query: LogQuery) -> Log:
    """What a build has written."""
    found = await call.engine.get_build(call.principal, commands.GetBuild(_build_id(call)))
    lines = await call.engine.get_build_log(call.principal, commands.GetBuildLog(found.id, query.lines))
    entries = [line(item) for item in lines]
    return Log(build_id=found.id, state=found.state.value, lines=[entry["line"] for entry in entries], entries=entries)


async def stream_log(call: Call, query: LogStreamQuery) -> Response:
    """What a build writes, as it comes.

    `log` frames from the start or after `Last-Event-ID`, at last one `build` frame with how it ended.
    """
    items = await call.engine.stream_build_log(
        call.principal, commands.StreamBuildLog(_build_id(call), _cursor(call, query))
    )

    async def frames() -> sse.Frames:
        async for item in items:
            if isinstance(item, resources.BuildLine):
                yield sse.frame("log", line(item), str(item.seq))
            else:
                yield sse.frame("build", build(item))

    return sse.response(call, frames(), source=items)


def _cursor(call: Call, query: LogStreamQuery) -> int | None:
    raw = call.request.headers.get("last-event-id") or query.last_event_id
    if not raw:
        return None
    if not (raw.isascii() and raw.isdigit() and len(raw) < 19):
        raise GatewayError("malformed", "Last-Event-ID is not an id of this stream.")
    return int(raw)


_BUILDS = "/sandbox-templates/{name}/builds"
_ONE = "/sandbox-template-builds/{build_id}"
_STREAM: dict[str, Any] = {"streams_answer": True, "timeout_s": float("inf")}

ROUTES = (
    Route("GET", _BUILDS, list_all, many(Build), READ),
    Route("POST", _BUILDS, create, one(Build, status=201), WRITE, BuildRequest),
    Route("GET", _ONE, get, one(Build), READ),
    Route("POST", _ONE + "/cancel", cancel, one(Build), WRITE),
    Route("GET", _ONE + "/logs", log, one(Log), READ, query=LogQuery),
    Route("GET", _ONE + "/logs/stream", stream_log, EVENT_STREAM, READ, query=LogStreamQuery, terms=_STREAM),
    Route("GET", _ONE + "/events", stream_log, EVENT_STREAM, READ, query=LogStreamQuery, terms=_STREAM),
)
