"""kill -9 of every part of the server, under load: nothing runs twice, nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server import ServerProcess
from tests.vmm.gvisor.support import traces

KEYS = 500
CLIENTS = 6
#: What a client may see while a part is down; a careful one asks again with the same idempotency key.
PASSING = {409, 429, 500, 502, 503, 504}

#: What the command line of each part's processes has in it.
PARTS = {"api": "run-api", "hostd": "run-hostd", "plane": "sandgate-plane"}

SMALL = {"memory_mb": 256, "timeout_sec": 3600}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("kills")
    with ServerProcess(home, rate_limit_per_minute=0, sandboxes_per_workspace=1000) as server:
        yield server


@contextlib.asynccontextmanager
async def api(server: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(base_url=server.base_url, headers=headers, timeout=30, trust_env=False) as client:
        yield client


async def lasting(client: httpx.AsyncClient, method: str, path: str | httpx.URL, **options) -> httpx.Response:
    """Ask until an answer comes that asking again would not change."""
    async with asyncio.timeout(180):
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await client.request(method, path, **options)
                if response.status_code not in PASSING:
                    return response
            await asyncio.sleep(0.1)


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 120) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"not within {timeout_s} s: {what}")


def processes(server: ServerProcess, part: str) -> list[psutil.Process]:
    """The live processes of one part; of the API, its manager and its workers."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(PARTS[part] in word for word in process.cmdline()):
                found.append(process)
    return found


def kill(server: ServerProcess, part: str, rng: random.Random) -> None:
    victims = processes(server, part)
    if victims:
        with contextlib.suppress(psutil.Error):
            rng.choice(victims).kill()


async def _grown(made: dict[str, str], by: int) -> None:
    goal = len(made) + by
    while len(made) < goal:
        await asyncio.sleep(0.05)


async def create_and_destroy(client: httpx.AsyncClient, key: str) -> str:
    """One sandbox by one key, asked for twice; returns its id."""
    headers = {"idempotency-key": key}
    created = await lasting(client, "POST", "/sandboxes", json=SMALL, headers=headers)
    assert created.status_code == 201, created.text
    again = await lasting(client, "POST", "/sandboxes", json=SMALL, headers=headers)
    assert again.content == created.content
    sandbox_id = created.json()["id"]
    gone = await lasting(client, "DELETE", f"/sandboxes/{sandbox_id}")
    assert gone.status_code == 204, gone.text
    return sandbox_id


async def test_every_key_makes_one_sandbox_while_parts_are_killed(server: ServerProcess) -> None:
    seed = uuid.uuid4().int & 0xFFFF_FFFF
    print(f"seed {seed}")
    rng = random.Random(seed)
    keys = iter([f"key-{number}" for number in range(KEYS)])
    made: dict[str, str] = {}
    async with api(server) as client:

        async def work() -> None:
            for key in keys:
                made[key] = await create_and_destroy(client, key)

        async def disturb() -> None:
            while True:
                # By what is done, not by the clock: a slow machine would spend all its time on starting parts.
                await _grown(made, rng.randint(1, 8))
                await asyncio.sleep(rng.uniform(0, 0.5))
                kill(server, rng.choice(list(PARTS)), rng)

        disturber = asyncio.create_task(disturb())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(work())
        finally:
            disturber.cancel()

        assert len(made) == len(set(made.values())) == KEYS
        destroyed = set()
        for page in range(1, KEYS // 100 + 2):
            listed = await lasting(client, "GET", f"/sandboxes?state=destroyed&page={page}&page_size=100")
            destroyed |= {sandbox["id"] for sandbox in listed.json()["data"]}
        assert destroyed <= set(made.values()), "a sandbox that no key asked for"
        lost = [await lasting(client, "GET", f"/sandboxes/{each}") for each in set(made.values()) - destroyed]
        assert not lost, [answer.text for answer in lost]
        assert (await lasting(client, "GET", "/sandboxes")).json()["page"]["total"] == 0


async def test_sandboxes_outlive_every_part_of_the_server(server: ServerProcess) -> None:
    async with api(server) as client:
        sandbox = (await lasting(client, "POST", "/sandboxes", json=SMALL)).json()
        base = f"/sandboxes/{sandbox['id']}"
        serve = "cd /workspace && python3 -m http.server 3000"
        count = "i=0; while sleep 0.1; do i=$((i+1)); echo $i > /workspace/beat; done"
        started = [
            (await lasting(client, "POST", f"{base}/processes", json={"command": command})).json()
            for command in (serve, count)
        ]
        preview = await lasting(client, "POST", f"{base}/previews", json={"port": 3000, "visibility": "public"})
        url = httpx.URL(preview.json()["url"])
        through_plane = url.copy_with(host="127.0.0.1", path="/beat")

        async def beat() -> int:
            answer = await lasting(client, "GET", through_plane, headers={"host": url.netloc.decode()})
            return int(answer.text or 0) if answer.status_code == 200 else 0

        async def beats() -> bool:
            return await beat() > 0

        await until(beats, "the preview serves the counter")
        for part in PARTS:
            before = await beat()
            for process in processes(server, part):
                with contextlib.suppress(psutil.Error):
                    process.kill()

            async def grows(before: int = before) -> bool:
                return await beat() > before + 5

            await until(grows, f"the counter goes on after {part} was killed")
            for process in started:
                now = await lasting(client, "GET", f"{base}/processes/{process['pid']}")
                assert (now.status_code, now.json()["state"]) == (200, "running"), f"{part}: {now.text}"
            echoed = await lasting(client, "POST", f"{base}/exec", json={"cmd": ["echo", part]})
            assert echoed.json()["stdout"] == f"{part}\n"
        assert (await lasting(client, "DELETE", base)).status_code == 204


async def test_an_exec_with_a_key_runs_once_while_the_api_is_killed(server: ServerProcess) -> None:
    rng = random.Random(2)
    async with api(server) as client:
        sandbox = (await lasting(client, "POST", "/sandboxes", json=SMALL)).json()
        base = f"/sandboxes/{sandbox['id']}"
        for round_ in range(10):
            body = {"command": "echo x >> /workspace/log; sleep 0.5; wc -l < /workspace/log"}
            asked = asyncio.create_task(
                lasting(client, "POST", f"{base}/exec", json=body, headers={"idempotency-key": f"run-{round_}"})
            )
            await asyncio.sleep(rng.uniform(0, 0.6))
            kill(server, rng.choice(["api", "hostd", "plane"]), rng)
            assert int((await asked).json()["stdout"]) == round_ + 1
        assert (await lasting(client, "DELETE", base)).status_code == 204


async def test_nothing_is_left_when_the_server_stops(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "home") as server:
        async with api(server) as client:
            for _ in range(3):
                assert (await lasting(client, "POST", "/sandboxes", json=SMALL)).status_code == 201
            assert {"processes", "interfaces", "cgroups"} <= traces(server.home).keys()
            kill(server, "hostd", random.Random(3))
    assert traces(server.home) == {}
