"""One real server for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.server import ServerProcess


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    # Four users of one workspace at once need more than the usual 300 requests a minute.
    with ServerProcess(tmp_path_factory.mktemp("clients"), rate_limit_per_minute=3000) as server:
        yield server


@pytest.fixture
def api(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {server.api_key}"}
    with httpx.Client(base_url=server.base_url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def sandbox(api: httpx.Client) -> Iterator[str]:
    made = api.post("/sandboxes", json={"timeout_sec": 900})
    assert made.status_code == 201, made.text
    path = f"/sandboxes/{made.json()['id']}"
    yield path
    api.delete(path)
