"""What a guest can and cannot reach and see."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.host import HostProcess
from tests.vmm.gvisor.support import Box, listening_everywhere, port_answers
from vmm.drivers.base import AGENT_PORT
from vmm.errors import LinkError
from vmm.link import Link, tcp


@dataclass(frozen=True)
class Elsewhere:
    """A host beyond this one that listens at an address that counts as public, and at a private one."""

    public: str
    private: str
    port: int


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """A network namespace behind a link of this host, with a server in it. Nothing of it outlives the test."""
    number = os.getpid() % 250
    public, private, gateway = f"198.51.100.{number + 2}", f"10.213.{number}.2", f"198.51.100.{number + 1}"
    link = f"els{os.getpid()}"
    program = "import socket; s = socket.create_server(('', 8000)); print('ready', flush=True)\nwhile True: s.accept()"
    with contextlib.ExitStack() as undo:
        holder = undo.enter_context(_process("unshare", "--net", "sh", "-c", "echo ready && exec sleep infinity"))
        inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        for command in (
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)],
            ["ip", "addr", "add", f"{gateway}/32", "dev", link],
            ["ip", "link", "set", link, "up"],
            [*inside, "ip", "addr", "add", f"{public}/32", "dev", "eth0"],
            [*inside, "ip", "addr", "add", f"{private}/32", "dev", "eth0"],
            [*inside, "ip", "link", "set", "eth0", "up"],
            [*inside, "ip", "route", "add", gateway, "dev", "eth0"],
            ["ip", "route", "add", public, "dev", link],
            ["ip", "route", "add", private, "dev", link],
        ):
            subprocess.run(command, check=True)
        undo.enter_context(_process(*inside, "python3", "-c", program))
        yield Elsewhere(public, private, 8000)


def own_addresses() -> list[str]:
    """IPv4 addresses of this host, loopback aside."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    return [address for address in found if ":" not in address]


@contextlib.contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said that it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


async def test_public_addresses_are_reachable_and_private_ones_are_not(box: Box, elsewhere: Elsewhere) -> None:
    public, private = f"{elsewhere.public}:{elsewhere.port}", f"{elsewhere.private}:{elsewhere.port}"
    assert await port_answers(elsewhere.private, elsewhere.port)
    assert await box.open_ports(public, private) == {public}


async def test_services_of_the_host_are_not_reachable(box: Box) -> None:
    gateway = (await box.shell("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")).strip()
    addresses = [gateway, *own_addresses()]
    with listening_everywhere() as port:
        assert all([await port_answers(address, port) for address in addresses])
        assert await box.open_ports(*(f"{address}:{port}" for address in addresses)) == set()


async def test_other_machines_are_not_reachable(box: Box, neighbour: Box) -> None:
    async with neighbour.serving(8000):
        assert await port_answers(neighbour.address, 8000)
        targets = f"{neighbour.address}:8000", f"{neighbour.address}:{AGENT_PORT}"
        assert await box.open_ports(*targets) == set()


async def test_metadata_addresses_are_not_reachable(box: Box) -> None:
    assert await box.open_ports("169.254.169.254:80", "100.100.100.200:80", "192.168.0.1:80", "172.17.0.1:80") == set()


async def test_a_forged_sender_address_does_not_leave(box: Box, elsewhere: Elsewhere) -> None:
    await box.shell("ip addr add 203.0.113.77/32 dev eth0", user="root")
    program = (
        "import socket; s = socket.socket(); s.settimeout(2); s.bind(('203.0.113.77', 0));"
        f"s.connect(('{elsewhere.public}', {elsewhere.port})); print('connected')"
    )
    assert "connected" not in await box.shell(f'python3 -c "{program}"', user="root")


async def test_the_agent_refuses_a_wrong_token(box: Box) -> None:
    with pytest.raises(LinkError):
        await Link.connect(tcp(box.address, AGENT_PORT), role="host", token="0" * 64)
    assert (await box.run("true")).exit.exit_code == 0


async def test_the_token_is_hidden_from_the_user(box: Box, host: HostProcess) -> None:
    token = json.loads((host.home / f"host/machines/{box.machine.id}.json").read_bytes())["token"]
    for line in ("cat /proc/*/environ", "cat /proc/*/cmdline", "env", "cat /proc/1/mem", "grep -rI . /run /etc /tmp"):
        assert token not in await box.shell(line)


async def test_files_and_processes_of_the_host_are_invisible(box: Box, host: HostProcess) -> None:
    assert not (await box.shell(f"ls {host.home} 2>/dev/null", user="root")).strip()
    commands = (await box.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", user="root")).lower()
    assert "runsc" not in commands
    assert "hostd" not in commands
    assert str(host.home) not in await box.shell("cat /proc/mounts /proc/self/mountinfo", user="root")


async def test_what_one_machine_writes_no_other_sees(box: Box, neighbour: Box) -> None:
    await box.shell("echo secret | tee /usr/bin/planted /tmp/planted /workspace/planted", user="root")
    for path in ("/usr/bin/planted", "/tmp/planted", "/workspace/planted"):
        assert (await neighbour.run("test", "-e", path)).exit.exit_code == 1


async def test_each_machine_has_its_own_names(box: Box, neighbour: Box) -> None:
    assert (await box.shell("hostname")).strip() == "box"
    assert (await neighbour.shell("hostname")).strip() == "neighbour"
    assert box.address in await box.shell("getent hosts box")
    ids = {(await each.shell("cat /etc/machine-id")).strip() for each in (box, neighbour)}
    assert len(ids) == 2
    assert all(len(machine_id) == 32 for machine_id in ids)


async def test_the_user_owns_its_places_and_root_the_rest(box: Box) -> None:
    assert (await box.shell("id -u; pwd; touch /workspace/a /home/user/b /tmp/c && echo made")).split()[-1] == "made"
    assert (await box.run("touch", "/usr/bin/x")).exit.exit_code == 1
    assert (await box.run("touch", "/usr/bin/x", user="root")).exit.exit_code == 0
    assert (await box.run("ls", "-la", "/", user="root")).exit.exit_code == 0
