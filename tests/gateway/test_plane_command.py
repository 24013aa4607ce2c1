"""`sandgate plane`, against a server on fake machines."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from previews.plane import PlaneClient
from previews.routes import PortRoute, SandboxRoute
from tests.gateway.test_serve import Server, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("plane") / "home", rate_limit_per_minute=0) as server:
        yield server


@pytest.fixture(scope="module")
def sandbox(server: Server) -> str:
    with server.client() as api:
        made = api.post("/sandboxes", json={"timeout_sec": 600}).json()
        api.post(f"/sandboxes/{made['id']}/previews", json={"port": 3000}).raise_for_status()
    return str(made["id"])


class Visitors:
    """Clients that ask again and again, each on connections of its own, until told to stop."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self._stop = threading.Event()
        self.answers: list[int] = []
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._visit, args=(number % 2 == 0,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _visit(self, is_keeping: bool) -> None:
        while not self._stop.is_set():
            with self._server.client() as api:
                for _ in range(1000 if is_keeping else 1):
                    self._ask(api)
                    if self._stop.is_set():
                        return

    def _ask(self, api: httpx.Client) -> None:
        try:
            self.answers.append(api.get("/sandboxes").status_code)
        except httpx.HTTPError as error:
            self.failures.append(repr(error))

    def have(self, count: int) -> bool:
        return len(self.answers) >= count

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


@pytest.fixture
def web_socket(server: Server) -> Iterator[ClientConnection]:
    """A web socket through a preview, to a server of the test's own."""
    with serve(echo, "127.0.0.1", 0) as upstream:
        port = upstream.socket.getsockname()[1]
        threading.Thread(target=upstream.serve_forever).start()
        asyncio.run(lead_to(server, port))
        name = f"{port}-echo.sandbox.localhost"
        with connect(f"ws://{name}/", sock=socket.create_connection(("127.0.0.1", server.port))) as client:
            yield client


async def lead_to(server: Server, port: int) -> None:
    # So new that no sync of the API takes it for forgotten.
    version = (time.time_ns() // 1000) + 3_600_000_000
    ports = {port: PortRoute("p", "public")}
    route = SandboxRoute(version, str(uuid.uuid4()), "echo", "w", "127.0.0.1", ports=ports)
    async with PlaneClient(str(server.home / "run" / "plane.sock")) as plane:
        await plane.wait_connected(10)
        await plane.put_sandbox(route)


def test_a_restart_drops_nothing(server: Server, web_socket: ClientConnection) -> None:
    with web_socket:
        visitors = Visitors(server, 4)
        try:
            planes = [server.child("sandgate-plane").pid]
            for _ in range(3):
                before = len(visitors.answers)
                until(partial(visitors.have, before + 20), "visits")
                web_socket.send("still there?")
                assert web_socket.recv(timeout=30) == "still there?"
                done = server.command("plane", "restart")
                assert done.returncode == 0, done.stderr
                planes.append(int(done.stdout.split()[1]))
            assert len(set(planes)) == 4
            # The web socket is where it was opened.
            assert psutil.pid_exists(planes[0])
            web_socket.send("and now?")
            assert web_socket.recv(timeout=30) == "and now?"
        finally:
            visitors.stop()
        assert visitors.failures == []
        assert set(visitors.answers) == {200}
    until(lambda: not psutil.pid_exists(planes[0]), "the first one ends with its last connection")


def test_a_killed_successor_comes_back(server: Server) -> None:
    """What was adopted is watched like what was started."""
    assert server.command("plane", "restart").returncode == 0
    pid = int(server.command("plane", "restart").stdout.split()[1])
    psutil.Process(pid).kill()

    def answers() -> bool:
        try:
            with server.client() as api:
                return api.get("/sandboxes").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, "coming back")
    assert not psutil.pid_exists(pid)


def test_a_drained_plane_stays_down_until_it_is_restarted(server: Server) -> None:
    assert server.command("plane", "drain").returncode == 0
    time.sleep(0.5)  # longer than the pause before a dead part is started again
    with server.client() as api, pytest.raises(httpx.ConnectError):
        api.get("/sandboxes")
    assert "no plane answers" in server.command("plane", "routes").stderr
    assert server.command("plane", "restart").returncode == 0
    with server.client() as api:
        assert api.get("/sandboxes").status_code == 200


def test_routes_and_connections_are_shown(server: Server, sandbox: str) -> None:
    lines = server.command("plane", "routes", "--json").stdout.splitlines()
    (route,) = [route for route in map(json.loads, lines) if route["id"] == sandbox]
    assert (route["state"], route["in_flight"], route["waiting"]) == ("running", 0, 0)
    assert route["ports"] == [{"port": 3000, "is_public": False, "shares": 0}]
    assert f"{sandbox}  running" in server.command("plane", "routes").stdout
    with server.client() as api:
        api.get("/sandboxes")
        found = json.loads(server.command("plane", "conns", "--json").stdout)
    assert found["connections"] >= 1
    assert [client["address"] for client in found["clients"]] == ["127.0.0.1"]
    assert "connections" in server.command("plane", "conns").stdout


def test_without_a_server_the_commands_say_so(tmp_path: Path) -> None:
    nobody = Server(tmp_path / "home")
    for action in ("restart", "drain"):
        done = nobody.command("plane", action)
        assert (done.returncode, done.stderr) == (
            1,
            "sandgate: no server runs here; use the settings that it was started with\n",
        )
