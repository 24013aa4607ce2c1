"""A process's output as events: a real plane between a scripted API and a scripted hostd."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from native import frames
from previews.streams import HEADER, OUTPUT_ORDER
from tests.previews.conftest import StartPlane
from tests.previews.harness import PATIENCE_S, Client, Exchange, Plane, unix_upstream
from tests.previews.http2 import http2_client, pseudo
from tests.previews.scripted import STREAM, Hostd, Link
from tests.support.certificates import Authority

OP = {"op": "exec", "id": "e1", "to": "m1", "shell": "true", "ends_with_client": True}
ORDER: dict[str, Any] = {
    "op": OP,
    "opening": "open\n",
    "heartbeat": "beat\n",
    "stdout": ["out:", "\n"],
    "stderr": ["err:", "\n"],
    "exit": "exit:$exit_code,$signal,$reason,$duration_ms\n",
    "error": "error:$code,$message\n",
    "refusal": '{"code":"$code","message":"$message"}',
    "errors": {
        "internal": {"status": 500, "code": "oops", "message": None, "with_cause": False},
        "no_such_process": {"status": 404, "code": "gone", "message": None, "with_cause": False},
        "no_answer": {"status": 504, "code": "late", "message": None, "with_cause": False},
        "machine_not_running": {"status": 409, "code": "off", "message": "It is off", "with_cause": True},
    },
}
EXIT = {"type": "exit", "exit_code": 143, "signal": "SIGTERM", "reason": "signaled", "duration_ms": 12}


class Api:
    """Orders the same for every request."""

    def __init__(self) -> None:
        self.order: dict[str, Any] = dict(ORDER)

    async def answer(self, exchange: Exchange) -> None:
        body = json.dumps(self.order).encode()
        head = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream", "X-Own: 1", "Transfer-Encoding: chunked"]
        await exchange.send("\r\n".join([*head, f"{HEADER}: {OUTPUT_ORDER}"]).encode() + b"\r\n\r\n")
        for piece in (body[:7], body[7:]):
            await exchange.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await exchange.send(b"0\r\n\r\n")


@pytest.fixture
async def api(run_dir: Path) -> AsyncIterator[Api]:
    api = Api()
    async with unix_upstream(api.answer, run_dir / "api.sock"):
        yield api


async def ask(client: Client, version: str = "1.1") -> None:
    await client.send(f"GET /output HTTP/{version}\r\nHost: localhost\r\n\r\n")


async def begin(client: Client, hostd: Hostd) -> Link:
    """Ask, and have the process start: the link that its output goes to."""
    await ask(client)
    link = await hostd.link()
    await link.op()
    link.reply()
    return link


async def until(client: Client, text: bytes) -> bytes:
    """Read until a text has come; the chunks' framing is left in."""
    async with asyncio.timeout(PATIENCE_S):
        return await client.reader.readuntil(text)


@pytest.mark.usefixtures("api")
async def test_output_becomes_events(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        for _ in range(2):
            await ask(client)
            link = await hostd.link()
            assert await link.op() == OP
            link.reply()
            link.data(b"one\ntw")
            link.data(b"o\nrest", 6)
            link.data(b"warning\n", channel=2)
            link.send(frames.encode_offset(frames.END, 1, STREAM, 12))
            link.tell(frames.EVENT, EXIT)
            response = await client.response()
            assert response.head.get("content-type") == "text/event-stream"
            assert (response.head.get("x-own"), response.head.get(HEADER)) == ("1", None)
            expected = b"open\nout:one\\n\nout:two\\n\nerr:warning\\n\nout:rest\nexit:143,15,signaled,12\n"
            assert response.body == expected
            assert (frames.ACK, b"") in await link.rest()
        assert await plane.metric("sandgate_plane_stream_output_bytes_total") > 2 * len(expected)
        assert await plane.metric("sandgate_plane_stream_outputs") == 0


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        ({"code": "no_such_process", "message": 'no "7"'}, 404, {"code": "gone", "message": 'no "7".'}),
        ({"code": "unheard_of", "message": "What."}, 500, {"code": "oops", "message": "What."}),
        (
            {"code": "machine_not_running", "message": "x", "detail": "idle"},
            409,
            {"code": "off", "message": "It is off (idle)."},
        ),
    ],
)
@pytest.mark.usefixtures("api")
async def test_a_refusal_is_an_ordinary_answer(
    plane: Plane, hostd: Hostd, error: dict[str, str], status: int, body: dict[str, str]
) -> None:
    async with plane.client() as client:
        for _ in range(2):
            await ask(client)
            link = await hostd.link()
            await link.op()
            link.tell(frames.ERROR, error)
            response = await client.response()
            assert (response.status, response.json()) == (status, body)
            assert (response.head.get("content-type"), response.head.get("x-own")) == ("application/json", "1")


@pytest.mark.usefixtures("api")
async def test_a_broken_link_is_made_again_where_it_was(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        link = await begin(client, hostd)
        link.data(b"one\nt")
        await until(client, b"out:one")
        link.close()
        for _ in range(2):
            link = await hostd.link()
            offsets = {"1": 5, "2": 0, "3": 0}
            expected = {"op": "attach", "id": "e1", "to": "m1", "offsets": offsets, "ends_with_client": True}
            assert await link.op() == expected
            link.tell(frames.ERROR, {"code": "agent_unreachable", "message": "x"})
        link = await hostd.link()
        await link.op()
        link.reply()
        link.data(b"wo\n", 5)
        link.tell(frames.EVENT, {**EXIT, "signal": None, "exit_code": 0, "reason": "exited"})
        rest = await until(client, b"0\r\n\r\n")
        assert b"out:two\\n\n" in rest
        assert b"exit:0,null,exited,12\n" in rest
    async with plane.client() as client:
        link = await begin(client, hostd)
        link.data(b"one\n")
        await until(client, b"out:one")
        link.close()
        link = await hostd.link()
        await link.op()
        link.tell(frames.ERROR, {"code": "no_such_process", "message": "x"})
        assert b"error:late,the process is not known" in await until(client, b"0\r\n\r\n")


@pytest.mark.usefixtures("api")
async def test_trouble_half_way_is_the_last_event(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        link = await begin(client, hostd)
        link.data(b"one\n")
        link.tell(frames.ERROR, {"code": "machine_not_running", "message": "x", "detail": "expired"})
        assert (await client.response()).body == b"open\nout:one\\n\nerror:off,It is off (expired).\n"


@pytest.mark.usefixtures("api")
async def test_a_client_that_leaves_closes_the_link(plane: Plane, hostd: Hostd) -> None:
    for has_begun in (True, False):
        async with plane.client() as client:
            await ask(client)
            link = await hostd.link()
            await link.op()
            if has_begun:
                link.reply()
                link.data(b"one\n")
                await until(client, b"out:one")
        assert await link.rest() == []


async def test_pauses(start_plane: StartPlane, hostd: Hostd, api: Api) -> None:
    plane = await start_plane("--stream-heartbeat-s", "0.3")
    async with plane.client() as client:
        link = await begin(client, hostd)
        link.data("50 % é".encode()[:-1], channel=3)
        await until(client, b"out:50 % \n")
        await until(client, b"beat\n")
        link.data(b"\xa9\n", 6, channel=3)
        await until(client, "out:é\\n\n".encode())


@pytest.mark.usefixtures("api")
async def test_a_slow_client_holds_up_its_own_process(plane: Plane, hostd: Hostd) -> None:
    async with plane.client() as client:
        link = await begin(client, hostd)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        credit, sent, line = 1024 * 1024, 0, b"x" * 1023 + b"\n"
        with contextlib.suppress(TimeoutError):
            while True:
                while credit:
                    link.data(line * 64, sent)
                    sent += 65536
                    credit -= 65536
                # Longer than it takes to give credit back to a client that reads.
                _, _, _, more, _ = await asyncio.wait_for(link.next(), 1.0)
                credit += more
        assert sent < 40 * 1024 * 1024
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        got = 0
        while got < sent // 1024:
            got += (await asyncio.wait_for(client.reader.read(1 << 20), PATIENCE_S)).count(b"out:")
        assert got == sent // 1024


@pytest.mark.usefixtures("api")
async def test_by_other_versions_of_http(start_plane: StartPlane, hostd: Hostd, authority: Authority) -> None:
    async def serve() -> None:
        link = await hostd.link()
        await link.op()
        link.reply()
        link.data(b"x" * 200_000 + b"\n")
        link.tell(frames.EVENT, EXIT)
        await link.rest()

    expected = b"open\nout:" + b"x" * 200_000 + b"\\n\nexit:143,15,signaled,12\n"
    authority.issue("local", "localhost")
    plane = await start_plane(*authority.flags)
    async with plane.client() as client:
        await ask(client, "1.0")
        await serve()
        assert (await client.rest()).endswith(b"\r\n\r\n" + expected)
    async with http2_client(plane, authority, "localhost") as client:
        stream = client.begin(pseudo("GET", "localhost", "/output"))
        serving = asyncio.create_task(serve())
        answer = await client.finish(stream)
        assert bytes(answer.body) == expected
        await serving


@pytest.mark.parametrize("order", [{}, {**ORDER, "op": 1}, {**ORDER, "stdout": ["a"]}, []])
async def test_an_order_that_makes_no_sense_is_an_error(plane: Plane, api: Api, order: Any) -> None:
    api.order = order
    response = await plane.request("GET", "localhost")
    assert (response.status, response.code) == (502, "upstream_broke")


@pytest.mark.parametrize(
    "wrong",
    [
        b"\xff" * 12,
        frames.encode(frames.REPLY, 0, STREAM, b"{}"),
        frames.encode(frames.REPLY, 0, STREAM, b"no JSON"),
        frames.encode(frames.CLOSE, 0, STREAM),
    ],
)
@pytest.mark.usefixtures("api")
async def test_a_peer_that_breaks_the_protocol(plane: Plane, hostd: Hostd, wrong: bytes) -> None:
    async with plane.client() as client:
        await ask(client)
        link = await hostd.link()
        await link.op()
        link.send(wrong)
        response = await client.response()
        assert (response.status, response.json()["code"]) == (500, "oops")
