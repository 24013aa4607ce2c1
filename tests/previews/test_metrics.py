"""Histograms of the plane, and a log that is sampled."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from tests.previews.conftest import StartPlane
from tests.previews.harness import PUBLIC, Exchange, Plane, Upstream, describe, host, sandbox_id, tcp_upstream


async def series(plane: Plane) -> dict[str, float]:
    """Every figure of /metrics."""
    text = (await plane.ask_admin("/metrics")).body.decode()
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}


async def test_histograms_tell_durations_and_first_bytes_by_class(plane: Plane, api: Upstream) -> None:
    async def late(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(0.3)
        await exchange.send(b"ok")

    async with tcp_upstream(late) as upstream:
        name = await plane.open(upstream.port)
        assert (await plane.request("GET", name)).body == b"ok"
    for _ in range(3):
        assert (await plane.request("GET", "localhost")).status == 200
    found = await series(plane)
    whole, first = "sandgate_plane_request_seconds", "sandgate_plane_first_byte_seconds"
    for metric in (whole, first):
        assert (
            found[f'{metric}_count{{class="preview"}}'] == found[f'{metric}_bucket{{class="preview",le="+Inf"}}'] == 1
        )
        assert found[f'{metric}_count{{class="api"}}'] == 3
    assert found[f'{whole}_sum{{class="preview"}}'] >= 0.3
    assert found[f'{whole}_sum{{class="preview"}}'] - found[f'{first}_sum{{class="preview"}}'] >= 0.29
    assert found[f'{whole}_bucket{{class="preview",le="0.25"}}'] == 0
    buckets = [value for name, value in found.items() if name.startswith(f'{whole}_bucket{{class="api"')]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 3


async def test_a_wait_for_a_wake_is_measured(plane: Plane) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.put(state="frozen", ports={upstream.port: PUBLIC})
        request = asyncio.create_task(plane.request("GET", host(upstream.port)))
        await asyncio.sleep(0.3)
        await plane.open(upstream.port)
        assert (await request).status == 200
    found = await series(plane)
    assert found["sandgate_plane_wake_seconds_count"] == 1
    assert 0.2 < found["sandgate_plane_wake_seconds_sum"] < 10
    assert found['sandgate_plane_first_byte_seconds_sum{class="preview"}'] > 0.2


def of_sandbox(found: dict[str, float], name: str) -> float | None:
    return found.get(f'sandgate_plane_sandbox_request_seconds_count{{sandbox="{name}"}}')


async def test_the_busiest_sandboxes_have_a_metric_of_their_own(start_plane: StartPlane) -> None:
    plane = await start_plane("--metric-sandboxes-max", "2")
    async with tcp_upstream(describe) as upstream:

        async def ask(slug: str, count: int) -> None:
            async with plane.client() as client:
                for _ in range(count):
                    assert (await client.request("GET", host(upstream.port, slug))).status == 200

        for slug in ("a", "b", "c", "idle"):
            await plane.open(upstream.port, slug)
        for slug, count in (("a", 5), ("b", 3), ("c", 2)):
            await ask(slug, count)
        found = await series(plane)
        ids = {slug: sandbox_id(slug) for slug in ("a", "b", "c", "idle")}
        assert [of_sandbox(found, ids[slug]) for slug in ids] == [5, 3, None, None]
        assert of_sandbox(found, "other") == 2
        # Others are the busiest now: what they had before stays where it was counted.
        await ask("c", 4)
        await ask("b", 1)
        found = await series(plane)
        assert [of_sandbox(found, ids[slug]) for slug in ids] == [None, 4, 6, None]
        assert of_sandbox(found, "other") == 2
        # What a destroyed one had since the last look is not lost.
        await ask("a", 3)
        await plane.control.drop_sandbox(ids["a"], plane.version())
        found = await series(plane)
        assert of_sandbox(found, ids["a"]) is None
        assert of_sandbox(found, "other") == 5


@pytest.mark.parametrize(("share", "count"), [("0", 0), ("0.25", 5), ("1", 20)])
async def test_the_access_log_notes_a_share_and_every_failure(
    start_plane: StartPlane, api: Upstream, run_dir: Path, share: str, count: int
) -> None:
    log = run_dir / "access.log"
    plane = await start_plane("--access-log", str(log), "--access-log-share", share)
    async with plane.client() as client:
        for _ in range(20):
            assert (await client.request("GET", "localhost")).status == 200
    assert (await plane.request("GET", host(1))).status == 404
    await plane.stop()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["status"] != 200] == [404]
    assert sum(line["status"] == 200 for line in lines) == count
    assert all(0 < line["first_byte_ms"] <= line["duration_ms"] for line in lines)
