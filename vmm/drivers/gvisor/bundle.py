"""The OCI configuration of a machine.

It is what the guest's kernel reads: processes and mounts. Who shuts that kernel in is `launch`; limits are set in
`cgroups`.

The template's image is shared by all machines and only read; gVisor lays the machine's own disk over it. Nothing of
the host is mounted into a machine. Its names (`/etc/hosts`, `/etc/hostname`, `/etc/machine-id`, `/etc/resolv.conf`) are
written through its agent once that answers, not mounted: so they lie in the writable layer, travel in snapshots, and a
restored copy gets its own by the same call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmm.drivers.base import Shape
from vmm.drivers.gvisor.cgroups import CPU_PERIOD_US

#: What a container's root may do by convention, minus raw sockets, which would let a guest forge packets, plus
#: SYS_ADMIN, without which the agent could not set the host name. gVisor grants them inside the sandbox only.
_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
]

#: A backstop for the host. It counts gVisor's own threads: too low a value kills the machine instead of failing a fork.
PIDS_MAX = 4096

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OPEN_FILES_MAX = 65_536


def cpu_quota_us(shape: Shape) -> int:
    """Processor time that a machine may use per period (`CPU_PERIOD_US`)."""
    return max(1000, int(shape.cpu_count * CPU_PERIOD_US))


def memory_bytes(shape: Shape) -> int:
    """Memory that a machine may use, gVisor's own included."""
    return shape.memory_mib * 1024 * 1024


def make(shape: Shape, *, agent: str, token: str, image: Path) -> dict[str, Any]:
    """Build the configuration. agent: path of the agent in the template.  image: EROFS image of the template."""
    root = "dev.gvisor.spec.rootfs."
    return {
        "ociVersion": "1.0.2",
        # Its own comes with its identity.
        "hostname": "localhost",
        # The annotations take the place of the directory. What is written goes over the image, into a given file.
        "root": {"path": "root", "readonly": False},
        "annotations": {root + "source": str(image), root + "type": "erofs", root + "overlay": "dir=/"},
        "process": {
            # gVisor has no killer that would go by it, but keeps 115 KB of each process whose score was set.
            "args": [agent, "--no-oom-score"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": [f"PATH={_PATH}", "HOME=/root", f"SANDGATE_AGENT_TOKEN={token}"],
            "noNewPrivileges": False,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": _OPEN_FILES_MAX, "hard": _OPEN_FILES_MAX}],
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            # Half the memory, as Linux does: a browser needs a large one, and it must not be able to fill it all.
            {
                "destination": "/dev/shm",  # noqa: S108
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "nodev", "mode=1777", f"size={shape.memory_mib // 2}m"],
            },
        ],
        "linux": {"namespaces": [{"type": "pid"}]},
    }
