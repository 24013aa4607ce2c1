"""hostd's connection to one machine's agent: kept up, shared by all streams to that machine.

A client's stream is spliced onto a stream of this connection: frames pass as they are, under another stream id.
Credits pass end to end, so what can be under way is bounded by what the client's readers have granted. The agent runs
among the guest's processes and is not trusted to keep to that: a line that sends more than was granted is cut.

States of a line:

    down ──dial, HELLO──▶ up ──lost──▶ down          (streams that were up end with `agent_unreachable`)
      └──────── close ────┴─▶ closed                 (streams end with the reason given)
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
from vmm.wire import FrameProtocol

logger = logging.getLogger(__name__)

Dial = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]

#: For the answer to an operation of hostd's own.
CALL_TIMEOUT_S = 10.0
_HELLO_TIMEOUT_S = 5.0
#: A booting agent listens within tens of milliseconds; one that is gone needs no haste.
_REDIAL_MIN_S, _REDIAL_MAX_S = 0.003, 0.5
_REDIAL_GROWTH = 1.3
_STEADY_S = 5.0
_KEEPALIVE_PERIOD_S = 3.0
_SILENT_PERIODS_MAX = 3
#: How long a stream opened while the line is down waits for it.
_PATIENCE_S = 3.0
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
    """A stream of a line. Until the line is up, what is sent waits here."""

    __slots__ = ("credit", "id", "line", "receiver", "waiting")

    def __init__(self, line: AgentLine, stream_id: int, receiver: Receiver) -> None:
        self.line = line
        self.id = stream_id
        self.receiver = receiver
        self.credit = [CREDIT_BYTES] * _CHANNELS
        self.waiting: list[Frame] | None = None

    def send(self, frame: Frame) -> None:
        """Pass a client's frame on."""
        kind, channel, _, offset, _ = frame
        if kind == frames.CREDIT and channel < _CHANNELS:
            self.credit[channel] += offset
        if self.waiting is not None:
            self.waiting.append(frame)
        else:
            self.line.pass_on(self, frame)
        if kind == frames.CLOSE:
            self.line.forget(self)


class AgentLine:
    """Keeps one connection up while `run` runs."""

    def __init__(self, name: str, dial: Dial, token: str) -> None:
        self.is_up = asyncio.Event()
        self.name = name
        self._dial = dial
        self._token = token
        self._wire: FrameProtocol | None = None
        self._greeting: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[Exception | None] | None = None
        self._streams: dict[int, LineStream] = {}
        self._last_id = 0
        self._closed: VmmError | None = None
        self._stalled_by: set[object] = set()
        self.last_error = "not dialled yet"

    def open(self, receiver: Receiver, payload: bytes) -> LineStream:
        """Open a stream with an OPEN frame's payload. What goes wrong reaches `receiver.fail`."""
        if self._closed is not None:
            raise self._closed
        self._last_id += 1
        stream = LineStream(self, self._last_id, receiver)
        self._streams[stream.id] = stream
        if not self.is_up.is_set():
            stream.waiting = []
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._give_up, stream)
        stream.send((frames.OPEN, 0, stream.id, 0, payload))
        return stream

    async def call(self, op: Mapping[str, Any], *, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """Run an operation of hostd's own.

        Raises AgentError when it is refused, MachineError(`agent_unreachable`) when there is no answer in time.
        """
        reply = _Reply()
        stream = self.open(reply, orjson.dumps(op))
        try:
            async with asyncio.timeout(timeout_s):
                return await reply.result
        except TimeoutError as error:
            raise MachineError(
                "agent_unreachable", "the machine's agent does not answer", detail=str(op["op"])
            ) from error
        finally:
            self.forget(stream)

    def pass_on(self, stream: LineStream, frame: Frame) -> None:
        """Send a frame to the agent."""
        if self._wire is not None:
            self._wire.relay(frame, stream.id)

    def forget(self, stream: LineStream) -> None:
        """Ignore what still arrives on a stream."""
        self._streams.pop(stream.id, None)

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
        """End every stream with `reason` and take no new one. `run` ends soon after."""
        self._closed = reason
        self._fail_all(reason)
        if self._wire is not None:
            self._wire.abort()

    async def run(self) -> None:
        """Dial, and dial again after each loss, until closed or cancelled."""
        delay_s = _REDIAL_MIN_S
        while self._closed is None:
            try:
                await self._connect()
            except (OSError, LinkError, TimeoutError, MachineError) as error:
                self.last_error = str(error) or type(error).__name__
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * _REDIAL_GROWTH, _REDIAL_MAX_S)
                continue
            try:
                up_s = await self._keep()
            finally:
                self._go_down()
            # One that greets and hangs up, again and again, is not dialled as fast as it likes.
            delay_s = _REDIAL_MIN_S if up_s > _STEADY_S else min(delay_s * 2, _REDIAL_MAX_S)
            await asyncio.sleep(delay_s)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._greeting = loop.create_future()
        self._lost = lost = loop.create_future()
        wire = FrameProtocol(lambda frame: self._take(wire, frame), lambda cause: _settle(lost, cause))
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                await self._dial(lambda: wire)
                hello = {"version": VERSION, "role": "host", "token": self._token}
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
        while self._wire is not None and self._lost is not None:
            done, _ = await asyncio.wait({self._lost}, timeout=_KEEPALIVE_PERIOD_S)
            if done:
                self.last_error = str(self._lost.result() or "the agent closed the connection")
                break
            silent_periods = 0 if self._wire.has_heard or self._stalled_by else silent_periods + 1
            if silent_periods >= _SILENT_PERIODS_MAX:
                self.last_error = "the agent has been silent"
                break
            self._wire.has_heard = False
            self._wire.send(frames.encode(frames.PING, 0, 0, bytes(8)))
        return time.monotonic() - began

    def _go_down(self) -> None:
        self.is_up.clear()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        self._fail_all(
            MachineError("agent_unreachable", "the connection to the machine's agent broke", detail=self.last_error)
        )

    def _flush(self) -> None:
        for stream in list(self._streams.values()):
            waiting, stream.waiting = stream.waiting, None
            for frame in waiting or ():
                self.pass_on(stream, frame)

    def _give_up(self, stream: LineStream) -> None:
        if stream.waiting is not None and stream.id in self._streams:
            self.forget(stream)
            stream.receiver.fail(
                MachineError("agent_unreachable", "the machine's agent does not answer", detail=self.last_error)
            )

    def _fail_all(self, error: VmmError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
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
