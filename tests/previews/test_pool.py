"""Kept upstream connections: used again, never for another sandbox, and replaced when they have gone stale."""

from __future__ import annotations

import asyncio

import pytest

from tests.previews.conftest import StartPlane
from tests.previews.harness import Exchange, Plane, Upstream, describe, eventually, host, tcp_upstream


async def answer_once(exchange: Exchange) -> None:
    """Answer, then close without saying so: what a server does whose keep-alive time is over."""
    await exchange.body()
    await exchange.answer(b"%d" % exchange.connection)
    exchange.writer.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH"])
async def test_a_connection_closed_while_idle_costs_no_request(plane: Plane, api: Upstream, method: str) -> None:
    api.handler = answer_once
    async with plane.client() as client:
        for number in range(20):
            response = await client.request(method, "localhost", body=b"x" if method in {"PUT", "POST"} else b"")
            assert response.status == 200
            assert len(api.requests) == number + 1
            await eventually(lambda: not api.open_connections, "the server closes")


async def close_on_second(exchange: Exchange) -> None:
    """Answer a connection's first request; close on reading its second."""
    await exchange.body()
    if exchange.connection == 0 and exchange.head.target == "/second":
        exchange.writer.close()
        return
    await exchange.answer(b"ok")


async def test_a_request_lost_with_a_kept_connection_is_sent_again_if_that_is_safe(plane: Plane, api: Upstream) -> None:
    api.handler = close_on_second
    async with plane.client() as client:
        assert (await client.request("GET", "localhost", "/first")).status == 200
        assert (await client.request("GET", "localhost", "/second")).status == 200
    assert [head.target for head in api.requests] == ["/first", "/second", "/second"]
    assert await plane.metric("sandgate_plane_upstream_retries_total") == 1


async def test_a_request_that_may_have_had_an_effect_is_not_sent_twice(plane: Plane, api: Upstream) -> None:
    api.handler = close_on_second
    async with plane.client() as client:
        assert (await client.request("POST", "localhost", "/first", body=b"x")).status == 200
        response = await client.request("POST", "localhost", "/second", body=b"x")
        assert (response.status, response.code) == (503, "api_unavailable")
    assert [head.target for head in api.requests] == ["/first", "/second"]


async def test_an_upstream_that_always_closes_is_asked_once_per_fresh_connection(plane: Plane) -> None:
    async def hang_up(exchange: Exchange) -> None:
        exchange.writer.close()

    async with tcp_upstream(hang_up) as upstream:
        response = await plane.request("GET", await plane.open(upstream.port))
        assert (response.status, response.code) == (502, "upstream_broke")
        assert upstream.connections == 1


async def test_a_connection_with_unasked_bytes_is_not_used_again(plane: Plane) -> None:
    async def chatty(exchange: Exchange) -> None:
        await exchange.answer(b"ok")
        if exchange.head.target == "/more":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    async with tcp_upstream(chatty) as upstream, plane.client() as client:
        name = await plane.open(upstream.port)
        for method in ["GET", "POST", "GET"]:
            assert (await client.request(method, name, "/more")).body == b"ok"
            await asyncio.sleep(0.05)
            # The planted response must not answer the next request.
            assert (await client.request(method, name, "/")).body == b"ok"


async def test_another_sandbox_at_the_same_address_gets_a_connection_of_its_own(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream, plane.client() as client:
        name = await plane.open(upstream.port, "first")
        assert (await client.request("GET", name)).status == 200
        await plane.open(upstream.port, "second")
        assert (await client.request("GET", host(upstream.port, "second"))).status == 200
        assert upstream.connections == 2
        # The same sandbox at a new version keeps its connection.
        await plane.open(upstream.port, "second")
        assert (await client.request("GET", host(upstream.port, "second"))).status == 200
        assert upstream.connections == 2


async def test_idle_connections_are_closed_in_time(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--upstream-idle-timeout-s", "0.3")
    assert (await plane.request("GET", "localhost")).status == 200
    assert len(api.open_connections) == 1
    await eventually(lambda: not api.open_connections, "the plane closes")


async def test_concurrent_requests_have_a_connection_each_and_share_them_later(plane: Plane, api: Upstream) -> None:
    gate = asyncio.Barrier(21)

    async def together(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.answer(b"ok")

    api.handler = together
    requests = [asyncio.create_task(plane.request("GET", "localhost")) for _ in range(20)]
    await gate.wait()
    assert {response.status for response in await asyncio.gather(*requests)} == {200}
    api.handler = describe
    for _ in range(20):
        assert (await plane.request("GET", "localhost")).status == 200
    assert api.connections == 20
