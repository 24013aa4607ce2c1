"""The server as a whole, started as a user starts it, on fake machines."""

from __future__ import annotations

import contextlib
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.certificates import Authority
from tests.support.server import ServerProcess, free_ports

TIMEOUT_S = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: whoever inherits an orphan collects it in its own time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Server(ServerProcess):
    """A server on fake machines."""

    def __init__(self, home: Path, **settings: Any) -> None:
        super().__init__(home, driver="fake", **settings)

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        children = filter(is_alive, psutil.Process(self.pid).children())
        return next(child for child in children if any(word in part for part in child.cmdline()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "home")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the tests that leave it as it is."""
    with Server(tmp_path_factory.mktemp("shared") / "home") as server:
        yield server


def test_serves_stops_and_leaves_nothing(server: Server) -> None:
    server.start()
    with server.client() as client:
        created = client.post("/sandboxes", json={}, headers={"idempotency-key": "first"})
        again = client.post("/sandboxes", json={}, headers={"idempotency-key": "first"})
        assert created.status_code == 201
        assert (again.content, again.headers["idempotency-replayed"]) == (created.content, "true")
        result = client.post(f"/sandboxes/{created.json()['id']}/exec", json={"cmd": ["echo", "hi"]})
        assert (result.json()["stdout"], result.json()["exit_code"]) == ("hi\n", 0)

    assert stat.S_IMODE(server.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.home / "credentials.json").stat().st_mode) == 0o600
    assert f"API key        {server.api_key}" in server.log.read_text()

    processes = server.descendants()
    assert len(processes) >= 3
    assert server.stop(signal.SIGINT) == 0
    assert [process for process in processes if is_alive(process)] == []
    assert list((server.home / "run").glob("*.sock")) == []


def test_health_is_public_and_the_rest_is_the_operators(shared: Server) -> None:
    public, admin = shared.base_url.removesuffix("/api/v1"), shared.admin_url
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{public}/healthz").json() == {"status": "ok"}
        for path in ("/metrics", "/readyz"):
            assert client.get(f"{public}{path}", headers={"x-sandgate-admin": "1"}).status_code == 404
        assert client.get(f"{admin}/readyz").json() == {
            "status": "ready",
            "database": True,
            "host": True,
            "plane": True,
        }
        with shared.client() as api:
            for _ in range(8):  # over both workers
                api.get("/sandboxes").raise_for_status()
        text = client.get(f"{admin}/metrics").text
        line = 'sandgate_api_requests_total{dialect="miosa",operation="GET /sandboxes",status="200"} 8.0'
        assert line in text.splitlines()
        assert "sandgate_plane_" in text


@pytest.mark.parametrize("part", ["run-api", "sandgate-plane", "run-hostd"])
def test_killed_part_comes_back(server: Server, part: str) -> None:
    server.start()
    killed = server.child(part)
    killed.send_signal(signal.SIGKILL)
    until(lambda: not is_alive(killed), "death")

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError), server.client() as client:
            return client.post("/sandboxes", json={}).status_code == 201
        return False

    until(answers, "coming back")
    assert server.child(part).pid != killed.pid
    assert server.stop() == 0


def test_killed_supervisor_takes_its_parts_along_and_the_next_one_starts(server: Server) -> None:
    server.start()
    processes = server.descendants()
    server.kill()
    server.start()  # waits for the remains

    assert [process for process in processes if is_alive(process)] == []
    assert server.stop() == 0


def test_second_start_keeps_the_key(server: Server) -> None:
    server.start()
    first = server.api_key
    server.stop()
    server.start()

    assert server.api_key == first
    with server.client() as client:
        assert client.get("/sandboxes").status_code == 200


def test_second_instance_is_refused_with_the_first_ones_process(shared: Server) -> None:
    other = Server(shared.home)
    refused = other.command("serve")

    assert refused.returncode == 1
    assert f"process {shared.pid}" in refused.stderr
    assert "SANDGATE_HOME" in refused.stderr


def test_taken_port_is_named_with_the_way_out(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port))
        taken.listen()
        refused = server.command("serve")

    assert refused.returncode == 1
    assert f"SANDGATE_LISTEN=127.0.0.1:{server.port}: Address already in use" in refused.stderr
    assert "or choose another" in refused.stderr


def test_with_tls_it_is_found_by_https_and_http_leads_there(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    authority.issue("all", "localhost", "*.sandbox.localhost")
    (port,) = free_ports(1)
    settings = {"tls_listen": f"127.0.0.1:{port}", "tls_dir": authority.directory, "https_redirect": True}
    with (
        Server(tmp_path / "home", **settings) as server,
        httpx.Client(
            verify=authority.context(), headers={"authorization": f"Bearer {server.api_key}"}, timeout=TIMEOUT_S
        ) as client,
    ):
        assert server.base_url == f"https://localhost:{port}/api/v1"
        assert client.get(f"{server.base_url}/sandboxes").status_code == 200
        moved = client.get(f"http://localhost:{server.port}/api/v1/sandboxes?limit=1")
        assert (moved.status_code, moved.headers["location"]) == (308, f"{server.base_url}/sandboxes?limit=1")
        made = client.post(f"{server.base_url}/sandboxes", json={}).json()
        url = client.post(f"{server.base_url}/sandboxes/{made['id']}/expose", json={"port": 3000}).text
        assert f"sandbox.localhost:{port}" in url
        assert "https://3000-" in url


def test_bad_setting_is_named(tmp_path: Path) -> None:
    refused = Server(tmp_path, workers="many").command("serve")

    assert (refused.returncode, refused.stderr) == (2, "sandgate: SANDGATE_WORKERS=many: must be a whole number\n")


def test_keys_need_a_server_that_has_been_started_once(server: Server) -> None:
    refused = server.command("keys", "list")

    assert refused.returncode == 1
    assert "start the server first" in refused.stderr


def test_keys_are_made_listed_and_revoked_while_it_serves(shared: Server) -> None:
    made = shared.command("keys", "create", "--name", "robot", "--scope", "sandboxes:read")
    secret = made.stdout.strip()
    with shared.client() as client:
        headers = {"authorization": f"Bearer {secret}"}
        assert client.get("/sandboxes", headers=headers).status_code == 200
        assert client.post("/sandboxes", json={}, headers=headers).status_code == 403
        row = next(line for line in shared.command("keys", "list").stdout.splitlines() if "robot" in line)
        assert secret not in row
        assert "sandboxes:read" in row
        assert shared.command("keys", "revoke", row.split()[0]).stdout == "revoked\n"
        assert client.get("/sandboxes", headers=headers).status_code == 401
    assert shared.command("keys", "revoke", "nothing").returncode == 1


def test_help_names_every_command(shared: Server) -> None:
    text = shared.command("--help").stdout

    assert all(word in text for word in ("serve", "doctor", "keys", "templates", "version", "SANDGATE_HOME"))
    assert "run-api" not in text
    assert shared.command("version").stdout.strip()


def test_long_home_gets_a_short_run_directory(tmp_path: Path) -> None:
    with Server(tmp_path / ("long" * 25)) as server, server.client() as client:
        assert client.get("/sandboxes").status_code == 200
