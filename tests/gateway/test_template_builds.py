"""Templates built for real: packages, files, commands and a start command in a gVisor sandbox, without a network.

The packages are made in the build itself: a wheel in a directory that pip is told of, a Debian package in a repository
of files. So pip and apt resolve names, download and install as they do elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.server import ServerProcess

#: Builds share the machine with whatever else is tested.
PATIENCE_S = 240.0
PORT = 8000

MAKE_PACKAGES = '''
import hashlib, os, pathlib, subprocess, zipfile

wheels = pathlib.Path("/srv/wheels")
wheels.mkdir(parents=True)
with zipfile.ZipFile(wheels / "greeting-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("greeting.py", """
import http.server, os, uuid
BORN = str(uuid.uuid4())

class Greeter(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.environ['GREETING']} {BORN}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def main():
    http.server.ThreadingHTTPServer(("", 8000), Greeter).serve_forever()
""")
    info = "greeting-1.0.dist-info"
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: greeting\\nVersion: 1.0\\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    wheel.writestr(f"{info}/RECORD", "")

repository = pathlib.Path("/srv/repository")
tree = pathlib.Path("/srv/greeter")
(tree / "DEBIAN").mkdir(parents=True)
(tree / "usr/bin").mkdir(parents=True)
control = "Package: greeter\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: x <x@example.com>\\nDescription: greets\\n"
(tree / "DEBIAN/control").write_text(control)
program = tree / "usr/bin/greeter"
program.write_text("#!/bin/sh\\nexec python3 -c 'import greeting; greeting.main()'\\n")
program.chmod(0o755)
repository.mkdir()
subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, repository / "greeter.deb"], check=True)
content = (repository / "greeter.deb").read_bytes()
digest = hashlib.sha256(content).hexdigest()
index = f"{control}Filename: ./greeter.deb\\nSize: {len(content)}\\nSHA256: {digest}\\n"
(repository / "Packages").write_text(index)
for source in pathlib.Path("/etc/apt/sources.list.d").glob("*"):
    source.unlink()
pathlib.Path("/etc/apt/sources.list").write_text("deb [trusted=yes] file:/srv/repository ./\\n")
'''

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
SPEC: dict[str, Any] = {
    "from": "miosa-sandbox",
    "memoryMib": 256,
    "env": {**OFFLINE, "GREETING": "hello"},
    "steps": [
        {"file": "/srv/make.py", "content": MAKE_PACKAGES, "mode": "700"},
        {"run": "python3 /srv/make.py"},
        {"pip": ["greeting==1.0"]},
        {"apt": ["greeter"]},
        {"run": "stat --format=%a /srv/make.py && pwd && id --user --name"},
    ],
    "startCmd": "greeter",
    "readiness_probe": {"type": "http", "port": PORT, "timeout_sec": 60},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("builds"), rate_limit_per_minute=6000) as server:
        yield server


def client(server: ServerProcess) -> httpx.Client:
    headers = {"authorization": f"Bearer {server.api_key}"}
    return httpx.Client(base_url=server.base_url, headers=headers, timeout=60)


@pytest.fixture
def api(server: ServerProcess) -> Iterator[httpx.Client]:
    with client(server) as api:
        yield api


def make(api: httpx.Client, name: str, spec: dict[str, Any]) -> None:
    made = api.post("/sandbox-templates", json={"name": name, "build_spec": spec})
    assert made.status_code == 201, made.text


def newest(api: httpx.Client, name: str) -> dict[str, Any]:
    build: dict[str, Any] = api.get(f"/sandbox-templates/{name}/builds").json()["data"][0]
    return build


def log(api: httpx.Client, build: dict[str, Any]) -> list[str]:
    answer = api.get(f"/sandbox-template-builds/{build['id']}/logs", params={"lines": 2000})
    lines: list[str] = answer.json()["lines"]
    return lines


def ended(api: httpx.Client, name: str) -> dict[str, Any]:
    until = time.monotonic() + PATIENCE_S
    while (build := newest(api, name))["state"] not in {"ready", "failed", "cancelled"}:
        assert time.monotonic() < until, build
        time.sleep(0.2)
    return build


def sandbox_from(api: httpx.Client, template: str, **fields: Any) -> str:
    made = api.post("/sandboxes", json={"template_id": template, "timeout_sec": 600, **fields})
    assert made.status_code == 201, made.text
    return f"/sandboxes/{made.json()['id']}"


def visit(api: httpx.Client, sandbox: str) -> str:
    """What the program in the sandbox says through its preview."""
    preview = api.post(f"{sandbox}/previews", json={"port": PORT, "visibility": "public"})
    assert preview.status_code == 201, preview.text
    name = urlsplit(preview.json()["url"]).netloc
    answer = httpx.get(f"http://127.0.0.1:{api.base_url.port}/", headers={"host": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_packages_files_commands_and_a_start_command(api: httpx.Client) -> None:
    make(api, "greeter", SPEC)
    build = ended(api, "greeter")
    said = log(api, build)
    assert build["state"] == "ready", said
    assert "Successfully installed greeting-1.0" in "\n".join(said)
    assert "Setting up greeter (1.0) ..." in said
    assert {"700", "/workspace", "root"} <= set(said)
    first, second = sandbox_from(api, "greeter"), sandbox_from(api, "greeter")
    try:
        # Not started in each of them: saved once, with what it held in its memory.
        greetings = {visit(api, first), visit(api, second)}
        assert len(greetings) == 1
        assert greetings.pop().startswith("hello ")
        result = api.post(
            f"{first}/exec", json={"command": "dpkg-query --show greeter && pip list 2>&1 | grep greeting"}
        )
        assert result.status_code == 200, result.text
        assert "greeter\t1.0" in result.text.replace("\\t", "\t")
    finally:
        for sandbox in (first, second):
            api.delete(sandbox)


@pytest.mark.parametrize(("kind", "said"), [("pip", "No matching distribution found"), ("apt", "Unable to locate")])
def test_a_package_that_cannot_be_had_is_said_plainly(api: httpx.Client, kind: str, said: str) -> None:
    steps = [*SPEC["steps"][:2], {kind: ["no-such-package"]}]
    make(api, f"lacks-{kind}", {"memoryMib": 256, "env": OFFLINE, "steps": steps})
    build = ended(api, f"lacks-{kind}")
    assert (build["state"], build["error_code"]) == ("failed", "step_failed")
    assert said in "\n".join(log(api, build))
    refused = api.post("/sandboxes", json={"template_id": f"lacks-{kind}"})
    assert refused.status_code in {404, 409}, refused.text


def test_a_build_outlives_the_server(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "home") as server:
        with client(server) as api:
            make(api, "slow", {"memoryMib": 256, "commands": ["echo begun; sleep 15; echo done"]})
            until = time.monotonic() + PATIENCE_S
            while "begun" not in log(api, newest(api, "slow")):
                assert time.monotonic() < until
                time.sleep(0.1)
        server.stop()
        server.start()
        with client(server) as api:
            build = ended(api, "slow")
            said = log(api, build)
            assert build["state"] == "ready", said
            assert said.count("begun") == 2
            assert "the server stopped during the build; it begins again" in said
            sandbox = sandbox_from(api, "slow")
            assert api.delete(sandbox).status_code in {200, 202, 204}
