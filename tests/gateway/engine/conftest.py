"""An engine on a real database. Tests that run machines take `engine`, those that do not take `offline`."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from gateway.commands import CreateSandbox, StreamEvents
from gateway.engine import Context, Engine
from gateway.engine.plan import Origin, plan
from gateway.events import EventLog
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.settings import Settings
from gateway.store import Database, migrate, open_database, sandboxes, workspaces
from tests.support.host import HostProcess, machine_spec
from vmm.client import HostClient
from vmm.drivers.fake import FakeDriver
from vmm.host.config import HostConfig, PoolConfig
from vmm.host.server import serve


@dataclass
class Recorder:
    """Routes to nowhere, remembered."""

    pushed: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    pokes: int = 0

    async def push(self, sandbox_id: str) -> None:
        self.pushed.append(sandbox_id)

    async def push_new(self, sandbox: Sandbox, version: int) -> None:
        self.pushed.append(sandbox.id)

    async def drop(self, sandbox_id: str, version: int) -> None:
        self.pushed.append(f"{sandbox_id} dropped")

    async def push_running(self, sandbox_id: str, address: str) -> None:
        self.pushed.append(f"{sandbox_id} running at {address}")

    async def push_key(self, key_id: str) -> None:
        self.keys.append(key_id)

    def poke(self) -> None:
        self.pokes += 1


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, default_template="default")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Migrated once; a copy takes a hundredth of the time."""
    path = tmp_path_factory.mktemp("sql") / "empty.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
async def database(tmp_path: Path, empty_database: Path) -> AsyncIterator[Database]:
    path = shutil.copy(empty_database, tmp_path / "sandgate.db")
    database = open_database(f"sqlite:///{path}")
    yield database
    await database.close()


@pytest.fixture
def routes() -> Recorder:
    return Recorder()


@pytest.fixture
async def principal(database: Database) -> Principal:
    return await make_principal(database, "first")


@pytest.fixture
async def stranger(database: Database) -> Principal:
    return await make_principal(database, "second")


async def make_principal(database: Database, workspace: str) -> Principal:
    workspace_id = await database.write(partial(workspaces.ensure, name=workspace))
    return Principal(workspace_id, None, frozenset())


@pytest.fixture
async def offline(tmp_path: Path, database: Database, routes: Recorder, settings: Settings) -> AsyncIterator[Engine]:
    """An engine whose host is not there."""
    async with HostClient(str(tmp_path / "no.sock")) as host:
        yield Engine(Context(database, host, routes, EventLog(database, routes.poke), settings))


async def event_types(engine: Engine, principal: Principal, resource_id: str) -> list[str]:
    """What has happened to something, in order."""
    pages = await engine.stream_events(principal, StreamEvents(0, resource_id=resource_id))
    return [event.type async for page in pages for event in page]


async def put_running(engine: Engine, principal: Principal, **fields: object) -> Sandbox:
    """A sandbox that SQL takes for running; there is no machine behind it."""
    command = CreateSandbox(effect_id=str(uuid.uuid4()))
    wanted = plan(principal, command, engine.context.settings, origin=Origin("default", "default"), now=time.time())
    running = replace(wanted, state=SandboxState.RUNNING, started_at=time.time(), address="10.0.0.2")
    sandbox = replace(running, **fields)  # type: ignore[arg-type]
    await engine.context.database.write(partial(sandboxes.insert, sandbox=sandbox))
    return sandbox


@pytest.fixture
def pool() -> PoolConfig:
    """What hostd makes ahead: nothing, unless a module says otherwise."""
    return PoolConfig()


@pytest.fixture
async def driver(tmp_path: Path, pool: PoolConfig) -> AsyncIterator[FakeDriver]:
    """The driver behind a hostd that listens on `hostd.sock`."""
    driver = FakeDriver()
    ready = asyncio.Event()
    config = HostConfig(
        home=tmp_path, socket_path=tmp_path / "hostd.sock", memory_reserve_mib=0, disk_reserve_mib=0, pool=pool
    )
    hostd = asyncio.create_task(serve(config, driver, ready=ready.set))
    async with asyncio.timeout(60):
        await ready.wait()
    yield driver
    hostd.cancel()
    await asyncio.wait([hostd])


@pytest.fixture
async def engine(
    tmp_path: Path, database: Database, routes: Recorder, settings: Settings, driver: FakeDriver
) -> AsyncIterator[Engine]:
    """An engine with a host of fake machines."""
    async with HostClient(str(tmp_path / "hostd.sock")) as host:
        engine = Engine(Context(database, host, routes, EventLog(database, routes.poke), settings))
        yield engine
        await engine.close()


@pytest.fixture(scope="session")
def host_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A hostd with gVisor machines, shared by the tests of this process."""
    process = HostProcess(tmp_path_factory.mktemp("hostd"))
    asyncio.run(process.start())
    yield process
    asyncio.run(process.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def machine_id(host_process: HostProcess) -> str:
    """A gVisor machine, shared by the tests of a module: each makes directories and processes of its own."""
    spec = machine_spec()

    async def create() -> None:
        async with host_process.client() as host:
            await host.create_machine(spec)

    asyncio.run(create())
    return spec.id


@pytest.fixture
async def real(
    host_process: HostProcess, database: Database, routes: Recorder, settings: Settings
) -> AsyncIterator[Engine]:
    """An engine with a host of gVisor machines."""
    async with host_process.client() as host:
        own = replace(settings, default_template="miosa-sandbox")
        engine = Engine(Context(database, host, routes, EventLog(database, routes.poke), own))
        yield engine
        await engine.close()


@pytest.fixture
async def box(real: Engine, principal: Principal, machine_id: str) -> Sandbox:
    """The module's machine as a sandbox of the caller."""
    return await put_running(real, principal, id=machine_id)
