import asyncio

import orjson
import pytest

from gateway.dialects.miosa import sse
from gateway.errors import GatewayError
from tests.support.calls import make_call


class Source:
    """Yields what is put into it, and knows whether it was closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def aclose(self) -> None:
        self.is_closed = True


async def frames(source: Source):
    async for item in source:
        yield sse.frame("note", {"item": item})


async def run(response, until: int) -> list[bytes]:
    """What the first `until` sends carry; then the client leaves."""
    sent: list[bytes] = []
    gone = asyncio.Event()

    async def send(message) -> None:
        sent.append(message.get("body", b""))
        if len(sent) >= until:
            gone.set()
            await asyncio.sleep(0)

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(60):
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return sent


def test_kind_stands_in_both_places():
    assert sse.frame("ready", {"a": 1}, "evt_1") == b'id: evt_1\nevent: ready\ndata: {"type":"ready","a":1}\n\n'


def test_data_may_have_a_type_of_its_own():
    frame = sse.frame("change", {"type": "modified"})
    assert orjson.loads(frame.split(b"data: ")[1])["type"] == "modified"


async def test_line_breaks_cannot_break_a_frame():
    assert sse.frame("note", {"line": "a\n\ndata: b\r\n"}).count(b"\n") == 3


async def test_source_is_closed_when_the_client_leaves():
    source = Source()
    source.queue.put_nowait(1)
    sent = await run(sse.response(make_call(), frames(source), source=source), until=3)
    assert b'"item":1' in b"".join(sent)
    assert source.is_closed


async def test_source_is_closed_when_the_client_left_before_the_first_byte():
    source = Source()
    await run(sse.response(make_call(), frames(source), source=source), until=1)
    assert source.is_closed


async def test_failure_half_way_is_a_last_frame():
    source = Source()
    source.queue.put_nowait(GatewayError("agent_unavailable", "Gone."))
    text = b"".join(await run(sse.response(make_call(), frames(source), source=source), until=99))
    assert b"event: error" in text
    assert b'"code":"bad_gateway"' in text
    assert source.is_closed


async def test_silence_is_filled_with_heartbeats(monkeypatch):
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.01)
    source = Source()
    sent = await run(sse.response(make_call(), frames(source), source=source), until=5)
    assert sent.count(sse.HEARTBEAT) >= 2


async def test_paused_yields_every_item_in_order():
    source = Source()
    for item in (1, 2, StopAsyncIteration()):
        source.queue.put_nowait(item)
    assert [item async for item in sse.paused(source, 1.0)] == [1, 2]


async def test_paused_passes_failures_on():
    source = Source()
    source.queue.put_nowait(ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        await anext(sse.paused(source, 1.0))
