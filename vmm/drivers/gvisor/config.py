"""Settings of the gVisor driver."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GvisorConfig:
    """How this instance uses the host.

    instance: eight hex digits that mark everything of this instance on the host; see `instance_id`.
    run_dir: state that dies with the machine it describes; on a file system in memory.
    disk_dir: where machines' disks take their blocks from.
    address_range: instances share it, each takes a /19 (2 048 machines).
    egress_allow: networks that guests may reach although they are private.
    resolvers: name servers for guests; none means those of the host.
    pool_size: links and disks kept ready, so that a start does not wait for them.
    starts_max: machines started at once; more only makes each slower, as starting is bound by CPU.
    rcu_expedited: have the kernel end every RCU grace period at once.
    """

    instance: str
    run_dir: Path
    disk_dir: Path
    address_range: str = "198.18.0.0/15"
    egress_allow: tuple[str, ...] = ()
    resolvers: tuple[str, ...] = ()
    pool_size: int = 4
    starts_max: int = 4
    rcu_expedited: bool = True

    @staticmethod
    def for_home(home: Path, **settings: object) -> GvisorConfig:
        """The settings of the instance whose data directory is `home`."""
        instance = instance_id(home)
        places = {"run_dir": Path("/run/sandgate") / instance, "disk_dir": home / "host" / "disks"}
        return GvisorConfig(instance=instance, **{**places, **settings})  # type: ignore[arg-type]


def instance_id(home: Path) -> str:
    """Eight hex digits that differ between data directories and stay the same for one."""
    return hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]
