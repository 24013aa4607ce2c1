"""The contract between hostd and whatever runs machines (gVisor, a virtual machine monitor, a fake).

A driver runs *units*. A unit is one incarnation of a machine: a cold start, a claim from the pool, a restore and a
wake each give the machine a new one, with an id of its own (a UUID) that is never used again. The driver turns a
`Shape` into a running unit whose agent can be dialled, saves it, and gives its resources back. It owns processes,
namespaces, addresses and limits. It does not own life-cycle states, timers, the journal or the agent protocol: those
are hostd's (`vmm.host`).

    absent ─prepare─▶ shell ─boot, restore─▶ running ⇄ frozen
       ◀──────────────── destroy ───────────────────────┘      save: running ─▶ running

Every operation names a unit, is idempotent and ends within a bounded time. Operations on one unit are never called
concurrently, except that `wait` and `dial` run beside the others; operations on different units are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vmm.types import MachineSpec, MachineStats, StopCause, TemplateInfo

#: TCP port of the agent inside a machine.
AGENT_PORT = 10_700


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do; hostd reports it in `host.info` and refuses what is missing.

    isolation: what stands between a guest and the host's kernel: "gvisor", "vm" or "none".
    limits: whether cpu, memory and pids are enforced. freeze: whether `freeze` stops a machine from using any CPU.
    memory_snapshot: whether a running machine can be saved with its memory.
    reconnect_after_snapshot: whether open connections to the machine break when it is saved.
    """

    isolation: str
    limits: bool
    freeze: bool
    memory_snapshot: bool = False
    reconnect_after_snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What a unit is made for. Units of equal shapes are interchangeable until they are given an identity."""

    template: str
    cpu_count: float
    memory_mib: int
    disk_mib: int

    @staticmethod
    def of(spec: MachineSpec) -> Shape:
        """The shape a machine asks for."""
        return Shape(spec.template, spec.cpu_count, spec.memory_mib, spec.disk_mib)


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save` did.

    pause_s: how long the unit stood still.  size_bytes: of all files written.
    template_digest, runtime: what the files can be restored over and by; both belong into the image's manifest.
    is_quiet: no TCP connection was open in it, not even within it; belongs there as well.
    """

    pause_s: float
    size_bytes: int
    template_digest: str
    runtime: str
    is_quiet: bool = False


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """A saved unit as `restore` reads it. Whoever opened it has verified it and keeps it until `restore` returns.

    directory: the files that `save` wrote, by the names it gave them.
    token: what the agent in it asks of whoever connects.  shape: what it was saved from.
    is_quiet, size_bytes: as in `Saved`.
    """

    id: str
    directory: Path
    token: str
    shape: Shape
    template_digest: str
    runtime: str
    is_quiet: bool = False
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a started unit is, in a form that survives a restart of hostd.

    address: IPv4 address reachable from the host.  resolvers: name servers the machine can reach.
    facts: JSON values for the driver alone, handed back to `adopt`.
    """

    address: str
    agent_port: int = AGENT_PORT
    resolvers: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exit:
    """Why a machine ended by itself; `detail` is for the log and for `MachineInfo.detail`."""

    cause: StopCause
    detail: str | None = None


class Driver(Protocol):
    """Runs units. Raises `vmm.errors.MachineError` and nothing else for what the caller or the host can cause."""

    @property
    def name(self) -> str:
        """Short name of the driver, as in `host.info`."""
        ...

    def capabilities(self) -> Capabilities:
        """What this driver can do on this host. Valid after `open`."""
        ...

    def templates(self) -> Sequence[TemplateInfo]:
        """Templates that a shape may name, by name or alias."""
        ...

    async def open(self) -> None:
        """Get the host ready; `adopt` for each known unit comes next, then `sweep`, then everything else.

        Raises MachineError(`driver_failed`) with the fix in its message when the host cannot run machines.
        """
        ...

    async def close(self) -> None:
        """Give back what `open` took. Units that still run are left alone, so that they can be adopted."""
        ...

    async def prepare(self, unit: str, shape: Shape, *, token: str) -> None:
        """Make a shell: everything a unit needs, with nothing running in it yet, and frozen.

        token: what the agent will ask of whoever connects once the shell is booted; a restored agent has the image's.
        Raises MachineError: `template_not_found`, `no_capacity`, `driver_failed`. After an error or a cancellation
        nothing of the unit is left.
        """
        ...

    async def boot(self, unit: str) -> Placement:
        """Start a shell from its template's files; returns as soon as its agent can be expected to listen.

        Raises MachineError: `machine_not_running` when there is no such shell, `driver_failed`. After an error or a
        cancellation nothing of the unit is left.
        """
        ...

    async def restore(self, unit: str, image: ImageFiles) -> Placement:
        """Start a shell from a saved unit: its memory, processes and files go on from where they were saved.

        Connections that were open then are reset. The shell must have the image's shape.
        Raises MachineError: as `boot`, `snapshot_corrupt`, and `snapshot_incompatible` when the host has another
        runtime or template. After an error or a cancellation nothing of the unit is left.
        """
        ...

    async def start(self, unit: str, shape: Shape, *, token: str) -> Placement:
        """`prepare` and `boot` in one."""
        ...

    async def save(self, unit: str, directory: Path) -> Saved:
        """Write a running unit's memory and files, of one instant, into an existing empty directory.

        The unit stands still meanwhile and runs on afterwards; connections to it are reset. A frozen unit is thawed
        first and frozen again afterwards.
        Raises MachineError: `machine_not_running`, `snapshot_failed`, `no_space`. After an error or a cancellation the
        unit runs as before, unless it has ended by itself, and the directory is empty.
        """
        ...

    async def adopt(self, unit: str, placement: Placement) -> bool:
        """Take over a unit that an earlier process of hostd started. False when it does not run any more.

        One that was frozen stays frozen: `freeze` or `thaw` brings it to where the journal says it was.
        """
        ...

    async def dial(self, unit: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """Connect to the unit's agent. Raises OSError while it does not listen."""
        ...

    async def wait(self, unit: str) -> Exit:
        """Return when a prepared, started or adopted unit has ended by itself or was destroyed. May be cancelled."""
        ...

    async def stats(self, unit: str) -> MachineStats:
        """Resource use as the host accounts it. Raises MachineError(`machine_not_running`)."""
        ...

    async def freeze(self, unit: str) -> None:
        """Stop every process of the unit where it is. Raises MachineError(`machine_not_running`)."""
        ...

    async def thaw(self, unit: str) -> None:
        """Undo `freeze`; no effect on a unit that is not frozen."""
        ...

    async def reclaim(self, unit: str) -> int:
        """Give a frozen unit's memory back to the host as far as that works; returns how many bytes.

        It comes back by itself, page by page, as the unit is thawed and uses it.
        """
        ...

    async def destroy(self, unit: str) -> None:
        """End a unit and free all it used. Works from the id alone, whatever state an interrupted call left."""
        ...

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        """Destroy every unit of this instance that is not in `keep`; returns their ids."""
        ...
