"""A real browser at a preview: a development server in a sandbox, reloaded over its WebSocket when a file changes."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.browser import Browser
from tests.support.server import ROOT

APPLICATION = Path(__file__).parent / "vite"
MODULES = ROOT / ".build" / "vite" / "node_modules"
PORT = 5173


def archive() -> bytes:
    """The application with its development server: the default template has node, but no npm."""
    subprocess.run([ROOT / "scripts/browser-env"], check=True, stdout=sys.stderr, timeout=600)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        tar.add(APPLICATION, ".")
        tar.add(MODULES, "node_modules")
    return file.getvalue()


def write(api: httpx.Client, sandbox: str, path: str, content: bytes) -> None:
    api.put(f"{sandbox}/fs/upload", params={"path": path}, content=content).raise_for_status()


def run(api: httpx.Client, sandbox: str, line: str) -> None:
    done = api.post(f"{sandbox}/exec", json={"command": line}).json()
    assert done["exit_code"] == 0, (done, api.get(f"{sandbox}/logs").text)


def say(text: str) -> bytes:
    return f"export const text = {text!r};\n".encode()


@pytest.fixture
def url(api: httpx.Client, sandbox: str) -> str:
    """Where the development server is seen."""
    write(api, sandbox, "/workspace/app.tar.gz", archive())
    run(api, sandbox, "mkdir app && tar xzf app.tar.gz --no-same-owner -C app")
    write(api, sandbox, "/workspace/app/text.js", say("first"))
    # Without CI it ends when its input does, which it has none of.
    line = f"cd app && CI=true exec node node_modules/vite/bin/vite.js --host 0.0.0.0 --port {PORT} --strictPort"
    api.post(f"{sandbox}/processes", json={"command": line}).raise_for_status()
    run(api, sandbox, f"until curl -sf http://127.0.0.1:{PORT}/ >/dev/null; do sleep 0.1; done")
    return str(api.post(f"{sandbox}/expose", json={"port": PORT}).json()["url"])


def test_a_page_is_loaded_and_reloaded_hot(api: httpx.Client, sandbox: str, url: str, tmp_path: Path) -> None:
    assert (urlsplit(url).hostname or "").endswith(".sandbox.localhost")
    with Browser(tmp_path) as browser:
        page = browser.open(url)
        page.wait_for("document.querySelector('h1')?.textContent === 'first'")
        # Lost if the page were loaded anew.
        page.evaluate("window.isSame = true")
        for text in ("second", "third"):
            write(api, sandbox, "/workspace/app/text.js", say(text))
            page.wait_for(f"document.querySelector('h1')?.textContent === '{text}'")
        assert page.evaluate("window.isSame") is True
