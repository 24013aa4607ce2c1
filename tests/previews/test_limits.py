"""Limits that are not failures of somebody else: sizes, and whose word about the client counts."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from native import plane_path
from tests.previews.conftest import StartPlane
from tests.previews.harness import PUBLIC, Exchange, Plane, Upstream, host, tcp_upstream
from tests.previews.http2 import http2_client
from tests.support.certificates import Authority


@pytest.mark.parametrize(("count", "status"), [(9, 200), (10, 200), (11, 431)])
async def test_a_head_has_so_many_fields(start_plane: StartPlane, api: Upstream, count: int, status: int) -> None:
    plane = await start_plane("--head-fields-max", "10")
    response = await plane.request("GET", "localhost", "/", *(f"X-{n}: 1" for n in range(count - 1)))
    assert response.status == status
    assert (status == 200) or response.code == "head_too_large"


async def swallow(exchange: Exchange) -> None:
    await exchange.answer(str(len(await exchange.body())).encode())


@pytest.mark.parametrize(("size", "status"), [(999, 200), (1000, 200), (1001, 413)])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_has_so_many_bytes(start_plane: StartPlane, framing: str, size: int, status: int) -> None:
    plane = await start_plane("--body-bytes-max", "1000")
    async with tcp_upstream(swallow) as upstream, plane.client() as client:
        name = await plane.open(upstream.port)
        if framing == "length":
            response = await client.request("POST", name, body=b"x" * size)
        else:
            head = f"POST / HTTP/1.1\r\nHost: {name}\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send(f"{head}1f4\r\n{'x' * 500}\r\n{size - 500:x}\r\n{'x' * (size - 500)}\r\n0\r\n\r\n")
            response = await client.response()
        assert response.status == status
        if status == 200:
            assert response.body == str(size).encode()
        else:
            assert response.code == "body_too_large"


async def test_the_api_limits_bodies_by_itself(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--body-bytes-max", "10")
    assert (await plane.request("POST", "localhost", body=b"x" * 1000)).status == 200


TOLD = ["X-Forwarded-For: 203.0.113.9, 198.51.100.7", "x-forwarded-for: 10.1.2.3", "X-Forwarded-Proto: https"]


async def seen(plane: Plane, *fields: str) -> dict[str, str]:
    response = await plane.request("GET", "localhost", "/", *fields)
    return {name.lower(): value for name, value in response.json()["fields"]}


@pytest.mark.parametrize(
    ("fields", "client", "proto"),
    [
        (TOLD, "198.51.100.7", "https"),
        (["X-Forwarded-For: 2001:db8::1"], "2001:db8::1", "http"),
        (["X-Forwarded-For: 203.0.113.9, unknown"], "127.0.0.1", "http"),
        (["X-Forwarded-Proto: gopher"], "127.0.0.1", "http"),
        ([], "127.0.0.1", "http"),
    ],
    ids=["the nearest that is not trusted", "IPv6", "no address", "no protocol", "nothing"],
)
async def test_a_trusted_proxy_is_believed(
    start_plane: StartPlane, api: Upstream, fields: list[str], client: str, proto: str
) -> None:
    plane = await start_plane("--trusted-proxy", "127.0.0.0/8", "--trusted-proxy", "10.0.0.0/8")
    said = await seen(plane, *fields)
    assert said["x-forwarded-for"] == said["x-real-ip"] == client
    assert said["x-forwarded-proto"] == proto
    shown = f'"[{client}]"' if ":" in client else client
    assert said["forwarded"] == f'for={shown};proto={proto};host="localhost"'


async def test_others_are_not(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--trusted-proxy", "127.0.0.2")
    assert (await seen(plane, *TOLD))["x-forwarded-for"] == "127.0.0.1"


async def test_behind_a_proxy_with_tls_nothing_is_redirected(
    start_plane: StartPlane, api: Upstream, run_dir: Path
) -> None:
    log = run_dir / "access.log"
    plane = await start_plane("--trusted-proxy", "127.0.0.1", "--https-redirect", "443", "--access-log", str(log))
    assert (await plane.request("GET", "localhost", "/", *TOLD)).status == 200
    assert (await plane.request("GET", "localhost")).status == 308
    await plane.stop()
    assert {json.loads(line)["client"] for line in log.read_text().splitlines()} == {"10.1.2.3", "127.0.0.1"}


async def test_a_proxy_may_have_many_connections(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--trusted-proxy", "127.0.0.1", "--client-connections-max", "1")
    async with plane.client() as first, plane.client() as second:
        assert (await first.request("GET", "localhost")).status == 200
        assert (await second.request("GET", "localhost")).status == 200


async def test_a_proxy_may_speak_http_2(start_plane: StartPlane, api: Upstream, authority: Authority) -> None:
    authority.issue("api", "localhost")
    plane = await start_plane("--trusted-proxy", "127.0.0.1", *authority.flags)
    async with http2_client(plane, authority, "localhost") as client:
        response = await client.request("GET", "localhost", "/", ("x-forwarded-for", "203.0.113.9"))
        said = dict(json.loads(bytes(response.body))["fields"])
        assert (said["X-Forwarded-For"], said["X-Forwarded-Proto"]) == ("203.0.113.9", "https")


@pytest.mark.parametrize("network", ["10.0.0.0/33", "proxy.example", ""])
async def test_a_network_that_is_none_is_refused(network: str) -> None:
    flags = ["--listen", "127.0.0.1:0", "--api-socket", "a", "--control-socket", "b", "--trusted-proxy", network]
    done = await asyncio.to_thread(subprocess.run, [plane_path(), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--trusted-proxy" in done.stderr


async def test_timeouts_are_counted_by_what_was_waited_for(start_plane: StartPlane) -> None:
    plane = await start_plane("--wake-timeout-s", "0.1")
    await plane.put(state="frozen", ports={1: PUBLIC})
    assert (await plane.request("GET", host(1))).code == "wake_timeout"
    assert await plane.metric('sandgate_plane_timeouts_total{wait="wake"}') == 1
