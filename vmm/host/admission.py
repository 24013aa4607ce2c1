"""What a machine may ask for, and whether the host has room for it."""

from __future__ import annotations

import os

from vmm.errors import MachineError
from vmm.host.config import HostConfig
from vmm.types import MachineSpec

_ID_LENGTH = 36
_HOSTNAME_MAX = 63
_MEMORY_MIB_MIN = 128
_DISK_MIB_MIN = 16
_CPU_COUNT_MIN = 0.05
_MIB = 1024 * 1024
#: More than /proc/meminfo has.
_MEMINFO_BYTES = 16384


def check_spec(spec: MachineSpec, config: HostConfig) -> None:
    """Refuse what is malformed or too large. Raises MachineError(`bad_request`, `limit_exceeded`)."""
    check_id(spec.id)
    name = spec.hostname
    if not (0 < len(name) <= _HOSTNAME_MAX and name.isascii() and name.replace("-", "a").isalnum()):
        raise MachineError("bad_request", "hostname must be letters, digits and hyphens, at most 63")
    limits = (
        ("memory_mib", spec.memory_mib, _MEMORY_MIB_MIN, config.memory_mib_max),
        ("disk_mib", spec.disk_mib, _DISK_MIB_MIN, config.disk_mib_max),
        ("cpu_count", spec.cpu_count, _CPU_COUNT_MIN, config.cpu_count_max),
    )
    for name, value, least, most in limits:
        if not least <= value <= most:
            raise MachineError("limit_exceeded", f"{name} must be between {least} and {most}")


def check_id(value: str) -> None:
    """Ids become file and group names: only a UUID's characters, and its length, as nothing may be another's prefix."""
    if len(value) != _ID_LENGTH or not all(c in "0123456789abcdef-" for c in value):
        raise MachineError("bad_request", "id must be a lower-case UUID")


def check_memory(config: HostConfig, wanted_bytes: int = 0) -> None:
    """Raises MachineError(`no_capacity`) unless so much memory is there beside the reserve."""
    if available_memory_bytes() < config.memory_reserve_mib * _MIB + wanted_bytes:
        raise MachineError("no_capacity", "the host is short of memory")


def check_disk(config: HostConfig) -> None:
    """Raises MachineError(`no_capacity`) when the disk of the data directory is nearly full."""
    disk = os.statvfs(config.home)
    if disk.f_bavail * disk.f_frsize < config.disk_reserve_mib * _MIB:
        raise MachineError("no_capacity", "the host is short of disk space")


def available_memory_bytes(meminfo: str = "/proc/meminfo") -> int:
    """What the kernel could give without swapping. Asked at every create and refill, so it is read in one piece."""
    descriptor = os.open(meminfo, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, _, rest = os.read(descriptor, _MEMINFO_BYTES).partition(b"MemAvailable:")
    finally:
        os.close(descriptor)
    return int(rest.split(None, 1)[0]) * 1024 if rest else 0
