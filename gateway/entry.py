"""Where every request of the API processes comes in: a plain ASGI application in front of the dialects.

It gives the request its id, repairs the path, finds the route, refuses bodies that are too large before anybody reads
them, and puts the headers on every answer that no handler should have to think of.

Not for: who may do what (gateway/phases.py) and what an API looks like (gateway/dialects).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import GatewayError
from gateway.ids import uuid7
from gateway.pipeline import BODY_BYTES_MAX, REQUEST_ID, Dialect
from gateway.routing import RouteIndex

_access = logging.getLogger("gateway.access")

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"

#: On every answer unless it says otherwise: nothing of the API is to be cached, framed, sniffed or run as a page.
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Mounted:
    """A dialect below a prefix, with one Starlette route per operation and then per socket, in their order."""

    dialect: Dialect
    prefix: str
    routes: Sequence[BaseRoute]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes of a body that is read as a whole, and of one that is passed on as it arrives."""

    whole_bytes_max: int
    streamed_bytes_max: int


class Entry:
    """The application that the API server runs.

    mounted: the dialects; a path without any of their prefixes belongs to the first, since some clients forget it.
    own: exact paths beside them, such as /healthz.
    """

    def __init__(self, mounted: Sequence[Mounted], *, own: Mapping[str, ASGIApp], limits: BodyLimits) -> None:
        self._doors = [_Door(one, limits) for one in mounted]
        self._own = dict(own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        send = _with_headers(send, request_id)
        if (app := self._own.get(scope["path"])) is not None:
            await app({**scope, REQUEST_ID: request_id}, receive, send)
            return
        door = next((door for door in self._doors if door.is_prefixed(scope["path"])), self._doors[0])
        await door.enter({**scope, REQUEST_ID: request_id}, receive, send)


class _Door:
    """The way into one dialect."""

    def __init__(self, mounted: Mounted, limits: BodyLimits) -> None:
        dialect = mounted.dialect
        self._dialect = dialect
        self._prefix = mounted.prefix
        sizes = [
            limits.streamed_bytes_max if operation.streams_body else limits.whole_bytes_max
            for operation in dialect.operations
        ]
        paths = [*(row.path for row in dialect.operations), *(row.path for row in dialect.sockets)]
        rows = zip(mounted.routes, [*sizes, *(0 for _ in dialect.sockets)], strict=True)
        self._index = RouteIndex(zip(paths, rows, strict=True))

    def is_prefixed(self, path: str) -> bool:
        return path == self._prefix or path.startswith(self._prefix + "/")

    async def enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "path": canonical_path(scope["path"], self._prefix), "root_path": self._prefix}
        try:
            _check_encoding(scope)
            route, bytes_max = self._find(scope)
            if scope["type"] == "http":
                scope[BODY_BYTES_MAX] = bytes_max
                receive = _limited(receive, Headers(scope=scope), bytes_max)
        except GatewayError as error:
            await self._refuse(error, scope, receive, send)
            return
        await route.handle(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[BaseRoute, int]:
        """The route of a request, with its parameters put into the scope, and its body limit."""
        allowed: set[str] = set()
        for route, bytes_max in self._index.candidates(scope["path"][len(self._prefix) :]):
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                return route, bytes_max
            if match is Match.PARTIAL:
                allowed |= getattr(route, "methods", None) or set()
        if allowed:
            message = f"{scope['method']} is not possible here."
            raise GatewayError("method_not_allowed", message, allowed_methods=allowed)
        raise GatewayError("route_not_found", "There is no such route.")

    async def _refuse(self, error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._dialect.error_response(error, scope[REQUEST_ID])
        _access.info("%s %s %d", scope.get("method", "GET"), scope["path"], response.status_code)
        if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        else:
            await response(scope, receive, send)


def new_request_id() -> str:
    """`req_` and 26 characters that sort by time."""
    number = uuid7().int
    return "req_" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def canonical_path(path: str, prefix: str) -> str:
    """The path with the prefix exactly once: clients leave it out, or join it to a base that has it already."""
    bare, rest = prefix.strip("/"), path.strip("/")
    while rest == bare or rest.startswith(bare + "/"):
        rest = rest[len(bare) :].strip("/")
    return f"{prefix}/{rest}".rstrip("/")


def _check_encoding(scope: Scope) -> None:
    """Refuse what would be decoded with loss: it might name another file than the caller means."""
    for part in (scope.get("raw_path") or b"", scope["query_string"]):
        try:
            unquote_to_bytes(part).decode()
        except UnicodeDecodeError:
            raise GatewayError("malformed", "The path or the query string is not valid UTF-8.") from None


def _limited(receive: Receive, headers: Headers, bytes_max: int) -> Receive:
    """`receive` that fails once more than bytes_max of body have come. Raises at once when the length says so."""
    error = GatewayError("too_large", f"The body may have at most {bytes_max} bytes.")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise GatewayError("malformed", "Content-Length is not a number.")
    if int(length) > bytes_max:
        raise error
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > bytes_max:
            raise error
        return message

    return receive_limited


def _with_headers(send: Send, request_id: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
