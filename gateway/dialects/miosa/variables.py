"""Environment variables and logs of a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands
from gateway.dialects.miosa import decode, outputs, sse
from gateway.dialects.miosa.route import EVENT_STREAM, NOTHING, Route, one
from gateway.errors import invalid
from gateway.pipeline import Call

READ = "sandboxes:read"
WRITE = "sandboxes:write"


class Variable(msgspec.Struct, kw_only=True):
    """A variable; `name` is another word for `key`."""

    key: decode.EnvName | None = None
    name: decode.EnvName | None = None
    value: decode.EnvValue


class SetVariablesRequest(msgspec.Struct, kw_only=True):
    """Variables as a list in `vars` or as an object in `env`."""

    vars: Annotated[list[Variable], Meta(max_length=256)] | None = None
    env: decode.Env | None = None


class LinesQuery(msgspec.Struct, kw_only=True):
    """How many lines from the end."""

    lines: Annotated[int, Meta(ge=1, le=10_000)] = 100


class VariableValue(TypedDict):
    """A variable."""

    key: str
    value: str


class Variables(TypedDict):
    """All variables of a sandbox."""

    vars: list[VariableValue]
    env: dict[str, str]


class Logs(TypedDict):
    """The last lines that the sandbox's processes wrote."""

    logs: str
    lines: list[str]


def variables(env: Mapping[str, str]) -> Variables:
    """Variables in MIOSA's words."""
    return Variables(vars=[VariableValue(key=key, value=value) for key, value in env.items()], env=dict(env))


async def list_all(call: Call) -> Variables:
    """List the variables."""
    return variables(await call.engine.list_env(call.principal, commands.ListEnv(decode.sandbox_id(call))))


async def set_some(call: Call, body: SetVariablesRequest) -> Variables:
    """Set variables for processes started from now on; others stay."""
    if body.vars is None and body.env is None:
        raise invalid("vars", "is required")
    wanted = dict(body.env or {})
    for index, variable in enumerate(body.vars or ()):
        key = variable.key or variable.name
        if key is None:
            raise invalid(f"vars[{index}].key", "is required")
        wanted[key] = variable.value
    command = commands.SetEnv(decode.sandbox_id(call), wanted)
    return variables(await call.engine.set_env(call.principal, command))


async def delete(call: Call) -> None:
    """Remove a variable."""
    command = commands.DeleteEnv(decode.sandbox_id(call), call.request.path_params["name"])
    await call.engine.delete_env(call.principal, command)


async def logs(call: Call, query: LinesQuery) -> Logs:
    """The last lines that processes started through the API wrote, oldest first."""
    command = commands.GetLogs(decode.sandbox_id(call), query.lines)
    lines = list(await call.engine.get_logs(call.principal, command))
    return Logs(logs="".join(f"{line}\n" for line in lines), lines=lines)


async def stream_logs(call: Call, query: LinesQuery) -> Response:
    """The same, then what comes."""
    command = commands.StreamLogs(decode.sandbox_id(call), query.lines)
    chunks = await call.engine.stream_logs(call.principal, command)
    return sse.response(call, outputs.frames(chunks), source=chunks)


_ONE = "/sandboxes/{sandbox_id}"
_STREAM = {"streams_answer": True, "timeout_s": float("inf")}

ROUTES = (
    Route("GET", _ONE + "/env", list_all, one(Variables), READ),
    Route("PUT", _ONE + "/env", set_some, one(Variables), WRITE, SetVariablesRequest),
    Route("PATCH", _ONE + "/env", set_some, one(Variables), WRITE, SetVariablesRequest),
    Route("POST", _ONE + "/env", set_some, one(Variables), WRITE, SetVariablesRequest),
    Route("DELETE", _ONE + "/env/{name}", delete, NOTHING, WRITE),
    Route("GET", _ONE + "/logs", logs, one(Logs), READ, query=LinesQuery),
    Route("GET", _ONE + "/logs/stream", stream_logs, EVENT_STREAM, READ, query=LinesQuery, terms=_STREAM),
)
