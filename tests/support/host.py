"""A real hostd for tests: its own process, data directory, address block and rules; the template cache is shared.

async with HostProcess(tmp_path) as host, host.client() as client:
await client.create_machine(machine_spec())
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import native
from vmm.client import HostClient
from vmm.templates.store import TemplateStore
from vmm.types import MachineSpec

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SANDGATE_CACHE", "/var/cache/sandgate"))

_READY_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 60


def machine_spec(**fields: Any) -> MachineSpec:
    """A small machine from the default template."""
    given = {"id": str(uuid.uuid4()), "template": "miosa-sandbox", "hostname": "box", "memory_mib": 512, **fields}
    return MachineSpec(**given)


class HostProcess:
    """hostd as a subprocess. `stop` ends it in order, `kill` does not; `start` may follow either."""

    def __init__(
        self, home: Path, *, agent: Path | None = None, host: dict[str, Any] | None = None, **gvisor: Any
    ) -> None:
        self.home = home
        # pytest's directories may be too deep for the 107 bytes of a Unix socket's address.
        self._sockets = Path(tempfile.mkdtemp(prefix="sg-"))
        self.socket_path = self._sockets / "hostd.sock"
        self.log_path = home / "hostd.log"
        self.process: subprocess.Popen[bytes] | None = None
        agent = agent or native.agent_path()
        TemplateStore(CACHE, agent).ensure(lambda line: print(line, file=sys.stderr))
        self._settings = {
            "host": {"home": str(home), "socket_path": str(self.socket_path), **(host or {})},
            "templates": {"cache": str(CACHE), "agent": str(agent)},
            "gvisor": {"pool_size": 2, **gvisor},
        }

    def client(self) -> HostClient:
        """A client of it, to be closed by the caller."""
        return HostClient(str(self.socket_path))

    @property
    def pid(self) -> int:
        """Process id of the running hostd."""
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Start it and wait until it serves."""
        self.process = process = await asyncio.to_thread(self._spawn)
        assert process.stdout is not None
        async with asyncio.timeout(_READY_TIMEOUT_S):
            line = await asyncio.to_thread(process.stdout.readline)
        if line.strip() != b"ready":
            raise RuntimeError(f"hostd did not start:\n{self.log_path.read_text()[-4000:]}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.hostd", json.dumps(self._settings)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill it as a crash would; its machines go on."""
        self._signal(signal.SIGKILL)

    def bury(self) -> None:
        """Wait for a death that was arranged for it."""
        process, self.process = self.process, None
        assert process is not None
        assert process.wait(_STOP_TIMEOUT_S) == -signal.SIGKILL
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    async def stop(self) -> None:
        """Let it end its machines and itself."""
        if self.process is not None:
            await asyncio.to_thread(self._signal, signal.SIGTERM)

    def clean(self) -> None:
        """Remove the socket's directory, once it will not be started again."""
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        finally:
            self.clean()

    def _signal(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(number)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
