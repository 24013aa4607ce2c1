"""A headless Chromium, driven over its DevTools protocol; no more than tests need.

with Browser(tmp_path) as browser:
    page = browser.open("http://localhost:8080/")
    page.wait_for("document.title === 'Hello'")
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

#: A cold start of the browser on a busy machine.
_START_S = 60.0
_PATIENCE_S = 60.0
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--remote-debugging-port=0",
)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; None if it throws, as it may while a page loads."""
        arguments = {"expression": expression, "returnByValue": True}
        return self._browser.call("Runtime.evaluate", arguments, self._session)["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + _PATIENCE_S
        while not self.evaluate(expression):
            text = self.evaluate("document.documentElement.outerHTML")
            assert time.monotonic() < until, f"{expression} does not come true in\n{text}"
            time.sleep(0.02)


class Browser:
    """One that runs. directory: for its profile and log."""

    def __init__(self, directory: Path) -> None:
        self._profile = directory / "chromium"
        self._log = directory / "chromium.log"
        self._stack = contextlib.ExitStack()
        self._last_id = 0
        self._process: subprocess.Popen[bytes]
        self._socket: ClientConnection

    def __enter__(self) -> Self:
        # Chromium's own sandbox does not start as root.
        own = ("--no-sandbox",) if os.geteuid() == 0 else ()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["chromium", *_FLAGS, *own, f"--user-data-dir={self._profile}", "about:blank"],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with contextlib.ExitStack() as stack:
            stack.callback(self._kill)
            self._socket = stack.enter_context(connect(self._address(), max_size=None, proxy=None))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _kill(self) -> None:
        """With its helpers, which are many."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _address(self) -> str:
        until = time.monotonic() + _START_S
        while True:
            text = self._log.read_text(errors="replace")
            if found := re.search(r"DevTools listening on (ws://\S+)", text):
                return found[1]
            assert self._process.poll() is None, text
            assert time.monotonic() < until, text
            time.sleep(0.02)

    def open(self, url: str) -> Page:
        """A new tab."""
        target = self.call("Target.createTarget", {"url": url})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session)

    def call(self, method: str, arguments: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": arguments}
        self._socket.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        while True:
            answer = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
