"""One connection of a client of hostd, and the splice between its streams and a machine's line.

A slow reader at a client's far end holds up only its own stream: it grants no credit. Should a whole client stop
taking bytes, the lines it reads from are not read until it does; after `_STALL_TIMEOUT_S` it is cut off, so that it
cannot hold up other clients of the same machines for longer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson

from native import frames
from native.frames import Frame
from vmm.errors import LinkError, MachineError, VmmError
from vmm.host.line import LineStream
from vmm.host.machine import Machine
from vmm.host.operations import Host
from vmm.host.transfer import Download, Upload
from vmm.link import VERSION
from vmm.types import MachineInfo, SnapshotInfo
from vmm.wire import FrameProtocol

logger = logging.getLogger(__name__)

_STALL_TIMEOUT_S = 20.0
#: Every worker of the API listens: each message less is a wake-up less of all of them.
_EVENTS_PACE_S = 0.005
#: Operations of a machine's agent whose end somebody waits for.
_AWAITED = frozenset({"exec", "read", "write"})
_KILL = orjson.dumps({"type": "signal", "signal": "SIGKILL"})


class _Open(Protocol):
    """A stream of a client."""

    def send(self, frame: Frame) -> None:
        """A frame from the client."""
        ...

    def leave(self) -> None:
        """The client's connection has ended."""
        ...


class Client:
    """Give `wire` to the server. Adds itself to `clients` while it is connected."""

    def __init__(self, host: Host, boot_id: str, clients: set[Client]) -> None:
        self.wire = FrameProtocol(self._on_frame, self._on_lost, self._on_writable)
        self.host = host
        self._boot_id = boot_id
        self._clients = clients
        self._is_greeted = False
        self._streams: dict[int, _Open] = {}
        self._stall: asyncio.TimerHandle | None = None
        self._stalled: set[Machine] = set()

    def forget(self, stream_id: int) -> None:
        """A stream is over."""
        self._streams.pop(stream_id, None)

    def send_json(self, kind: int, stream_id: int, message: object) -> None:
        """Send a frame with a JSON payload."""
        self.wire.send(frames.encode(kind, 0, stream_id, orjson.dumps(message)))

    def send_error(self, stream_id: int, error: VmmError) -> None:
        """End a stream with an error."""
        message = {"code": error.code, "message": error.message}
        self.send_json(frames.ERROR, stream_id, message | ({"detail": error.detail} if error.detail else {}))

    def _on_frame(self, frame: Frame) -> None:
        if not self.wire.is_open:
            return  # the rest of what came along with the frame that broke the protocol
        try:
            self._take(frame)
        except LinkError as error:
            logger.warning("cut a client that broke the protocol: %s", error.message)
            self.wire.abort(error)

    def _take(self, frame: Frame) -> None:
        kind, _, stream_id, _, payload = frame
        if not self._is_greeted:
            self._greet(kind, payload)
        elif kind == frames.PING:
            self.wire.send(frames.encode(frames.PONG, 0, 0, payload))
        elif kind == frames.OPEN:
            self._open(stream_id, payload)
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.send(frame)

    def _greet(self, kind: int, payload: bytes) -> None:
        if kind != frames.HELLO or _decode(payload).get("version") != VERSION:
            self.send_error(0, LinkError("bad_frame", f"expected HELLO with version {VERSION}"))
            self.wire.close()
            return
        self._is_greeted = True
        self._clients.add(self)
        self.send_json(frames.HELLO, 0, {"version": VERSION, "role": "hostd", "boot_id": self._boot_id})

    def _open(self, stream_id: int, payload: bytes) -> None:
        if stream_id == 0 or stream_id in self._streams:
            raise LinkError("bad_frame", f"stream {stream_id} cannot be opened")
        try:
            op = _decode(payload)
            machine_id = op.get("to")
            if machine_id is not None:
                is_passive = bool(op.get("passive", False))
                machine = self.host.machines.find_usable(str(machine_id), is_passive=is_passive)
                splice = _Splice(self, stream_id, machine, op)
                splice.open(payload)
                self._streams[stream_id] = splice
            elif op.get("op") in _STREAMS:
                self._streams[stream_id] = _STREAMS[op["op"]](self, stream_id, op)
            else:
                self._streams[stream_id] = _Call(self, stream_id, op)
        except VmmError as error:
            self.send_error(stream_id, error)

    def _on_lost(self, _: Exception | None) -> None:
        self._clients.discard(self)
        self._end_stall()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.leave()

    def _on_writable(self, is_writable: bool) -> None:
        if is_writable:
            self._end_stall()
        elif self._stall is None:
            self._stall = asyncio.get_running_loop().call_later(_STALL_TIMEOUT_S, self._cut)
            for stream in self._streams.values():
                if isinstance(stream, _Splice):
                    self.stall(stream.machine)

    def stall(self, machine: Machine) -> None:
        """Have a machine's line wait until we can take more."""
        self._stalled.add(machine)
        machine.line.stall(self)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        while self._stalled:
            self._stalled.pop().line.resume(self)

    def _cut(self) -> None:
        logger.warning("cut a client that took nothing for %.0f s", _STALL_TIMEOUT_S)
        self.wire.abort(LinkError("link_lost", "the client does not read"))


class _Call:
    """An operation of hostd's own: a task that ends with one answer."""

    def __init__(self, client: Client, stream_id: int, op: Mapping[str, Any]) -> None:
        self._client = client
        self._id = stream_id
        # Kept by the client's table of streams until it ends.
        self._task = asyncio.create_task(self._run(op), name=f"host {op.get('op')}")

    def send(self, frame: Frame) -> None:
        """The client may lose interest; what it asked for still happens."""
        if frame[0] == frames.CLOSE:
            self._client.forget(self._id)

    def leave(self) -> None:
        """As for CLOSE: a create whose caller is gone goes on, the caller asks again with the same id."""

    async def _run(self, op: Mapping[str, Any]) -> None:
        try:
            reply = await self._client.host.call(op)
            self._client.send_json(frames.REPLY, self._id, reply)
            self._client.wire.send(frames.encode(frames.CLOSE, 0, self._id))
        except VmmError as error:
            self._client.send_error(self._id, error)
        except Exception:
            logger.exception("operation %s failed", op.get("op"))
            self._client.send_error(self._id, MachineError("internal", "the host service failed"))
        finally:
            self._client.forget(self._id)


class _Events:
    """`machine.events`: changes of state from the reply on. What happens within milliseconds is sent as one."""

    def __init__(self, client: Client, stream_id: int, op: Mapping[str, Any]) -> None:
        self._client = client
        self._id = stream_id
        self._of = op.get("of")
        self._states = op.get("states")
        self._unsent: list[bytes] = []
        self._unwatch = client.host.machines.watch(self._wants, self._tell)
        client.send_json(frames.REPLY, stream_id, {})

    def send(self, frame: Frame) -> None:
        if frame[0] == frames.CLOSE:
            self._client.forget(self._id)
            self.leave()

    def leave(self) -> None:
        self._unsent = []
        self._unwatch()

    def _wants(self, change: MachineInfo | SnapshotInfo) -> bool:
        if isinstance(change, SnapshotInfo):
            return self._of in (None, "snapshot")
        return self._of in (None, "machine") and (self._states is None or change.state in self._states)

    def _tell(self, event: bytes) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_later(_EVENTS_PACE_S, self._send)
        self._unsent.append(frames.encode(frames.EVENT, 0, self._id, event))

    def _send(self) -> None:
        if self._unsent:
            self._client.wire.send(b"".join(self._unsent))
            self._unsent = []


class _Splice:
    """A client's stream joined to one of a machine's line. Frames pass both ways as they are."""

    def __init__(self, client: Client, stream_id: int, machine: Machine, op: Mapping[str, Any]) -> None:
        self._client = client
        self._id = stream_id
        self.machine = machine
        self._is_active = not op.get("passive", False)
        # A command that runs in the foreground may be silent for long and is still being waited for, and so is a file.
        is_awaited = op.get("op") in _AWAITED and not (op.get("pty") or op.get("background"))
        self._keeps_busy = self._is_active and is_awaited
        self._ends_with_client = bool(op.get("ends_with_client", False))
        self._line: LineStream

    def open(self, payload: bytes) -> None:
        """Pass the OPEN on, or have it wait for the machine to wake. Raises MachineError when the machine has ended."""
        self._line = self.machine.line.open(self, payload)
        self.machine.busy += self._keeps_busy
        if self._is_active:
            self.machine.use()
        if not self._client.wire.is_writable:
            self._client.stall(self.machine)

    def send(self, frame: Frame) -> None:
        """From the client to the agent."""
        self._line.send(frame)
        if frame[0] == frames.DATA and self._is_active:
            self.machine.use()
        if frame[0] == frames.CLOSE:
            self._end()
        elif frame[0] == frames.ACK:
            self._ends_with_client = False

    def receive(self, frame: Frame) -> None:
        """From the agent to the client."""
        self._client.wire.relay(frame, self._id)
        if frame[0] in (frames.CLOSE, frames.ERROR):
            self._end()

    def fail(self, error: VmmError) -> None:
        """The line broke or was closed."""
        self._client.send_error(self._id, error)
        self._end()

    def leave(self) -> None:
        """The client is gone: its processes are ended or detached, as it asked, its unfinished writes dropped."""
        if self._ends_with_client:
            self._line.send((frames.CONTROL, 0, self._line.id, 0, _KILL))
        self._line.send((frames.CLOSE, 0, self._line.id, 0, b""))
        self._end()

    def _end(self) -> None:
        self._client.forget(self._id)
        if self._keeps_busy:
            self._keeps_busy = False
            self.machine.busy -= 1
            self.machine.touch()


def _download(client: Client, stream_id: int, op: Mapping[str, Any]) -> Download:
    snapshot_id = str(op.get("id"))
    return Download(client, stream_id, lambda: client.host.machines.snapshots.exported(snapshot_id))


def _upload(client: Client, stream_id: int, op: Mapping[str, Any]) -> Upload:
    snapshot_id, snapshots = str(op.get("id")), client.host.machines.snapshots
    return Upload(client, stream_id, lambda: snapshots.imported(snapshot_id), lambda: snapshots.find(snapshot_id).info)


#: hostd's own operations that are more than a call.
_STREAMS: Mapping[str, Callable[[Client, int, Mapping[str, Any]], _Open]] = {
    "machine.events": _Events,
    "snapshot.export": _download,
    "snapshot.import": _upload,
}


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        op = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise LinkError("bad_frame", "a payload that should be JSON is not") from error
    if not isinstance(op, dict):
        raise LinkError("bad_frame", "a payload that should be a JSON object is not")
    return op
