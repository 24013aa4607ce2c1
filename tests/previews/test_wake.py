"""Requests for a sandbox that sleeps: held, woken for once, and passed on to wherever it runs then."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from native import frames
from previews.plane import PlaneClient
from previews.routes import PortRoute
from tests.previews.conftest import StartPlane
from tests.previews.harness import (
    PATIENCE_S,
    PUBLIC,
    Plane,
    Response,
    describe,
    eventually,
    host,
    sandbox_id,
    tcp_upstream,
)
from tests.previews.scripted import Hostd

ID = sandbox_id("demo")
ASLEEP = ["frozen", "hibernated"]


@contextlib.asynccontextmanager
async def listening(plane: Plane) -> AsyncIterator[list[str]]:
    """The plane's only control connection; whom it is asked to wake."""
    await plane.control.close()
    woken: list[str] = []
    async with PlaneClient(str(plane.control_socket), on_wake=woken.append) as plane.control:
        await plane.control.wait_connected(PATIENCE_S)
        yield woken


def begin(plane: Plane, port: int, *fields: str, body: bytes = b"") -> asyncio.Task[Response]:
    """A request under way."""
    return asyncio.create_task(plane.request("POST" if body else "GET", host(port), "/", *fields, body=body))


async def held(plane: Plane, count: int) -> None:
    """Wait until so many requests are held."""
    async with asyncio.timeout(PATIENCE_S):
        while await plane.metric("sandgate_plane_waiting") != count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("state", ASLEEP)
async def test_many_requests_wait_for_one_wake(start_plane: StartPlane, state: str) -> None:
    plane = await start_plane("--wake-waiting-max", "500")
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state=state, ports=ports)
        requests = [begin(plane, upstream.port, body=b"x" * 100) for _ in range(500)]
        await held(plane, 500)
        assert (woken, upstream.requests) == ([ID], [])
        await plane.put(ports=ports)
        responses = await asyncio.gather(*requests)
        assert [len(response.json()["body"]) for response in responses] == [100] * 500
        assert woken == [ID]
        await held(plane, 0)
        # The next sleep is another one.
        await plane.put(state=state, ports=ports)
        late = begin(plane, upstream.port)
        await eventually(lambda: woken == [ID, ID], "asked again")
        await plane.put(ports=ports)
        assert (await late).status == 200


@pytest.mark.parametrize("between", ["hibernated", "starting"])
async def test_held_requests_go_to_the_new_address(plane: Plane, between: str) -> None:
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state="hibernated", address="127.0.0.2", ports=ports)
        request = begin(plane, upstream.port)
        await eventually(lambda: woken == [ID], "asked")
        await plane.put(state=between, address="127.0.0.3", ports=ports)
        await held(plane, 1)
        await plane.put(ports=ports)
        assert (await request).status == 200


async def test_a_sandbox_that_does_not_wake_is_a_timeout(start_plane: StartPlane) -> None:
    plane = await start_plane("--wake-timeout-s", "0.2")
    await plane.put(state="frozen", ports={1: PUBLIC})
    response = await plane.request("GET", host(1))
    assert (response.status, response.code) == (504, "wake_timeout")
    assert response.head.get("retry-after") == "1"


async def test_one_request_too_many_is_refused_and_the_others_stay(start_plane: StartPlane) -> None:
    plane = await start_plane("--wake-waiting-max", "2")
    async with tcp_upstream(describe) as upstream:
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        requests = [begin(plane, upstream.port) for _ in range(2)]
        await held(plane, 2)
        async with plane.client() as client:
            for _ in range(2):
                refused = await client.request("GET", host(upstream.port))
                assert (refused.status, refused.code) == (503, "too_many_waiting")
        await plane.open(upstream.port)
        assert [(await request).status for request in requests] == [200, 200]


async def test_a_paused_sandbox_is_left_alone(plane: Plane) -> None:
    async with listening(plane) as woken:
        for state in ASLEEP:
            await plane.put(state=state, auto_resume=False, ports={1: PUBLIC})
            response = await plane.request("GET", host(1))
            assert (response.status, response.code) == (409, "sandbox_paused")
        assert (await plane.request("GET", host(2))).status == 401
        assert woken == []


async def test_strangers_wake_nobody(plane: Plane) -> None:
    async with listening(plane) as woken:
        await plane.put(state="frozen")
        assert (await plane.request("GET", host(1))).code == "preview_token_missing"
        assert (await plane.request("GET", host(1), "/?mt=mp_x")).code == "preview_token_invalid"
        assert woken == []


@pytest.mark.parametrize(
    ("change", "code"), [("destroyed", "sandbox_gone"), ("closed", "preview_token_missing")], ids=["gone", "closed"]
)
async def test_a_held_request_hears_of_the_end(plane: Plane, change: str, code: str) -> None:
    await plane.put(state="frozen", ports={1: PUBLIC})
    request = begin(plane, 1)
    await held(plane, 1)
    if change == "destroyed":
        await plane.control.drop_sandbox(ID, plane.version())
    else:
        await plane.put(state="frozen", ports={1: PortRoute("p", "private")})
    assert (await request).code == code


@pytest.mark.parametrize("is_half_closed", [False, True], ids=["reset", "half-closed"])
async def test_a_client_that_leaves_is_held_no_more(plane: Plane, is_half_closed: bool) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        async with plane.client() as client:
            await client.send(f"GET / HTTP/1.1\r\nHost: {host(upstream.port)}\r\n\r\n")
            await held(plane, 1)
            if is_half_closed:
                client.writer.write_eof()
            else:
                client.writer.transport.abort()
            await held(plane, 0)
        await plane.open(upstream.port)
        assert upstream.requests == []
        assert await plane.metric('sandgate_plane_requests_total{class="preview",status="none"}') == 1


async def test_somebody_else_is_asked_when_the_first_does_nothing(plane: Plane) -> None:
    async with listening(plane) as first:
        second: list[str] = []
        async with PlaneClient(str(plane.control_socket), on_wake=second.append) as other:
            await other.wait_connected(PATIENCE_S)
            await plane.put(state="frozen", ports={1: PUBLIC})
            request = begin(plane, 1)
            await eventually(lambda: len(first) + len(second) == 1, "one is asked")
            await eventually(lambda: (first, second) == ([ID], [ID]), "the other is asked")
            await plane.control.drop_sandbox(ID, plane.version())
            await request


async def test_a_wake_waits_for_somebody_to_ask(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        await plane.control.close()
        request = begin(plane, upstream.port)
        await held(plane, 1)
        async with listening(plane) as woken:
            await eventually(lambda: woken == [ID], "asked at last")
            await plane.open(upstream.port)
            assert (await request).status == 200


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@contextlib.asynccontextmanager
async def echoing(plane: Plane) -> AsyncIterator[tuple[int, Any]]:
    """A web socket to a sandbox that repeats everything, and its port."""
    async with serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        name = await plane.open(port)
        url, (address, own) = f"ws://{name}:{plane.address[1]}/", plane.address
        async with connect(url, host=address, port=own, proxy=None) as client, asyncio.timeout(PATIENCE_S):
            yield port, client


async def test_a_web_socket_outlives_sleep_and_its_bytes_wake(plane: Plane) -> None:
    async with listening(plane) as woken, echoing(plane) as (port, client):
        await plane.put(state="frozen", ports={port: PUBLIC})
        # Long enough for the sweep that ends what is not admitted.
        await asyncio.sleep(0.6)
        assert woken == []
        await client.send("anybody there?")
        await eventually(lambda: woken == [ID], "asked")
        assert await client.recv() == "anybody there?"
        await plane.put(ports={port: PUBLIC})
        await client.send("good morning")
        assert await client.recv() == "good morning"
        assert woken == [ID]


async def test_a_web_socket_ends_when_its_sandbox_wakes_from_hibernation(plane: Plane) -> None:
    async with listening(plane) as woken, echoing(plane) as (port, client):
        await plane.put(state="hibernated", ports={port: PUBLIC})
        await client.send("anybody there?")
        await eventually(lambda: woken == [ID], "asked")
        # The same address, another incarnation.
        await plane.put(ports={port: PUBLIC})
        await client.wait_closed()


async def test_a_sandbox_that_falls_asleep_under_a_request_is_woken(plane: Plane) -> None:
    released = asyncio.Event()

    async def slow(exchange: Any) -> None:
        await released.wait()
        await exchange.answer(b"late")

    async with listening(plane) as woken, tcp_upstream(slow) as upstream:
        await plane.open(upstream.port)
        request = begin(plane, upstream.port)
        await eventually(lambda: len(upstream.requests) == 1, "it arrives")
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        await eventually(lambda: woken == [ID], "asked")
        released.set()
        assert (await request).body == b"late"


async def resumed(hostd: Hostd, **machine: str) -> None:
    """Let hostd be asked to resume the sandbox, and answer with a machine."""
    link = await hostd.link()
    assert await link.op() == {"op": "machine.resume", "id": ID}
    link.tell(frames.REPLY, {"id": ID, "state": "running", "address": "127.0.0.1"} | machine)


async def test_a_frozen_sandbox_is_woken_without_the_api(plane: Plane, hostd: Hostd) -> None:
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state="frozen", ports=ports)
        requests = [begin(plane, upstream.port) for _ in range(5)]
        await held(plane, 5)
        assert upstream.requests == []
        await resumed(hostd)
        # The record says that it sleeps, still.
        assert [(await request).status for request in requests] == [200] * 5
        # Hostd's word does not stand for ever: it may be frozen again.
        async with asyncio.timeout(PATIENCE_S):
            while await plane.metric("sandgate_plane_wakes_total") < 2:
                later = begin(plane, upstream.port)
                await asyncio.wait([later], timeout=0.2)
        await resumed(hostd)
        assert (await later).status == 200
        # And it counts for one record only.
        await plane.put(state="frozen", ports=ports)
        last = begin(plane, upstream.port)
        await resumed(hostd)
        assert (await last).status == 200
        assert woken == []


@pytest.mark.parametrize("answer", ["elsewhere", "asleep", "refused", "lost"])
async def test_the_api_judges_a_wake_that_did_not_go_as_it_should(plane: Plane, hostd: Hostd, answer: str) -> None:
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state="frozen", ports=ports)
        request = begin(plane, upstream.port)
        if answer == "elsewhere":
            await resumed(hostd, address="127.0.0.2")
        elif answer == "asleep":
            await resumed(hostd, state="hibernated")
        else:
            link = await hostd.link()
            await link.op()
            if answer == "refused":
                link.tell(frames.ERROR, {"code": "no_capacity", "message": "no room"})
            else:
                link.close()
        await eventually(lambda: woken == [ID], "asked")
        assert upstream.requests == []
        await plane.put(ports=ports)
        assert (await request).status == 200


async def test_a_record_that_comes_first_outdoes_the_hosts_word(plane: Plane, hostd: Hostd) -> None:
    async with listening(plane), tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state="frozen", ports=ports)
        request = begin(plane, upstream.port)
        link = await hostd.link()
        await link.op()
        # It woke and fell asleep again while the answer was on its way.
        await plane.put(ports=ports)
        assert (await request).status == 200
        await plane.put(state="frozen", ports=ports)
        link.tell(frames.REPLY, {"id": ID, "state": "running", "address": "127.0.0.1"})
        assert await link.rest() == []
        again = begin(plane, upstream.port)
        await resumed(hostd)
        assert (await again).status == 200


async def test_a_hibernated_sandbox_is_the_apis_to_wake(plane: Plane, hostd: Hostd) -> None:
    async with listening(plane) as woken:
        await plane.put(state="hibernated", ports={1: PUBLIC})
        request = begin(plane, 1)
        await eventually(lambda: woken == [ID], "asked")
        assert hostd.writers == []
        await plane.control.drop_sandbox(ID, plane.version())
        await request


@contextlib.asynccontextmanager
async def successor(run_dir: Path) -> AsyncIterator[Plane]:
    """Another plane which has taken over once this is entered."""
    plane = Plane(run_dir)
    await plane.start("--take-over")
    try:
        yield plane
    finally:
        await plane.stop()


async def test_held_requests_outlive_a_hand_over(run_dir: Path, plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, plane.client() as kept:
        ports = {upstream.port: PUBLIC}
        await plane.open(upstream.port)
        assert (await kept.request("GET", host(upstream.port))).status == 200
        async with listening(plane) as woken:
            await plane.put(state="frozen", ports=ports)
            request = begin(plane, upstream.port)
            await eventually(lambda: woken == [ID], "asked")
            async with successor(run_dir) as after:
                # One that reaches the old process still: the new one has to ask.
                other = asyncio.create_task(kept.request("GET", host(upstream.port)))
                await eventually(lambda: len(woken) >= 2, "asked by the successor")
                third = begin(after, upstream.port)
                await plane.put(ports=ports)
                assert [(await task).status for task in (request, other, third)] == [200] * 3
                await kept.close()
                async with asyncio.timeout(PATIENCE_S):
                    assert await plane.process.wait() == 0


async def test_a_sleeping_sandbox_survives_a_restart(plane: Plane) -> None:
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        await plane.kill()
        await plane.start()
        request = begin(plane, upstream.port)
        await eventually(lambda: woken == [ID], "asked")
        await plane.open(upstream.port)
        assert (await request).status == 200


async def test_a_wish_for_what_is_awake_or_unknown_is_ignored(plane: Plane) -> None:
    async with listening(plane) as woken:
        await plane.put()
        await plane.put("asleep", state="frozen")
        _, writer = await asyncio.open_unix_connection(plane.control_socket)
        for name in ("demo", "nobody", "asleep", "asleep"):
            writer.write(json.dumps({"t": "wake", "id": sandbox_id(name)}).encode() + b"\n")
        await eventually(lambda: bool(woken), "asked")
        writer.close()
        await plane.control.stats()
        assert woken == [sandbox_id("asleep")]


async def test_a_wake_that_fails_releases_everybody_at_once(plane: Plane) -> None:
    async with listening(plane) as woken:
        await plane.put(state="hibernated", ports={1: PUBLIC})
        requests = [begin(plane, 1) for _ in range(20)]
        await held(plane, 20)
        assert woken == [ID]
        plane.control.refuse_wake(ID)
        responses = await asyncio.gather(*requests)
        assert {(response.status, response.code) for response in responses} == {(503, "wake_failed")}
        assert {response.head.get("retry-after") for response in responses} <= {"0", "1"}
        # Whoever comes next may have it tried again, but not at once.
        retry = await next_try(plane, woken, 2)
        plane.control.refuse_wake(ID)
        assert (await retry).code == "wake_failed"
        resting = await plane.request("GET", host(1))
        assert (resting.code, resting.head.get("retry-after"), woken) == ("wake_failed", "2", [ID, ID])


async def next_try(plane: Plane, woken: list[str], count: int) -> asyncio.Task[Response]:
    """A request that is held because the plane has asked for the wake again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            request = begin(plane, 1)
            await asyncio.wait([request], timeout=0.2)
            if len(woken) == count:
                return request
            assert (await request).code == "wake_failed"


async def test_a_sandbox_that_wakes_after_all_is_served(plane: Plane) -> None:
    async with listening(plane) as woken, tcp_upstream(describe) as upstream:
        ports = {upstream.port: PUBLIC}
        await plane.put(state="frozen", ports=ports)
        request = begin(plane, upstream.port)
        await eventually(lambda: woken == [ID], "asked")
        plane.control.refuse_wake(ID)
        assert (await request).code == "wake_failed"
        await plane.put(ports=ports)
        assert (await plane.request("GET", host(upstream.port))).status == 200
        # And what failed before is forgotten.
        await plane.put(state="frozen", ports=ports)
        again = begin(plane, upstream.port)
        await eventually(lambda: woken == [ID, ID], "asked at once")
        await plane.put(ports=ports)
        assert (await again).status == 200


async def test_an_unknown_sandbox_that_does_not_wake_is_nobodys_concern(plane: Plane) -> None:
    plane.control.refuse_wake(sandbox_id("nobody"))
    async with tcp_upstream(describe) as upstream:
        assert (await plane.request("GET", await plane.open(upstream.port))).status == 200
