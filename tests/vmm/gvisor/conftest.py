"""One real hostd for all tests of this directory; those that kill it or look at what it leaves start their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.host import HostProcess, machine_spec
from tests.vmm.gvisor.support import Box
from vmm.client import HostClient
from vmm.types import StopCause


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    process = HostProcess(tmp_path_factory.mktemp("host"))
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())
    process.clean()


@pytest.fixture
async def client(host: HostProcess) -> AsyncIterator[HostClient]:
    async with host.client() as client:
        yield client


@pytest.fixture
async def box(client: HostClient) -> AsyncIterator[Box]:
    """A running machine."""
    box = Box(client, await client.create_machine(machine_spec()))
    yield box
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)


@pytest.fixture
async def neighbour(client: HostClient) -> AsyncIterator[Box]:
    """Another running machine."""
    box = Box(client, await client.create_machine(machine_spec(hostname="neighbour")))
    yield box
    await client.destroy_machine(box.machine.id, StopCause.REQUESTED)
