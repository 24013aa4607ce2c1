"""Resource groups of machines, in either hierarchy: several v1 trees or the one of v2.

A machine's group is made before its first process, which joins it; its limits are set once a guest runs in it. Groups
lie at `sandgate-<instance>/<machine>` in every tree that says something about machines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.types import MachineStats

_ROOT = Path("/sys/fs/cgroup")
#: The trees without which a machine would have no limit.
_NEEDED = ("cpu", "memory", "pids")
#: The v1 trees that a machine joins. The last limits nothing: by it, systemd knows what belongs to which service.
_JOINED = (*_NEEDED, "cpuacct", "freezer", "name=systemd")
_FREEZE_TIMEOUT_S = 2.0
CPU_PERIOD_US = 100_000
#: Room above what cannot be given back, when that is more than the limit.
_MEMORY_SLACK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The mounted trees: `unified` in v2, otherwise one directory per v1 controller."""

    unified: Path | None
    trees: dict[str, Path]

    @property
    def is_complete(self) -> bool:
        """Whether every limit a machine needs can be enforced."""
        return all(self.tree(controller) is not None for controller in _NEEDED)

    def tree(self, controller: str) -> Path | None:
        """Root of the tree that holds a controller."""
        return self.unified or self.trees.get(controller)

    def joined(self) -> list[Path]:
        """The trees in which a machine has a group, each once."""
        trees = (self.tree(name) for name in _JOINED)
        return list(dict.fromkeys(tree for tree in trees if tree is not None))

    def roots(self) -> list[Path]:
        """Every tree, each once."""
        return [self.unified] if self.unified else list(dict.fromkeys(self.trees.values()))


def find_hierarchy(mounts: str = "/proc/self/mounts") -> Hierarchy:
    """Look up where the controllers are mounted."""
    controllers = {line.split()[0] for line in Path("/proc/cgroups").read_text().splitlines()[1:]}
    trees: dict[str, Path] = {}
    unified = None
    for line in Path(mounts).read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and Path(place) == _ROOT:
            unified = Path(place)
        elif kind == "cgroup":
            names = [option for option in options.split(",") if option in controllers or option.startswith("name=")]
            trees.update((name, Path(place)) for name in names)
    return Hierarchy(unified, trees)


class Groups:
    """The groups of one instance."""

    def __init__(self, hierarchy: Hierarchy, instance: str) -> None:
        self._hierarchy = hierarchy
        self._parent = f"sandgate-{instance}"

    @property
    def is_complete(self) -> bool:
        """Whether every limit a machine needs can be enforced."""
        return self._hierarchy.is_complete

    def make(self, machine_id: str, *, pids_max: int) -> list[Path]:
        """Make the groups of a machine, with no limit but that; returns their directories. Raises OSError."""
        unified = self._hierarchy.unified
        if unified:
            for above in (unified, unified / self._parent):
                above.mkdir(exist_ok=True)
                (above / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _NEEDED))
        groups = [root / self._parent / machine_id for root in self._hierarchy.joined()]
        for group in groups:
            group.mkdir(parents=True)
        self._write(machine_id, "pids", "pids.max", str(pids_max))
        return groups

    def machines(self) -> set[str]:
        """Ids of all machines that have a group."""
        return {
            path.name
            for root in self._hierarchy.roots()
            if (root / self._parent).is_dir()
            for path in (root / self._parent).iterdir()
            if path.is_dir()
        }

    def processes(self, machine_id: str) -> set[int]:
        """Host process ids in a machine's group: the sandbox, its gofer and their helpers."""
        pids: set[int] = set()
        for group in self._groups(machine_id):
            with contextlib.suppress(OSError):
                pids.update(int(line) for line in (group / "cgroup.procs").read_text().split())
        return pids

    def oom_kills(self, machine_id: str) -> int:
        """How many of the machine's processes the kernel has killed for want of memory."""
        name = "memory.events" if self._hierarchy.unified else "memory.oom_control"
        for line in self._read(machine_id, "memory", name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def stats(self, machine_id: str) -> MachineStats:
        """Counters of a machine; zeros for what this host does not count."""
        if self._hierarchy.unified:
            cpu = dict(line.split() for line in self._read(machine_id, "cpu", "cpu.stat").splitlines())
            cpu_seconds = int(cpu.get("usage_usec", 0)) / 1e6
            limit = self._number(machine_id, "memory", "memory.max")
        else:
            cpu_seconds = self._number(machine_id, "cpuacct", "cpuacct.usage") / 1e9
            limit = self._number(machine_id, "memory", "memory.limit_in_bytes")
        pids = self._number(machine_id, "pids", "pids.current")
        return MachineStats(cpu_seconds, self.memory_bytes(machine_id), limit, pids, self._cached_bytes(machine_id))

    def can_freeze(self) -> bool:
        """Whether the host can stop a machine in place."""
        return self._hierarchy.tree("freezer") is not None

    def set_frozen(self, machine_id: str, is_frozen: bool) -> None:
        """Freeze, which blocks for about a millisecond, or thaw, in a fifth of one; it is done then. Raises OSError."""
        tree = self._hierarchy.tree("freezer")
        if tree is None:
            raise FileNotFoundError("no freezer controller")
        group = f"{tree}/{self._parent}/{machine_id}"
        if self._hierarchy.unified:
            _put(f"{group}/cgroup.freeze", b"1" if is_frozen else b"0")
            return
        state = f"{group}/freezer.state"
        if not is_frozen:
            _put(state, b"THAWED")
            return
        deadline = time.monotonic() + _FREEZE_TIMEOUT_S
        # v1 may stay at FREEZING until it is asked again.
        while True:
            _put(state, b"FROZEN")
            if Path(state).read_text().strip() == "FROZEN":
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{machine_id} is not frozen")
            time.sleep(0.0005)

    def is_frozen(self, machine_id: str) -> bool:
        """Whether a machine stands still, or was told to."""
        name = "cgroup.freeze" if self._hierarchy.unified else "freezer.state"
        return self._read(machine_id, "freezer", name).strip() not in ("0", "THAWED", "")

    def set_limits(self, machine_id: str, *, cpu_quota_us: int, memory_bytes: int) -> None:
        """Set a machine's limits; a negative one is none. Raises OSError.

        cpu_quota_us: processor time per period (`CPU_PERIOD_US`).  memory_bytes: a machine that already holds more is
        kept from growing instead of being killed.
        """
        if self._hierarchy.unified:
            held = self._number(machine_id, "memory", "memory.current") - self._cached_bytes(machine_id)
            if 0 <= memory_bytes < held + _MEMORY_SLACK_BYTES:
                memory_bytes = held + _MEMORY_SLACK_BYTES
            quota = f"{cpu_quota_us if cpu_quota_us >= 0 else 'max'} {CPU_PERIOD_US}"
            self._write(machine_id, "cpu", "cpu.max", quota)
            self._write(machine_id, "memory", "memory.max", str(memory_bytes) if memory_bytes >= 0 else "max")
            return
        self._write(machine_id, "cpu", "cpu.cfs_quota_us", str(cpu_quota_us))
        try:
            self._write(machine_id, "memory", "memory.limit_in_bytes", str(memory_bytes))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            held = self._number(machine_id, "memory", "memory.usage_in_bytes") + _MEMORY_SLACK_BYTES
            self._write(machine_id, "memory", "memory.limit_in_bytes", str(held))

    @contextlib.contextmanager
    def unlimited(self, machine_id: str, *, cpu_quota_us: int, memory_bytes: int) -> Iterator[None]:
        """Lift a machine's limits, and set these in the end. Raises OSError."""
        self.set_limits(machine_id, cpu_quota_us=-1, memory_bytes=-1)
        try:
            yield
        finally:
            # A machine that has died meanwhile has taken its group along.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self.set_limits(machine_id, cpu_quota_us=cpu_quota_us, memory_bytes=memory_bytes)

    def memory_bytes(self, machine_id: str) -> int:
        """Memory that counts as the machine's, page cache included."""
        name = "memory.current" if self._hierarchy.unified else "memory.usage_in_bytes"
        return self._number(machine_id, "memory", name)

    def drop_memory(self, machine_id: str) -> None:
        """Let go of what the kernel can read back: page cache, and with swap everything."""
        with contextlib.suppress(OSError):  # some of it is always in use, and that is told as an error
            if self._hierarchy.unified:
                self._write(machine_id, "memory", "memory.reclaim", str(self.memory_bytes(machine_id)))
            else:
                self._write(machine_id, "memory", "memory.force_empty", "1")

    def remove(self, machine_id: str) -> bool:
        """Remove a machine's groups; False when a process still lives in one."""
        return all(_remove(group) for group in self._groups(machine_id))

    def close(self) -> None:
        """Remove the parents of all groups, unless machines are left in them."""
        for root in self._hierarchy.roots():
            _remove(root / self._parent)

    def _groups(self, machine_id: str) -> list[Path]:
        return [root / self._parent / machine_id for root in self._hierarchy.roots()]

    def _read(self, machine_id: str, controller: str, name: str) -> str:
        tree = self._hierarchy.tree(controller)
        if tree is None:
            return ""
        try:
            return (tree / self._parent / machine_id / name).read_text()
        except OSError:
            return ""

    def _write(self, machine_id: str, controller: str, name: str, value: str) -> None:
        tree = self._hierarchy.tree(controller)
        if tree is None:
            raise FileNotFoundError(f"no {controller} controller")
        (tree / self._parent / machine_id / name).write_text(value)

    def _cached_bytes(self, machine_id: str) -> int:
        """Page cache of files on a disk. A guest's memory counts as cache too, of a file in memory."""
        rows = dict(line.split() for line in self._read(machine_id, "memory", "memory.stat").splitlines())
        return int(rows.get("file" if self._hierarchy.unified else "cache", 0)) - int(rows.get("shmem", 0))

    def _number(self, machine_id: str, controller: str, name: str) -> int:
        text = self._read(machine_id, controller, name).strip()
        return int(text) if text.isdecimal() else 0


def _put(path: str, value: bytes) -> None:
    """Write a control file at once. A `Path` takes as long as a thaw, for which somebody waits."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value)
    finally:
        os.close(descriptor)


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
