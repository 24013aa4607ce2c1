"""Settings of hostd that hold for every driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmm.drivers.base import Shape


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """What is made ahead of its use. The default is nothing.

    shapes: held in stock whether or not anybody asks; others are from their second create on, while they are asked for.
    ready_min, ready_max: booted units per shape; shells_min, shells_max: units in which nothing runs yet.
    thawed: how many of the ready ones per shape are not frozen, which spares a claim the thaw and costs processor time.
    memory_share: of the host's memory, for all of them together.
    """

    shapes: tuple[Shape, ...] = ()
    ready_min: int = 0
    ready_max: int = 0
    shells_min: int = 0
    shells_max: int = 0
    thawed: int = 0
    memory_share: float = 0.25

    @property
    def is_on(self) -> bool:
        """Whether there is a pool at all."""
        return self.ready_max > 0 or self.shells_max > 0


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Where hostd keeps its things and how much it takes on.

    home: data directory; hostd writes below `home/host`.
    socket_path: Unix socket to listen on, at most 107 bytes, as the kernel demands.
    machines_max: machines at once; a create above it is refused with `no_capacity`.
    memory_mib_max, cpu_count_max, disk_mib_max: the most one machine may ask for; above it `limit_exceeded`.
    memory_reserve_mib, disk_reserve_mib: what has to stay available on the host for another machine to be started.
    boot_timeout_s: from the start of a machine to the first answer of its agent.
    shutdown_timeout_s: to end all machines; what is left then is reported and ended at the next start.
    wake_timeout_s: from the request to wake a machine until it runs.
    reclaim_after_s: how long a machine stays frozen before its memory is given back; its next wake then takes longer.
    hibernate_after_s: how long a machine stays frozen before it is written to disk, unless it says otherwise.
    hibernate_below_mib: with less memory available than this, frozen machines are hibernated, the longest frozen first.
    images_mib_max: what all images may take on the disk; a snapshot above it fails with `no_space`.
    pack_after_s: how long nobody has needed an image before it is compressed; it is unpacked when it is needed again.
    pool: what is made ahead of its use.
    backing_mib: memory kept backed by the hypervisor for saves, restores and starts (`vmm.host.backing`).
    ended_kept_s: how long an ended machine is still listed, so that a client that was away learns why it ended.
    """

    home: Path
    socket_path: Path
    machines_max: int = 500
    memory_mib_max: int = 16_384
    cpu_count_max: float = 16.0
    disk_mib_max: int = 65_536
    memory_reserve_mib: int = 512
    disk_reserve_mib: int = 2_048
    boot_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0
    wake_timeout_s: float = 30.0
    reclaim_after_s: float = 10.0
    hibernate_after_s: float = 600.0
    hibernate_below_mib: int = 1_024
    images_mib_max: int = 65_536
    pack_after_s: float = 3600.0
    pool: PoolConfig = PoolConfig()
    backing_mib: int = 0
    ended_kept_s: float = 3600.0
