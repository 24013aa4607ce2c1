"""The plane as a process: start, restart, drain, admin listener, access log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest

from native import plane_path
from previews.plane import PlaneClient
from previews.routes import KeyRoute, PortRoute
from previews.tokens import hash_token
from tests.previews.conftest import StartPlane
from tests.previews.harness import (
    PATIENCE_S,
    PUBLIC,
    Exchange,
    Plane,
    Upstream,
    describe,
    eventually,
    host,
    sandbox_id,
    tcp_upstream,
)

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_restarted_plane_serves_before_the_api_is_back(plane: Plane, how: str) -> None:
    async with tcp_upstream(describe) as upstream:
        await plane.put("open", ports={upstream.port: PUBLIC})
        await plane.put("shut", ports={upstream.port: PortRoute("p", "private")})
        await plane.put("closed", ports={upstream.port: PUBLIC})
        await plane.put("closed", ports={})
        gone = await plane.put("gone", ports={upstream.port: PUBLIC})
        await plane.control.drop_sandbox(gone.id, plane.version())
        for key, owner in [("owner", "w1"), ("revoked", "w1")]:
            await plane.control.put_key(KeyRoute(1, hash_token(f"msk_{key}"), owner, None))
        await plane.control.drop_key(hash_token("msk_revoked"), 2)
        await plane.control.close()
        # Whatever was acknowledged is remembered, at once and for the next times too.
        for _ in range(2):
            await (plane.kill() if how == "kill" else plane.stop())
            await plane.start()
            seen = [
                (await plane.request("GET", host(upstream.port, slug), "/", *fields)).status
                for slug, *fields in [
                    ("open",),
                    ("shut",),
                    ("shut", "X-API-Key: msk_owner"),
                    ("shut", "X-API-Key: msk_revoked"),
                    ("closed",),
                    ("gone",),
                ]
            ]
            assert seen == [200, 401, 200, 403, 401, 410]
        assert not plane.control.is_connected


async def test_an_old_record_stays_old_over_a_restart(plane: Plane) -> None:
    await plane.put(v=10, ports={3000: PUBLIC})
    await plane.control.drop_sandbox(sandbox_id("demo"), 11)
    await plane.kill()
    await plane.start()
    await plane.control.wait_connected(PATIENCE_S)
    await plane.put(v=10, ports={3000: PUBLIC})
    assert (await plane.request("GET", host(3000))).status == 410


@pytest.mark.parametrize("damage", [b'{"t":"sandbox","v":1,"i', b"\xff\xfe\n", b"{}\n[]\n"])
async def test_a_damaged_routes_file_costs_the_damaged_lines_only(plane: Plane, damage: bytes) -> None:
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        await plane.kill()
        with (plane.directory / "plane.routes").open("ab") as file:
            file.write(damage)
        await plane.start()
        assert (await plane.request("GET", name)).status == 200


async def test_the_routes_file_does_not_grow_for_ever(plane: Plane) -> None:
    await asyncio.gather(*(plane.put(f"s{number % 10}", owner="w" * 2000) for number in range(1500)))
    path = plane.directory / "plane.routes"
    await eventually(lambda: path.stat().st_size < 100_000, "3 MB of pushes are rewritten to what is left of them")


async def until_refused(plane: Plane) -> None:
    """Wait until the plane takes no new connection."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with plane.client():
                    await asyncio.sleep(0.01)


async def test_requests_in_flight_end_before_the_process_does(plane: Plane, api: Upstream) -> None:
    proceed = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        await proceed.wait()
        await exchange.answer(b"done")

    api.handler = wait
    async with plane.client() as busy, plane.client() as idle:
        await busy.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: len(api.requests) == 1, "the request is under way")
        plane.process.terminate()
        # An idle connection is closed, a new one is not taken any more.
        assert await idle.rest() == b""
        await until_refused(plane)
        proceed.set()
        response = await busy.response()
        assert (response.body, response.head.get("connection")) == (b"done", "close")
        assert await busy.rest() == b""
    assert await plane.stop() == 0
    assert not plane.control_socket.exists()


async def test_a_drain_does_not_wait_for_ever(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--drain-timeout-s", "0.2")

    async def hold(exchange: Exchange) -> None:
        await exchange.send(SWITCH)
        await exchange.reader.read()

    api.handler = hold
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert (await client.head()).status == 101
        assert await plane.stop() == 0
        assert await client.rest() == b""


async def test_a_second_signal_ends_the_drain(plane: Plane, api: Upstream) -> None:
    async def hold(exchange: Exchange) -> None:
        await exchange.reader.read()

    api.handler = hold
    async with plane.client() as client:
        await client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: len(api.requests) == 1, "the request is under way")
        plane.process.terminate()
        await until_refused(plane)
        plane.process.send_signal(signal.SIGINT)
        assert await plane.stop() == 0


async def test_the_plane_dies_with_its_parent(run_dir: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, plane_path(), "--listen", "127.0.0.1:0", "--die-with-parent"),
        *("--api-socket", run_dir / "api.sock", "--control-socket", run_dir / "plane.sock"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    await eventually(lambda: not _is_running(pid), "the child has ended")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def run_to_end(*argv: str | Path) -> tuple[int, str]:
    """Exit status and what was said on standard error."""
    process = await asyncio.create_subprocess_exec(
        plane_path(), *argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_two_planes_do_not_share_anything(plane: Plane, run_dir: Path) -> None:
    taken = f"127.0.0.1:{plane.address[1]}"
    status, said = await run_to_end(
        *("--listen", taken, "--api-socket", run_dir / "a", "--control-socket", run_dir / "other.sock")
    )
    assert status == 1
    assert f"cannot listen on {taken}" in said
    status, said = await run_to_end(
        *("--listen", "127.0.0.1:0", "--api-socket", run_dir / "a", "--control-socket", plane.control_socket)
    )
    assert status == 1
    assert "it is in use by another process" in said
    assert (await plane.control.stats()).sandboxes == 0


async def test_bad_flags_are_explained() -> None:
    status, said = await run_to_end("--listen", "nowhere")
    assert status == 2
    assert "nowhere" in said


async def test_several_listeners_and_domains(start_plane: StartPlane, api: Upstream) -> None:
    plane = await start_plane("--listen", "[::1]:0", "--domain", "Example.com.", "--domain", "localhost")
    async with tcp_upstream(describe) as upstream:
        await plane.open(upstream.port)
        for domain in ["localhost", "example.com"]:
            assert (await plane.request("GET", f"{upstream.port}-demo.sandbox.{domain}")).status == 200


async def test_ipv6_clients_are_named_as_the_standard_spells_them(run_dir: Path, api: Upstream) -> None:
    plane = Plane(run_dir)
    plane.process = await asyncio.create_subprocess_exec(
        *(plane_path(), "--listen", "[::1]:0", "--api-socket", plane.api_socket, "--die-with-parent"),
        *("--control-socket", plane.control_socket),
        stdout=asyncio.subprocess.PIPE,
    )
    assert plane.process.stdout is not None
    said = json.loads(await plane.process.stdout.readline())
    assert said["admin"] is None
    plane.address = ("::1", int(said["listen"][0].rpartition(":")[2]))
    try:
        fields = dict((await plane.request("GET", "localhost")).json()["fields"])
        assert fields["X-Forwarded-For"] == "::1"
        assert fields["Forwarded"] == 'for="[::1]";proto=http;host="localhost"'
    finally:
        await plane.stop()


async def test_the_admin_listener_tells_health_readiness_and_metrics(plane: Plane, run_dir: Path) -> None:
    assert (await plane.ask_admin("/healthz")).body == b"ok\n"
    not_ready = await plane.ask_admin("/readyz")
    assert (not_ready.status, not_ready.body) == (503, b"the API does not answer\n")
    assert (await plane.ask_admin("/nothing")).status == 404
    assert await plane.metric("sandgate_plane_api_up") == 0

    async def answer(exchange: Exchange) -> None:
        assert exchange.head.get("x-sandgate-admin") == "1"
        body = {"/readyz": b"ready\n", "/metrics": b"sandgate_api_x 5\n"}[exchange.head.target]
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await exchange.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    server = Upstream(answer)
    async with await asyncio.start_unix_server(server.serve, run_dir / "api.sock"):
        ready = await plane.ask_admin("/readyz")
        assert (ready.status, ready.body) == (200, b"ready\n")
        assert await plane.metric("sandgate_api_x") == 5
        assert await plane.metric("sandgate_plane_api_up") == 1


async def test_metrics_count_requests_by_class_and_status(plane: Plane, api: Upstream) -> None:
    async with tcp_upstream(describe) as upstream, plane.client() as client:
        name = await plane.open(upstream.port)
        await client.request("POST", name, body=b"12345")
        await client.request("GET", "localhost")
        await client.request("GET", host(1, "nobody"))
        counted = 'sandgate_plane_requests_total{{class="{}",status="{}"}}'
        assert await plane.metric(counted.format("preview", "2xx")) == 1
        assert await plane.metric(counted.format("preview", "4xx")) == 1
        assert await plane.metric(counted.format("api", "2xx")) == 1
        assert await plane.metric('sandgate_plane_failures_total{code="preview_unknown"}') == 1
        assert await plane.metric("sandgate_plane_upload_bytes_total") == 5
        assert await plane.metric("sandgate_plane_connections") == 1
        assert await plane.metric("sandgate_plane_sandboxes") == 1


async def test_the_access_log_tells_what_happened_and_no_secret(
    start_plane: StartPlane, api: Upstream, tmp_path: Path
) -> None:
    log = tmp_path / "access.log"
    plane = await start_plane("--access-log", str(log))
    secret = "preview_token=miosa_pv_secret"
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        await plane.request("GET", name, f"/a?{secret}", "Authorization: Bearer msk_secret")
        failed = await plane.request("GET", host(1, "nobody"), f"/b?{secret}")
        await plane.request("PUT", "localhost", "/c")
        async with plane.client() as client:
            await client.send("nonsense\r\n\r\n")
            await client.response()
        await eventually(lambda: len(log.read_text().splitlines()) == 4, "four lines")
    text = log.read_text()
    assert "secret" not in text
    lines = sorted((json.loads(line) for line in text.splitlines()), key=lambda line: str(line["path"]))
    assert [(line["class"], line["method"], line["path"], line["status"]) for line in lines] == [
        ("none", "nonsense", "", 400),
        ("preview", "GET", "/a", 200),
        ("preview", "GET", "/b", 404),
        ("api", "PUT", "/c", 200),
    ]
    assert lines[1]["sandbox"] == sandbox_id("demo")
    assert (lines[2]["code"], lines[2]["request_id"]) == ("preview_unknown", failed.head.get("x-request-id"))
    assert {line["client"] for line in lines} == {"127.0.0.1"}


async def test_a_client_of_a_stopped_plane_just_reconnects(plane: Plane) -> None:
    async with PlaneClient(str(plane.control_socket)) as client:
        await client.wait_connected(PATIENCE_S)
        await plane.stop()
        await eventually(lambda: not client.is_connected, "the loss is noticed")
        await plane.start()
        await client.wait_connected(PATIENCE_S)
