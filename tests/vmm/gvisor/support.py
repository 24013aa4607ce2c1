"""What the tests of real machines share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import native
from tests.support.host import CACHE
from vmm.agent import Agent
from vmm.client import HostClient
from vmm.drivers.gvisor.config import GvisorConfig, instance_id
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.guest import Command, Completed
from vmm.templates.store import TemplateStore
from vmm.types import MachineInfo

_RUN_TIMEOUT_S = 60
#: Version 2 and version 1. No deeper: the groups of other instances come and go.
_CGROUP_TREES = ("sandgate-", "*/sandgate-")

#: Tells for each "address:port" argument whether something answers there.
_PROBE = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def probe(target):
    address, port = target.split(":")
    try:
        with socket.create_connection((address, int(port)), 2) as s:
            s.settimeout(2)
            return f"{target} open"
    except OSError as error:
        return f"{target} closed ({error})"
with ThreadPoolExecutor(16) as pool:
    print("\\n".join(pool.map(probe, sys.argv[1:])))
"""


@dataclass
class Box:
    """A machine and the means to run things in it."""

    client: HostClient
    machine: MachineInfo

    @property
    def agent(self) -> Agent:
        return self.client.agent(self.machine.id)

    @property
    def address(self) -> str:
        assert self.machine.address is not None
        return self.machine.address

    async def run(self, *argv: str, user: str = "user", timeout_s: float = _RUN_TIMEOUT_S) -> Completed:
        command = Command(argv=argv, user=user, timeout_s=timeout_s)
        return await self.agent.run(str(uuid.uuid4()), command, deadline=time.monotonic() + timeout_s + 10)

    async def shell(self, line: str, user: str = "user", timeout_s: float = _RUN_TIMEOUT_S) -> str:
        done = await self.run("bash", "-c", line, user=user, timeout_s=timeout_s)
        return (done.stdout + done.stderr).decode(errors="replace")

    async def open_ports(self, *targets: str) -> set[str]:
        """Which of the "address:port" targets can be connected to from inside."""
        done = await self.run("python3", "-c", _PROBE, *targets)
        lines = done.stdout.decode().splitlines()
        assert len(lines) == len(targets), done.stderr.decode()
        return {line.split()[0] for line in lines if line.split()[1] == "open"}

    @asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[None]:
        """An HTTP server inside."""
        argv = ("python3", "-m", "http.server", str(port))
        server = await self.agent.exec(str(uuid.uuid4()), Command(argv=argv, background=True))
        try:
            await until(lambda: self._listens(port))
            yield
        finally:
            await server.signal("SIGKILL")
            server.close()

    async def _listens(self, port: int) -> bool:
        return port in {listening.port for listening in await self.agent.ports()}


async def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until `condition`, a plain or an async function, gives something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        if time.monotonic() > deadline:
            raise TimeoutError("the condition has not come true")
        await asyncio.sleep(0.02)


async def port_answers(address: str, port: int) -> bool:
    """Whether the host can connect."""
    try:
        async with asyncio.timeout(3):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


@contextmanager
def listening_everywhere() -> Iterator[int]:
    """A TCP service of the host on all its addresses; gives its port."""
    import socket

    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server.getsockname()[1]


@asynccontextmanager
async def opened_driver(home: Path, **options: Any) -> AsyncIterator[GvisorDriver]:
    """A driver in this process, of which nothing is left afterwards. options: as the driver takes them."""
    config = GvisorConfig.for_home(home, pool_size=1)
    driver = GvisorDriver(config, TemplateStore(CACHE, native.agent_path()), **options)
    await driver.open()
    await driver.sweep([])
    yield driver
    await driver.sweep([])
    await driver.close()
    await until(lambda: not traces(home))


def traces(home: Path) -> dict[str, list[str]]:
    """Everything on the host that belongs to the instance with this data directory, by kind."""
    import subprocess

    instance = instance_id(home)
    prefix = f"sg{instance[:6]}-"
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    found = {
        "processes": [pid for pid, line in processes() if instance in line],
        "interfaces": [path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(prefix)],
        "cgroups": [str(path) for tree in _CGROUP_TREES for path in Path("/sys/fs/cgroup").glob(tree + instance)],
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if instance in line],
        "loops": [path for path in _loop_files() if str(home) in path],
        "tables": [line for line in tables.splitlines() if instance in line],
        "run": [str(path) for path in Path("/run/sandgate").glob(f"{instance}*")],
    }
    return {kind: things for kind, things in found.items() if things}


def processes() -> Iterator[tuple[str, str]]:
    """Id and command line of every process of the host."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                yield entry.name, (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue


def _loop_files() -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            yield path.read_text().strip()
        except OSError:
            continue
