"""The public listener as a Unix socket: who may connect, who the client is, and what becomes of its file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from native import plane_path
from previews.plane import PlaneClient
from tests.previews.conftest import StartPlane
from tests.previews.harness import (
    PATIENCE_S,
    Client,
    Exchange,
    Plane,
    Response,
    Upstream,
    describe,
    eventually,
    tcp_upstream,
)
from tests.support.certificates import Authority

TOLD = ["X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https"]


@pytest.fixture
def public(run_dir: Path) -> Path:
    return run_dir / "public.sock"


@contextlib.asynccontextmanager
async def unix_client(path: Path) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_unix_connection(path, limit=2**20))
    try:
        yield client
    finally:
        await client.close()


async def ask(path: Path, name: str = "localhost", *fields: str) -> Response:
    async with unix_client(path) as client:
        return await client.request("GET", name, "/", *fields)


def seen(response: Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.json()["fields"]}


async def test_it_serves_beside_the_others(start_plane: StartPlane, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}", "--listen", "[::1]:0")
    async with tcp_upstream(describe) as upstream:
        name = await plane.open(upstream.port)
        async with unix_client(public) as client:
            for _ in range(3):
                assert (await client.request("GET", name)).status == 200
        assert (await plane.request("GET", name)).status == 200


async def test_curl_finds_it(start_plane: StartPlane, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}")
    async with tcp_upstream(describe) as upstream:
        url = f"http://{await plane.open(upstream.port)}/"
        curl = ["curl", "--silent", "--show-error", "--fail", "--unix-socket", str(public), url]
        done = await asyncio.to_thread(subprocess.run, curl, capture_output=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["line"] == "GET / HTTP/1.1"


async def test_a_websocket_goes_through_it(start_plane: StartPlane, public: Path) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := await exchange.reader.read(65536):
            await exchange.send(data)

    plane = await start_plane("--listen", f"unix:{public}")
    async with tcp_upstream(echo) as upstream:
        name = await plane.open(upstream.port)
        async with unix_client(public) as client:
            await client.send(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
            assert (await client.head()).status == 101
            for data in (b"hello", b"x" * 1_000_000):
                sending = asyncio.create_task(client.send(data))
                assert await client.reader.readexactly(len(data)) == data
                await sending


async def test_a_client_without_an_address_is_unknown(start_plane: StartPlane, api: Upstream, public: Path) -> None:
    await start_plane("--listen", f"unix:{public}")
    said = seen(await ask(public, "localhost", *TOLD))
    assert (said["x-forwarded-for"], said["x-real-ip"], said["x-forwarded-proto"]) == ("unknown", "unknown", "http")
    assert said["forwarded"] == 'for=unknown;proto=http;host="localhost"'


async def test_a_proxy_there_is_believed_where_that_is_set(
    start_plane: StartPlane, api: Upstream, public: Path
) -> None:
    plane = await start_plane("--listen", f"unix:{public}", "--trusted-proxy", "unix", "--client-connections-max", "1")
    async with unix_client(public) as first, unix_client(public) as second:
        for client in (first, second):
            said = seen(await client.request("GET", "localhost", "/", *TOLD))
            assert (said["x-forwarded-for"], said["x-forwarded-proto"]) == ("203.0.113.9", "https")
    # Not by the network, though.
    assert seen(await plane.request("GET", "localhost", "/", *TOLD))["x-forwarded-for"] == "127.0.0.1"


async def test_strangers_there_count_as_one_client(start_plane: StartPlane, api: Upstream, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}", "--client-connections-max", "1")
    async with unix_client(public) as first:
        assert (await first.request("GET", "localhost")).status == 200
        assert (await ask(public)).code == "too_many_connections"
        assert (await plane.request("GET", "localhost")).status == 200
        clients = (await plane.control.connections())["clients"]
        assert {"address": "unix", "connections": 1} in clients


@pytest.mark.parametrize("mode", ["600", "666"])
async def test_its_file_has_the_mode_and_owner_that_were_asked_for(
    start_plane: StartPlane, public: Path, mode: str
) -> None:
    group = os.getgid() if os.geteuid() != 0 else 65534
    await start_plane("--listen", f"unix:{public}", "--socket-mode", mode, "--socket-group", str(group))
    found = public.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (int(mode, 8), group)


async def test_its_file_goes_with_it(start_plane: StartPlane, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}")
    assert public.exists()
    await plane.stop()
    assert not public.exists()


async def test_the_file_of_a_killed_one_is_replaced(start_plane: StartPlane, api: Upstream, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}")
    await plane.kill()
    assert public.exists()
    await plane.start("--listen", f"unix:{public}")
    assert (await ask(public)).status == 200


@pytest.mark.parametrize("what", ["a file", "a live socket", "a relative path"])
async def test_what_is_not_ours_is_left_alone(run_dir: Path, public: Path, what: str) -> None:
    with contextlib.ExitStack() as stack:
        if what == "a file":
            public.write_text("precious")
        elif what == "a live socket":
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(str(public))
            other.listen()
        address = "unix:public.sock" if what == "a relative path" else f"unix:{public}"
        flags = ["--listen", address, "--api-socket", run_dir / "a", "--control-socket", run_dir / "c"]
        done = await asyncio.to_thread(
            subprocess.run, [plane_path(), *flags], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode != 0
        assert "public.sock" in done.stderr
        assert what == "a relative path" or public.exists()


async def test_it_survives_a_hand_over(start_plane: StartPlane, run_dir: Path, api: Upstream, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}")
    inode = public.stat().st_ino
    stop = asyncio.Event()

    async def visit() -> int:
        count = 0
        while not stop.is_set():
            assert (await ask(public)).status == 200
            count += 1
        return count

    visitors = [asyncio.create_task(visit()) for _ in range(4)]
    before = plane
    for workers in (3, 1):
        after = Plane(run_dir, workers)
        await after.start("--take-over", "--listen", f"unix:{public}")
        async with asyncio.timeout(PATIENCE_S):
            assert await before.process.wait() == 0
        assert public.stat().st_ino == inode
        before = after
    stop.set()
    async with asyncio.timeout(PATIENCE_S):
        counts = await asyncio.gather(*visitors)
    assert min(counts) > 0
    assert await before.stop() == 0
    assert not public.exists()


async def test_one_that_is_not_taken_over_is_gone(start_plane: StartPlane, run_dir: Path, public: Path) -> None:
    plane = await start_plane("--listen", f"unix:{public}")
    after = Plane(run_dir)
    await after.start("--take-over")
    try:
        async with PlaneClient(str(after.control_socket)) as control:
            await control.wait_connected(PATIENCE_S)
            await eventually(lambda: not public.exists(), "the file is removed")
        async with asyncio.timeout(PATIENCE_S):
            assert await plane.process.wait() == 0
    finally:
        await after.stop()


async def test_it_may_speak_tls(start_plane: StartPlane, api: Upstream, public: Path, authority: Authority) -> None:
    authority.issue("api", "localhost")
    flags = [*authority.flags, "--tls-listen", f"unix:{public}"]
    await start_plane(*flags)
    opened = await asyncio.open_unix_connection(public, ssl=authority.context(), server_hostname="localhost")
    client = Client(*opened)
    assert seen(await client.request("GET", "localhost"))["x-forwarded-proto"] == "https"
    await client.close()


#: What may stand in front; without any, the tests above have a plain client there.
FRONTS = [name for name in ("nginx",) if shutil.which(name)]


@pytest.mark.parametrize("front", FRONTS or [None])
async def test_a_real_proxy_stands_in_front(
    start_plane: StartPlane, run_dir: Path, public: Path, front: str | None
) -> None:
    plane = await start_plane("--listen", f"unix:{public}", "--trusted-proxy", "unix", "--socket-mode", "666")
    async with tcp_upstream(describe) as upstream, proxy(front, run_dir, public) as path:
        name = await plane.open(upstream.port)
        for _ in range(5):
            response = await ask(path, name, *(TOLD if front is None else []))
            assert response.status == 200
            said = seen(response)
            assert (said["x-forwarded-for"], said["x-forwarded-proto"]) == ("203.0.113.9", "https")


@contextlib.asynccontextmanager
async def proxy(program: str | None, run_dir: Path, public: Path) -> AsyncIterator[Path]:
    """The program on a Unix socket of its own, the plane behind it; without one, the plane's own socket."""
    if program is None:
        yield public
        return
    front = run_dir / "front.sock"
    configuration = run_dir / "nginx.conf"
    configuration.write_text(NGINX.format(run_dir=run_dir, public=public, front=front))
    run_dir.chmod(0o755)  # its workers are nobody
    nginx = await asyncio.create_subprocess_exec(program, "-c", configuration, "-p", run_dir, "-e", "stderr")
    try:
        await eventually(front.exists, "nginx listens")
        yield front
    finally:
        nginx.terminate()
        await nginx.wait()


NGINX = """
daemon off; error_log stderr; pid {run_dir}/nginx.pid; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {run_dir}/body; proxy_temp_path {run_dir}/proxy;
    fastcgi_temp_path {run_dir}/f; uwsgi_temp_path {run_dir}/u; scgi_temp_path {run_dir}/s;
    upstream plane {{ server unix:{public}; keepalive 4; }}
    server {{
        listen unix:{front};
        location / {{
            proxy_pass http://plane; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For 203.0.113.9;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
}}
"""
