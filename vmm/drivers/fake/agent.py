"""The agent of fake machines: real frames over real sockets, in front of a file tree and processes in memory.

One `Connection` per client; it finds its machine by the address that was dialled, so that a thousand machines can share
one listener. Stream ids, credits, offsets, exits and their acknowledgement follow docs/protocol.md.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import signal as signals
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from native import frames
from native.frames import Frame
from vmm.drivers.fake.faults import Faults
from vmm.drivers.fake.files import FileTree, is_below
from vmm.drivers.fake.processes import Process, check
from vmm.errors import AgentError
from vmm.stream import CREDIT_BYTES, INPUT, STDOUT
from vmm.wire import FrameProtocol

logger = logging.getLogger(__name__)

_EXITED_MAX = 1_000


class Guest:
    """The inside of one fake machine."""

    def __init__(self, token: str, faults: Faults) -> None:
        self.files = FileTree()
        self.faults = faults
        self.boot_id = str(uuid.uuid4())
        self.connections: set[Connection] = set()
        self.processes: dict[str, Process] = {}
        self.env: dict[str, str] = {}
        self.hostname = ""
        self.token = token
        self.may_run = asyncio.Event()
        self.may_run.set()
        self._started = time.monotonic()
        self._last_pid = 1

    def start_process(self, op: Mapping[str, Any]) -> tuple[Process, bool]:
        """The process of an `exec`, and whether it was known before."""
        known = self.processes.get(str(op.get("id")))
        if known is not None:
            return known, True
        check(op)
        self._last_pid += 1
        env = {**self.env, **(op.get("env") or {})}
        process = Process(self._last_pid, op, self.files, env, may_run=self.may_run)
        self.processes[process.id] = process
        exited = [other.id for other in self.processes.values() if other.exit is not None]
        for old in exited[:-_EXITED_MAX]:
            del self.processes[old]
        return process, False

    def find_process(self, op: Mapping[str, Any]) -> Process:
        """The process that an operation names by id or pid."""
        for process in self.processes.values():
            if op.get("id") == process.id or (op.get("id") is None and op.get("pid") == process.pid):
                return process
        raise AgentError("no_such_process", "no process of that id")

    def metrics(self) -> dict[str, Any]:
        """Counted from what the machine holds; it has no memory or processor of its own."""
        return {
            "cpu_seconds": 0.0,
            "memory_used_bytes": 0,
            "memory_total_bytes": 0,
            "disk_used_bytes": self.files.size_bytes(),
            "disk_total_bytes": 0,
            "processes": sum(1 for process in self.processes.values() if process.exit is None),
            "uptime_s": time.monotonic() - self._started,
            "load1": 0.0,
        }

    def cut(self) -> None:
        """Break every connection; processes go on."""
        for connection in list(self.connections):
            connection.abort()

    def freeze(self) -> None:
        """Let everything in it stand still."""
        self.may_run.clear()
        for connection in self.connections:
            connection.wire.pause_reading()

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.may_run.set()
        for connection in self.connections:
            connection.wire.resume_reading()

    def dump(self) -> dict[str, Any]:
        """Files, processes and names of this instant, in plain values."""
        return {
            "files": self.files.dump(),
            "processes": [process.dump() for process in self.processes.values()],
            "env": self.env,
            "hostname": self.hostname,
            "token": self.token,
            "last_pid": self._last_pid,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any], faults: Faults) -> Guest:
        """A guest that goes on where another one was dumped."""
        guest = cls(dumped["token"], faults)
        guest.files.load(dumped["files"])
        guest.env, guest.hostname, guest._last_pid = dict(dumped["env"]), dumped["hostname"], dumped["last_pid"]
        for saved in dumped["processes"]:
            process = Process(saved["pid"], saved["op"], guest.files, saved["env"], may_run=guest.may_run, saved=saved)
            guest.processes[process.id] = process
        return guest

    async def stop(self) -> None:
        """End everything in it."""
        self.cut()
        await asyncio.gather(*(process.stop() for process in self.processes.values()))


class Connection:
    """One client of one guest."""

    def __init__(self, find: Callable[[str], Guest | None]) -> None:
        """find: the guest at an address."""
        self.wire = FrameProtocol(self._on_frame, self._on_lost)
        self._find = find
        self._guest: Guest | None = None
        self._streams: dict[int, ServerStream] = {}
        self._sent = 0

    def abort(self) -> None:
        """Break it."""
        self.wire.abort()

    def send(self, frame: bytes) -> None:
        """Send a frame, or the part of it that a cut leaves."""
        cut_after = None if self._guest is None else self._guest.faults.cut_after_bytes
        self._sent += len(frame)
        if cut_after is not None and self._sent > cut_after:
            self.wire.send(frame[: max(0, len(frame) - (self._sent - cut_after))])
            self.wire.abort()
        elif self._guest is None or not self._guest.faults.is_stalled:
            self.wire.send(frame)

    def forget(self, stream_id: int) -> None:
        """A stream is over."""
        self._streams.pop(stream_id, None)

    def _on_frame(self, frame: Frame) -> None:
        kind, _, stream_id, _, payload = frame
        if self._guest is None:
            self._greet(kind, payload)
        elif self._guest.faults.is_stalled:
            return
        elif kind == frames.PING:
            self.send(frames.encode(frames.PONG, 0, 0, payload))
        elif kind == frames.OPEN:
            self._streams[stream_id] = ServerStream(self, self._guest, stream_id, orjson.loads(payload))
        elif stream_id in self._streams:
            self._streams[stream_id].receive(frame)

    def _greet(self, kind: int, payload: bytes) -> None:
        hello = orjson.loads(payload) if kind == frames.HELLO else {}
        guest = self._find(self.wire.local_address)
        if guest is None or hello.get("token") != guest.token:
            refusal = {"code": "unauthorized", "message": "wrong token"}
            self.send(frames.encode(frames.ERROR, 0, 0, orjson.dumps(refusal)))
            self.wire.close()
            return
        self._guest = guest
        guest.connections.add(self)
        if not guest.may_run.is_set():
            self.wire.pause_reading()
        answer = {"version": 1, "role": "agent", "boot_id": guest.boot_id}
        self.send(frames.encode(frames.HELLO, 0, 0, orjson.dumps(answer)))

    def _on_lost(self, _: Exception | None) -> None:
        if self._guest is not None:
            self._guest.connections.discard(self)
        for stream in list(self._streams.values()):
            stream.cancel()


class ServerStream:
    """One operation under way: a task that lives until it is over, or until the client leaves."""

    def __init__(self, connection: Connection, guest: Guest, stream_id: int, op: dict[str, Any]) -> None:
        self._connection = connection
        self._guest = guest
        self._id = stream_id
        self._op = op
        self._credit = [CREDIT_BYTES] * 4
        self._changed = asyncio.Event()
        self._acked = False
        self._process: Process | None = None
        self._written = bytearray()
        self._written_all = False
        self._task = asyncio.create_task(self._run(), name=f"fake {op.get('op')}")

    def receive(self, frame: Frame) -> None:
        """Take a frame of the client."""
        kind, channel, _, offset, payload = frame
        if kind == frames.CREDIT:
            self._credit[channel] += offset
            if self._process is not None and channel in self._process.outputs:
                self._process.outputs[channel].credit(offset)
        elif kind == frames.DATA:
            self._take_input(offset, payload)
        elif kind == frames.END:
            self._written_all = True
            if self._process is not None:
                self._process.input.finish()
        elif kind == frames.CONTROL:
            self._control(orjson.loads(payload))
        elif kind == frames.ACK:
            self._acked = True
        elif kind == frames.CLOSE:
            self.cancel()
        self._notify()

    def cancel(self) -> None:
        """The client has left."""
        self._connection.forget(self._id)
        self._task.cancel()

    async def _run(self) -> None:
        name = str(self._op.get("op"))
        try:
            await asyncio.sleep(self._guest.faults.reply_delay_s)
            handler = _HANDLERS.get(name)
            if handler is None:
                raise AgentError("unsupported", f"no operation {name}")
            _confine(self._op)
            await handler(self)
            self._send(frames.CLOSE)
        except AgentError as error:
            self._send_json(frames.ERROR, {"code": error.code, "message": error.message})
        except (KeyError, TypeError, ValueError) as error:
            self._send_json(frames.ERROR, {"code": "bad_request", "message": f"{name}: {error}"})
        except Exception:
            logger.exception("fake agent: %s failed", name)
            self._connection.abort()
        finally:
            self._connection.forget(self._id)

    async def op_exec(self) -> None:
        process, resumed = self._guest.start_process(self._op)
        reply = {"id": process.id, "pid": process.pid, "started_at": process.started_at, "resumed": resumed}
        self._reply(reply | {"stdin_bytes": process.input.offset})
        await self._follow(process)

    async def op_attach(self) -> None:
        process = self._guest.find_process(self._op)
        self._reply(process.record())
        await self._follow(process)

    async def _follow(self, process: Process) -> None:
        self._process = process
        tail = self._op.get("tail_bytes")
        offsets = {int(channel): offset for channel, offset in (self._op.get("offsets") or {}).items()}
        process.changed.listeners.add(self._notify)
        try:
            async with asyncio.TaskGroup() as tasks:
                credit = tasks.create_task(self._return_input_credit(process))
                for channel, output in process.outputs.items():
                    start = offsets.get(channel, 0 if tail is None else output.end - tail)
                    output.credit(max(0, start - output.credited))
                    tasks.create_task(self._send_output(process, channel, max(start, output.start)))
                while process.exit is None and self._op.get("follow", True):
                    await self._changed.wait()
                credit.cancel()
        finally:
            process.changed.listeners.discard(self._notify)
        if process.exit is None:
            return
        self._send_json(frames.EVENT, {"type": "exit", **process.exit})
        while not self._acked:
            await self._changed.wait()
        if not process.op.get("background"):
            self._guest.processes.pop(process.id, None)

    async def _send_output(self, process: Process, channel: int, offset: int) -> None:
        output = process.outputs[channel]
        while True:
            offset = max(offset, output.start)
            size = min(output.end - offset, self._credit[channel], frames.DATA_BYTES_MAX)
            if size > 0:
                await self._send_data(channel, offset, output.read(offset, size))
                offset += size
            elif output.is_ended and offset >= output.end:
                self._connection.send(frames.encode_offset(frames.END, channel, self._id, output.end))
                return
            elif not self._op.get("follow", True):
                return
            else:
                await self._changed.wait()

    async def _return_input_credit(self, process: Process) -> None:
        returned = process.input.read_bytes
        while True:
            self._grant(process.input.read_bytes - returned)
            returned = process.input.read_bytes
            await self._changed.wait()

    async def op_read(self) -> None:
        content, info = self._guest.files.read(self._op["path"])
        self._reply(info)
        start = int(self._op.get("offset") or 0)
        length = self._op.get("length")
        part = content[start:] if length is None else content[start : start + length]
        sent = 0
        while sent < len(part):
            size = min(len(part) - sent, self._credit[STDOUT], frames.DATA_BYTES_MAX)
            if size > 0:
                await self._send_data(STDOUT, sent, part[sent : sent + size])
                sent += size
            else:
                await self._changed.wait()
        self._connection.send(frames.encode_offset(frames.END, STDOUT, self._id, len(part)))

    async def op_write(self) -> None:
        while not self._written_all:
            await self._changed.wait()
        op = self._op
        options = {"parents": op.get("parents", True), "append": op.get("append", False), "mode": op.get("mode")}
        self._reply(self._guest.files.write(op["path"], bytes(self._written), **options))

    async def op_watch(self) -> None:
        recursive = bool(self._op.get("recursive", True))
        tell = lambda event: self._send_json(frames.EVENT, event)  # noqa: E731
        stop = self._guest.files.listen(self._op["path"], recursive=recursive, listener=tell)
        try:
            self._reply({})
            await asyncio.Event().wait()
        finally:
            stop()

    async def op_signal(self) -> None:
        process = self._guest.find_process(self._op)
        process.signal(_signal_number(self._op["signal"]))
        self._reply(process.record())

    async def op_stdin(self) -> None:
        process = self._guest.find_process(self._op)
        if process.exit is not None:
            raise AgentError("process_exited", "the process has ended")
        data = base64.b64decode(self._op["data_base64"])
        process.input.feed(process.input.offset, data)
        if self._op.get("eof"):
            process.input.finish()
        self._reply({"written": len(data)})

    async def op_identity(self) -> None:
        for path, text in (self._op.get("files") or {}).items():
            self._guest.files.write(path, text.encode(), mode=None, parents=True, append=False)
        self._guest.hostname = self._op.get("hostname") or self._guest.hostname
        if self._op.get("reset"):
            self._guest.env.clear()
        self._guest.env |= self._op.get("env") or {}
        for name in self._op.get("unset") or ():
            self._guest.env.pop(name, None)
        if token := self._op.get("token"):
            self._guest.token = token
        self._reply(_NO_HOOKS)

    async def op_answer(self) -> None:
        self._reply(_ANSWERS[self._op["op"]](self._guest, self._op))

    def _take_input(self, offset: int, data: bytes) -> None:
        if self._process is not None:
            self._grant(self._process.input.feed(offset, data))
        else:
            self._written += data
            self._grant(len(data))

    def _grant(self, size: int) -> None:
        if size:
            self._connection.send(frames.encode_offset(frames.CREDIT, INPUT, self._id, size))

    def _control(self, message: Mapping[str, Any]) -> None:
        if self._process is not None and message.get("type") == "signal":
            self._process.signal(_signal_number(message["signal"]))

    async def _send_data(self, channel: int, offset: int, data: bytes) -> None:
        self._credit[channel] -= len(data)
        self._connection.send(frames.encode_data(channel, self._id, offset, data))
        await self._connection.wire.drain()

    def _reply(self, message: Mapping[str, Any]) -> None:
        self._send_json(frames.REPLY, message)

    def _send_json(self, kind: int, message: Mapping[str, Any]) -> None:
        self._send(kind, orjson.dumps(message))

    def _send(self, kind: int, payload: bytes = b"") -> None:
        self._connection.send(frames.encode(kind, 0, self._id, payload))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _signal_number(signal: Any) -> int:
    if isinstance(signal, int):
        return signals.Signals(signal) if signal else 0
    return signals.Signals[str(signal)]


def _confine(op: Mapping[str, Any]) -> None:
    roots = op.get("roots")
    paths = [op[name] for name in ("path", "source", "destination") if name in op]
    if roots is not None and not all(any(is_below(path, root) for root in roots) for path in paths):
        raise AgentError("forbidden_path", "the path lies outside of what may be reached")


def _list(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.list(op["path"], op.get("depth", 1), op.get("limit", 20_000))


def _mkdir(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.mkdir(op["path"], mode=op.get("mode"), parents=op.get("parents", True))


def _rename(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.rename(op["source"], op["destination"], overwrite=op.get("overwrite", True))


def _copy(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.copy(op["source"], op["destination"], recursive=op.get("recursive", False))


def _chmod(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.change(op["path"], mode=op["mode"], recursive=op.get("recursive", False))


def _chown(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return guest.files.change(op["path"], owner=op["user"], recursive=op.get("recursive", False))


def _remove(guest: Guest, op: Mapping[str, Any]) -> dict[str, Any]:
    return {"removed": guest.files.remove(op["path"], recursive=op.get("recursive", False))}


#: Nobody's programs can run in here.
_NO_HOOKS: Mapping[str, Any] = {"ran": [], "failed": []}

_ANSWERS: Mapping[str, Callable[[Guest, Mapping[str, Any]], Mapping[str, Any]]] = {
    "chmod": _chmod,
    "chown": _chown,
    "copy": _copy,
    "list": _list,
    "metrics": lambda guest, _: guest.metrics(),
    "mkdir": _mkdir,
    "hooks": lambda _, __: _NO_HOOKS,
    # Nothing in here can listen.
    "ports": lambda _, __: {"ports": []},
    "process": lambda guest, op: guest.find_process(op).record(),
    "processes": lambda guest, _: {"processes": [process.record() for process in guest.processes.values()]},
    "remove": _remove,
    "rename": _rename,
    "warm_up": lambda _, __: {},
    "stat": lambda guest, op: guest.files.entry(op["path"]),
}

_HANDLERS: Mapping[str, Callable[[ServerStream], Awaitable[None]]] = {
    "attach": ServerStream.op_attach,
    "exec": ServerStream.op_exec,
    "identity": ServerStream.op_identity,
    "read": ServerStream.op_read,
    "signal": ServerStream.op_signal,
    "stdin": ServerStream.op_stdin,
    "watch": ServerStream.op_watch,
    "write": ServerStream.op_write,
    **dict.fromkeys(_ANSWERS, ServerStream.op_answer),
}
