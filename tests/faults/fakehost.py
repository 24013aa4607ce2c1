"""hostd over fake units that live in a process of their own: a start takes milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import orjson

from tests.support.fuse import Fuse
from vmm.drivers.fake.keeper import KeptDriver
from vmm.host import crash
from vmm.host.config import HostConfig, PoolConfig
from vmm.host.server import serve
from vmm.types import MachineSpec


def _fork_server() -> ForkServerContext:
    """hostd starts in milliseconds when its modules are there already; what is killed is a process all the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Keeper:
    """The process that fake units live in."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sg-"))
        self.socket_path = self.directory / "keeper.sock"
        command = [sys.executable, "-m", "vmm.drivers.fake.keeper", str(self.socket_path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def ask(self, call: str, *arguments: Any) -> Any:
        """One call, without an event loop: hostd's stands still while its units are killed."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket_path))
            connection.sendall(orjson.dumps({"n": 1, "call": call, "arguments": arguments}) + b"\n")
            return orjson.loads(connection.makefile("rb").readline())["result"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self.directory)


def _run(home: str, socket_path: str, keeper_socket: str, pool: PoolConfig, ready: Any) -> None:
    """hostd, in a process of its own."""
    keeper = Keeper.__new__(Keeper)
    keeper.socket_path = Path(keeper_socket)
    crash.arm(Fuse(Path(home) / "fuse", lambda count: keeper.ask("end_newest", count)).on_point)
    config = HostConfig(
        home=Path(home),
        socket_path=Path(socket_path),
        memory_reserve_mib=0,
        disk_reserve_mib=0,
        hibernate_below_mib=0,
        pool=pool,
    )
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    asyncio.run(serve(config, KeptDriver(Path(keeper_socket)), ready=ready.set))


@dataclass
class FakeHost:
    """hostd over a keeper. `kill` is kill -9."""

    home: Path
    keeper: Keeper
    counter: Sequence[str] = ("count", "0.002")
    process: BaseProcess | None = None
    pool: PoolConfig = field(default_factory=PoolConfig)
    fuse: Fuse = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True)
        self.socket_path = self.keeper.directory / f"{uuid.uuid4().hex[:8]}.sock"
        self.fuse = Fuse(self.home / "fuse", lambda _: None)

    async def start(self) -> None:
        context = _fork_server()
        ready = context.Event()
        arguments = (str(self.home), str(self.socket_path), str(self.keeper.socket_path), self.pool, ready)
        self.process = context.Process(target=_run, args=arguments, daemon=True)
        self.process.start()
        assert await asyncio.to_thread(ready.wait, 20), "hostd did not start"

    async def has_died(self) -> None:
        """Wait for its death and bury it."""
        assert self.process is not None
        await asyncio.to_thread(self.process.join, 20)
        assert self.process.exitcode == -9
        self.process = None

    async def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.join, 20)
        self.socket_path.unlink(missing_ok=True)

    def units(self) -> set[str]:
        """All that the driver runs, whoever owns it."""
        return set(self.keeper.ask("units"))

    def alive(self) -> set[str]:
        return self.units()

    def spec(self, machine_id: str, **fields: Any) -> MachineSpec:
        return MachineSpec(id=machine_id, template="default", hostname="m", memory_mib=128, **fields)


@contextlib.contextmanager
def keeper() -> Iterator[Keeper]:
    """For the duration of a test."""
    process = Keeper()
    try:
        yield process
    finally:
        process.stop()
