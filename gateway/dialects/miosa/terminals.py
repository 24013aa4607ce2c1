"""Terminals: login shells on a PTY, used over a WebSocket.

From the server: binary frames with the terminal's bytes, or with `?format=json` text frames
`{"type": "stdout", "data"}`; at last the text frame `{"type": "exit", "code", "exit"}`.
From the client: binary frames are input. Text frames are input too, unless they are a JSON object with a known `type`:
`stdin` or `input` with `data`, `resize` with `rows` and `cols`, `signal` with `signal`, `ping`.
"""

from __future__ import annotations

import asyncio
import codecs
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import msgspec
import orjson
from msgspec import Meta
from starlette.datastructures import URL
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketState

from gateway import commands
from gateway.dialects.miosa import decode
from gateway.dialects.miosa.answers import iso_time
from gateway.dialects.miosa.route import NOTHING, Route, one
from gateway.errors import GatewayError
from gateway.pipeline import Call, SocketCall, SocketOperation

if TYPE_CHECKING:
    from gateway.engine.terminals import Terminal

SCOPE = "sandboxes:write"

#: A WebSocket that authenticates by subprotocol offers `bearer.<key>` beside the protocol it means.
BEARER_PROTOCOL = "bearer."

_CONTROLS = frozenset({"stdin", "input", "resize", "signal", "ping"})
#: What a terminal's own keys would send; a PTY turns them into signals for whatever runs in front.
_SIGNAL_KEYS = {"SIGINT": b"\x03", "SIGQUIT": b"\x1c", "SIGTSTP": b"\x1a"}

#: What a shell has still to say when it takes no more input.
_LAST_WORDS_S = 5.0

Cells = Annotated[int, Meta(ge=1, le=1000)]


class OpenTerminalRequest(msgspec.Struct, kw_only=True):
    """Size, working directory and variables of the shell."""

    rows: Cells = 24
    cols: Cells = 80
    cwd: decode.Path | None = None
    env: decode.Env | None = None


class AttachQuery(msgspec.Struct, kw_only=True):
    """How frames look, and for a new terminal its size."""

    format: Literal["binary", "json"] = "binary"
    rows: Cells = 24
    cols: Cells = 80
    cwd: decode.Path | None = None


class Control(msgspec.Struct, kw_only=True):
    """A text frame that is more than input."""

    type: str
    data: str = ""
    rows: Cells | None = None
    cols: Cells | None = None
    signal: str = ""


class _Typed(msgspec.Struct):
    """What tells a control from input."""

    type: str


class TerminalSession(TypedDict):
    """A terminal. `ws_url` opens it once without the key, until `expires_at`; with the key it opens any time."""

    id: str
    session_id: str
    sandbox_id: str
    ws_url: str
    ticket: str
    expires_at: str


def socket_url(connection: HTTPConnection, path: str, **query: str) -> str:
    """The address of a WebSocket of this server, as the caller reaches it."""
    scheme = connection.headers.get("x-forwarded-proto", connection.url.scheme)
    url = URL(f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{connection.url.netloc}/api/v1{path}")
    return str(url.include_query_params(**query))


async def create(call: Call, body: OpenTerminalRequest) -> TerminalSession:
    """Open a terminal."""
    sandbox_id = decode.sandbox_id(call)
    command = commands.OpenTerminal(sandbox_id, call.effect_id, body.rows, body.cols, body.cwd, body.env or {})
    session = await call.engine.open_terminal(call.principal, command)
    path = f"/sandboxes/{sandbox_id}/terminal/{session.id}/stream"
    return TerminalSession(
        id=session.id,
        session_id=session.id,
        sandbox_id=sandbox_id,
        ws_url=socket_url(call.request, path, ticket=session.ticket),
        ticket=session.ticket,
        expires_at=iso_time(session.expires_at),
    )


async def delete(call: Call) -> None:
    """End a terminal's shell."""
    session_id = decode.resource_id(call.request, "session_id", missing="process_not_found")
    await call.engine.close_terminal(call.principal, commands.CloseTerminal(decode.sandbox_id(call), session_id))


async def attach(call: SocketCall) -> None:
    """Join a terminal that was opened before; leaving lets its shell go on."""
    query = decode.query(call.socket, AttachQuery)
    sandbox_id = decode.sandbox_id(call)
    session_id = decode.resource_id(call.socket, "session_id", missing="process_not_found")
    await _show(call, sandbox_id, session_id, query)


async def open_and_attach(call: SocketCall) -> None:
    """A terminal of its own for this connection; its shell ends with it."""
    query = decode.query(call.socket, AttachQuery)
    sandbox_id = decode.sandbox_id(call)
    command = commands.OpenTerminal(sandbox_id, call.effect_id, query.rows, query.cols, query.cwd)
    session = await call.engine.open_terminal(call.principal, command)
    try:
        await _show(call, sandbox_id, session.id, query)
    finally:
        await call.engine.close_terminal(call.principal, commands.CloseTerminal(sandbox_id, session.id))


async def _show(call: SocketCall, sandbox_id: str, session_id: str, query: AttachQuery) -> None:
    """Show a terminal to the caller, until it or the caller ends."""
    socket = call.socket
    terminal = await call.engine.attach_terminal(call.principal, sandbox_id, session_id)
    try:
        await socket.accept(subprotocol=_subprotocol(socket))
        await _carry(socket, terminal, query)
    finally:
        await terminal.close()
    if socket.client_state is WebSocketState.CONNECTED:
        await socket.close()


async def _carry(socket: WebSocket, terminal: Terminal, query: AttachQuery) -> None:
    """Bytes both ways until one side ends."""
    typing = asyncio.create_task(_client_to_terminal(socket, terminal))
    showing = asyncio.create_task(_terminal_to_client(socket, terminal, query))
    try:
        await asyncio.wait({typing, showing}, return_when=asyncio.FIRST_COMPLETED)
        if typing.done() and socket.client_state is WebSocketState.CONNECTED:
            typing.result()
            await asyncio.wait({showing}, timeout=_LAST_WORDS_S)
        if showing.done():
            showing.result()
    finally:
        typing.cancel()
        showing.cancel()
        # Granian keeps a close frame back for as long as somebody waits for the client's next message.
        await asyncio.wait({typing, showing})


async def _client_to_terminal(socket: WebSocket, terminal: Terminal) -> None:
    """Until the client leaves or the shell has ended."""
    while (message := await socket.receive())["type"] == "websocket.receive":
        data = message.get("bytes")
        if data is None:
            data = await _text_frame(socket, terminal, message["text"])
        try:
            await terminal.write(data)
        except GatewayError as error:
            if error.code != "conflict":
                raise
            return


async def _text_frame(socket: WebSocket, terminal: Terminal, text: str) -> bytes:
    """Do what a control says, or return the input that a text frame is."""
    control = parse_control(text)
    if control is None:
        return text.encode()
    match control.type:
        case "resize" if control.rows is not None and control.cols is not None:
            await terminal.resize(control.rows, control.cols)
        case "signal":
            return _SIGNAL_KEYS.get(control.signal, b"")
        case "ping":
            await socket.send_text('{"type":"pong"}')
    return control.data.encode()


def parse_control(text: str) -> Control | None:
    """A text frame as a control; None if it is input."""
    if not text.startswith("{"):
        return None
    try:
        kind = msgspec.json.decode(text, type=_Typed).type
    except msgspec.DecodeError:
        return None
    if kind not in _CONTROLS:
        return None
    try:
        return msgspec.json.decode(text, type=Control)
    except msgspec.ValidationError:
        # A control with bad fields is none to obey, and nothing that anybody typed.
        return Control(type="ignored")


async def _terminal_to_client(socket: WebSocket, terminal: Terminal, query: AttachQuery) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    async for data in terminal:
        if query.format == "binary":
            await socket.send_bytes(data)
        elif text := decoder.decode(data):
            await socket.send_text(_json({"type": "stdout", "data": text}))
    if (ended := terminal.exit) is not None:
        await socket.send_text(_json({"type": "exit", "code": ended.exit_code, "exit": ended.exit_code}))


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()


def _subprotocol(socket: WebSocket) -> str | None:
    """What to agree on: anything the client offers that is not its key."""
    offered: list[str] = socket.scope.get("subprotocols", [])
    return next((name for name in offered if not name.startswith(BEARER_PROTOCOL)), None)


_ONE = "/sandboxes/{sandbox_id}/terminal"

ROUTES = (
    Route("POST", _ONE, create, one(TerminalSession, status=201), SCOPE, OpenTerminalRequest),
    Route("DELETE", _ONE + "/{session_id}", delete, NOTHING, SCOPE),
)

SOCKETS = (
    SocketOperation(_ONE + "/stream", open_and_attach, SCOPE),
    SocketOperation(_ONE + "/{session_id}/stream", attach, SCOPE, "terminal", "session_id"),
)
