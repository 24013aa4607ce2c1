"""Network slots: a namespace with one end of a veth pair, an address for each end, and the socket gVisor reads.

gVisor's own network stack owns the guest's address, so the guest's end of the pair has none: it only carries frames
between the host's end and a packet socket that the sandbox receives at its start. The namespace has no name and no bind
mount. It lives as long as a process or that socket holds it, and takes the veth pair and its addresses along, so that
neither a crash nor a forgotten call can leak one.

Several instances may share a box. Each takes one block of the address range, locked by a file, and names its interfaces
after itself, so that rules and clean-up of one never touch another's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.drivers.gvisor import syscalls
from vmm.drivers.gvisor.netlink import Netlink
from vmm.errors import MachineError

#: One block serves 2 048 machines at four addresses each (network, host, guest, broadcast).
BLOCK_PREFIX = 19
SLOTS_MAX = 2 ** (32 - BLOCK_PREFIX - 2)

_GUEST_LINK = "eth0"
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SO_DETACH_FILTER = 27
#: What runsc itself gives the socket it would have made; less drops frames in bursts.
_SOCKET_BUFFER_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class Slot:
    """One machine's link. `namespace` and `packets` are open descriptors, owned by the slot until `release`."""

    index: int
    interface: str
    gateway: str
    address: str
    mac: bytes
    mtu: int
    namespace: int
    packets: socket.socket

    def release(self) -> None:
        """Close the descriptors. Unless a sandbox holds them too, this removes namespace, link and addresses."""
        self.packets.close()
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1


class Block:
    """The addresses of one instance, for as long as the lock is held."""

    def __init__(self, network: ipaddress.IPv4Network, instance: str, lock: int) -> None:
        self.network = network
        self.prefix = interface_prefix(instance)
        self._lock = lock
        # First in, first out: an address comes back as late as possible, when nobody remembers its last machine.
        self._free = deque(range(SLOTS_MAX))

    def take(self) -> int:
        """Take a free slot index. Raises MachineError(`no_capacity`)."""
        if not self._free:
            raise MachineError("no_capacity", "the host has no free network address")
        return self._free.popleft()

    def reserve(self, index: int) -> None:
        """Take a certain index, that of an adopted machine."""
        with contextlib.suppress(ValueError):
            self._free.remove(index)

    def give_back(self, index: int) -> None:
        """Make an index free again."""
        self._free.append(index)

    def interface(self, index: int) -> str:
        """Name of the host's end of a slot's link."""
        return f"{self.prefix}{index}"

    def addresses(self, index: int) -> tuple[str, str]:
        """The host's and the guest's address of a slot."""
        base = self.network.network_address + 4 * index
        return str(base + 1), str(base + 2)

    def close(self) -> None:
        """Let another instance have the block."""
        os.close(self._lock)


def interface_prefix(instance: str) -> str:
    """What the names of an instance's interfaces start with; with an index they stay within 15 characters."""
    return f"sg{instance[:6]}-"


def claim_block(range_: ipaddress.IPv4Network, instance: str, lock_dir: Path) -> Block:
    """Lock a block of `range_` that no other instance and no network of the host uses.

    A block whose instance has died with machines still running stays its own: their interfaces tell.
    Raises MachineError(`driver_failed`) when none is left.
    """
    lock_dir.mkdir(parents=True, exist_ok=True)
    used = list(host_networks())
    blocks = list(range_.subnets(new_prefix=BLOCK_PREFIX))
    blocks.sort(key=lambda block: _owner(lock_dir, block) != instance)
    for block in blocks:
        lock = os.open(_lock_path(lock_dir, block), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        owner = os.pread(lock, 64, 0).decode(errors="replace")
        is_ours = owner == instance
        if not is_ours and (_has_interfaces(owner) or any(block.overlaps(other) for other in used)):
            os.close(lock)
            continue
        os.ftruncate(lock, 0)
        os.pwrite(lock, instance.encode(), 0)
        return Block(block, instance, lock)
    raise MachineError("driver_failed", f"every address block in {range_} is in use; set another address range")


def make_slot(block: Block, index: int, mtu: int) -> Slot:
    """Build a slot. Changes the calling thread's network namespace meanwhile: only for a thread made for it."""
    interface = block.interface(index)
    gateway, address = block.addresses(index)
    with contextlib.ExitStack() as undo:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, home)
        with Netlink() as host:
            with contextlib.suppress(OSError):
                host.delete(interface)  # The last user of this index may not have been reaped by the kernel yet.
            syscalls.unshare_network()
            try:
                namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                keep = undo.enter_context(contextlib.ExitStack())
                keep.callback(os.close, namespace)
                with Netlink() as guest:
                    guest.add_veth(_GUEST_LINK, interface, peer_namespace=home, mtu=mtu)
                    guest.set_up(_GUEST_LINK)
                packets = keep.enter_context(_packet_socket())
            finally:
                syscalls.enter_network(home)
            _forbid_ipv6(interface)
            host.add_address(interface, gateway, 30)
            host.set_up(interface)
            link = ipaddress.ip_interface(f"{gateway}/30")
            host.acknowledge_at_once(interface, gateway, str(link.network.network_address), 30)
        keep.pop_all()
    return Slot(index, interface, gateway, address, packets.getsockname()[4], mtu, namespace, packets)


@contextlib.contextmanager
def unreachable(pid: int) -> Iterator[None]:
    """Keep packets from the sandbox with this process. Raises OSError, also when it has none of our links."""
    with _packets_of(pid) as packets:
        syscalls.drop_packets(packets)
        try:
            yield
        finally:
            packets.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def make_reachable(pid: int) -> None:
    """End what an interrupted `unreachable` has left."""
    with _packets_of(pid) as packets, contextlib.suppress(FileNotFoundError):
        packets.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _packets_of(pid: int) -> socket.socket:
    """The packet socket of a slot, from the process that it was handed to."""
    pidfd = os.pidfd_open(pid)
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if not str(path.readlink()).startswith("socket:"):
                    continue
                found = socket.socket(fileno=syscalls.take_descriptor(pidfd, int(path.name)))
                if found.family == socket.AF_PACKET:
                    return found
                found.close()
    finally:
        os.close(pidfd)
    raise OSError(errno.ENOTCONN, "the sandbox has no link")


def interfaces(prefix: str) -> list[str]:
    """Names of the host's interfaces that start with `prefix`."""
    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def uplink_mtu() -> int:
    """MTU of the link with the default route, at most Ethernet's. With the same, guests' packets need no splitting."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        link, destination = line.split()[:2]
        if destination == "00000000":
            return min(1500, int(Path(f"/sys/class/net/{link}/mtu").read_text()))
    return 1500


def host_networks() -> Iterable[ipaddress.IPv4Network]:
    """Networks the host has a direct route to, its own addresses' among them; the default route is none."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        _, destination, _, _, _, _, _, mask = line.split()[:8]
        network, netmask = (int.from_bytes(bytes.fromhex(word), "little") for word in (destination, mask))
        if netmask:
            yield ipaddress.IPv4Network((network, netmask.bit_count()))


def _packet_socket() -> socket.socket:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        packets.bind((_GUEST_LINK, _ETH_P_ALL))
        packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER_BYTES)
        packets.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER_BYTES)
    except BaseException:
        packets.close()
        raise
    return packets


def _forbid_ipv6(interface: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a host without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6").write_text("1")


def _lock_path(lock_dir: Path, block: ipaddress.IPv4Network) -> Path:
    return lock_dir / f"{block.network_address}.lock"


def _owner(lock_dir: Path, block: ipaddress.IPv4Network) -> str:
    with contextlib.suppress(OSError):
        return _lock_path(lock_dir, block).read_text()
    return ""


def _has_interfaces(instance: str) -> bool:
    return bool(instance) and bool(interfaces(interface_prefix(instance)))
