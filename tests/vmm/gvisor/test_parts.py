"""The driver's parts that need no machine: addresses, rules, disks, processes, groups."""

from __future__ import annotations

import io
import ipaddress
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vmm.gvisor.support import until
from vmm.drivers.gvisor import cgroups, firewall, network, processes
from vmm.drivers.gvisor.config import GvisorConfig, instance_id
from vmm.drivers.gvisor.disk import make_disk
from vmm.errors import MachineError

_RANGE = ipaddress.IPv4Network("198.18.0.0/15")
_MIB = 1024 * 1024


def test_instances_get_blocks_of_their_own(tmp_path: Path) -> None:
    blocks = [network.claim_block(_RANGE, f"{number:08x}", tmp_path) for number in range(4)]
    try:
        networks = [block.network for block in blocks]
        assert not any(one.overlaps(other) for one in networks for other in networks if one is not other)
    finally:
        for block in blocks:
            block.close()


def test_an_instance_gets_its_block_back(tmp_path: Path) -> None:
    first = network.claim_block(_RANGE, "aaaaaaaa", tmp_path)
    second = network.claim_block(_RANGE, "bbbbbbbb", tmp_path)
    first.close()
    second.close()
    again = network.claim_block(_RANGE, "bbbbbbbb", tmp_path)
    assert again.network == second.network
    again.close()


def test_a_full_range_is_refused(tmp_path: Path) -> None:
    held = network.claim_block(_RANGE, "aaaaaaaa", tmp_path)
    with pytest.raises(MachineError, match="every address block"):
        network.claim_block(held.network, "bbbbbbbb", tmp_path)
    held.close()


def test_addresses_come_back_as_late_as_possible() -> None:
    block = network.Block(ipaddress.IPv4Network("198.18.0.0/19"), "x" * 8, os.open("/dev/null", os.O_RDONLY))
    first = block.take()
    block.give_back(first)
    taken = [block.take() for _ in range(network.SLOTS_MAX)]
    assert taken[-1] == first
    assert len(set(taken)) == network.SLOTS_MAX
    with pytest.raises(MachineError, match="no free network address"):
        block.take()
    block.close()


def test_the_way_to_a_guest_is_one_route_that_delays_no_acknowledgement(tmp_path: Path) -> None:
    block = network.claim_block(_RANGE, "cccccccc", tmp_path)
    # A thread of its own, because it changes its network namespace.
    with ThreadPoolExecutor(1) as links:
        slot = links.submit(network.make_slot, block, 7, 1500).result()
    try:
        routes = subprocess.run(
            ["ip", "route", "show", "dev", slot.interface], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert len(routes) == 1
        assert routes[0].startswith(str(ipaddress.ip_interface(f"{slot.gateway}/30").network))
        assert f"src {slot.gateway}" in routes[0]
        assert "quickack 1" in routes[0]
    finally:
        slot.release()
        block.close()


def test_addresses_stay_inside_their_block() -> None:
    block = network.Block(ipaddress.IPv4Network("198.18.32.0/19"), "x" * 8, os.open("/dev/null", os.O_RDONLY))
    for index in (0, network.SLOTS_MAX - 1):
        gateway, address = (ipaddress.IPv4Address(text) for text in block.addresses(index))
        assert gateway in block.network
        assert address == gateway + 1
        assert len(block.interface(index)) <= 15
    block.close()


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 192.0.2.1\nnameserver 192.0.2.2\n", ["192.0.2.1", "192.0.2.2"]),
        ("# nameserver 192.0.2.1\nsearch example.com\nnameserver\n", []),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.9\n", ["192.0.2.9"]),
        ("nameserver fd00::1\n", []),
    ],
)
def test_only_resolvers_a_guest_can_reach_are_used(tmp_path: Path, text: str, servers: list[str]) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    assert firewall.host_resolvers([str(tmp_path / "missing"), str(file)]) == servers


def test_rules_load_reload_and_go() -> None:
    instance = f"test{os.getpid() % 10_000:04d}"
    rules = firewall.ruleset(
        instance,
        prefix=network.interface_prefix(instance),
        block=ipaddress.IPv4Network("198.18.0.0/19"),
        resolvers=[],
        allowed=["10.1.0.0/16"],
        denied=[*firewall.NOT_INTERNET, "10.0.0.0/24"],
    )
    try:
        firewall.apply(rules)
        firewall.apply(rules)
        listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        assert listed.count(firewall.table_name(instance)) == 1
    finally:
        firewall.remove(instance)
    firewall.remove(instance)
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert firewall.table_name(instance) not in listed


def test_bad_rules_are_an_error_with_the_reason() -> None:
    with pytest.raises(MachineError) as caught:
        firewall.apply("table inet {{{")
    assert "syntax error" in (caught.value.detail or "")


async def test_a_disk_has_its_size_and_goes_with_its_last_user(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, 32 * _MIB)
    backing = f"{tmp_path}/#"

    def devices() -> list[str]:
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        return [text for path in files if path.exists() and backing in (text := path.read_text())]

    assert len(devices()) == 1
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    with Path(disk.path, "file").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            _write(file, 64 * _MIB)
        assert 30 * _MIB <= file.tell() <= 42 * _MIB
        disk.release()
        assert len(devices()) == 1
    await until(lambda: not devices())
    assert not list(tmp_path.iterdir())


def test_a_process_is_known_by_its_start_time() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        started = processes.start_time(process.pid)
        assert started is not None
        assert started == processes.start_time(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.start_time(process.pid) is None
    assert processes.start_time(process.pid) is None


def test_only_orphans_are_reaped() -> None:
    own = subprocess.Popen(["true"])
    os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
    stranger = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)
    spared = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, spared.pid, os.WEXITED | os.WNOWAIT)
    processes.reap_orphans(spare={spared.pid})
    with pytest.raises(ChildProcessError):
        os.waitpid(stranger.pid, os.WNOHANG)
    stranger.returncode = 0
    assert own.wait() == 0
    assert spared.wait() == 0


def test_processes_are_found_by_an_argument() -> None:
    mark = f"--mark={time.monotonic_ns()}"
    with subprocess.Popen(["sh", "-c", "read line", mark], stdin=subprocess.PIPE) as process:
        found = dict(processes.with_argument(mark.split("=", maxsplit=1)[0] + "="))
        assert found[process.pid] == mark.split("=")[1]
        process.kill()


def test_the_cgroup_trees_of_this_host_are_found() -> None:
    hierarchy = cgroups.find_hierarchy()
    assert hierarchy.is_complete
    for controller in ("cpu", "memory", "pids"):
        tree = hierarchy.tree(controller)
        assert tree is not None
        assert (tree / "cgroup.procs").exists()


def test_the_layout_of_version_two_is_understood(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n")
    hierarchy = cgroups.find_hierarchy(str(mounts))
    assert hierarchy.roots() == [Path("/sys/fs/cgroup")]
    assert hierarchy.tree("memory") == Path("/sys/fs/cgroup")


def test_in_version_2_a_machine_gets_one_group_with_every_controller(tmp_path: Path) -> None:
    [group] = cgroups.Groups(cgroups.Hierarchy(tmp_path, {}), "0123abcd").make("unit", pids_max=10)
    assert group == tmp_path / "sandgate-0123abcd" / "unit"
    assert (group / "pids.max").read_text() == "10"
    for above in group.parents[:2]:
        assert (above / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_instances_differ_by_data_directory(tmp_path: Path) -> None:
    assert instance_id(tmp_path / "a") != instance_id(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert instance_id(tmp_path / "a") == instance_id(tmp_path / "link")
    assert GvisorConfig.for_home(tmp_path, pool_size=9).pool_size == 9


def _write(file: io.FileIO, size: int) -> None:
    while file.tell() < size:
        file.write(bytes(_MIB))
