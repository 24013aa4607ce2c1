"""Commands and processes: run and wait, run and stream, start in the background and look after it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands, resources
from gateway.dialects.miosa import answers, decode, outputs
from gateway.dialects.miosa.answers import iso, iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import EVENT_STREAM, NOTHING, Route, bare, many, one
from gateway.errors import invalid
from gateway.pipeline import Call

EXEC = "sandboxes:write"
READ = "sandboxes:read"

TIMEOUT_S = 30.0
TIMEOUT_S_MAX = 600.0
#: Beyond the command's own limit: starting it, and killing it when it overruns.
_GRACE_S = 15.0
_EXEC_BYTES_MAX = 16 * 1024 * 1024

Argv = Annotated[list[decode.Argument], Meta(min_length=1, max_length=4096)]


class ExecRequest(msgspec.Struct, kw_only=True):
    """A command in one of these spellings.

    A list in `cmd` (or `command`) is run as it is. A string with `args` is a program and its arguments. A string alone
    is a line for `bash -lc`. The timeout is `timeout_ms`, or seconds in `timeout`, `timeout_sec`, `timeout_seconds`.
    """

    # The string has no pattern: msgspec 0.22 corrupts memory when it frees a union of a list and a string with one.
    cmd: Argv | str | None = None
    command: Argv | str | None = None
    args: Annotated[list[decode.Argument], Meta(max_length=4096)] | None = None
    cwd: decode.Path | None = None
    working_dir: decode.Path | None = None
    env: decode.Env | None = None
    user: Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z_][a-z0-9_-]*$")] | None = None
    sudo: bool | None = None
    name: decode.Name | None = None
    stdin: str | None = None
    detached: bool | None = None
    background: bool | None = None
    timeout_ms: Annotated[int, Meta(ge=100, le=600_000)] | None = None
    timeout: Annotated[float, Meta(ge=0.1, le=600)] | None = None
    timeout_sec: Annotated[float, Meta(ge=0.1, le=600)] | None = None
    timeout_seconds: Annotated[float, Meta(ge=0.1, le=600)] | None = None

    @property
    def timeout_s(self) -> float | None:
        """The limit in seconds, None when nothing was said."""
        if self.timeout_ms is not None:
            return self.timeout_ms / 1000
        seconds: float | None = first(self.timeout, self.timeout_sec, self.timeout_seconds)
        return seconds

    @property
    def runs_as(self) -> str | None:
        """The user, None for the sandbox's own."""
        return "root" if self.sudo else self.user


class SignalRequest(msgspec.Struct):
    """Which signal, SIGTERM when nothing is said."""

    signal: Annotated[str, Meta(pattern=r"^(SIG)?[A-Z0-9+-]{1,12}$")] | Annotated[int, Meta(ge=1, le=64)] | None = None


class StdinRequest(msgspec.Struct, kw_only=True):
    """Input: text in `data`, or bytes in `data_base64`. eof closes the input after it."""

    data: Annotated[str, Meta(max_length=1024 * 1024)] | None = None
    data_base64: Annotated[str, Meta(max_length=1400 * 1024)] | None = None
    eof: bool = False


class TailQuery(msgspec.Struct):
    """How many lines from the end."""

    tail: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    lines: Annotated[int, Meta(ge=1, le=100_000)] | None = None


class ExecResult(TypedDict):
    """A finished command. Bytes that are not UTF-8 are replaced in the text and kept in the `_base64` fields.

    `exit_code` is 128 + signal for a killed command and 124 for one that ran out of time.
    """

    stdout: str
    stderr: str
    output: str
    exit_code: int
    success: bool
    duration_ms: int
    reason: Literal["exited", "signaled", "timeout"]
    signal: int | None
    timed_out: bool
    truncated: bool
    stdout_base64: NotRequired[str]
    stderr_base64: NotRequired[str]


class Process(TypedDict):
    """A process started through the API."""

    pid: int
    id: str
    name: str | None
    command: str
    cwd: str
    state: Literal["running", "exited"]
    status: Literal["running", "exited"]
    running: bool
    background: bool
    exit_code: int | None
    signal: int | None
    reason: str | None
    started_at: str
    exited_at: str | None


class ProcessLogs(TypedDict):
    """What a process wrote. `data` is the text again: clients make a string of whatever stands there."""

    pid: int
    logs: str
    data: str


class Written(TypedDict):
    """How much input a process took."""

    pid: int
    written: int


def exec_result(item: resources.ExecResult) -> ExecResult:
    """A finished command in MIOSA's words."""
    stdout = item.stdout.decode("utf-8", "replace")
    stderr = item.stderr.decode("utf-8", "replace")
    answer = ExecResult(
        stdout=stdout,
        stderr=stderr,
        output=stdout + stderr,
        exit_code=item.exit_code,
        success=item.exit_code == 0,
        duration_ms=round(item.duration_ms),
        reason=item.reason,
        signal=item.signal,
        timed_out=item.reason == "timeout",
        truncated=item.truncated,
    )
    if "\ufffd" in stdout:
        answer["stdout_base64"] = base64.b64encode(item.stdout).decode()
    if "\ufffd" in stderr:
        answer["stderr_base64"] = base64.b64encode(item.stderr).decode()
    return answer


def process(item: resources.Process) -> Process:
    """A process in MIOSA's words."""
    return Process(
        pid=item.pid,
        id=item.exec_id,
        name=item.name,
        command=item.command,
        cwd=item.cwd,
        state=item.state,
        status=item.state,
        running=item.state == "running",
        background=item.background,
        exit_code=item.exit_code,
        signal=item.signal,
        reason=item.reason,
        started_at=iso_time(item.started_at),
        exited_at=iso(item.exited_at),
    )


def command_line(body: ExecRequest) -> tuple[Sequence[str] | None, str | None]:
    """The argv or the shell line a request asks for; exactly one of the two."""
    if body.cmd is not None and body.command is not None:
        raise invalid("command", "must not be given together with cmd")
    given = first(body.cmd, body.command)
    field = "cmd" if body.cmd is not None else "command"
    if given is None or not given:
        raise invalid(field, "is required")
    if isinstance(given, str) and "\x00" in given:
        raise invalid(field, "must not contain NUL")
    if isinstance(given, str) and len(given) > decode.ARGUMENT_LENGTH_MAX:
        raise invalid(field, f"expected str of length <= {decode.ARGUMENT_LENGTH_MAX}")
    if isinstance(given, list):
        return [*given, *(body.args or ())], None
    if body.args is not None:
        return [given, *body.args], None
    if not given.strip():
        raise invalid(field, "must not be blank")
    return None, given


def _refuse_stdin(body: ExecRequest) -> None:
    if body.stdin:
        raise invalid("stdin", "is taken only where the answer waits for the end; a process has processes/{pid}/stdin")


async def run(call: Call, body: ExecRequest) -> ExecResult | Response:
    """Run a command and wait for its end.

    With `detached` it starts in the background and the answer is 202 with the process. A command that takes long keeps
    the connection alive with white space ahead of the JSON. The same request again while it still runs (the retry of a
    client that gave up waiting) joins it instead of running it twice.
    """
    if body.detached or body.background:
        return answers.one(await start(call, body), 202)
    argv, shell = command_line(body)
    command = commands.Exec(
        decode.sandbox_id(call),
        call.effect_id,
        argv=argv,
        shell=shell,
        cwd=first(body.cwd, body.working_dir),
        env=body.env or {},
        user=body.runs_as,
        timeout_s=first(body.timeout_s, TIMEOUT_S),
        stdin=None if body.stdin is None else body.stdin.encode(),
    )
    return exec_result(await call.engine.exec(call.principal, command))


async def stream(call: Call, body: ExecRequest) -> Response:
    """Run a command and stream its output.

    Frames `stdout` and `stderr` with `{"line"}`, at last `exit` with `{"exit_code"}`. Closing the stream kills it.
    """
    _refuse_stdin(body)
    argv, shell = command_line(body)
    command = commands.StreamExec(
        decode.sandbox_id(call),
        call.effect_id,
        argv=argv,
        shell=shell,
        cwd=first(body.cwd, body.working_dir),
        env=body.env or {},
        user=body.runs_as,
        timeout_s=first(body.timeout_s, TIMEOUT_S),
    )
    return outputs.ordered(call, await call.engine.stream_exec(call.principal, command))


async def start(call: Call, body: ExecRequest) -> Process:
    """Start a background process; it outlives the request."""
    _refuse_stdin(body)
    argv, shell = command_line(body)
    command = commands.StartProcess(
        decode.sandbox_id(call),
        call.effect_id,
        argv=argv,
        shell=shell,
        name=body.name,
        cwd=first(body.cwd, body.working_dir),
        env=body.env or {},
        user=body.runs_as,
        timeout_s=body.timeout_s,
    )
    return process(await call.engine.start_process(call.principal, command))


async def list_all(call: Call) -> resources.Page[Process]:
    """List processes started through the API, newest first."""
    found = await call.engine.list_processes(call.principal, commands.ListProcesses(decode.sandbox_id(call)))
    return answers.whole([process(item) for item in found])


async def get(call: Call) -> Process:
    """Get a process."""
    command = commands.GetProcess(decode.sandbox_id(call), decode.pid(call))
    return process(await call.engine.get_process(call.principal, command))


async def send_signal(call: Call, body: SignalRequest) -> Process:
    """Send a signal to the whole process group."""
    name = str(first(body.signal, "SIGTERM"))
    if not name.isdigit() and not name.startswith("SIG"):
        name = f"SIG{name}"
    command = commands.SignalProcess(decode.sandbox_id(call), decode.pid(call), name)
    return process(await call.engine.signal_process(call.principal, command))


async def kill(call: Call) -> Process:
    """Stop a process and what it started."""
    command = commands.StopProcess(decode.sandbox_id(call), decode.pid(call))
    return process(await call.engine.stop_process(call.principal, command))


async def stop(call: Call) -> None:
    """Stop a process and what it started: SIGTERM, two seconds later SIGKILL. Stopping a finished one is fine."""
    await kill(call)


async def write_stdin(call: Call, body: StdinRequest) -> Written:
    """Write to a background process's input."""
    if body.data is not None and body.data_base64 is not None:
        raise invalid("data", "must not be given together with data_base64")
    data = decode.base64_bytes("data_base64", body.data_base64) if body.data_base64 else (body.data or "").encode()
    if not data and not body.eof:
        raise invalid("data", "is required")
    pid = decode.pid(call)
    command = commands.WriteStdin(decode.sandbox_id(call), pid, data, eof=body.eof)
    await call.engine.write_stdin(call.principal, command)
    return Written(pid=pid, written=len(data))


async def logs(call: Call, query: TailQuery) -> ProcessLogs:
    """The end of what a process wrote."""
    pid = decode.pid(call)
    command = commands.GetProcessOutput(decode.sandbox_id(call), pid, tail_lines=first(query.tail, query.lines))
    chunks = await call.engine.get_process_output(call.principal, command)
    text = b"".join(chunk.data for chunk in chunks).decode("utf-8", "replace")
    return ProcessLogs(pid=pid, logs=text, data=text)


async def stream_logs(call: Call) -> Response:
    """What is kept of a process's output, then what it writes, then its `exit`."""
    command = commands.StreamProcessOutput(decode.sandbox_id(call), decode.pid(call))
    return outputs.ordered(call, await call.engine.stream_process_output(call.principal, command))


_ONE = "/sandboxes/{sandbox_id}"
_PROCESS = _ONE + "/processes/{pid}"
_COMMAND = _ONE + "/commands/{pid}"
_RUN = {"early_status": 200, "timeout_s": TIMEOUT_S_MAX + _GRACE_S}
# A caller who leaves before the stream has begun takes the command along, so it is no change that outlives him.
_STREAM = {"streams_answer": True, "timeout_s": float("inf"), "mutates": False}

ROUTES = (
    Route("POST", _ONE + "/exec", run, one(ExecResult), EXEC, ExecRequest, _EXEC_BYTES_MAX, terms=_RUN),
    Route("POST", _ONE + "/exec/stream", stream, EVENT_STREAM, EXEC, ExecRequest, terms=_STREAM),
    Route("POST", _ONE + "/processes", start, one(Process, status=201), EXEC, ExecRequest),
    Route("GET", _ONE + "/processes", list_all, many(Process), READ),
    Route("GET", _PROCESS, get, one(Process), READ),
    Route("DELETE", _PROCESS, stop, NOTHING, EXEC),
    Route("POST", _PROCESS + "/signal", send_signal, one(Process), EXEC, SignalRequest),
    Route("POST", _PROCESS + "/stdin", write_stdin, one(Written), EXEC, StdinRequest),
    Route("GET", _PROCESS + "/logs", logs, bare(ProcessLogs), READ, query=TailQuery),
    Route("GET", _PROCESS + "/stream", stream_logs, EVENT_STREAM, READ, terms=_STREAM),
    # The same under the names of the 2.x clients.
    Route("POST", _ONE + "/commands", run, one(ExecResult), EXEC, ExecRequest, _EXEC_BYTES_MAX, terms=_RUN),
    Route("GET", _ONE + "/commands", list_all, many(Process), READ),
    Route("GET", _COMMAND, get, one(Process), READ),
    Route("GET", _COMMAND + "/logs", logs, bare(ProcessLogs), READ, query=TailQuery),
    Route("POST", _COMMAND + "/kill", kill, one(Process), EXEC),
)
