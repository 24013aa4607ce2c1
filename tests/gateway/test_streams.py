"""Streams of a real server: nothing is lost and nothing comes twice, whichever part is killed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import orjson
import psutil
import pytest

from tests.support.server import ServerProcess

PATIENCE_S = 60.0
#: What the command line of each part's processes has in it.
PARTS = {"api": "run-api", "hostd": "run-hostd", "plane": "sandgate-plane"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("streams")
    with ServerProcess(home, rate_limit_per_minute=0, workers=2) as server:
        yield server


@pytest.fixture
async def api(server: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(base_url=server.base_url, headers=headers, timeout=30, trust_env=False) as client:
        yield client


class Follower:
    """A client that follows the events of this test's keys, and resumes where it was when its stream ends."""

    def __init__(self, api: httpx.AsyncClient, after: str, **parameters: Any) -> None:
        self.api = api
        self.last = after
        self.parameters = {"types": "api_key.*", **parameters}
        self.events: list[str] = []
        self.ids: list[str] = []
        self.streams = 0

    async def follow(self) -> None:
        while True:
            with contextlib.suppress(httpx.TransportError):
                await self._stream()
            await asyncio.sleep(0.05)

    async def _stream(self) -> None:
        headers = {"last-event-id": self.last}
        async with self.api.stream("GET", "/events/stream", headers=headers, params=self.parameters) as response:
            if response.status_code != 200:
                return
            assert "x-sandgate-stream" not in response.headers
            self.streams += 1
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    event = orjson.loads(line[6:])
                    assert event["event_id"] > self.last
                    self.last = event["event_id"]
                    self.ids.append(event["id"])
                    self.events.append(event["type"])

    async def has(self, count: int) -> None:
        await until(lambda: len(self.events) >= count, f"{count} events, not {len(self.events)}")


async def until(condition: Any, what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


@contextlib.asynccontextmanager
async def following(*followers: Follower) -> AsyncIterator[None]:
    """Have them follow, each from its first stream on."""
    tasks = [asyncio.create_task(one.follow()) for one in followers]
    try:
        await until(lambda: all(one.streams for one in followers), "every stream is open")
        yield
        failures = [task.exception() for task in tasks if task.done()]
        assert failures == []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def make_key(api: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Ask until there is an answer; one idempotency key makes one key."""
    headers = {"idempotency-key": str(time.time_ns())}
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                made = await api.post("/api-keys", json={"name": "test", **fields}, headers=headers)
                if made.status_code == 201:
                    return dict(made.json())
            await asyncio.sleep(0.05)


async def now(api: httpx.AsyncClient) -> str:
    """The id of the newest event."""
    made = await make_key(api)
    follower = Follower(api, "0", resource_id=made["id"])
    async with following(follower):
        await follower.has(1)
    return follower.last


def kill(server: ServerProcess, part: str) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(PARTS[part] in word for word in process.cmdline()):
                process.kill()


async def test_every_follower_gets_every_event(api: httpx.AsyncClient) -> None:
    start = await now(api)
    followers = [Follower(api, start) for _ in range(30)]
    async with following(*followers):
        made = [(await make_key(api))["id"] for _ in range(10)]
        for follower in followers:
            await follower.has(10)
            assert follower.ids == made
            assert follower.streams == 1


async def test_streams_outlive_the_api(server: ServerProcess, api: httpx.AsyncClient) -> None:
    follower = Follower(api, await now(api))
    async with following(follower):
        made = []
        for count in range(1, 9):
            made.append((await make_key(api))["id"])
            await follower.has(count)
            if count in (2, 5):
                kill(server, "api")
        assert follower.ids == made
        assert follower.streams == 1


async def test_streams_resume_after_the_plane_was_killed(server: ServerProcess, api: httpx.AsyncClient) -> None:
    follower = Follower(api, await now(api))
    async with following(follower):
        made = []
        for count in range(1, 9):
            made.append((await make_key(api))["id"])
            if count in (2, 5):
                kill(server, "plane")
        await follower.has(8)
        assert follower.ids == made
        assert follower.streams >= 2


async def test_a_revoked_key_loses_its_stream(server: ServerProcess, api: httpx.AsyncClient) -> None:
    made = await make_key(api)
    headers = {"authorization": f"Bearer {made['key']}"}
    async with (
        httpx.AsyncClient(base_url=server.base_url, headers=headers, timeout=30, trust_env=False) as other,
        other.stream("GET", "/events/stream") as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert await anext(lines) == ": open"
        assert (await api.delete(f"/api-keys/{made['id']}")).status_code == 204
        async with asyncio.timeout(PATIENCE_S):
            # It ends in order: anything else would be an exception.
            async for _ in lines:
                pass


async def test_a_ticket_opens_a_stream_that_goes_on(api: httpx.AsyncClient) -> None:
    ticket = (await api.post("/auth/sse-ticket", json={})).json()["ticket"]
    async with api.stream("GET", "/events", params={"ticket": ticket}, headers={"authorization": ""}) as response:
        assert response.status_code == 200
        made = await make_key(api)
        async with asyncio.timeout(PATIENCE_S):
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    assert orjson.loads(line[6:])["id"] == made["id"]
                    break


@pytest.fixture(scope="module")
def sandbox(server: ServerProcess) -> str:
    """The path of a sandbox."""
    headers = {"authorization": f"Bearer {server.api_key}"}
    made = httpx.post(f"{server.base_url}/sandboxes", json={}, headers=headers, timeout=60, trust_env=False)
    assert made.status_code == 201, made.text
    return f"/sandboxes/{made.json()['id']}"


async def frames(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    assert response.status_code == 200, await response.aread()
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield orjson.loads(line[6:])


async def run(api: httpx.AsyncClient, sandbox: str, command: str) -> list[dict[str, Any]]:
    async with (
        asyncio.timeout(PATIENCE_S),
        api.stream("POST", f"{sandbox}/exec/stream", json={"command": command}) as response,
    ):
        return [frame async for frame in frames(response)]


async def test_output_comes_in_lines_of_text(api: httpx.AsyncClient, sandbox: str) -> None:
    command = (
        r"printf 'a\tb\"c\\\xff\xe2\x82\xac\r\n\n\x1b[0m'; sleep 0.3; printf 'rest\xe2' >&2; sleep 0.3; kill -9 $$"
    )
    found = await run(api, sandbox, command)
    assert [(frame["type"], frame.get("line"), frame.get("stream")) for frame in found] == [
        ("stdout", 'a\tb"c\\\ufffd€\r\n', "stdout"),
        ("stdout", "\n", "stdout"),
        ("stdout", "\x1b[0m", "stdout"),
        ("stderr", "rest", "stderr"),
        ("stderr", "\ufffd", "stderr"),
        ("exit", None, None),
    ]
    ended = found[-1]
    assert (ended["exit_code"], ended["signal"], ended["reason"]) == (137, 9, "signaled")
    assert isinstance(ended["duration_ms"], int)


async def test_much_output_comes_whole(api: httpx.AsyncClient, sandbox: str) -> None:
    found = await run(api, sandbox, "seq 1 200000; seq 1 1000 >&2; exit 3")
    numbers = [str(number) + "\n" for number in range(1, 200_001)]
    # Where the output pauses, half a line goes out by itself.
    text = {name: "".join(frame["line"] for frame in found if frame["type"] == name) for name in ("stdout", "stderr")}
    assert text == {"stdout": "".join(numbers), "stderr": "".join(numbers[:1000])}
    assert found[-1]["exit_code"] == 3


async def test_output_goes_on_after_hostd_and_the_api_were_killed(
    server: ServerProcess, api: httpx.AsyncClient, sandbox: str
) -> None:
    command = "for i in $(seq 1 150); do echo $i; sleep 0.02; done"
    lines = []
    async with (
        asyncio.timeout(60),
        api.stream("POST", f"{sandbox}/exec/stream", json={"command": command, "timeout": 60}) as response,
    ):
        async for frame in frames(response):
            if frame["type"] == "stdout":
                lines.append(frame["line"])
            if len(lines) == 20 and frame["type"] == "stdout":
                kill(server, "api")
                kill(server, "hostd")
    # Whatever comes next finds the API back.
    await now(api)
    assert lines == [f"{number}\n" for number in range(1, 151)]
    assert (frame["type"], frame.get("exit_code")) == ("exit", 0)


async def test_a_download_goes_on_after_hostd_was_killed(
    server: ServerProcess, api: httpx.AsyncClient, sandbox: str
) -> None:
    numbers = "".join(f"{number}\n" for number in range(1, 3_000_001)).encode()
    await run(api, sandbox, "seq 1 3000000 > /workspace/numbers")
    found = bytearray()
    async with (
        asyncio.timeout(60),
        api.stream("GET", f"{sandbox}/fs/download", params={"path": "/workspace/numbers"}) as response,
    ):
        async for part in response.aiter_raw():
            if not found:
                kill(server, "api")
                kill(server, "hostd")
            found += part
    await now(api)
    assert bytes(found) == numbers


async def test_a_streamed_command_ends_with_the_plane(
    server: ServerProcess, api: httpx.AsyncClient, sandbox: str
) -> None:
    command = "trap '' TERM HUP; echo on; sleep 986"
    with contextlib.suppress(httpx.TransportError):
        async with api.stream("POST", f"{sandbox}/exec/stream", json={"command": command}) as response:
            async for frame in frames(response):
                assert frame["line"] == "on\n"
                kill(server, "plane")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                listed = (await api.get(f"{sandbox}/processes")).json()["data"]
                if not any(item["state"] == "running" for item in listed if "986" in item["command"]):
                    return
            await asyncio.sleep(0.05)


async def test_who_leaves_takes_the_command_along(server: ServerProcess, api: httpx.AsyncClient, sandbox: str) -> None:
    async def is_running() -> bool:
        listed = await api.get(f"{sandbox}/processes")
        return any(one["running"] and "987" in one["command"] for one in listed.json()["data"])

    async with api.stream("POST", f"{sandbox}/exec/stream", json={"command": "echo on; sleep 987"}) as response:
        assert (await anext(frames(response)))["line"] == "on\n"
        assert await is_running()
    async with asyncio.timeout(PATIENCE_S):
        while await is_running():
            await asyncio.sleep(0.05)
    admin = (await api.get(f"{server.admin_url}/metrics")).text
    assert "\nsandgate_plane_stream_outputs 0\n" in admin


async def test_a_client_that_does_not_read_holds_up_its_own_command_only(api: httpx.AsyncClient, sandbox: str) -> None:
    async with api.stream("POST", f"{sandbox}/exec/stream", json={"command": "yes; echo"}) as response:
        assert response.status_code == 200
        for _ in range(3):
            assert (await run(api, sandbox, "echo hello"))[0]["line"] == "hello\n"
