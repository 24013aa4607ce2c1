"""hostd's connection to the agent in one unit: kept up, shared by all streams to that machine.

A client's stream is spliced onto a stream of this connection: frames pass as they are, under another stream id.
Credits pass end to end, so what can be under way is bounded by what the client's readers have granted. The agent runs
among the guest's processes and is not trusted to keep to that: a line that sends more than was granted is cut.

States of a line:

    down ──dial, HELLO──▶ up ──lost──▶ down          (streams that were up end with `agent_unreachable`)
      └──────── close ────┴─▶ closed                 (streams end with the reason given)

Beside them, a line can be *held*: while its unit is frozen or being saved. Then nothing of clients passes, nothing is
dialled or pinged, and a lost connection ends no stream: all wait. hostd's own calls pass. Once released, what waited
goes out; streams whose connection was lost meanwhile end with `agent_unreachable`, and their clients attach again where
they were: the agent keeps what has not been credited. A machine without a unit (`nowhere`) has a held line too. Streams
go from one line to the next by `inherit`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import orjson

from native import frames
from native.frames import Frame
from vmm.errors import AgentError, LinkError, MachineError, VmmError
from vmm.link import VERSION
from vmm.stream import CREDIT_BYTES
from vmm.tasks import run_in_background
from vmm.wire import FrameProtocol

logger = logging.getLogger(__name__)

Dial = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]

#: For the answer to an operation of hostd's own.
CALL_TIMEOUT_S = 10.0
#: From dialling to the agent's HELLO, doubled after each time-out. A unit just restored may lose the first
#: packets, and the kernel waits a second before it sends them again: a new connection is sooner there.
_HELLO_MIN_S, _HELLO_MAX_S = 0.5, 5.0
#: A booting agent listens within tens of milliseconds; one that is gone needs no haste.
_REDIAL_MIN_S, _REDIAL_MAX_S = 0.003, 0.5
_REDIAL_GROWTH = 1.3
_STEADY_S = 5.0
_KEEPALIVE_PERIOD_S = 3.0
_SILENT_PERIODS_MAX = 3
#: How long a stream opened while the line is down waits for it.
_PATIENCE_S = 5.0
#: And while it is held: for the machine to wake. This many may wait.
_HOLD_TIMEOUT_S = 30.0
_WAITING_MAX = 1024
_CHANNELS = 4
_ENDING = (frames.ERROR, frames.CLOSE)


class Receiver(Protocol):
    """One end of a stream on a line: takes what the agent sends on it."""

    def receive(self, frame: Frame) -> None:
        """A frame from the agent; ERROR and CLOSE are the last."""
        ...

    def fail(self, error: VmmError) -> None:
        """The stream ended without the agent's doing."""
        ...


class LineStream:
    """A stream of a line. While the line is down or held, what is sent waits here.

    wire: the connection that its OPEN went out on, None before.  is_own: hostd's, which a held line does not hold.
    """

    __slots__ = ("credit", "id", "is_own", "line", "receiver", "waiting", "wire")

    def __init__(self, line: AgentLine, stream_id: int, receiver: Receiver, *, is_own: bool) -> None:
        self.line = line
        self.is_own = is_own
        self.id = stream_id
        self.receiver = receiver
        self.credit = [CREDIT_BYTES] * _CHANNELS
        self.waiting: list[Frame] | None = None
        self.wire: FrameProtocol | None = None

    def send(self, frame: Frame) -> None:
        """Pass a client's frame on."""
        kind, channel, _, offset, _ = frame
        if kind == frames.CREDIT and channel < _CHANNELS:
            self.credit[channel] += offset
        if kind == frames.CLOSE:
            # What its client said before it left (a signal, say) still counts, and a frozen agent reads it later.
            self._flush()
            self.line.pass_on(self, frame)
            self.line.forget(self)
        elif self.waiting is not None:
            self.waiting.append(frame)
        elif self.line.is_held and not self.is_own:
            self.waiting = [frame]
        else:
            self.line.pass_on(self, frame)

    def go_out(self, wire: FrameProtocol) -> None:
        """Send what waited."""
        self.wire = wire
        self._flush()

    def _flush(self) -> None:
        waiting, self.waiting = self.waiting, None
        for frame in waiting or ():
            self.line.pass_on(self, frame)


class AgentLine:
    """Keeps one connection up from `start`, or while `run` runs, until `close`."""

    def __init__(self, name: str, dial: Dial, token: str) -> None:
        self.is_up = asyncio.Event()
        self.is_held = False
        #: What the next connection opens the agent with.
        self.token = token
        self.last_error = "not dialled yet"
        self.name = name
        self._dial = dial
        self._wire: FrameProtocol | None = None
        self._greeting: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[Exception | None] | None = None
        self._released = asyncio.Event()
        self._released.set()
        self._streams: dict[int, LineStream] = {}
        self._last_id = 0
        self._closed: VmmError | None = None
        self._stalled_by: set[object] = set()
        self._was_hung_up = False
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def nowhere(cls, name: str) -> AgentLine:
        """Where the streams of a machine wait that has no unit."""
        line = cls(name, _refuse, "")
        line.hold()
        return line

    def start(self) -> None:
        """Dial in a task of its own, which ends with `close`."""
        self._task = run_in_background(self.run(), f"line {self.name}")

    def open(self, receiver: Receiver, payload: bytes) -> LineStream:
        """Open a client's stream with an OPEN frame's payload. What goes wrong later reaches `receiver.fail`.

        Raises MachineError: why the line was closed, `no_capacity` when very many wait already.
        """
        if self._closed is None and self.is_held and len(self._streams) >= _WAITING_MAX:
            self._check_waiting()
        return self._open(receiver, payload, is_own=False)

    async def call(self, op: Mapping[str, Any], *, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """Run an operation of hostd's own, on a held line too.

        Raises AgentError when it is refused, MachineError(`agent_unreachable`) when there is no answer in time.
        """
        reply = _Reply()
        stream = self._open(reply, orjson.dumps(op), is_own=True)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply.result
        except TimeoutError as error:
            raise MachineError(
                "agent_unreachable", "the machine's agent does not answer", detail=str(op["op"])
            ) from error
        finally:
            self.forget(stream)

    def hold(self) -> None:
        """Let all streams wait from now on: the unit is about to stand still."""
        self.is_held = True
        self._released.clear()

    def release(self) -> None:
        """The unit runs: let all that waited go on."""
        self.is_held = False
        self._released.set()
        if self._wire is not None:
            self._flush()
            return
        # They learn that the connection broke once there is another one: a client that is told now asks too early.
        for stream in self._streams.values():
            self._limit_waiting(stream)

    def hang_up(self) -> None:
        """Give up a held line's connection, so that a save need not reset it."""
        self._was_hung_up = True
        self._drop_wire()

    def inherit(self, other: AgentLine) -> None:
        """Take over the streams of a line that is given up, held or not. It must not be released any more."""
        streams, other._streams = other._streams, {}
        for stream in streams.values():
            self._last_id += 1
            stream.id, stream.line = self._last_id, self
            self._streams[stream.id] = stream
        for by in other._stalled_by:
            self.stall(by)
        self._flush()

    def fail_waiting(self, error: VmmError) -> None:
        """End the streams that have not been opened at the agent yet: what they wait for does not come."""
        for stream in [stream for stream in self._streams.values() if stream.wire is None]:
            self._fail(stream, error)

    def pass_on(self, stream: LineStream, frame: Frame) -> None:
        """Send a frame to the agent, unless the stream belongs to an earlier connection."""
        if self._wire is not None and stream.wire is self._wire:
            self._wire.relay(frame, stream.id)

    def forget(self, stream: LineStream) -> None:
        """Ignore what still arrives on a stream."""
        self._streams.pop(stream.id, None)

    def give_up(self, stream: LineStream, code: str) -> None:
        """A stream has waited for as long as it may."""
        if stream.id in self._streams and (stream.wire is None or stream.wire is not self._wire):
            self._fail(stream, MachineError(code, "the machine's agent does not answer", detail=self.last_error))

    def stall(self, by: object) -> None:
        """Stop reading from the agent until `by`, a client that cannot take more, is done with."""
        self._stalled_by.add(by)
        if self._wire is not None:
            self._wire.pause_reading()

    def resume(self, by: object) -> None:
        """Undo `stall`."""
        self._stalled_by.discard(by)
        if not self._stalled_by and self._wire is not None:
            self._wire.resume_reading()

    def close(self, reason: VmmError) -> None:
        """End every stream with `reason`, take no new one and dial no more."""
        self._closed = reason
        for stream in list(self._streams.values()):
            self._fail(stream, reason)
        if self._wire is not None:
            self._wire.abort()
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Dial, and dial again after each loss, until closed or cancelled."""
        delay_s, hello_s = _REDIAL_MIN_S, _HELLO_MIN_S
        while self._closed is None:
            await self._released.wait()
            try:
                await self._connect(hello_s)
            except (OSError, LinkError, TimeoutError, MachineError) as error:
                self.last_error = str(error) or "no answer"
                hello_s = min(hello_s * 2, _HELLO_MAX_S) if isinstance(error, TimeoutError) else hello_s
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * _REDIAL_GROWTH, _REDIAL_MAX_S)
                continue
            try:
                up_s = await self._keep()
            finally:
                self._go_down()
            # One that greets and hangs up, again and again, is not dialled as fast as it likes.
            is_fault = up_s < _STEADY_S and not self._was_hung_up
            delay_s = min(delay_s * 2, _REDIAL_MAX_S) if is_fault else _REDIAL_MIN_S
            hello_s, self._was_hung_up = _HELLO_MIN_S, False
            await asyncio.sleep(delay_s)

    def _open(self, receiver: Receiver, payload: bytes, *, is_own: bool) -> LineStream:
        if self._closed is not None:
            raise self._closed
        self._last_id += 1
        stream = LineStream(self, self._last_id, receiver, is_own=is_own)
        self._streams[stream.id] = stream
        stream.waiting = [(frames.OPEN, 0, stream.id, 0, payload)]
        if self._wire is not None and (is_own or not self.is_held):
            stream.go_out(self._wire)
        else:
            self._limit_waiting(stream)
        return stream

    def _check_waiting(self) -> None:
        if sum(1 for stream in self._streams.values() if stream.wire is None) >= _WAITING_MAX:
            raise MachineError("no_capacity", f"{_WAITING_MAX} streams wait for the machine already")

    async def _connect(self, hello_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._greeting = loop.create_future()
        self._lost = lost = loop.create_future()
        wire = FrameProtocol(lambda frame: self._take(wire, frame), lambda cause: _settle(lost, cause))
        try:
            async with asyncio.timeout(hello_s):
                await self._dial(lambda: wire)
                hello = {"version": VERSION, "role": "host", "token": self.token}
                wire.send(frames.encode(frames.HELLO, 0, 0, orjson.dumps(hello)))
                await asyncio.wait({self._greeting, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not self._greeting.done():
                    raise LinkError("link_lost", "the agent hung up on us")
                self._greeting.result()
        except BaseException:
            wire.abort()
            raise
        self._wire = wire
        if self._stalled_by:
            wire.pause_reading()
        self.is_up.set()
        self._flush()

    async def _keep(self) -> float:
        """Return once the connection is lost or silent for too long: for how many seconds it was up."""
        began = time.monotonic()
        silent_periods = 0
        while (wire := self._wire) is not None and self._lost is not None:
            done, _ = await asyncio.wait({self._lost}, timeout=_KEEPALIVE_PERIOD_S)
            if done:
                self.last_error = str(self._lost.result() or "the agent closed the connection")
                break
            if self.is_held:
                silent_periods = 0
                continue
            silent_periods = 0 if wire.has_heard or self._stalled_by else silent_periods + 1
            if silent_periods >= _SILENT_PERIODS_MAX:
                self.last_error = "the agent has been silent"
                break
            wire.has_heard = False
            wire.send(frames.encode(frames.PING, 0, 0, bytes(8)))
        return time.monotonic() - began

    def _go_down(self) -> None:
        was_lost = self._wire is not None
        self._drop_wire()
        for stream in list(self._streams.values()):
            if stream.wire is not None and (stream.is_own or (was_lost and not self.is_held)):
                self._fail(stream, self._broken())

    def _drop_wire(self) -> None:
        wire, self._wire = self._wire, None
        self.is_up.clear()
        if wire is not None:
            wire.abort()

    def _flush(self) -> None:
        """Let waiting streams out, and end those that an earlier connection took along; not what is held."""
        for stream in list(self._streams.values()):
            if self.is_held and not stream.is_own:
                continue
            if stream.wire is not None and stream.wire is not self._wire:
                self._fail(stream, self._broken())
            elif self._wire is not None:
                stream.go_out(self._wire)

    def _broken(self) -> MachineError:
        return MachineError("agent_unreachable", "the connection to the machine's agent broke", detail=self.last_error)

    def _limit_waiting(self, stream: LineStream) -> None:
        """It may have gone to another line by the time that it has waited for long enough."""
        code, limit_s = ("wake_timeout", _HOLD_TIMEOUT_S) if self.is_held else ("agent_unreachable", _PATIENCE_S)
        asyncio.get_running_loop().call_later(limit_s, lambda: stream.line.give_up(stream, code))

    def _fail(self, stream: LineStream, error: VmmError) -> None:
        self.forget(stream)
        stream.waiting = None
        stream.receiver.fail(error)

    def _take(self, wire: FrameProtocol, frame: Frame) -> None:
        if not wire.is_open:
            return  # the rest of what came along with the frame that broke the protocol
        try:
            self._on_frame(frame)
        except LinkError as error:
            logger.warning("machine %s: its agent broke the protocol: %s", self.name, error.message)
            wire.abort(error)

    def _on_frame(self, frame: Frame) -> None:
        kind, channel, stream_id, _, payload = frame
        if stream_id == 0:
            self._on_connection_frame(kind, payload)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if kind == frames.DATA:
            if channel >= _CHANNELS or len(payload) > stream.credit[channel]:
                raise LinkError("bad_frame", "the agent sent more than it was granted")
            stream.credit[channel] -= len(payload)
        elif kind in _ENDING:
            self.forget(stream)
        stream.receiver.receive(frame)

    def _on_connection_frame(self, kind: int, payload: bytes) -> None:
        if self._greeting is None or self._greeting.done():
            return
        if kind == frames.HELLO:
            self._greeting.set_result(None)
        elif kind == frames.ERROR:
            self._greeting.set_exception(
                LinkError("unauthorized", "the agent refused us", detail=payload[:500].decode(errors="replace"))
            )


class _Reply:
    """Receives the answer to a call of hostd's own."""

    def __init__(self) -> None:
        self.result: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def receive(self, frame: Frame) -> None:
        kind, payload = frame[0], frame[4]
        if self.result.done():
            return
        if kind == frames.REPLY:
            self.result.set_result(_decode(payload))
        elif kind == frames.ERROR:
            message = _decode(payload)
            self.result.set_exception(AgentError(str(message.get("code")), str(message.get("message"))))
        elif kind == frames.CLOSE:
            self.fail(MachineError("agent_unreachable", "the agent ended the stream without an answer"))

    def fail(self, error: VmmError) -> None:
        if not self.result.done():
            self.result.set_exception(error)


async def _refuse(_: Callable[[], asyncio.Protocol]) -> object:
    raise ConnectionRefusedError("the machine has no unit")


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        message = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise LinkError("bad_frame", "a payload that should be JSON is not") from error
    if not isinstance(message, dict):
        raise LinkError("bad_frame", "a payload that should be a JSON object is not")
    return message


def _settle(lost: asyncio.Future[Exception | None], cause: Exception | None) -> None:
    if not lost.done():
        lost.set_result(cause)
