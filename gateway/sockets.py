"""Makes an ASGI application of a dialect's WebSocket route."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from gateway.errors import GatewayError
from gateway.ids import uuid7
from gateway.observability import logs, metrics
from gateway.phases import Phases, RefusedError, unexpected
from gateway.pipeline import REQUEST_ID, Dialect, SocketCall, SocketOperation


class SocketEndpoint:
    """One WebSocket route as an ASGI application."""

    def __init__(self, phases: Phases, dialect: Dialect, operation: SocketOperation) -> None:
        self._phases = phases
        self._dialect = dialect
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        request_id = scope.get(REQUEST_ID) or str(uuid7())
        logs.request_id.set(request_id)
        with metrics.SOCKETS.track_inprogress():
            try:
                principal, _ = await self._phases.admit(socket, self._dialect, self._operation)
                call = SocketCall(socket, self._operation, principal, self._phases.engine, str(uuid7()), request_id)
                await self._operation.handler(call)
            except RefusedError as refusal:
                await self._refuse(socket, refusal.error, request_id)
            except GatewayError as error:
                await self._refuse(socket, error, request_id)
            except Exception as error:  # noqa: BLE001 - the outermost place that can still answer
                await self._refuse(socket, unexpected(error), request_id)

    async def _refuse(self, socket: WebSocket, error: GatewayError, request_id: str) -> None:
        if socket.application_state is WebSocketState.CONNECTED:
            # 1008: policy, the caller's to mend; 1011: the server's.
            await socket.close(1008 if error.source == "caller" else 1011, error.message[:120])
        elif "websocket.http.response" in socket.scope.get("extensions", {}):
            await socket.send_denial_response(self._dialect.error_response(error, request_id))
        elif socket.application_state is WebSocketState.CONNECTING:
            await socket.close(1008, error.message[:120])
