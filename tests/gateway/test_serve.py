"""The server as a whole, started as a user starts it, on fake machines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@dataclass
class Server:
    """`sandgate serve` in a process of its own."""

    home: Path
    ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "SANDGATE_HOME": str(self.home),
            "SANDGATE_LISTEN": f"127.0.0.1:{self.ports[0]}",
            "SANDGATE_ADMIN_LISTEN": f"127.0.0.1:{self.ports[1]}",
            "SANDGATE_DRIVER": "fake",
            **self.settings,
        }

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "gateway", *arguments]
        return subprocess.run(argv, env=self.environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    def start(self) -> Server:
        output = (self.home.parent / f"{self.home.name}.out").open("w")
        argv = [sys.executable, "-m", "gateway", "serve"]
        with output:
            self.process = subprocess.Popen(
                argv, env=self.environ, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        until(lambda: "is ready" in self.output or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.output
        return self

    @property
    def output(self) -> str:
        return (self.home.parent / f"{self.home.name}.out").read_text()

    @property
    def credentials(self) -> dict[str, str]:
        return json.loads((self.home / "credentials.json").read_text())

    def client(self) -> httpx.Client:
        found = self.credentials
        headers = {"authorization": f"Bearer {found['api_key']}"}
        return httpx.Client(base_url=found["base_url"], headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if any(word in part for part in child.cmdline()))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "home")
    yield server
    if server.process is not None and server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the tests that leave it as it is."""
    server = Server(tmp_path_factory.mktemp("shared") / "home")
    yield server.start()
    server.stop()


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
    assert server.credentials["api_key"] in server.output

    processes = server.descendants()
    assert len(processes) >= 3
    assert server.stop(signal.SIGINT) == 0
    assert [process for process in processes if is_alive(process)] == []
    assert list((server.home / "run").glob("*.sock")) == []


def test_health_is_public_and_the_rest_is_the_operators(shared: Server) -> None:
    public, admin = (f"http://127.0.0.1:{port}" for port in shared.ports)
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
    server.process.kill()
    server.process.wait()
    server.start()  # waits for the remains

    assert [process for process in processes if is_alive(process)] == []
    assert server.stop() == 0


def test_second_start_keeps_the_key(server: Server) -> None:
    server.start()
    first = server.credentials
    server.stop()
    server.start()

    assert server.credentials == first
    with server.client() as client:
        assert client.get("/sandboxes").status_code == 200


def test_second_instance_is_refused_with_the_first_ones_process(shared: Server) -> None:
    other = Server(shared.home)
    refused = other.command("serve")

    assert refused.returncode == 1
    assert f"process {shared.process.pid}" in refused.stderr
    assert "SANDGATE_HOME" in refused.stderr


def test_taken_port_is_named_with_the_way_out(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.ports[0]))
        taken.listen()
        refused = server.command("serve")

    assert refused.returncode == 1
    assert f"SANDGATE_LISTEN=127.0.0.1:{server.ports[0]}: Address already in use" in refused.stderr
    assert "or choose another" in refused.stderr


def test_bad_setting_is_named(server: Server) -> None:
    server.settings["SANDGATE_WORKERS"] = "many"
    refused = server.command("serve")

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


async def test_long_home_gets_a_short_run_directory(tmp_path: Path) -> None:
    server = Server(tmp_path / ("long" * 25))
    server.home.mkdir(parents=True)
    server.start()
    try:
        with server.client() as client:
            assert client.get("/sandboxes").status_code == 200
    finally:
        assert await asyncio.to_thread(server.stop) == 0, server.output
