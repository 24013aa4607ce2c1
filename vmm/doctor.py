"""What a host needs to run machines, checked by trying it, and how to get what is missing.

Used by `sandgate doctor`. Nothing here changes the host: whatever a check makes is gone when it returns.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vmm import programs
from vmm.drivers.gvisor import cgroups, firewall, runsc, syscalls
from vmm.drivers.gvisor.disk import make_disk
from vmm.host.admission import available_memory_bytes

_DISK_BYTES_MIN = 4 * 1024**3
_MEMORY_BYTES_MIN = 1024**3
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `what` says what was found; `fix`, for what is not ok, what to do about it."""

    name: str
    is_ok: bool
    what: str
    fix: str = ""


def diagnose(*, cache: Path, ports: Sequence[tuple[str, int]] = ()) -> list[Finding]:
    """Check everything; takes well below a second.

    cache: where templates go.  ports: addresses that should be free to listen on.
    """
    checks: list[Callable[[], Finding]] = [
        _root,
        _runsc,
        _user_namespaces,
        _network_namespaces,
        _cgroups,
        _nft,
        _forwarding,
        _resolvers,
        lambda: _disks(cache),
        _builders,
        lambda: _disk_space(cache),
        _memory,
        _kvm,
    ]
    return [check() for check in checks] + [_port(*address) for address in ports]


def _root() -> Finding:
    return Finding(
        "root", os.geteuid() == 0, f"running as user id {os.geteuid()}", "run it as root, for example with sudo"
    )


def _runsc() -> Finding:
    wanted = ", ".join(runsc.RELEASES)
    fix = "enable Debian's bookworm-backports suite, then `apt-get install runsc/bookworm-backports`"
    program = runsc.find()
    if program is None:
        return Finding("runsc", False, "runsc is not installed", fix)
    try:
        release = runsc.release(program)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("runsc", False, f"runsc does not run: {error}", fix)
    if release not in runsc.RELEASES:
        return Finding("runsc", False, f"runsc {release}, which was not tried; {wanted} was", fix)
    return Finding("runsc", True, f"runsc {release}")


def _user_namespaces() -> Finding:
    limit = _number("/proc/sys/user/max_user_namespaces")
    fix = "`sysctl user.max_user_namespaces=15000`; gVisor confines itself with user namespaces"
    return Finding("user namespaces", bool(limit), f"up to {limit} user namespaces", fix)


def _network_namespaces() -> Finding:
    fix = "run it as root outside of a container, or give the container CAP_SYS_ADMIN and CAP_NET_ADMIN"
    try:
        # The thread that leaves its namespace ends with the pool; nothing else runs in it.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(syscalls.unshare_network).result()
    except OSError as error:
        return Finding("network namespaces", False, f"cannot be made: {error}", fix)
    return Finding("network namespaces", True, "can be made")


def _cgroups() -> Finding:
    hierarchy = cgroups.find_hierarchy()
    version = "v2" if hierarchy.unified else "v1"
    fix = "mount the cgroup controllers cpu, memory and pids below /sys/fs/cgroup, writable"
    roots = [root for name in ("cpu", "memory", "pids") if (root := hierarchy.tree(name)) is not None]
    is_writable = all(os.access(root, os.W_OK) for root in roots)
    what = f"cgroup {version}" if hierarchy.is_complete else f"cgroup {version} lacks cpu, memory or pids"
    return Finding("cgroups", hierarchy.is_complete and is_writable, what if is_writable else f"{what}, read-only", fix)


def _nft() -> Finding:
    fix = "`apt-get install nftables`; in a container, give it CAP_NET_ADMIN"
    try:
        subprocess.run([programs.find("nft") or "nft", "list", "tables"], capture_output=True, timeout=10, check=True)
    except FileNotFoundError:
        return Finding("nftables", False, "nft is not installed", fix)
    except subprocess.SubprocessError as error:
        return Finding("nftables", False, f"nft does not work: {error}", fix)
    return Finding("nftables", True, "nft works")


def _forwarding() -> Finding:
    path = "/proc/sys/net/ipv4/ip_forward"
    is_ok = _number(path) == 1 or os.access(path, os.W_OK)
    return Finding(
        "forwarding",
        is_ok,
        "packets can be forwarded" if is_ok else "packets cannot be forwarded",
        f"write 1 to {path}",
    )


def _resolvers() -> Finding:
    found = firewall.host_resolvers()
    what = f"guests ask {', '.join(found)}" if found else "the host's resolver is on its loopback address only"
    return Finding(
        "name servers", bool(found), what, "add a name server that is not on 127.0.0.0/8 to /etc/resolv.conf"
    )


def _disks(cache: Path) -> Finding:
    fix = "`apt-get install e2fsprogs`; in a container, give it /dev/loop-control, the loop devices and CAP_SYS_ADMIN"
    try:
        make_disk(_existing(cache), 16 * _MIB).release()
    except OSError as error:
        return Finding("machine disks", False, f"cannot be made: {error}", fix)
    return Finding("machine disks", True, "can be made")


def _builders() -> Finding:
    needed = {"mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils"}
    missing = {program: package for program, package in needed.items() if programs.find(program) is None}
    what = f"{', '.join(missing)} not installed" if missing else "templates can be built"
    return Finding("template builders", not missing, what, f"`apt-get install {' '.join(missing.values())}`")


def _disk_space(cache: Path) -> Finding:
    free = shutil.disk_usage(_existing(cache)).free
    fix = (
        f"free some space, or set SANDGATE_CACHE and SANDGATE_HOME to a disk with {_DISK_BYTES_MIN // 1024**3} GiB free"
    )
    return Finding("disk space", free >= _DISK_BYTES_MIN, f"{free / 1024**3:.1f} GiB free at {cache}", fix)


def _memory() -> Finding:
    available = available_memory_bytes()
    fix = "stop something, or add memory: a machine takes 16 MiB when idle and what its guest uses when not"
    return Finding("memory", available >= _MEMORY_BYTES_MIN, f"{available / 1024**3:.1f} GiB available", fix)


def _kvm() -> Finding:
    what = (
        "/dev/kvm is there; the gVisor driver does without" if Path("/dev/kvm").exists() else "no KVM, and none needed"
    )
    return Finding("kvm", True, what)


def _port(address: str, port: int) -> Finding:
    try:
        with socket.create_server((address, port)):
            return Finding("port", True, f"{address}:{port} is free")
    except OSError as error:
        fix = "stop what listens there, or set another address"
        return Finding("port", False, f"{address}:{port} cannot be listened on: {error.strerror}", fix)


def _existing(path: Path) -> Path:
    """The path or its nearest parent that exists."""
    candidates: Iterable[Path] = (path, *path.absolute().parents)
    return next(candidate for candidate in candidates if candidate.exists())


def _number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0
