"""Agents to test against: the real one as a process of this machine, and the fake one; the same tests run on both."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import native
from tests.vmm.faults import Relay
from vmm.agent import Agent
from vmm.drivers.base import Shape
from vmm.drivers.fake import FakeDriver
from vmm.link import Dial, Link, tcp


@dataclass
class Rig:
    """An agent behind a relay, and a provider of links that dials again as a client does.

    root: a directory that the agent's files may be made in.
    """

    dial: Dial
    token: str
    root: str
    next_budget: Callable[[], int | None] = lambda: None
    links_made: int = 0
    relay: Relay = field(init=False)
    link: Link | None = None

    def __post_init__(self) -> None:
        self.relay = Relay(self.dial, self._budget)
        self.agent = Agent(self.links)

    def _budget(self) -> int | None:
        return self.next_budget()

    async def links(self, deadline: float) -> Link:
        while self.link is None or not self.link.is_open:
            try:
                self.link = await Link.connect(self.relay.dial, role="host", token=self.token)
                self.links_made += 1
            except OSError:
                await asyncio.sleep(0.005)
        return self.link

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.relay.cut()


@asynccontextmanager
async def fake_agent() -> AsyncIterator[Rig]:
    driver = FakeDriver()
    await driver.open()
    try:
        await driver.start("m", Shape("default", 1.0, 512, 1024), token="t")
        rig = Rig(lambda protocol: driver.dial("m", protocol), "t", "/workspace")
        try:
            yield rig
        finally:
            rig.close()
    finally:
        await driver.close()


@asynccontextmanager
async def real_agent(directory: Path, *, hooks: Path = Path("/nonexistent")) -> AsyncIterator[Rig]:
    """Started for the test on a port of the system's choice, as the user who runs the tests."""
    token = secrets.token_hex(32)
    process = await asyncio.create_subprocess_exec(
        str(native.agent_path()),
        "--listen",
        "127.0.0.1:0",
        "--print-port",
        "--hooks",
        str(hooks),
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "SANDGATE_AGENT_TOKEN": token},
        cwd=directory,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        rig = Rig(tcp("127.0.0.1", port), token, str(directory))
        try:
            yield rig
        finally:
            rig.close()
    finally:
        # Told rather than killed: it ends the processes that tests have left.
        process.terminate()
        async with asyncio.timeout(60):
            await process.communicate()
