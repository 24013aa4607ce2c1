"""The MIOSA API as the pipeline sees it."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.responses import Response

from gateway.dialects.miosa import errors, events
from gateway.dialects.miosa.routes import ROUTES, SOCKETS
from gateway.dialects.miosa.terminals import BEARER_PROTOCOL
from gateway.errors import GatewayError
from gateway.pipeline import Credentials, Operation, SocketOperation
from gateway.resources import Event

PREFIX = "/api/v1"


class MiosaDialect:
    """Routes, credentials and errors of the MIOSA API; paths are relative to `prefix`."""

    name = events.NAME
    prefix = PREFIX

    def __init__(self) -> None:
        self._operations = tuple(route.operation() for route in ROUTES)

    @property
    def operations(self) -> Sequence[Operation]:
        return self._operations

    @property
    def sockets(self) -> Sequence[SocketOperation]:
        return SOCKETS

    def credentials(self, connection: HTTPConnection) -> Credentials:
        """A bearer token; on a WebSocket perhaps as the subprotocol `bearer.<key>`. Tickets stand in the query."""
        return Credentials(key=_key(connection), ticket=connection.query_params.get("ticket"))

    def error_response(self, error: GatewayError, request_id: str, *, status_sent: bool = False) -> Response:
        return errors.error_response(error, request_id, status_sent=status_sent)

    def event_frame(self, event: Event) -> bytes:
        """An entry of the event log as event streams send it."""
        return events.frame(event)


def _key(connection: HTTPConnection) -> str | None:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    offered: list[str] = connection.scope.get("subprotocols", [])
    return next((name[len(BEARER_PROTOCOL) :] for name in offered if name.startswith(BEARER_PROTOCOL)), None)
