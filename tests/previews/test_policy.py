"""What pages of other sites may do with previews and the API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from previews.errors import PlaneError
from previews.routes import PolicyRule, PortRoute
from tests.previews.conftest import StartPlane
from tests.previews.harness import Exchange, Plane, Response, Upstream, host, tcp_upstream

APP = "https://app.example"
OWN = [
    "Access-Control-Allow-Origin: *",
    "access-control-allow-credentials: true",
    "Access-Control-Expose-Headers: X-Own",
    "X-Frame-Options: DENY",
    "Content-Security-Policy: default-src 'self'; frame-ancestors 'none'",
    "X-Own: 1",
]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A server that has opinions of its own."""

    async def answer(exchange: Exchange) -> None:
        await exchange.answer(b"hello", "200 OK", *OWN)

    async with tcp_upstream(answer) as server:
        yield server


async def put(plane: Plane, port: int, visibility: str = "public", **policy: object) -> None:
    await plane.put(ports={port: PortRoute("p", visibility, (), PolicyRule(**policy))})  # type: ignore[arg-type]


def fields(response: Response) -> list[str]:
    """The response's fields as lines, without those that say nothing here."""
    return [f"{name}: {value}" for name, value in response.head.fields if name not in {"Content-Length", "Connection"}]


async def preflight(plane: Plane, name: str, origin: str, *more: str) -> Response:
    method = "Access-Control-Request-Method: PUT"
    return await plane.request("OPTIONS", name, "/", f"Origin: {origin}", method, *more)


async def test_without_a_policy_the_server_has_its_say(plane: Plane, upstream: Upstream) -> None:
    name = await plane.open(upstream.port)
    assert fields(await plane.request("GET", name, "/", f"Origin: {APP}")) == OWN
    assert fields(await preflight(plane, name, APP)) == OWN
    await put(plane, upstream.port)
    assert fields(await plane.request("GET", name, "/", f"Origin: {APP}")) == OWN


async def test_an_allowed_origin_may_read(plane: Plane, upstream: Upstream) -> None:
    await put(plane, upstream.port, allowed_origins=["https://other.example", APP])
    response = await plane.request("GET", host(upstream.port), "/", f"Origin: {APP}")
    assert response.body == b"hello"
    assert fields(response) == [
        *OWN[3:],
        f"Access-Control-Allow-Origin: {APP}",
        "Vary: Origin",
        "Access-Control-Expose-Headers: *",
    ]


@pytest.mark.parametrize("origin", ["https://app.example.evil", "http://app.example", "null", None])
async def test_another_origin_may_not(plane: Plane, upstream: Upstream, origin: str | None) -> None:
    await put(plane, upstream.port, allowed_origins=[APP])
    said = [f"Origin: {origin}"] if origin else []
    response = await plane.request("GET", host(upstream.port), "/", *said)
    assert fields(response) == [*OWN[3:], "Vary: Origin"]


async def test_a_preflight_is_answered_without_the_sandbox(plane: Plane, upstream: Upstream) -> None:
    name = host(upstream.port)
    # Private, and asleep: the question is about the policy only.
    policy = PolicyRule(allowed_origins=[APP], allow_credentials=True)
    await plane.put(state="frozen", ports={upstream.port: PortRoute("p", "private", (), policy)})
    async with plane.client() as client:
        for _ in range(2):
            asked = ("Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: x-a, x-b")
            response = await client.request("OPTIONS", name, "/", f"Origin: {APP}", *asked)
            assert response.status == 204
            assert fields(response) == [
                f"Access-Control-Allow-Origin: {APP}",
                "Access-Control-Allow-Credentials: true",
                "Vary: Origin",
                "Access-Control-Allow-Methods: PUT",
                "Access-Control-Allow-Headers: x-a, x-b",
                "Access-Control-Max-Age: 600",
            ]
    denied = await preflight(plane, name, "https://evil.example")
    assert (denied.status, denied.code) == (403, "origin_denied")
    assert upstream.requests == []
    assert (await plane.request("OPTIONS", name, "/", f"Origin: {APP}")).status == 401


async def test_credentials_leave_the_exposed_names_to_the_server(plane: Plane, upstream: Upstream) -> None:
    await put(plane, upstream.port, allowed_origins=[APP], allow_credentials=True)
    response = await plane.request("GET", host(upstream.port), "/", f"Origin: {APP}")
    assert response.head.all("access-control-expose-headers") == ["X-Own"]
    assert response.head.all("access-control-allow-credentials") == ["true"]
    assert response.head.all("access-control-allow-origin") == [APP]


@pytest.mark.parametrize(
    ("ancestors", "value"), [([], "'none'"), (["'self'", "https://*.example"], "'self' https://*.example")]
)
async def test_frames_are_allowed_to_whom_the_policy_says(
    plane: Plane, upstream: Upstream, ancestors: list[str], value: str
) -> None:
    await put(plane, upstream.port, frame_ancestors=ancestors)
    response = await plane.request("GET", host(upstream.port))
    assert fields(response) == [
        *OWN[:3],
        "Content-Security-Policy: default-src 'self'",
        "X-Own: 1",
        f"Content-Security-Policy: frame-ancestors {value}",
    ]


@pytest.mark.parametrize(
    "policy",
    [
        {"allowed_origins": ["*"], "allow_credentials": True},
        {"allowed_origins": ["https://a\r\nX: y"]},
        {"frame_ancestors": ["'self'; script-src *"]},
    ],
    ids=["everybody with credentials", "another field", "another directive"],
)
async def test_a_policy_that_opens_too_much_is_refused(plane: Plane, policy: dict[str, object]) -> None:
    with pytest.raises(PlaneError, match="plane_refused"):
        await put(plane, 3000, **policy)


async def test_pages_may_call_the_api_where_that_is_set(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--api-origin", APP, "--api-origin", "http://localhost:5173")
    response = await plane.request("GET", "api.localhost", "/x", f"Origin: {APP}", "Authorization: Bearer k")
    assert response.head.get("access-control-allow-origin") == APP
    assert ["Authorization", "Bearer k"] in json.loads(response.body)["fields"]
    assert (await preflight(plane, "api.localhost", "http://localhost:5173")).status == 204
    assert (await preflight(plane, "api.localhost", "http://localhost")).code == "origin_denied"
    assert len(api.requests) == 1


async def test_no_page_may_call_the_api_by_default(plane: Plane, api: Upstream) -> None:
    response = await preflight(plane, "api.localhost", APP)
    assert response.head.get("access-control-allow-origin") is None
    assert len(api.requests) == 1


async def test_an_allowed_page_can_read_why_it_failed(plane: Plane) -> None:
    async with tcp_upstream(hang_up) as server:
        ports = {
            1: PortRoute("a", "private", (), PolicyRule(allowed_origins=[APP])),
            2: PortRoute("b", "public", (), PolicyRule(allowed_origins=[APP], allow_credentials=True)),
            server.port: PortRoute("c", "public", (), PolicyRule(allowed_origins=["*"], frame_ancestors=[])),
        }
        await plane.put(ports=ports)
        for port, code in [(1, "preview_token_missing"), (2, "port_closed"), (server.port, "upstream_broke")]:
            allowed = await plane.request("GET", host(port), "/", f"Origin: {APP}")
            assert (allowed.code, allowed.head.get("access-control-allow-origin")) == (code, APP)
            assert allowed.head.get("vary") == "Origin"
            other = await plane.request("GET", host(port), "/", "Origin: https://evil.example")
            assert other.code == code
            is_for_all = port == server.port
            assert (other.head.get("access-control-allow-origin") is not None) == is_for_all
            assert other.head.get("vary") == "Origin"
        credentialed = await plane.request("GET", host(2), "/", f"Origin: {APP}")
        assert credentialed.head.get("access-control-expose-headers") == "Retry-After, X-Request-Id"
        assert credentialed.head.get("access-control-allow-credentials") == "true"
        framed = await plane.request("GET", host(server.port), "/", "Accept: text/html")
        assert "frame-ancestors 'none'" in framed.head.all("content-security-policy")


async def hang_up(exchange: Exchange) -> None:
    exchange.writer.close()


async def test_a_page_can_read_why_a_sleeping_sandbox_failed(start_plane: StartPlane) -> None:
    plane = await start_plane("--wake-timeout-s", "0.1")
    policy = PolicyRule(allowed_origins=[APP])
    await plane.put(state="frozen", ports={1: PortRoute("p", "public", (), policy)})
    response = await plane.request("GET", host(1), "/", f"Origin: {APP}")
    assert (response.code, response.head.get("access-control-allow-origin")) == ("wake_timeout", APP)


async def test_a_page_can_read_that_the_api_is_away(start_plane: StartPlane) -> None:
    plane = await start_plane("--api-origin", APP)
    response = await plane.request("GET", "api.localhost", "/", f"Origin: {APP}")
    assert (response.code, response.head.get("access-control-allow-origin")) == ("api_unavailable", APP)


async def test_the_server_alone_decides_who_reads_without_a_policy(plane: Plane) -> None:
    await plane.open(1)
    response = await plane.request("GET", host(1), "/", f"Origin: {APP}")
    assert (response.code, response.head.get("vary")) == ("port_closed", None)
    assert response.head.get("access-control-allow-origin") is None
