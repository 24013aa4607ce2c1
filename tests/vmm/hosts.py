"""hostd with the fake driver, in this process or as a process that can be killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmm.drivers.fake import FakeDriver
from vmm.host.config import HostConfig
from vmm.host.server import serve

_PROGRAM = """
import asyncio, sys
from pathlib import Path
from vmm.drivers.fake import FakeDriver
from vmm.host.config import HostConfig
from vmm.host.server import serve
home = Path(sys.argv[1])
config = HostConfig(home=home, socket_path=Path(sys.argv[2]), memory_reserve_mib=0, disk_reserve_mib=0)
asyncio.run(serve(config, FakeDriver(), ready=lambda: print("ready", flush=True)))
"""


def configuration(home: Path, socket_path: Path, **settings: Any) -> HostConfig:
    roomy = {"machines_max": 5_000, "memory_reserve_mib": 0, "disk_reserve_mib": 0, "hibernate_below_mib": 0}
    return HostConfig(home=home, socket_path=socket_path, **{**roomy, **settings})


@asynccontextmanager
async def host_in_process(home: Path, socket_path: Path, driver: FakeDriver, **settings: Any) -> AsyncIterator[None]:
    """hostd in a task of this loop, so that the test can reach its driver. settings: of `HostConfig`."""
    ready = asyncio.Event()
    task = asyncio.create_task(serve(configuration(home, socket_path, **settings), driver, ready=ready.set))
    waiting = asyncio.create_task(ready.wait())
    try:
        async with asyncio.timeout(60):
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.wait([task, waiting])


@dataclass
class HostProcess:
    """hostd as a process of its own."""

    home: Path
    socket_path: Path
    process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _PROGRAM, str(self.home), str(self.socket_path), stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            assert await self.process.stdout.readline() == b"ready\n"

    async def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
            self.process = None
