"""Saving and restoring real machines: what survives, what copies share, and what happens on faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

import native
from tests.support.host import CACHE
from tests.vmm.gvisor.support import traces, until
from vmm.agent import Agent
from vmm.drivers.base import ImageFiles, Placement, Saved, Shape
from vmm.drivers.gvisor import runsc
from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.disk import make_disk
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.errors import MachineError
from vmm.guest import Command
from vmm.images.manifest import Manifest
from vmm.images.store import ImageStore
from vmm.link import Link
from vmm.templates.store import TemplateStore

_SHAPE = Shape("miosa-sandbox", cpu_count=1.0, memory_mib=512, disk_mib=64)
_PORT = 8000
_MIB = 1024 * 1024

#: Writes numbered, checksummed lines to a disk and to memory, without a pause, and tells on a port how it is doing.
_WRITER = """
import hashlib, json, os, secrets, socket, threading, time

lock, lines, ticks = threading.Lock(), 0, 0
secret = secrets.token_hex(1 << 16)
digest = hashlib.sha256(secret.encode()).hexdigest()

def line(number):
    return f"{number} {hashlib.sha256(str(number).encode()).hexdigest()}\\n"

def write():
    global lines
    with open("/workspace/log", "w", 1) as disk, open("/dev/shm/log", "w", 1) as memory:
        while True:
            with lock:
                disk.write(line(lines))
                memory.write(line(lines))
                lines += 1
            time.sleep(0.002)

def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1

def is_whole(path):
    with open(path) as file:
        return file.readlines() == [line(number) for number in range(lines)]

def check():
    with lock:
        return {
            "lines": lines, "ticks": ticks, "digest": digest, "pid": os.getpid(),
            "disk": is_whole("/workspace/log"), "memory": is_whole("/dev/shm/log"),
            "heap": hashlib.sha256(secret.encode()).hexdigest() == digest,
            "deleted": not os.path.exists("/workspace/old"),
        }

open("/workspace/old", "w").close()
os.remove("/workspace/old")
for work in (write, tick):
    threading.Thread(target=work, daemon=True).start()
with socket.create_server(("0.0.0.0", 8000)) as server:
    while True:
        with server.accept()[0] as connection:
            connection.sendall(json.dumps(check()).encode())
"""


#: Echoes what it is sent, with one epoll for all connections; and is itself connected to its own loopback.
_ECHO = """
import selectors, socket
poll = selectors.EpollSelector()
server = socket.create_server(("0.0.0.0", 8000))
poll.register(server, selectors.EVENT_READ)
own = socket.create_connection(("127.0.0.1", 8000))
while True:
    for key, _ in poll.select():
        if key.fileobj is server:
            poll.register(server.accept()[0], selectors.EVENT_READ)
            continue
        try:
            data = key.fileobj.recv(100)
        except OSError:
            data = b""
        if data:
            key.fileobj.sendall(data)
        else:
            poll.unregister(key.fileobj)
            key.fileobj.close()
"""


@dataclass
class Unit:
    """A unit of the driver, and the means to talk to it."""

    driver: GvisorDriver
    id: str
    token: str
    address: str = ""

    async def shell(self, line: str) -> str:
        link = await Link.connect(lambda protocol: self.driver.dial(self.id, protocol), role="host", token=self.token)

        async def links(_: float) -> Link:
            return link

        try:
            async with asyncio.timeout(30):
                done = await Agent(links).run(str(uuid.uuid4()), Command(argv=["sh", "-c", line]))
        finally:
            link.close()
        return (done.stdout + done.stderr).decode()

    async def run_script(self, text: str) -> None:
        """Start a Python program that stays."""
        await self.shell(f"cat > /workspace/program.py <<'end'\n{text}\nend\nsetsid python3 /workspace/program.py &")

    async def echo(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the echo program that has been used."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(self.address, _PORT)
                    writer.write(b"hello")
                    assert await reader.readexactly(5) == b"hello"
                    return reader, writer
                await asyncio.sleep(0.01)

    async def report(self) -> dict[str, Any]:
        """What the writer says of itself; waits until it listens."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(self.address, _PORT)
                    report = await reader.read()
                    writer.close()
                    if report:
                        return dict(orjson.loads(report))
                await asyncio.sleep(0.01)

    async def save(self, directory: Path) -> ImageFiles:
        saved: Saved = await self.driver.save(self.id, directory)
        assert saved.size_bytes == sum(file.stat().st_size for file in directory.iterdir())
        by = (saved.template_digest, saved.runtime, saved.is_quiet)
        return ImageFiles("image", directory, self.token, _SHAPE, *by)


@dataclass
class Rig:
    """The driver of one test."""

    driver: GvisorDriver

    async def boot(self) -> Unit:
        unit = Unit(self.driver, str(uuid.uuid4()), secrets.token_hex(8))
        unit.address = (await self.driver.start(unit.id, _SHAPE, token=unit.token)).address
        await until(lambda: _answers(unit))
        return unit

    async def writer(self) -> Unit:
        """A unit that runs the writer."""
        unit = await self.boot()
        await unit.run_script(_WRITER)
        await unit.report()
        return unit

    async def prepare(self) -> str:
        shell = str(uuid.uuid4())
        await self.driver.prepare(shell, _SHAPE, token="unused")
        return shell

    async def restore(self, image: ImageFiles, shell: str | None = None) -> Unit:
        shell = shell or await self.prepare()
        placement: Placement = await self.driver.restore(shell, image)
        return Unit(self.driver, shell, image.token, placement.address)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    templates = TemplateStore(CACHE, native.agent_path())
    await asyncio.to_thread(templates.ensure, lambda line: print(line, file=sys.stderr))
    driver = GvisorDriver(GvisorConfig.for_home(tmp_path, pool_size=1), templates)
    await driver.open()
    await driver.sweep([])
    yield Rig(driver)
    await driver.sweep([])
    await driver.close()
    await until(lambda: not traces(tmp_path))


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    directory = tmp_path / "draft"
    directory.mkdir()
    return directory


async def test_a_copy_goes_on_where_it_was_saved(rig: Rig, draft: Path) -> None:
    unit = await rig.writer()
    before = await unit.report()
    image = await unit.save(draft)
    copies = [await rig.restore(image) for _ in range(2)]
    reports = [await each.report() for each in (unit, *copies)]
    for report in reports:
        assert report["disk"]
        assert report["memory"]
        assert report["heap"]
        assert report["deleted"]
        assert report["lines"] > before["lines"]
        assert report["ticks"] > before["ticks"]
        assert (report["digest"], report["pid"]) == (before["digest"], before["pid"])
    assert len({each.address for each in (unit, *copies)}) == 3
    # Each has gone its own way, and does so still.
    await copies[0].shell("echo mine > /workspace/mine")
    assert "No such file" in await copies[1].shell("cat /workspace/mine")
    assert (await unit.report())["lines"] > reports[0]["lines"]
    assert (await copies[1].report())["lines"] > reports[2]["lines"]


async def test_open_connections_are_reset_and_harm_nobody(rig: Rig, draft: Path) -> None:
    unit = await rig.boot()
    await unit.run_script(_ECHO)
    reader, writer = await unit.echo()
    line = await Link.connect(lambda protocol: rig.driver.dial(unit.id, protocol), role="host", token=unit.token)
    image = await unit.save(draft)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    await asyncio.wait_for(line.closed.wait(), 10)
    writer.close()
    for each in (unit, await rig.restore(image)):
        (await each.echo())[1].close()
        assert await each.shell("echo fine") == "fine\n"


async def test_a_machine_without_connections_is_saved_at_once(rig: Rig, tmp_path: Path) -> None:
    """By one checkpoint instead of two; what watches for connections has to go on all the same."""
    sandboxes = runsc.Runsc("runsc", GvisorConfig.for_home(tmp_path).run_dir / "machines")
    unit = await rig.boot()
    await unit.run_script(_ECHO.replace("own =", "# own ="))
    await unit.shell("while ! grep -q ':1F40' /proc/net/tcp; do sleep 0.05; done")
    for generation in range(2):
        (draft := tmp_path / f"draft{generation}").mkdir()
        image = await unit.save(draft)
        assert image.is_quiet
        copy = await rig.restore(image)
        for each in (unit, copy):
            (await each.echo())[1].close()
            assert await each.shell("echo fine") == "fine\n"
            await until(lambda unit=each.id: sandboxes.connections(unit) == 0)
        unit = copy


async def test_connections_within_a_machine_count_in_its_copies_too(rig: Rig, tmp_path: Path) -> None:
    """They came with the image, and gVisor does not know how many they were."""
    unit = await rig.boot()
    await unit.run_script(_ECHO)
    (await unit.echo())[1].close()
    for generation in range(2):
        (draft := tmp_path / f"draft{generation}").mkdir()
        image = await unit.save(draft)
        assert not image.is_quiet
        unit = await rig.restore(image)
        (await unit.echo())[1].close()


async def test_a_command_leaves_nothing_in_the_kernel(rig: Rig, tmp_path: Path) -> None:
    unit = await rig.boot()
    sizes = []
    for number in range(2):
        for _ in range(1 + 20 * number):
            await unit.shell("true")
        (draft := tmp_path / f"draft{number}").mkdir()
        await unit.save(draft)
        sizes.append((draft / "checkpoint.img").stat().st_size)
    assert sizes[1] - sizes[0] < 20 * 20_000


async def test_a_connection_attempt_without_an_answer_makes_it_fail_and_harms_nobody(rig: Rig, draft: Path) -> None:
    unit = await rig.writer()
    connect = "import socket; socket.create_connection(('10.255.255.1', 80))"
    await unit.shell(f'setsid python3 -c "{connect}" & while ! grep -q ":0000 02" /proc/net/tcp; do sleep 0.05; done')
    with pytest.raises(MachineError, match="snapshot_failed"):
        await rig.driver.save(unit.id, draft)
    assert not list(draft.iterdir())
    assert (await unit.report())["disk"]
    assert await unit.shell("echo fine") == "fine\n"


async def test_an_image_that_was_packed_and_sent_restores(rig: Rig, tmp_path: Path) -> None:
    unit = await rig.writer()
    here, there = (ImageStore(tmp_path / name, disk_mib_max=1000) for name in ("here", "there"))
    for store in (here, there):
        store.load()
    saved = await rig.driver.save(unit.id, here.draft("one"))
    here.publish(Manifest("one", unit.token, _SHAPE, saved.template_digest, saved.runtime, created_at=0.0))
    assert here.pack("one")
    exported = tmp_path / "exported"
    exported.touch()
    here.export("one", exported)
    there.import_("two", exported)
    for store, image in ((here, "one"), (there, "two")):
        with store.open(image) as files:
            report = await (await rig.restore(files)).report()
        assert report["disk"]
        assert report["memory"]
        assert report["heap"]


async def test_many_copies_start_at_once(rig: Rig, draft: Path) -> None:
    image = await (await rig.writer()).save(draft)
    shells = await asyncio.gather(*(rig.prepare() for _ in range(5)))
    copies = await asyncio.gather(*(rig.restore(image, shell) for shell in shells))
    reports = await asyncio.gather(*(copy.report() for copy in copies))
    assert all(report["disk"] and report["memory"] and report["heap"] for report in reports)
    assert len({copy.address for copy in copies}) == 5
    entropy = await asyncio.gather(*(copy.shell("head -c 16 /dev/urandom | od -An -tx1") for copy in copies))
    assert len(set(entropy)) == 5


async def test_a_copy_has_the_limits_of_its_shape(rig: Rig, draft: Path) -> None:
    unit = await rig.boot()
    await unit.shell("head -c 20000000 /dev/urandom > /workspace/first")
    copy = await rig.restore(await unit.save(draft))
    assert "No space left" in await copy.shell("head -c 60000000 /dev/zero > /workspace/second")
    assert int(await copy.shell("stat -c %s /workspace/first")) == 20_000_000
    for each in (unit, copy):
        assert (await rig.driver.stats(each.id)).memory_limit_bytes == _SHAPE.memory_mib * _MIB


async def test_an_image_just_written_counts_as_cache_and_memory_does_not(rig: Rig, draft: Path) -> None:
    unit = await rig.boot()
    before = await rig.driver.stats(unit.id)
    await unit.shell("head -c 40000000 /dev/urandom > /dev/shm/held")
    held = await rig.driver.stats(unit.id)
    assert held.memory_bytes - held.cached_bytes > before.memory_bytes - before.cached_bytes + 20_000_000
    await unit.save(draft)
    assert (await rig.driver.stats(unit.id)).cached_bytes > held.cached_bytes + 20_000_000


async def test_a_frozen_machine_is_saved_and_stays_frozen(rig: Rig, draft: Path) -> None:
    unit = await rig.writer()
    await rig.driver.freeze(unit.id)
    assert await rig.driver.reclaim(unit.id) > 0
    image = await unit.save(draft)
    used = (await rig.driver.stats(unit.id)).cpu_seconds
    assert (await (await rig.restore(image)).report())["disk"]
    assert (await rig.driver.stats(unit.id)).cpu_seconds == used
    await rig.driver.thaw(unit.id)
    assert (await unit.report())["disk"]


async def test_a_full_disk_leaves_the_machine_running_and_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    unit = await rig.writer()
    small = make_disk(tmp_path, 0)
    try:
        with pytest.raises(MachineError) as caught:
            await rig.driver.save(unit.id, Path(small.path))
        assert caught.value.code == "no_space"
        assert [path.name for path in Path(small.path).iterdir()] == ["lost+found"]
    finally:
        small.release()
    first, second = await unit.report(), await unit.report()
    assert second["disk"]
    assert second["lines"] >= first["lines"]


async def test_a_damaged_image_is_refused_and_leaves_nothing(rig: Rig, draft: Path) -> None:
    image = await (await rig.boot()).save(draft)
    saved = (draft / "checkpoint.img").read_bytes()
    (draft / "checkpoint.img").write_bytes(saved[: len(saved) // 2])
    shell = await rig.prepare()
    with pytest.raises(MachineError) as caught:
        await rig.driver.restore(shell, image)
    assert caught.value.code == "snapshot_corrupt"
    with pytest.raises(MachineError, match="machine_not_running"):
        await rig.driver.stats(shell)


@pytest.mark.parametrize("other", [{"template_digest": "0" * 64}, {"runtime": "20300101"}])
async def test_an_image_for_another_host_is_refused(rig: Rig, draft: Path, other: dict[str, str]) -> None:
    image = replace(await (await rig.boot()).save(draft), **other)
    with pytest.raises(MachineError) as caught:
        await rig.restore(image)
    assert caught.value.code == "snapshot_incompatible"


async def test_a_machine_that_dies_while_it_is_saved_leaves_nothing(rig: Rig, draft: Path, tmp_path: Path) -> None:
    unit = await rig.boot()
    await unit.shell("head -c 100000000 /dev/urandom > /dev/shm/ballast")
    saving = asyncio.create_task(rig.driver.save(unit.id, draft))
    await until((draft / "checkpoint.img").exists)
    for pid in map(int, traces(tmp_path)["processes"]):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"runsc-sandbox"):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(MachineError, match="snapshot_failed"):
        await saving
    assert not list(draft.iterdir())
    await rig.driver.wait(unit.id)


async def test_a_save_that_nobody_waits_for_leaves_nothing(rig: Rig, draft: Path) -> None:
    unit = await rig.writer()
    saving = asyncio.create_task(rig.driver.save(unit.id, draft))
    await until((draft / "checkpoint.img").exists)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert not list(draft.iterdir())
    assert (await unit.report())["disk"]


async def _answers(unit: Unit) -> bool:
    with contextlib.suppress(OSError):
        return await unit.shell("echo yes") == "yes\n"
    return False
