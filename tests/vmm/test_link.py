"""Links and streams against a peer that says exactly what the test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from native import frames
from tests.vmm.faults import Peer, listening
from vmm import link as link_module
from vmm import stream as stream_module
from vmm.errors import AgentError, LinkError, MachineError, VmmError
from vmm.link import Link
from vmm.stream import CREDIT_BYTES, STDERR, STDOUT, Chunk, End, Stream

KIB = 1024
FULL = frames.DATA_BYTES_MAX


@asynccontextmanager
async def joined(peer: Peer) -> AsyncIterator[Link]:
    async with asyncio.timeout(60), listening(peer) as dial:
        link = await Link.connect(dial, role="host", token="t0")
        try:
            yield link
        finally:
            link.close()


@pytest.fixture
async def peer() -> Peer:
    return Peer()


@pytest.fixture
async def link(peer: Peer) -> AsyncIterator[Link]:
    async with joined(peer) as link:
        yield link


async def test_hello_carries_role_and_token(peer: Peer, link: Link) -> None:
    assert peer.hello == {"version": 1, "role": "host", "token": "t0"}
    assert link.hello == {"version": 1, "role": "agent", "boot_id": "b"}


@pytest.mark.parametrize(
    ("greeting", "code"),
    [
        ({"code": "unauthorized", "message": "wrong token"}, "unauthorized"),
        ({"version": 2, "role": "agent"}, "bad_frame"),
    ],
)
async def test_a_refused_greeting_raises(peer: Peer, greeting: dict[str, object], code: str) -> None:
    peer.greets_with = greeting
    async with listening(peer) as dial:
        with pytest.raises(LinkError) as caught:
            await Link.connect(dial, role="host", token="t0")
    assert caught.value.code == code


async def test_a_peer_that_never_greets_is_given_up(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_HELLO_TIMEOUT_S", 0.05)
    peer.greets_with = None
    async with listening(peer) as dial:
        with pytest.raises(LinkError):
            await Link.connect(dial, role="host")
        await asyncio.wait_for(peer.lost.wait(), 5)


async def test_nobody_listening_is_an_os_error() -> None:
    async with listening(Peer()) as dial:
        pass
    with pytest.raises(OSError, match=r"refused|Connect"):
        await Link.connect(dial, role="host")


async def test_reply_then_data_events_and_close(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "exec", "id": "x"})
    stream_id, op = await peer.opened()
    assert op == {"op": "exec", "id": "x"}
    peer.say(frames.REPLY, stream_id, {"pid": 7})
    peer.data(stream_id, STDOUT, 0, b"out")
    peer.data(stream_id, STDERR, 0, b"err")
    peer.number(frames.END, stream_id, STDOUT, 3)
    peer.say(frames.EVENT, stream_id, {"type": "exit", "exit_code": 0})
    peer.say(frames.CLOSE, stream_id)
    assert await stream.reply() == {"pid": 7}
    assert [item async for item in stream] == [
        Chunk(STDOUT, 0, b"out"),
        Chunk(STDERR, 0, b"err"),
        End(STDOUT, 3),
        {"type": "exit", "exit_code": 0},
    ]
    assert link.stream_count == 0


@pytest.mark.parametrize(
    ("role", "op", "code", "raised"),
    [
        ("agent", {"op": "stat"}, "not_found", AgentError),
        ("hostd", {"op": "stat", "to": "m"}, "not_found", AgentError),
        ("hostd", {"op": "stat", "to": "m"}, "machine_not_found", MachineError),
        ("hostd", {"op": "stat", "to": "m"}, "agent_unreachable", MachineError),
        ("hostd", {"op": "machine.get"}, "bad_request", MachineError),
    ],
)
async def test_errors_name_who_refused(peer: Peer, role: str, op: dict[str, str], code: str, raised: type) -> None:
    peer.greets_with = {"version": 1, "role": role}
    async with joined(peer) as link:
        stream = link.open(op)
        stream_id, _ = await peer.opened()
        peer.say(frames.ERROR, stream_id, {"code": code, "message": "no", "detail": "why"})
        with pytest.raises(VmmError) as caught:
            await stream.reply()
    assert type(caught.value) is raised
    assert (caught.value.code, caught.value.message, caught.value.detail) == (code, "no", "why")


async def test_credit_goes_back_as_the_reader_takes(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "read"})
    stream_id, _ = await peer.opened()
    for index in range(CREDIT_BYTES // FULL):
        peer.data(stream_id, STDOUT, index * FULL, bytes(FULL))
    await _until(lambda: len(stream._items) == CREDIT_BYTES // FULL)
    assert peer.received_nothing()
    first = await anext(stream)
    assert isinstance(first, Chunk)
    credit = await peer.frame(frames.CREDIT)
    assert credit[1:4] == (STDOUT, stream_id, FULL)
    peer.data(stream_id, STDOUT, CREDIT_BYTES, bytes(FULL))
    offsets = [(await anext(stream)).offset for _ in range(CREDIT_BYTES // FULL)]  # type: ignore[union-attr]
    assert offsets == [FULL, 2 * FULL, 3 * FULL, CREDIT_BYTES]


Violation = Callable[[Peer, int], None]


def _beyond_credit(peer: Peer, stream_id: int) -> None:
    for index in range(CREDIT_BYTES // FULL + 1):
        peer.data(stream_id, STDOUT, index * FULL, bytes(FULL))


def _repeated_bytes(peer: Peer, stream_id: int) -> None:
    peer.data(stream_id, STDOUT, 0, b"abc")
    peer.data(stream_id, STDOUT, 2, b"c")


def _data_after_end(peer: Peer, stream_id: int) -> None:
    peer.number(frames.END, stream_id, STDOUT, 0)
    peer.data(stream_id, STDOUT, 0, b"")


def _unknown_channel(peer: Peer, stream_id: int) -> None:
    peer.data(stream_id, 9, 0, b"abc")


def _second_reply(peer: Peer, stream_id: int) -> None:
    peer.say(frames.REPLY, stream_id, {})
    peer.say(frames.REPLY, stream_id, {})


def _no_json(peer: Peer, stream_id: int) -> None:
    peer.say(frames.EVENT, stream_id, b"{")


def _no_object(peer: Peer, stream_id: int) -> None:
    peer.say(frames.EVENT, stream_id, [1])


@pytest.mark.parametrize(
    "violation",
    [_beyond_credit, _repeated_bytes, _data_after_end, _unknown_channel, _second_reply, _no_json, _no_object],
)
async def test_a_violation_ends_its_stream_and_no_other(peer: Peer, link: Link, violation: Violation) -> None:
    bad, good = link.open({"op": "exec"}), link.open({"op": "stat"})
    bad_id, _ = await peer.opened()
    good_id, _ = await peer.opened()
    violation(peer, bad_id)
    await _until(lambda: bad.is_over)
    with pytest.raises(LinkError) as caught:
        async for _ in bad:
            pass
    assert caught.value.code == "bad_frame"
    assert (await peer.frame(frames.CLOSE))[2] == bad_id
    peer.say(frames.REPLY, good_id, {"fine": True})
    assert await good.reply() == {"fine": True}


async def test_a_gap_is_visible(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "attach"})
    stream_id, _ = await peer.opened()
    peer.data(stream_id, STDOUT, 100, b"a")
    peer.data(stream_id, STDOUT, 200, b"b")
    assert [await anext(stream), await anext(stream)] == [Chunk(STDOUT, 100, b"a"), Chunk(STDOUT, 200, b"b")]


async def test_a_stalled_reader_does_not_stall_others(peer: Peer, link: Link) -> None:
    stalled = link.open({"op": "read"})
    stalled_id, _ = await peer.opened()
    for index in range(CREDIT_BYTES // FULL):
        peer.data(stalled_id, STDOUT, index * FULL, bytes(FULL))
    for round_ in range(20):
        stream = link.open({"op": "read"})
        stream_id, _ = await peer.opened()
        peer.data(stream_id, STDOUT, 0, bytes([round_]))
        assert await anext(stream) == Chunk(STDOUT, 0, bytes([round_]))
        stream.close()
        await peer.frame(frames.CLOSE)
    waiting = [await anext(stalled) for _ in range(CREDIT_BYTES // FULL)]
    assert sum(len(item.data) for item in waiting if isinstance(item, Chunk)) == CREDIT_BYTES


async def test_send_waits_for_credit(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "write"})
    stream_id, _ = await peer.opened()
    data = bytes(range(256)) * (8 * KIB)
    sending = asyncio.create_task(stream.send(data))
    received = await _take_data(peer, CREDIT_BYTES)
    await _until(lambda: stream._send_credit == 0)
    assert not sending.done()
    peer.number(frames.CREDIT, stream_id, 0, CREDIT_BYTES)
    received += await _take_data(peer, CREDIT_BYTES)
    await sending
    assert received == data
    stream.end()
    assert (await peer.frame(frames.END))[3] == len(data)


async def test_an_error_wakes_a_sender_that_waits_for_credit(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "write"})
    stream_id, _ = await peer.opened()
    sending = asyncio.create_task(stream.send(bytes(2 * CREDIT_BYTES)))
    await _take_data(peer, CREDIT_BYTES)
    peer.say(frames.ERROR, stream_id, {"code": "no_space", "message": "full"})
    with pytest.raises(AgentError, match="no_space"):
        await sending


async def test_send_waits_while_the_connection_is_full(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "write"})
    stream_id, _ = await peer.opened()
    peer.wire.pause_reading()
    stream._send_credit = 64 * CREDIT_BYTES
    sending = asyncio.create_task(stream.send(bytes(64 * CREDIT_BYTES)))
    await _until(lambda: not link._wire.is_writable)
    assert not sending.done()
    peer.wire.resume_reading()
    await _take_data(peer, 64 * CREDIT_BYTES)
    await sending
    assert stream_id in link._streams


Step = Callable[[Stream], Awaitable[object]]


async def _send_too_much(stream: Stream) -> None:
    await stream.send(bytes(2 * CREDIT_BYTES))


@pytest.mark.parametrize("step", [Stream.reply, Stream.__anext__, _send_too_much])
async def test_cancellation_leaks_no_stream(peer: Peer, link: Link, step: Step) -> None:
    async def work() -> None:
        with link.open({"op": "exec"}) as stream:
            await step(stream)

    task = asyncio.create_task(work())
    stream_id, _ = await peer.opened()
    await _until(lambda: any(s._reader or s._writer for s in link._streams.values()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert link.stream_count == 0
    assert (await peer.frame_after(frames.CLOSE, frames.DATA))[2] == stream_id


async def test_frames_for_a_stream_that_was_left_are_ignored(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "read"})
    stream_id, _ = await peer.opened()
    stream.close()
    peer.data(stream_id, STDOUT, 0, b"late")
    peer.say(frames.CLOSE, stream_id)
    other = link.open({"op": "stat"})
    await peer.frame(frames.CLOSE)
    other_id, _ = await peer.opened()
    peer.say(frames.REPLY, other_id, {})
    assert await other.reply() == {}


async def test_a_lost_link_fails_every_stream_after_what_had_arrived(peer: Peer, link: Link) -> None:
    streams = [link.open({"op": "read"}) for _ in range(3)]
    for _ in streams:
        stream_id, _ = await peer.opened()
        peer.data(stream_id, STDOUT, 0, b"kept")
    peer.wire.close()
    await asyncio.wait_for(link.closed.wait(), 5)
    for stream in streams:
        assert await anext(stream) == Chunk(STDOUT, 0, b"kept")
        with pytest.raises(LinkError) as caught:
            await anext(stream)
        assert caught.value.code == "link_lost"
    assert link.stream_count == 0
    with pytest.raises(LinkError):
        link.open({"op": "stat"})


async def test_a_malformed_frame_ends_the_link(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "read"})
    await peer.opened()
    peer.wire.send(b"\xff" * 12)
    with pytest.raises(LinkError):
        await stream.reply()
    assert not link.is_open
    await asyncio.wait_for(peer.lost.wait(), 5)


async def test_close_fails_what_is_under_way(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "read"})
    link.close()
    with pytest.raises(LinkError):
        await stream.reply()
    await asyncio.wait_for(peer.lost.wait(), 5)


async def test_a_dead_peer_is_noticed(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_KEEPALIVE_PERIOD_S", 0.02)
    peer.answers_pings = False
    async with joined(peer) as link:
        with pytest.raises(LinkError, match="stopped answering"):
            await link.open({"op": "watch"}).reply()


async def test_a_quiet_peer_that_answers_pings_is_kept(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_KEEPALIVE_PERIOD_S", 0.001)
    async with joined(peer) as link:
        await _until(lambda: peer.pings > 10)
        assert link.is_open


def test_a_dead_peer_is_noticed_within_ten_seconds() -> None:
    assert link_module._KEEPALIVE_PERIOD_S * link_module._SILENT_PERIODS_MAX <= 10


async def test_pings_are_answered(peer: Peer, link: Link) -> None:
    peer.say(frames.PING, 0, b"12345678")
    assert (await peer.frame(frames.PONG))[4] == b"12345678"
    assert link.is_open


async def test_too_many_events_become_one_overflow(peer: Peer, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_EVENTS_MAX", 3)
    stream = link.open({"op": "watch"})
    stream_id, _ = await peer.opened()
    for number in range(10):
        peer.say(frames.EVENT, stream_id, {"n": number})
    peer.say(frames.CLOSE, stream_id)
    assert [item async for item in stream] == [{"n": 0}, {"n": 1}, {"n": 2}, {"type": "overflow"}]


async def test_events_after_an_overflow_arrive_again(peer: Peer, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_EVENTS_MAX", 1)
    stream = link.open({"op": "watch"})
    stream_id, _ = await peer.opened()
    for number in range(3):
        peer.say(frames.EVENT, stream_id, {"n": number})
    await _until(lambda: len(stream._items) == 2)
    assert [await anext(stream), await anext(stream)] == [{"n": 0}, {"type": "overflow"}]
    peer.say(frames.EVENT, stream_id, {"n": 3})
    assert await anext(stream) == {"n": 3}


async def test_many_streams_at_once_keep_apart(peer: Peer, link: Link) -> None:
    async def ask(number: int) -> object:
        with link.open({"op": "stat", "n": number}) as stream:
            return (await stream.reply())["n"]

    async def answer() -> None:
        asked = [await peer.opened() for _ in range(500)]
        for stream_id, op in reversed(asked):
            peer.say(frames.REPLY, stream_id, {"n": op["n"]})

    answers, _ = await asyncio.gather(asyncio.gather(*(ask(n) for n in range(500))), answer())
    assert answers == list(range(500))


async def test_ack_leaves_the_stream(peer: Peer, link: Link) -> None:
    stream = link.open({"op": "exec"})
    stream_id, _ = await peer.opened()
    stream.ack()
    assert (await peer.frame(frames.ACK))[2] == stream_id
    stream.close()
    assert link.stream_count == 0
    with pytest.raises(LinkError):
        stream.control({"type": "resize"})
    assert peer.received_nothing()


async def test_a_second_reader_is_refused(peer: Peer, link: Link) -> None:
    with link.open({"op": "exec"}) as stream:
        first = asyncio.create_task(stream.reply())
        await _until(lambda: stream._reader is not None)
        with pytest.raises(RuntimeError, match="one reader"):
            await anext(stream)
        first.cancel()
        await asyncio.wait([first])


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def _take_data(peer: Peer, size: int) -> bytes:
    parts = []
    while size > 0:
        part = (await peer.frame(frames.DATA))[4]
        parts.append(part)
        size -= len(part)
    assert size == 0
    return b"".join(parts)
