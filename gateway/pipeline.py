"""What dialects and the phases of a request agree on.

A dialect lists `Operation` rows; `gateway.phases.Phases` turns each into an ASGI application that authenticates,
limits, takes care of idempotency and calls the handler. The handler gets a `Call` and answers with a Starlette
`Response`; a `GatewayError` it raises becomes the dialect's error answer.

Not for: routing, request ids, body limits (gateway/entry.py) and anything about one API's spelling (gateway/dialects).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from gateway.auth import Credentials
from gateway.errors import GatewayError
from gateway.resources import Principal

if TYPE_CHECKING:
    from gateway.engine import Engine

__all__ = [
    "ANONYMOUS",
    "BODY_BYTES_MAX",
    "REQUEST_ID",
    "Call",
    "Credentials",
    "Dialect",
    "Operation",
    "SocketCall",
    "SocketOperation",
]

#: Who calls a public operation: nobody of any workspace, with no right to anything.
ANONYMOUS = Principal(workspace_id="", key_id=None, scopes=frozenset({"none"}))

#: Key of the ASGI scope under which gateway/entry.py leaves the request's id.
REQUEST_ID = "sandgate.request_id"
#: The same for the bytes that the request's body may have.
BODY_BYTES_MAX = "sandgate.body_bytes_max"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of a dialect: which request leads to which handler, and on what terms.

    path: a Starlette path pattern, e.g. "/sandboxes/{sandbox_id}".
    scope: what the key must allow, e.g. "sandboxes:read"; None for any valid key.
    mutates: it runs to its end when the caller leaves, and takes part in idempotency.
    limited: it counts against the workspace's request rate.
    public: no key is asked for (`Call.principal` is `ANONYMOUS`).
    streams_body: the handler reads `call.request.stream()` itself; otherwise the body is read before it starts.
        An idempotency key then covers method, path, query and the length of the body, not its bytes.
    streams_answer: the answer is an endless or live stream (SSE); it is never recorded under an idempotency key.
    ticket_purpose: a ticket issued for this purpose also opens it; ticket_resource: the path parameter with the id of
        what the ticket must have been issued for.
    is_repeat_possible: whether this request may be the repeat of one whose caller left without an idempotency key
        (gateway/undelivered.py); it then gets that one's answer.
    timeout_s: the deadline; None for the server's default, math.inf for none (streams).
    early_status: when set, and the handler takes long, this status goes out ahead with white space following every
        few seconds, so that neither the client nor a proxy between gives up. Only for JSON answers.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Response]]
    scope: str | None = None
    mutates: bool = False
    limited: bool = True
    public: bool = False
    streams_body: bool = False
    streams_answer: bool = False
    ticket_purpose: str | None = None
    ticket_resource: str | None = None
    is_repeat_possible: Callable[[Request], bool] | None = None
    timeout_s: float | None = None
    early_status: int | None = None


@dataclass(frozen=True, slots=True)
class SocketOperation:
    """A WebSocket route; authenticated and limited before its handler may accept the connection."""

    path: str
    handler: Callable[[SocketCall], Awaitable[None]]
    scope: str | None = None
    ticket_purpose: str | None = None
    ticket_resource: str | None = None


@dataclass(slots=True)
class Call:
    """One request on its way through a handler.

    effect_id: UUID (version 7); the same for every request with one idempotency key.
    deadline: time of the event loop (`loop.time()`) at which the caller gets `timeout`; math.inf for never.
    """

    request: Request
    operation: Operation
    principal: Principal
    engine: Engine
    effect_id: str
    deadline: float
    request_id: str


@dataclass(slots=True)
class SocketCall:
    """One WebSocket connection on its way through a handler, not yet accepted."""

    socket: WebSocket
    operation: SocketOperation
    principal: Principal
    engine: Engine
    effect_id: str
    request_id: str


class Dialect(Protocol):
    """What the pipeline needs to know about one API's spelling."""

    @property
    def name(self) -> str:
        """Label in logs and metrics."""

    @property
    def operations(self) -> Sequence[Operation]:
        """Its HTTP routes."""

    @property
    def sockets(self) -> Sequence[SocketOperation]:
        """Its WebSocket routes."""

    def credentials(self, connection: HTTPConnection) -> Credentials:
        """Where this API's clients put their key or ticket."""

    def error_response(self, error: GatewayError, request_id: str, *, status_sent: bool = False) -> Response:
        """The error in this API's words; with status_sent only the body still reaches the caller."""
