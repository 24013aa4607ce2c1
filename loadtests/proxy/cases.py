"""What is compared: each case is one kind of load on several subjects, and the bars that the plane has to clear."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loadtests.proxy import control, peers
from loadtests.proxy.events import Background, to_nchan, to_plane
from loadtests.proxy.peers import Endpoint, Site, Start

#: As a browser sends them; with Host and the cookie, 13 headers of about 900 bytes.
BROWSER_HEADERS = (
    "Connection: keep-alive",
    "Cache-Control: max-age=0",
    'sec-ch-ua: "Chromium";v="142", "Google Chrome";v="142", "Not_A Brand";v="99"',
    "sec-ch-ua-mobile: ?0",
    'sec-ch-ua-platform: "Linux"',
    "Upgrade-Insecure-Requests: 1",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8",
    "Sec-Fetch-Site: same-origin",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8,fr;q=0.7",
    f"Cookie: _ga=GA1.2.1234567890.1763790000; session=eyJhbGciOiJIUzI1NiJ9.e30.Zm9v; sandgate_preview={control.TOKEN}",
)

#: Hosts that are asked in turn, spread evenly over the table, whatever its size.
HOSTS_ASKED = 10
ROUTES = 1000
CHANGES_PER_S = 1000

Quantity = Literal["per_core", "p50", "p99", "rate", "kib_each", "failures"]


@dataclass(frozen=True, slots=True)
class Subject:
    """One side of a comparison.

    tool: the key in `peers.TOOLS` of what it needs. background: goes on during each run; what it yields is added to
    the run's figures. arguments: the load generator's, after the case's.
    """

    label: str
    start: Start
    tool: str | None = None
    background: Background | None = None
    routes: int = ROUTES
    arguments: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A demand on `subject`'s figure: as a ratio to `against`'s, as the difference to it, or alone."""

    quantity: Quantity
    subject: str
    against: str | None
    at_least: float | None = None
    at_most: float | None = None
    is_difference: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load. unit: what per-core figures count. arguments: the load generator's, connection aside.

    host: asked instead of the sandboxes'. is_held: nothing is timed; the memory of a fresh proxy is looked at while the
    load's connections are open.
    """

    name: str
    about: str
    arguments: Sequence[str]
    subjects: Sequence[Subject]
    bars: Sequence[Bar]
    unit: Literal["requests", "megabytes", "events"] = "requests"
    is_tls: bool = False
    is_latency: bool = True
    is_held: bool = False
    host: str | None = None
    headers: Sequence[str] = field(default=BROWSER_HEADERS)


PLANE = Subject("plane", peers.plane())
NGINX = Subject("nginx", peers.nginx(), "nginx")
NGINX_16K = Subject("nginx, 16 KB", peers.nginx(buffer_kib=16), "nginx")
HAPROXY = Subject("haproxy", peers.haproxy(), "haproxy")
CHP = Subject("configurable-http-proxy", peers.configurable_http_proxy(), "configurable-http-proxy")
DIRECT = Subject("direct", peers.direct())


@contextlib.asynccontextmanager
async def route_changes(site: Site, endpoint: Endpoint) -> AsyncIterator[dict[str, float]]:
    """Routes pushed anew one after another, `CHANGES_PER_S` of them, those that are asked included."""
    figures: dict[str, float] = {}
    assert endpoint.control is not None
    async with control.connected(endpoint.control) as api:
        changing = asyncio.create_task(_change_routes(site, api, figures))
        try:
            yield figures
        finally:
            changing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await changing


async def _change_routes(site: Site, api: control.Control, figures: dict[str, float]) -> None:
    batch = CHANGES_PER_S // 50
    started, changes = time.monotonic(), 0
    while True:
        slugs = [site.slugs[(changes + index) % len(site.slugs)] for index in range(batch)]
        await api.push([control.sandbox_record(slug) for slug in slugs])
        changes += batch
        elapsed = time.monotonic() - started
        figures["changes_per_s"] = changes / elapsed
        await asyncio.sleep(max(0.0, changes / CHANGES_PER_S - elapsed))


def _and_nchan(events_per_s: float) -> tuple[Subject, Subject]:
    """The same events of 200 bytes from both."""
    return (
        Subject("plane", peers.plane(), background=to_plane(events_per_s, 200)),
        Subject("nchan", peers.nginx(), "nchan", background=to_nchan(events_per_s, 200)),
    )


def _sse(
    name: str,
    about: str,
    subscribers: int,
    subjects: Sequence[Subject],
    bar: Bar,
    *,
    is_latency: bool = True,
    is_held: bool = False,
) -> Case:
    """A case of event streams; besides `bar`, its subject may not fail once."""
    return Case(
        name=name,
        about=about,
        arguments=("sse", "--path", "/events", "--subscribers", str(subscribers)),
        subjects=subjects,
        bars=(bar, Bar("failures", bar.subject, None, at_most=0)),
        unit="events",
        is_latency=is_latency,
        is_held=is_held,
        host="localhost",
        headers=(),
    )


CASES = (
    Case(
        name="http-1k",
        about="1 KB answers, 64 kept connections, 13 request headers; the plane checks a private preview's token.",
        arguments=("http", "--path", "/bytes/1024", "--connections", "64"),
        subjects=(PLANE, NGINX, HAPROXY, CHP),
        bars=(
            Bar("per_core", "plane", "nginx", at_least=1.2),
            Bar("p99", "plane", "nginx", at_most=1.0),
            Bar("failures", "plane", None, at_most=0),
        ),
    ),
    Case(
        name="http-64k",
        about="64 KB answers, otherwise the same. nginx has buffers of 128 KB.",
        arguments=("http", "--path", "/bytes/65536", "--connections", "64"),
        subjects=(PLANE, NGINX, HAPROXY, CHP),
        bars=(
            Bar("per_core", "plane", "nginx", at_least=1.0),
            Bar("p99", "plane", "nginx", at_most=1.0),
            Bar("failures", "plane", None, at_most=0),
        ),
    ),
    Case(
        name="http-1k-open",
        about="1 KB answers due at 10,000 a second whatever the answers do; latency counts from when they were due.",
        arguments=("http", "--path", "/bytes/1024", "--connections", "64", "--rate", "10000"),
        subjects=(PLANE, NGINX, HAPROXY),
        bars=(Bar("p99", "plane", "nginx", at_most=1.0),),
    ),
    Case(
        name="tls-1k",
        about="1 KB answers over kept TLS 1.3 connections, AES-128-GCM.",
        arguments=("http", "--path", "/bytes/1024", "--connections", "64"),
        subjects=(PLANE, NGINX),
        bars=(Bar("per_core", "plane", "nginx", at_least=1.0),),
        is_tls=True,
    ),
    Case(
        name="routes",
        about="1 KB answers with tables of different sizes; ten hosts of each are asked.",
        arguments=("http", "--path", "/bytes/1024", "--connections", "64"),
        subjects=(
            Subject("10 routes", peers.plane(), routes=10),
            Subject("1,000 routes", peers.plane(), routes=1000),
            Subject("10,000 routes", peers.plane(), routes=10_000),
        ),
        bars=(
            Bar("per_core", "1,000 routes", "10 routes", at_least=0.95, at_most=1.05),
            Bar("per_core", "10,000 routes", "10 routes", at_least=0.95, at_most=1.05),
        ),
    ),
    Case(
        name="route-changes",
        about=f"1 KB answers while {CHANGES_PER_S:,} routes a second are pushed anew, those that are asked included.",
        arguments=("http", "--path", "/bytes/1024", "--connections", "64"),
        subjects=(PLANE, Subject("plane, changing", peers.plane(), background=route_changes)),
        bars=(Bar("failures", "plane, changing", None, at_most=0),),
    ),
    Case(
        name="websocket-bulk",
        about="WebSocket frames of 16 KB from the origin, 4 connections, as fast as they go.",
        arguments=("websocket", "--path", "/flood/16384", "--connections", "4"),
        subjects=(
            PLANE,
            NGINX,
            NGINX_16K,
            HAPROXY,
            Subject("websockify", peers.websockify(lambda origin: origin.raw_flood), "websockify"),
        ),
        bars=(
            Bar("per_core", "plane", "nginx, 16 KB", at_least=1.5),
            Bar("per_core", "plane", "nginx", at_least=1.0),
            Bar("failures", "plane", None, at_most=0),
        ),
        unit="megabytes",
        is_latency=False,
    ),
    Case(
        name="websocket-echo",
        about="A WebSocket frame of 64 bytes there and back, one at a time, on one connection.",
        arguments=("websocket", "--path", "/echo", "--connections", "1", "--echo", "64"),
        subjects=(
            DIRECT,
            PLANE,
            NGINX,
            HAPROXY,
            Subject("websockify", peers.websockify(lambda origin: origin.raw_echo), "websockify"),
        ),
        bars=(
            Bar("p50", "plane", "direct", at_most=500.0, is_difference=True),
            Bar("failures", "plane", None, at_most=0),
        ),
    ),
    _sse(
        "sse-fan-out",
        "2,000 subscribers of one topic, 50 events of 200 bytes a second: 100,000 deliveries a second are due.",
        2000,
        _and_nchan(50),
        Bar("per_core", "plane", "nchan", at_least=1.3),
    ),
    _sse(
        "sse-fan-out-80",
        "The same with 80 events a second: 160,000 deliveries a second are due.",
        2000,
        _and_nchan(80),
        Bar("rate", "plane", None, at_least=150_000),
    ),
    _sse(
        "sse-stalled",
        "200 subscribers, 100 events of 2 KB a second, with and without ten more subscribers that never read.",
        200,
        (
            Subject("plane", peers.plane(), background=to_plane(100, 2048)),
            Subject("plane, stalled", peers.plane(), background=to_plane(100, 2048), arguments=("--stalled", "10")),
        ),
        Bar("p99", "plane, stalled", "plane", at_most=1.1),
    ),
    _sse(
        "sse-idle",
        "15,000 subscribers to whom nothing is sent: what the process grows by for each, kernel memory left out.",
        15_000,
        _and_nchan(0.1),
        Bar("kib_each", "plane", None, at_most=4),
        is_latency=False,
        is_held=True,
    ),
)
