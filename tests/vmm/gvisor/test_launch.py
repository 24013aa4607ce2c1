"""A sandbox that we start ourselves is shut in at least as tightly as one that `runsc create` has started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest

import native
from tests.support.host import CACHE
from tests.vmm.gvisor.support import opened_driver
from vmm.drivers.base import Shape
from vmm.drivers.gvisor import bundle, processes, runsc
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.drivers.gvisor.launch import Resources, launch
from vmm.errors import MachineError
from vmm.templates.store import TemplateStore

_SHAPE = Shape("miosa-sandbox", 1.0, 512, 1024)
_NOBODY = "65534"
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_OWN_NAMESPACES = {"user", "mnt", "ipc", "uts", "net"}


class Process:
    """A sandbox's kernel, as its host sees it."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        lines = (self._proc / "status").read_text().splitlines()
        self.status = {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}

    def capabilities(self, kind: str) -> int:
        return int(self.status[kind], 16)

    @property
    def namespaces(self) -> set[str]:
        """Those that are not the host's."""
        host = Path("/proc/self/ns")
        return {link.name for link in (self._proc / "ns").iterdir() if link.readlink() != (host / link.name).readlink()}

    @property
    def users(self) -> list[str]:
        """Which users and groups its user namespace knows, and who they are outside."""
        return [" ".join((self._proc / name).read_text().split()) for name in ("uid_map", "gid_map")]

    @property
    def tree(self) -> set[str]:
        """Every path below its root."""
        root = self._proc / "root"
        return {str(path.relative_to(root)) for path in root.rglob("*")}

    @property
    def mounts(self) -> dict[str, set[str]]:
        """Places and options of what is mounted for it."""
        rows = [line.split() for line in (self._proc / "mountinfo").read_text().splitlines()]
        return {row[4]: set(row[5].split(",")) for row in rows}

    @property
    def files(self) -> set[str]:
        """What its descriptors are of, without what tells two sandboxes apart."""
        return {_kind(str(link.readlink())) for link in (self._proc / "fd").iterdir()}

    @property
    def environment(self) -> set[str]:
        """Names of its variables."""
        return {line.partition("=")[0] for line in (self._proc / "environ").read_text().split("\0") if line}


def _kind(target: str) -> str:
    if target.startswith("/memfd:") or not target.startswith("/"):
        return target.partition(":[")[0]
    return "unnamed file" if target.endswith(" (deleted)") else Path(target).suffix or target


@pytest.fixture
def created(tmp_path: Path) -> Iterator[Process]:
    """The kernel of a sandbox that runsc itself has created and started, without a network."""
    program = runsc.find()
    assert program is not None
    template = TemplateStore(CACHE, native.agent_path())
    template.load()
    found = template.find(_SHAPE.template)
    config = bundle.make(_SHAPE, agent=found.agent, token="unused", image=found.image)
    config["annotations"]["dev.gvisor.spec.rootfs.overlay"] = f"dir={tmp_path}"
    (tmp_path / "root").mkdir()
    (tmp_path / "config.json").write_bytes(orjson.dumps(config))
    flags = [f"--root={tmp_path}/state", "--platform=systrap", "--network=none", "--overlay2=none", "--ignore-cgroups"]

    def command(*words: str) -> None:
        quiet = subprocess.DEVNULL
        subprocess.run([program, *flags, *words], check=True, timeout=60, stdin=quiet, stdout=quiet, stderr=quiet)

    command("create", f"--bundle={tmp_path}", "created")
    pid = orjson.loads(next((tmp_path / "state").glob("*.state")).read_bytes())["sandbox"]["pid"]
    try:
        command("start", "created")
        yield Process(pid)
    finally:
        # Not by `runsc delete`, which waits for somebody else to reap it.
        os.kill(pid, signal.SIGKILL)
        processes.reap_orphans(())


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[GvisorDriver]:
    async with opened_driver(tmp_path / "home") as driver:
        yield driver


@pytest.fixture
async def launched(driver: GvisorDriver) -> Process:
    """The kernel of a machine of ours."""
    placement = await driver.start(str(uuid.uuid4()), _SHAPE, token="unused")
    return Process(placement.facts["pid"])


async def test_it_has_no_capability_and_no_rights_of_root(launched: Process, created: Process) -> None:
    for kind in _CAPABILITIES:
        assert launched.capabilities(kind) == 0
    assert set(launched.status["Uid"].split() + launched.status["Gid"].split()) == {_NOBODY}
    assert launched.status["Groups"] == ""
    assert launched.status["NoNewPrivs"] == created.status["NoNewPrivs"] == "1"


async def test_its_system_calls_are_filtered(launched: Process, created: Process) -> None:
    assert launched.status["Seccomp"] == created.status["Seccomp"] == "2"
    # And one of ours before it, which leaves CPUID to the processor.
    assert int(launched.status["Seccomp_filters"]) == int(created.status["Seccomp_filters"]) + 1


async def test_it_has_namespaces_of_its_own(launched: Process, created: Process) -> None:
    assert launched.namespaces >= created.namespaces >= _OWN_NAMESPACES
    assert launched.users == [f"{_NOBODY} {_NOBODY} 1"] * 2


async def test_it_sees_no_file(launched: Process, created: Process) -> None:
    assert launched.tree <= created.tree <= {"etc", "etc/localtime", "proc"}
    assert list(launched.mounts) == list(created.mounts) == ["/"]
    assert launched.mounts["/"] >= created.mounts["/"] | {"ro", "nosuid", "nodev", "noexec"}


async def test_it_holds_only_what_it_needs(launched: Process, created: Process) -> None:
    # The log takes the place of a standard stream, the packet socket is the link.
    assert launched.files <= created.files | {".log", "socket"}
    assert launched.environment <= created.environment


async def test_what_hostd_has_open_stays_with_hostd(driver: GvisorDriver, tmp_path: Path) -> None:
    with (tmp_path / "secret.open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        placement = await driver.start(str(uuid.uuid4()), _SHAPE, token="unused")
    assert ".open" not in Process(placement.facts["pid"]).files


async def test_no_start_waits_for_a_grace_period(tmp_path: Path) -> None:
    setting = Path("/sys/kernel/rcu_expedited")
    before = setting.read_text()
    setting.write_text("0")
    try:
        async with opened_driver(tmp_path / "home"):
            assert setting.read_text().strip() == "1"
    finally:
        setting.write_text(before)


async def test_a_sandbox_that_does_not_start_says_why(driver: GvisorDriver, tmp_path: Path) -> None:
    with (tmp_path / "network").open("w") as no_network:
        parts = Resources(Path("/dev/null"), str(tmp_path), no_network.fileno(), [], 1.0, 1 << 29)
        with pytest.raises(MachineError, match="driver_failed") as caught:
            await asyncio.to_thread(launch, "/usr/bin/runsc", tmp_path, {}, parts)
    assert "network namespace" in (caught.value.detail or "")


async def test_a_sandbox_that_cannot_read_its_configuration_says_why(driver: GvisorDriver, tmp_path: Path) -> None:
    with Path("/proc/self/ns/net").open() as network:
        parts = Resources(Path("/dev/null"), str(tmp_path), network.fileno(), [], 1.0, 1 << 29)
        with pytest.raises(MachineError, match="driver_failed") as caught:
            await asyncio.to_thread(launch, "/usr/bin/runsc", tmp_path, {}, parts)
    assert "spec" in (caught.value.detail or "")
