"""A real server for tests: `sandgate serve` with its own data directory on free ports; the template cache is shared.

with ServerProcess(tmp_path) as server:
    httpx.get(f"{server.base_url}/sandboxes", headers={"authorization": f"Bearer {server.api_key}"})
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]

#: The first start builds the template, which takes a minute or two.
_START_S = 600.0
_STOP_S = 90.0
_COMMAND_S = 60.0


class ServerProcess:
    """`sandgate serve`. `stop` ends it in order; leaving the context does too."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.log = home / "serve.log"
        self.port, admin_port = free_ports(2)
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self._environ = {
            **os.environ,
            "SANDGATE_HOME": str(home),
            "SANDGATE_LISTEN": f"127.0.0.1:{self.port}",
            "SANDGATE_ADMIN_LISTEN": f"127.0.0.1:{admin_port}",
            # Tests count sandboxes and the host's resources; those of the pool want one. Filling takes processor time.
            "SANDGATE_POOL_READY_MAX": "0",
            "SANDGATE_POOL_SHELLS_MAX": "0",
            "SANDGATE_BACKING_MIB": "0",
            **{f"SANDGATE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = ""
        self.api_key = ""

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._sandgate("serve"), cwd=ROOT, env=self._environ, stdout=log, stderr=log
            )
        until = time.monotonic() + _START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.logs()}")
            time.sleep(0.05)
        credentials = json.loads((self.home / "credentials.json").read_bytes())
        self.base_url, self.api_key = credentials["base_url"], credentials["api_key"]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Let it end its sandboxes and itself; its exit code, 0 if it did not run."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def kill(self) -> None:
        """Kill the supervisor, and it alone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another subcommand of `sandgate` with the same settings."""
        argv = self._sandgate(*arguments)
        return subprocess.run(
            argv, cwd=ROOT, env=self._environ, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    def make_key(self, workspace: str) -> str:
        """The secret of a new key in a workspace, which is made too if need be."""
        made = self.command("keys", "create", "--workspace", workspace)
        made.check_returncode()
        return next(word for word in made.stdout.split() if word.startswith("msk_"))

    def logs(self) -> str:
        """The end of what its processes wrote."""
        files = [self.log, *sorted((self.home / "logs").glob("*.log"))]
        return "\n".join(
            f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files if file.exists()
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.admin_url}/readyz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    @staticmethod
    def _sandgate(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "gateway", *arguments]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
