"""Every supported release of the `miosa` package against a real server, unmodified, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.server import ROOT, ServerProcess

VERSIONS = ["1.0.0", "1.1.0", "1.3.8", "2.19.2"]
SCENARIO = Path(__file__).with_name("scenario.py")

#: With the one each release makes, more than a page of the size clients get when they do not ask.
_CROWD = 24
_SCENARIO_S = 240


@pytest.fixture(scope="module")
def crowd(server: ServerProcess) -> Iterator[None]:
    headers = {"authorization": f"Bearer {server.api_key}"}
    with httpx.Client(base_url=server.base_url, headers=headers, timeout=120) as api, ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make_sandbox(api), range(_CROWD)))
        yield
        # Each would keep the processors a little busy for as long as the server runs.
        list(pool.map(lambda sandbox_id: api.delete(f"/sandboxes/{sandbox_id}"), made))


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Another server, which allows few requests."""
    with ServerProcess(tmp_path_factory.mktemp("strict"), driver="fake", rate_limit_per_minute=10) as server:
        yield server


@pytest.fixture(scope="module")
def runs(
    server: ServerProcess, strict_server: ServerProcess, crowd: None
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All releases at once: they wait for their sandboxes more than they work."""
    subprocess.run([ROOT / "scripts/client-envs"], check=True, stdout=sys.stderr, timeout=600)
    started = {version: start(version, server, strict_server) for version in VERSIONS}
    yield started
    for process in started.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


def make_sandbox(api: httpx.Client) -> str:
    made = api.post("/sandboxes", json={"memory_mb": 256, "timeout_sec": 1800})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def start(version: str, *servers: ServerProcess) -> subprocess.Popen[str]:
    python = ROOT / ".build/clients" / version / "bin/python"
    arguments = [word for server in servers for word in (server.base_url, server.api_key)]
    return subprocess.Popen([python, SCENARIO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_scenario(version: str, runs: dict[str, subprocess.Popen[str]], server: ServerProcess) -> None:
    output, _ = runs[version].communicate(timeout=_SCENARIO_S)
    assert runs[version].returncode == 0, f"{output}\n{server.logs()}"
    assert "ok destroy" in output
