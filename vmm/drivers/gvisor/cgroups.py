"""Resource groups of machines, in either hierarchy: several v1 trees or the one of v2.

runsc makes a machine's group and sets its limits (`bundle`); this module finds it again, reads its counters, freezes it
and removes what is left. Groups lie at `sandgate-<instance>/<machine>` in every tree.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from vmm.types import MachineStats

_ROOT = Path("/sys/fs/cgroup")
#: The trees without which a machine would have no limit.
_NEEDED = ("cpu", "memory", "pids")
_FREEZE_TIMEOUT_S = 2.0


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
            # A tree without a controller ("name=systemd") limits nothing, but runsc makes groups there as well.
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

    def path(self, machine_id: str) -> str:
        """Group of a machine, as the bundle names it."""
        return f"/{self._parent}/{machine_id}"

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
            memory, limit = (self._number(machine_id, "memory", f"memory.{name}") for name in ("current", "max"))
        else:
            cpu_seconds = self._number(machine_id, "cpuacct", "cpuacct.usage") / 1e9
            memory, limit = (
                self._number(machine_id, "memory", f"memory.{name}_in_bytes") for name in ("usage", "limit")
            )
        return MachineStats(cpu_seconds, memory, limit, self._number(machine_id, "pids", "pids.current"))

    def can_freeze(self) -> bool:
        """Whether the host can stop a machine in place."""
        return self._hierarchy.tree("freezer") is not None

    def set_frozen(self, machine_id: str, is_frozen: bool) -> None:
        """Freeze or thaw; returns once it is done. Blocks for about a millisecond. Raises OSError."""
        tree = self._hierarchy.tree("freezer")
        if tree is None:
            raise FileNotFoundError("no freezer controller")
        group = tree / self._parent / machine_id
        if self._hierarchy.unified:
            (group / "cgroup.freeze").write_text("1" if is_frozen else "0")
            return
        state = "FROZEN" if is_frozen else "THAWED"
        deadline = time.monotonic() + _FREEZE_TIMEOUT_S
        # v1 may stay at FREEZING until it is asked again.
        while True:
            (group / "freezer.state").write_text(state)
            if (group / "freezer.state").read_text().strip() == state:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{machine_id} is not {state.lower()}")
            time.sleep(0.0005)

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

    def _number(self, machine_id: str, controller: str, name: str) -> int:
        text = self._read(machine_id, controller, name).strip()
        return int(text) if text.isdecimal() else 0


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
