"""hostd's connection to an agent: what a broken, slow or hostile agent can do to those who use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from native import frames
from native.frames import Frame
from tests.vmm.gvisor.support import until
from vmm.errors import AgentError, MachineError, VmmError
from vmm.host.line import AgentLine, LineStream
from vmm.stream import CREDIT_BYTES
from vmm.wire import FrameProtocol


class Peer:
    """An agent that greets and then does what the test does with `wire`."""

    def __init__(self) -> None:
        self.received: list[Frame] = []
        self.wires: list[FrameProtocol] = []
        self.answers = True

    async def dial(self, protocol: Any) -> object:
        loop = asyncio.get_running_loop()
        wire = FrameProtocol(self._on_frame, lambda _: None)
        self.wires.append(wire)
        server = await loop.create_server(lambda: wire, "127.0.0.1", 0)
        async with server:
            return await loop.create_connection(protocol, *server.sockets[0].getsockname()[:2])

    @property
    def wire(self) -> FrameProtocol:
        return self.wires[-1]

    def opened(self) -> list[Frame]:
        return [frame for frame in self.received if frame[0] == frames.OPEN]

    def _on_frame(self, frame: Frame) -> None:
        if frame[0] == frames.HELLO and self.answers:
            self.wire.send(frames.encode(frames.HELLO, 0, 0, b'{"version":1,"role":"agent","boot_id":"b"}'))
        elif frame[0] == frames.PING:
            self.wire.send(frames.encode(frames.PONG, 0, 0, frame[4]))
        self.received.append(frame)


class Reader:
    """Collects what a stream brings."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.error: VmmError | None = None

    def receive(self, frame: Frame) -> None:
        self.frames.append(frame)

    def fail(self, error: VmmError) -> None:
        self.error = error


@asynccontextmanager
async def running(peer: Peer) -> AsyncIterator[AgentLine]:
    line = AgentLine("machine", peer.dial, "token")
    task = asyncio.create_task(line.run())
    try:
        yield line
    finally:
        line.close(MachineError("machine_not_running", "the test is over"))
        task.cancel()
        await asyncio.wait([task])
        for wire in peer.wires:
            wire.abort()


async def _open(line: AgentLine, peer: Peer) -> tuple[Reader, LineStream]:
    reader = Reader()
    before = len(peer.opened())
    stream = line.open(reader, b'{"op":"exec"}')
    await until(lambda: len(peer.opened()) > before)
    return reader, stream


async def test_frames_pass_as_they_are_under_another_stream_id() -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, stream = await _open(line, peer)
        stream.send((frames.DATA, 0, 77, 5, b"input"))
        peer.wire.send(frames.encode_data(1, stream.id, 9, b"output"))
        await until(lambda: reader.frames and len(peer.received) == 3)
        assert peer.received[-1] == (frames.DATA, 0, stream.id, 5, b"input")
        assert reader.frames == [(frames.DATA, 1, stream.id, 9, b"output")]


async def test_what_is_opened_before_the_agent_listens_waits_for_it() -> None:
    peer = Peer()
    line = AgentLine("machine", peer.dial, "token")
    reader = Reader()
    stream = line.open(reader, b'{"op":"exec"}')
    stream.send((frames.DATA, 0, 1, 0, b"early"))
    task = asyncio.create_task(line.run())
    await until(lambda: len(peer.received) == 3)
    assert [frame[0] for frame in peer.received] == [frames.HELLO, frames.OPEN, frames.DATA]
    line.close(MachineError("machine_not_running", "over"))
    await asyncio.wait([task])
    assert reader.error is not None
    assert reader.error.code == "machine_not_running"
    peer.wire.abort()


@pytest.mark.parametrize("excess", [0, 1])
async def test_an_agent_that_sends_more_than_granted_is_cut(excess: int) -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, stream = await _open(line, peer)
        sent = 0
        while sent < CREDIT_BYTES:
            size = min(frames.DATA_BYTES_MAX, CREDIT_BYTES - sent)
            peer.wire.send(frames.encode_data(1, stream.id, sent, bytes(size)))
            sent += size
        peer.wire.send(frames.encode_data(1, stream.id, sent, bytes(excess)))
        await until(lambda: reader.error is not None or sum(len(frame[4]) for frame in reader.frames) == CREDIT_BYTES)
        if excess:
            await until(lambda: reader.error is not None)
            assert reader.error is not None
            assert reader.error.code == "agent_unreachable"
        else:
            assert reader.error is None


async def test_credit_from_the_client_is_credit_for_the_agent() -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, stream = await _open(line, peer)
        stream.send((frames.CREDIT, 1, stream.id, 1000, b""))
        for size in (*[frames.DATA_BYTES_MAX] * (CREDIT_BYTES // frames.DATA_BYTES_MAX), 1000):
            peer.wire.send(frames.encode_data(1, stream.id, 0, bytes(size)))
        await until(lambda: sum(len(frame[4]) for frame in reader.frames) == CREDIT_BYTES + 1000)
        assert reader.error is None


async def test_streams_of_a_lost_connection_fail_and_the_next_one_works() -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, _ = await _open(line, peer)
        peer.wire.abort()
        await until(lambda: reader.error is not None)
        assert reader.error is not None
        assert reader.error.code == "agent_unreachable"
        await until(lambda: len(peer.wires) == 2 and line.is_up.is_set())
        again, stream = await _open(line, peer)
        peer.wire.send(frames.encode(frames.CLOSE, 0, stream.id))
        await until(lambda: again.frames)
        assert again.error is None


async def test_an_agent_that_does_not_greet_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.host.line._PATIENCE_S", 0.1)
    peer = Peer()
    peer.answers = False
    async with running(peer) as line:
        with pytest.raises(MachineError, match="agent_unreachable"):
            await line.call({"op": "metrics"})


async def test_a_refusal_reaches_whoever_asked() -> None:
    peer = Peer()
    async with running(peer) as line:
        asking = asyncio.create_task(line.call({"op": "identity"}))
        await until(peer.opened)
        message = orjson.dumps({"code": "permission_denied", "message": "no"})
        peer.wire.send(frames.encode(frames.ERROR, 0, peer.opened()[0][2], message))
        with pytest.raises(AgentError, match="permission_denied"):
            await asking


async def test_a_stalled_client_stops_the_reading_until_it_resumes() -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, stream = await _open(line, peer)
        one, other = object(), object()
        line.stall(one)
        line.stall(other)
        peer.wire.send(frames.encode_data(1, stream.id, 0, b"later"))
        line.resume(one)
        await asyncio.sleep(0.05)
        assert not reader.frames
        line.resume(other)
        await until(lambda: reader.frames)


async def test_frames_of_unknown_streams_are_ignored() -> None:
    peer = Peer()
    async with running(peer) as line:
        reader, stream = await _open(line, peer)
        peer.wire.send(frames.encode_data(1, stream.id + 100, 0, b"stray"))
        peer.wire.send(frames.encode_data(1, stream.id, 0, b"ours"))
        await until(lambda: reader.frames)
        assert [frame[4] for frame in reader.frames] == [b"ours"]


async def test_what_is_sent_on_a_held_line_waits_and_hostds_own_calls_pass() -> None:
    peer = Peer()
    async with running(peer) as line:
        _, stream = await _open(line, peer)
        line.hold()
        stream.send((frames.DATA, 0, stream.id, 0, b"later"))
        late = line.open(Reader(), b'{"op":"stat"}')
        asking = asyncio.create_task(line.call({"op": "identity"}))
        await until(lambda: len(peer.opened()) == 2)
        assert orjson.loads(peer.opened()[1][4]) == {"op": "identity"}
        peer.wire.send(frames.encode(frames.REPLY, 0, peer.opened()[1][2], b"{}"))
        assert await asking == {}
        line.release()
        await until(lambda: len(peer.opened()) == 3)
        assert [(frame[0], frame[2]) for frame in peer.received[-2:]] == [
            (frames.DATA, stream.id),
            (frames.OPEN, late.id),
        ]


async def test_a_held_line_is_neither_dialled_nor_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.host.line._KEEPALIVE_PERIOD_S", 0.01)
    peer = Peer()
    peer.answers = True
    async with running(peer) as line:
        reader, _ = await _open(line, peer)
        line.hold()
        await asyncio.sleep(0.05)
        pings = sum(frame[0] == frames.PING for frame in peer.received)
        await asyncio.sleep(0.1)
        assert sum(frame[0] == frames.PING for frame in peer.received) == pings
        peer.wire.abort()
        await until(lambda: not line.is_up.is_set())
        await asyncio.sleep(0.1)
        assert (len(peer.wires), reader.error) == (1, None)
        line.release()
        await until(line.is_up.is_set)
        assert reader.error is not None
        assert reader.error.code == "agent_unreachable"


async def test_streams_go_to_the_next_line_with_what_waits_on_them() -> None:
    old, new = Peer(), Peer()
    async with running(old) as first, running(new) as second:
        open_reader, _ = await _open(first, old)
        first.hold()
        waiting_reader = Reader()
        waiting = first.open(waiting_reader, b'{"op":"exec"}')
        waiting.send((frames.DATA, 0, waiting.id, 0, b"input"))
        await until(second.is_up.is_set)
        second.inherit(first)
        assert open_reader.error is not None
        assert open_reader.error.code == "agent_unreachable"
        await until(lambda: len(new.received) == 3)
        assert [frame[0] for frame in new.received] == [frames.HELLO, frames.OPEN, frames.DATA]
        new.wire.send(frames.encode_data(1, waiting.id, 0, b"output"))
        await until(lambda: waiting_reader.frames)
        assert waiting_reader.error is None


async def test_streams_that_nothing_comes_for_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.host.line._HOLD_TIMEOUT_S", 0.05)
    line = AgentLine.nowhere("machine")
    reader = Reader()
    line.open(reader, b'{"op":"exec"}')
    await until(lambda: reader.error is not None)
    assert reader.error is not None
    assert reader.error.code == "wake_timeout"


async def test_what_a_client_said_before_it_left_a_held_line_is_not_lost() -> None:
    peer = Peer()
    async with running(peer) as line:
        _, stream = await _open(line, peer)
        line.hold()
        stream.send((frames.CONTROL, 0, stream.id, 0, b'{"type":"signal","signal":"SIGKILL"}'))
        stream.send((frames.CLOSE, 0, stream.id, 0, b""))
        await until(lambda: len(peer.received) == 4)
        assert [frame[0] for frame in peer.received[2:]] == [frames.CONTROL, frames.CLOSE]
