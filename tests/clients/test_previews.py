"""Previews of a real sandbox, as visitors see them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

VISITORS = 10


@pytest.fixture
def url(api: httpx.Client, sandbox: str) -> str:
    """A public preview with a web server behind it."""
    api.post(f"{sandbox}/processes", json={"command": "python3 -m http.server 8000"}).raise_for_status()
    waiting = "until curl -sf http://127.0.0.1:8000/ >/dev/null; do sleep 0.1; done"
    assert api.post(f"{sandbox}/exec", json={"command": waiting}).json()["exit_code"] == 0
    return str(api.post(f"{sandbox}/expose", json={"port": 8000}).json()["url"])


def visit(url: str) -> int:
    # Not every resolver knows the names below localhost.
    name = urlsplit(url)
    with httpx.Client(timeout=60, trust_env=False) as client:
        return client.get(f"http://127.0.0.1:{name.port}/", headers={"host": name.netloc}).status_code


@pytest.mark.parametrize("how", [{}, {"hibernate": True}], ids=["frozen", "hibernated"])
def test_visitors_wake_a_paused_sandbox(api: httpx.Client, sandbox: str, url: str, how: dict[str, Any]) -> None:
    assert visit(url) == 200
    assert api.post(f"{sandbox}/pause", json=how).json()["state"] == "paused"
    with ThreadPoolExecutor(VISITORS) as pool:
        assert set(pool.map(visit, [url] * VISITORS)) == {200}
    assert api.get(sandbox).json()["state"] == "running"
