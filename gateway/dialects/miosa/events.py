"""The event log as a stream, and the tickets that open it from a browser."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response, StreamingResponse

from gateway import commands, resources
from gateway.dialects.miosa import decode, sse
from gateway.dialects.miosa.answers import iso_time
from gateway.dialects.miosa.route import EVENT_STREAM, Route, one
from gateway.errors import GatewayError
from gateway.events import topic_of
from gateway.pipeline import Call
from previews.streams import HEADER, EventsOrder, cursor_mark

NAME = "miosa"
SCOPE = "sandboxes:read"
TICKET_PURPOSE = "events"
TICKET_TTL_S = 60

_CURSOR = re.compile(r"^(?:evt_)?(?P<seq>\d{1,18})$")


class EventsQuery(msgspec.Struct, kw_only=True):
    """Which events. types: a comma-separated list of patterns such as `sandbox.*`."""

    types: Annotated[str, Meta(max_length=1024)] | None = None
    resource_type: Literal["sandbox", "snapshot", "template", "computer", "deployment", "api_key"] | None = None
    resource_id: decode.Text | None = None
    last_event_id: decode.Text | None = None
    ticket: str | None = None


class Ticket(TypedDict):
    """Opens an event stream once, as `?ticket=`."""

    ticket: str
    expires_in: int
    expires_at: str


def frame(item: resources.Event) -> bytes:
    """An event as a frame. `id` in the data is the resource's; the frame's own id is the cursor."""
    data: dict[str, Any] = {
        **item.data,
        "type": item.type,
        "id": item.resource_id,
        "event_id": event_id(item.seq),
        "resource_type": item.resource_type,
        "resource_id": item.resource_id,
        "tenant_id": item.workspace_id,
        "workspace_id": item.workspace_id,
        "ts": iso_time(item.at),
    }
    return sse.frame(item.type, data, event_id(item.seq))


def event_id(seq: int) -> str:
    """A cursor in MIOSA's words."""
    return f"evt_{seq:016d}"


def cursor(call: Call, query: EventsQuery) -> int | None:
    """Where the caller left off; None for from now on."""
    raw = call.request.headers.get("last-event-id") or query.last_event_id
    if not raw:
        return None
    match = _CURSOR.match(raw)
    if match is None:
        raise GatewayError("malformed", "Last-Event-ID is not an id of this stream.")
    return int(match["seq"])


async def _stream(call: Call, query: EventsQuery, resource_type: str | None, resource_id: str | None) -> Response:
    types = tuple(kind.strip() for kind in (query.types or "").split(",") if kind.strip())
    command = commands.StreamEvents(cursor(call, query), types, resource_type, resource_id)
    backlog = await call.engine.stream_events(call.principal, command)
    topic = topic_of(NAME, call.principal.workspace_id)
    order = EventsOrder(topic, types, resource_type, resource_id, await call.engine.key_hash(call.principal))

    async def content() -> sse.Frames:
        yield sse.OPEN
        async for page in backlog:
            yield b"".join(map(frame, page))
        yield cursor_mark(backlog.cursor)

    return StreamingResponse(content(), headers={**sse.HEADERS, HEADER: order.header()}, media_type=sse.MEDIA_TYPE)


async def stream(call: Call, query: EventsQuery) -> Response:
    """Events of the workspace as they happen.

    `Last-Event-ID` resumes after that event. A browser, which cannot send a key, opens it with a ticket.
    """
    return await _stream(call, query, query.resource_type, query.resource_id)


async def stream_of_sandbox(call: Call, query: EventsQuery) -> Response:
    """Events of one sandbox as they happen."""
    sandbox_id = decode.sandbox_id(call)
    await call.engine.get_sandbox(call.principal, commands.GetSandbox(sandbox_id))
    return await _stream(call, query, "sandbox", sandbox_id)


class TicketRequest(msgspec.Struct):
    """Nothing to say."""


async def create_ticket(call: Call, body: TicketRequest) -> Ticket:  # noqa: ARG001
    """Get a single-use ticket for an event stream."""
    item = await call.engine.create_ticket(call.principal, commands.CreateTicket("events", TICKET_TTL_S))
    return Ticket(ticket=item.ticket, expires_in=TICKET_TTL_S, expires_at=iso_time(item.expires_at))


_STREAM: dict[str, Any] = {"streams_answer": True, "timeout_s": float("inf"), "ticket_purpose": TICKET_PURPOSE}

ROUTES = (
    Route("GET", "/events", stream, EVENT_STREAM, SCOPE, query=EventsQuery, terms=_STREAM),
    Route("GET", "/events/stream", stream, EVENT_STREAM, SCOPE, query=EventsQuery, terms=_STREAM),
    Route(
        "GET",
        "/sandboxes/{sandbox_id}/events",
        stream_of_sandbox,
        EVENT_STREAM,
        SCOPE,
        query=EventsQuery,
        terms=_STREAM,
    ),
    Route("POST", "/auth/sse-ticket", create_ticket, one(Ticket), SCOPE, TicketRequest),
    Route("POST", "/sse/ticket", create_ticket, one(Ticket), SCOPE, TicketRequest),
)
