"""Who is let in to which preview, and what the sandbox gets to see of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from previews.routes import KeyRoute, PortRoute, SandboxRoute, ShareRule, TokenRule
from previews.tokens import hash_token, make_token
from tests.previews.harness import (
    PATIENCE_S,
    Client,
    Exchange,
    Plane,
    Response,
    describe,
    eventually,
    host,
    tcp_upstream,
)

FAR = 4_000_000_000.0
PAST = 1_000.0

SECRETS = {
    "share": "miosa_pv_share",
    "share of another port": "miosa_pv_other_port",
    "share of another path": "miosa_pv_other_path",
    "share of this path": "miosa_pv_this_path",
    "expired share": "miosa_pv_expired",
    "share of another sandbox": "miosa_pv_other_sandbox",
    "browser token": "mp_all_ports",
    "browser token of this port": "mp_this_port",
    "browser token of another port": "mp_other_port",
    "expired browser token": "mp_expired",
    "unknown token": "mp_unknown",
    "owner's key": "msk_live_owner",
    "owner's expired key": "msk_live_expired",
    "stranger's key": "msk_live_stranger",
    "unknown key": "msk_live_unknown",
}

#: How each secret fares on a private port, below /docs.
VERDICTS = {
    "share": (200, None),
    "share of another port": (403, "preview_token_invalid"),
    "share of another path": (403, "preview_token_invalid"),
    "share of this path": (200, None),
    "expired share": (403, "preview_token_expired"),
    "share of another sandbox": (403, "preview_token_invalid"),
    "browser token": (200, None),
    "browser token of this port": (200, None),
    "browser token of another port": (403, "preview_token_invalid"),
    "expired browser token": (403, "preview_token_expired"),
    "unknown token": (403, "preview_token_invalid"),
    "owner's key": (200, None),
    "owner's expired key": (403, "preview_token_expired"),
    "stranger's key": (403, "preview_token_invalid"),
    "unknown key": (403, "preview_token_invalid"),
}

TOKEN_CARRIERS = ["?preview_token", "?mt", "?mp", "header", "cookie", "cookie among others"]
KEY_CARRIERS = ["bearer", "x-api-key"]


@dataclass(frozen=True)
class Case:
    """One way of knocking."""

    visibility: str
    secret: str
    carrier: str
    kind: str

    @property
    def expected(self) -> tuple[int, str | None]:
        return (200, None) if self.visibility == "public" else VERDICTS[self.secret]

    def request(self) -> tuple[str, list[str]]:
        """Target and fields."""
        value, target, fields = SECRETS[self.secret], "/docs/page?a=1&b=%20", ["X-Mine: 1"]
        match self.carrier:
            case "header":
                fields.append(f"X-Miosa-Preview-Token: {value}")
            case "cookie":
                fields.append(f"Cookie: sandgate_preview={value}")
            case "cookie among others":
                fields.append(f"Cookie: a=1; sandgate_preview={value}; b=2")
            case "bearer":
                fields.append(f"Authorization: Bearer {value}")
            case "x-api-key":
                fields.append(f"X-API-Key: {value}")
            case parameter:
                target = f"/docs/page?a=1&{parameter[1:]}={value}&b=%20"
        if self.kind == "websocket":
            fields += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"]
        elif self.kind == "events":
            fields.append("Accept: text/event-stream")
        return target, fields


def cases() -> Iterator[Case]:
    for visibility, kind, secret in itertools.product(
        ["private", "unopened", "public"], ["http", "events", "websocket"], SECRETS
    ):
        for carrier in KEY_CARRIERS if secret.endswith("key") else TOKEN_CARRIERS:
            yield Case(visibility, secret, carrier, kind)


def routes(port: int, visibility: str) -> SandboxRoute:
    """A sandbox with every kind of token, whose `port` is opened as told."""

    def share(secret: str, path: str = "/", expires_at: float = FAR) -> ShareRule:
        return ShareRule(secret, hash_token(SECRETS[secret]), expires_at, path)

    def token(secret: str, port: int | None = None, expires_at: float | None = FAR) -> TokenRule:
        return TokenRule(hash_token(SECRETS[secret]), expires_at, port)

    shares = [
        share("share"),
        share("share of another path", "/doc"),
        share("share of this path", "/docs"),
        share("expired share", "/", PAST),
    ]
    ports = {port + 1: PortRoute("p2", "private", [share("share of another port")])}
    tokens = [
        token("browser token", None, None),
        token("browser token of this port", port),
        token("browser token of another port", port + 1),
        token("expired browser token", None, PAST),
    ]
    if visibility == "unopened":
        # No preview, so no shares: their tokens are kept for the sandbox instead, to test the port alone.
        tokens += [TokenRule(rule.hash, rule.expires_at, port, rule.path) for rule in shares]
    else:
        ports[port] = PortRoute("p1", "public" if visibility == "public" else "private", shares)
    return SandboxRoute(1, SLUGS[visibility], visibility, "w1", "127.0.0.1", "running", ports, tokens)


SLUGS = {
    "private": "00000000-0000-4000-8000-000000000001",
    "public": "00000001-0000-4000-8000-000000000001",
    "unopened": "00000002-0000-4000-8000-000000000001",
    "other": "00000003-0000-4000-8000-000000000001",
}


async def push_all(plane: Plane, port: int) -> None:
    for visibility in ["private", "public", "unopened"]:
        await plane.control.put_sandbox(routes(port, visibility))
    other = ShareRule("s", hash_token(SECRETS["share of another sandbox"]), FAR)
    await plane.control.put_sandbox(
        SandboxRoute(1, SLUGS["other"], "other", "w1", "127.0.0.1", ports={port: PortRoute("p", "private", [other])})
    )
    for name, owner, expires_at in [
        ("owner's key", "w1", None),
        ("owner's expired key", "w1", PAST),
        ("stranger's key", "w2", FAR),
    ]:
        await plane.control.put_key(KeyRoute(1, hash_token(SECRETS[name]), owner, expires_at))


async def accept_all(exchange: Exchange) -> None:
    """Switch protocols when asked to; otherwise answer with what was received."""
    if exchange.head.get("upgrade"):
        await exchange.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    else:
        await describe(exchange)


async def test_every_way_of_knocking(plane: Plane) -> None:
    everything = list(cases())
    assert len(everything) > 400
    async with tcp_upstream(accept_all) as upstream:
        await push_all(plane, upstream.port)
        seen, wanted = {}, {}
        for case in everything:
            target, fields = case.request()
            response = await plane.request("GET", host(upstream.port, case.visibility), target, *fields)
            status = 200 if response.status == 101 else response.status
            seen[case] = (status, None if status == 200 else response.code)
            wanted[case] = case.expected
        assert seen == wanted
        # No sandbox ever saw a secret, and every sandbox saw the rest.
        for head in upstream.requests:
            assert not [secret for secret in SECRETS.values() if secret in str(head)], head
            assert head.target == "/docs/page?a=1&b=%20"
            assert head.get("x-mine") == "1"
            assert head.get("cookie") in (None, "a=1; b=2")


async def test_an_applications_own_credentials_pass(plane: Plane) -> None:
    fields = [
        "Authorization: Bearer eyJhbGciOi.own",
        "X-API-Key: own",
        "Cookie: sandgate_previews=1; x=sandgate_preview",
    ]
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        for authorization in ["Bearer eyJhbGciOi.own", "Basic YTpi", "Bearer", "bearer " + "x" * 3000]:
            fields[0] = f"Authorization: {authorization}"
            response = await plane.request("GET", name, "/?mt=1&mp=2&mp=", *fields)
            assert response.json()["line"] == "GET /?mt=1&mp=2&mp= HTTP/1.1"
            sent = dict(response.json()["fields"])
            assert sent["Authorization"] == authorization
            assert sent["X-API-Key"] == "own"
            assert sent["Cookie"] == "sandgate_previews=1; x=sandgate_preview"


async def test_an_applications_own_credentials_open_nothing(plane: Plane) -> None:
    await plane.put(ports={3000: PortRoute("p", "private")})
    for fields in [[], ["Authorization: Bearer own"], ["X-API-Key: own"], ["Cookie: a=b"]]:
        response = await plane.request("GET", host(3000), "/?mt=own", *fields)
        assert (response.status, response.code) == (401, "preview_token_missing")
        assert response.head.get("www-authenticate") == 'Bearer realm="preview"'


@pytest.mark.parametrize(
    ("target", "is_open"),
    [
        ("/docs", True),
        ("/docs/", True),
        ("/docs/a.b/..c", True),
        ("/docs?x=/../", True),
        ("/", False),
        ("/docsx", False),
        ("/Docs", False),
        ("//docs", False),
        ("/docs/..", False),
        ("/docs/../admin", False),
        ("/docs/./x", False),
        ("/docs//x", False),
        ("/docs/%2e%2e/admin", False),
        ("/docs/%2E./admin", False),
        ("/docs/..;a=b/admin", False),
        ("/docs%2f..%2fadmin", False),
        ("/docs/..\\admin", False),
        ("/docs/%5c../admin", False),
        ("/docs/\xff/x", False),
    ],
)
async def test_a_share_opens_its_path_and_nothing_beside(plane: Plane, target: str, is_open: bool) -> None:
    async with tcp_upstream(describe) as upstream:
        share = ShareRule("s", hash_token("miosa_pv_x"), FAR, "/docs")
        await plane.put(ports={upstream.port: PortRoute("p", "private", [share])})
        response = await plane.request("GET", host(upstream.port), target, "X-Miosa-Preview-Token: miosa_pv_x")
        assert response.status == (200 if is_open else 403)


async def test_one_good_credential_is_enough(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await push_all(plane, upstream.port)
        good, bad = SECRETS["share"], SECRETS["expired share"]
        response = await plane.request(
            *("GET", host(upstream.port, "private"), f"/?preview_token={bad}"),
            *(f"Cookie: sandgate_preview={good}", "Authorization: Bearer msk_live_unknown"),
        )
        assert response.status == 200


async def test_the_agents_port_is_never_reached(plane: Plane) -> None:
    await push_all(plane, 3000)
    response = await plane.request("GET", host(10700, "private"), "/", "X-API-Key: msk_live_owner")
    assert (response.status, response.code) == (404, "preview_unknown")


BROWSER = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"


async def follow(plane: Plane, client: Client, name: str, response: Response) -> tuple[str, str]:
    """What a browser keeps of a redirect: its cookie and the next target."""
    assert response.status == 303
    assert response.head.get("cache-control") == "no-store"
    assert response.head.get("referrer-policy") == "no-referrer"
    cookie = response.head.get("set-cookie")
    location = response.head.get("location")
    assert cookie is not None
    assert location is not None
    assert urlsplit(location).netloc == ""
    return cookie, location


async def test_a_browser_trades_the_token_in_its_address_for_a_cookie(plane: Plane) -> None:
    token = make_token("share")
    async with tcp_upstream(describe) as upstream, plane.client() as client:
        share = ShareRule("s", token.hash, time.time() + 100, "/app")
        await plane.put(ports={upstream.port: PortRoute("p", "private", [share])})
        name = host(upstream.port)
        response = await client.request("GET", name, f"/app/x?a=1&preview_token={token.secret}", BROWSER)
        cookie, location = await follow(plane, client, name, response)
        assert location == "/app/x?a=1"
        pair, *attributes = cookie.split("; ")
        assert pair == f"sandgate_preview={token.secret}"
        assert {"Path=/app", "HttpOnly", "SameSite=Lax"} <= set(attributes)
        assert any(
            90 <= int(part.removeprefix("Max-Age=")) <= 100 for part in attributes if part.startswith("Max-Age=")
        )
        assert upstream.requests == []

        response = await client.request("GET", name, location, BROWSER, f"Cookie: {pair}")
        assert response.status == 200
        assert response.json()["line"] == "GET /app/x?a=1 HTTP/1.1"
        # The token of the address does not leak by the referrer either.
        referrer = f"Referer: http://{name}/app/x?preview_token={token.secret}&a=1"
        response = await client.request("GET", name, "/app/y", referrer, f"Cookie: {pair}")
        assert dict(response.json()["fields"])["Referer"] == f"http://{name}/app/x?a=1"


async def test_a_frame_gets_a_cookie_that_works_in_frames(plane: Plane) -> None:
    token = make_token("browser")
    await plane.put(tokens=[TokenRule(token.hash, None)])
    async with plane.client() as client:
        response = await client.request("GET", host(3000), f"/?mt={token.secret}", BROWSER, "Sec-Fetch-Dest: iframe")
        cookie, location = await follow(plane, client, host(3000), response)
        assert location == "/"
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=None; Secure; Partitioned")


async def test_no_redirect_for_programs_and_for_what_would_not_be_let_in(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await push_all(plane, upstream.port)
        good, name = SECRETS["share"], host(upstream.port, "private")
        for method, fields in [("GET", ["Accept: application/json"]), ("GET", []), ("POST", [BROWSER])]:
            assert (await plane.request(method, name, f"/?preview_token={good}", *fields)).status == 200
        assert (await plane.request("GET", name, "/?preview_token=miosa_pv_bad", BROWSER)).status == 403


async def test_revocation_is_in_force_once_it_is_acknowledged(plane: Plane) -> None:
    token, key = make_token("share"), "msk_live_k"
    async with tcp_upstream(describe) as upstream:
        name = host(upstream.port)
        shares = [ShareRule("s", token.hash, FAR)]

        async def status(field: str) -> int:
            return (await plane.request("GET", name, "/", field)).status

        by_share, by_key = f"X-Miosa-Preview-Token: {token.secret}", f"X-API-Key: {key}"
        for _ in range(20):
            await plane.put(ports={upstream.port: PortRoute("p", "private", shares)})
            await plane.control.put_key(KeyRoute(plane.version(), hash_token(key), "w1", None))
            assert (await status(by_share), await status(by_key)) == (200, 200)
            await plane.put(ports={upstream.port: PortRoute("p", "private")})
            await plane.control.drop_key(hash_token(key), plane.version())
            assert (await status(by_share), await status(by_key)) == (403, 403)


async def test_a_token_expires_by_itself(plane: Plane) -> None:
    token = make_token("share")
    async with tcp_upstream(describe) as upstream:
        share = ShareRule("s", token.hash, time.time() + 1.0)
        await plane.put(ports={upstream.port: PortRoute("p", "private", [share])})
        seen: list[int] = []

        async def knock() -> None:
            while not seen or seen[-1] == 200:
                response = await plane.request(
                    "GET", host(upstream.port), "/", f"X-Miosa-Preview-Token: {token.secret}"
                )
                seen.append(response.status)
                await asyncio.sleep(0.02)

        async with asyncio.timeout(PATIENCE_S):
            await knock()
        assert seen[0] == 200
        assert seen[-1] == 403
        assert time.time() >= share.expires_at if share.expires_at else False


@pytest.mark.parametrize("change", ["closed", "private", "revoked", "gone", "moved"])
async def test_streams_end_when_what_let_them_in_does(plane: Plane, change: str) -> None:
    token = make_token("share")
    port_route = (
        PortRoute("p", "public")
        if change in {"closed", "private"}
        else PortRoute("p", "private", [ShareRule("s", token.hash, FAR)])
    )

    async def endless(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await exchange.reader.read()

    async with tcp_upstream(endless) as upstream, plane.client() as client:
        route = await plane.put(ports={upstream.port: port_route})
        bystander = await plane.open(upstream.port, "bystander")
        await client.send(
            f"GET / HTTP/1.1\r\nHost: {host(upstream.port)}\r\nX-Miosa-Preview-Token: {token.secret}\r\n\r\n"
        )
        assert (await client.head()).status == 200
        async with plane.client() as other:
            await other.send(f"GET / HTTP/1.1\r\nHost: {bystander}\r\n\r\n")
            assert (await other.head()).status == 200
            match change:
                case "closed":
                    await plane.put()
                case "private" | "revoked":
                    await plane.put(ports={upstream.port: PortRoute("p", "private")})
                case "gone":
                    await plane.control.drop_sandbox(route.id, plane.version())
                case "moved":
                    await plane.put(address="127.0.0.2", ports={upstream.port: port_route})
            assert await client.rest() == b"2\r\nhi\r\n"
            await eventually(lambda: len(upstream.open_connections) == 1, "only the bystander's stream stays")
            assert await other.reader.readexactly(7) == b"2\r\nhi\r\n"
            assert not other.reader.at_eof()
    assert await plane.metric("sandgate_plane_revoked_total") == 1
