"""The contract between hostd and whatever runs machines (gVisor, a virtual machine monitor, a fake).

A driver turns a `MachineSpec` into a running machine whose agent can be dialled, and gives its resources back. It owns
processes, namespaces, addresses and limits. It does not own life-cycle states, timers, the journal or the agent
protocol: those are hostd's (`vmm.host`).

Every operation names the machine by its id, is idempotent and ends within a bounded time. Operations on one machine are
never called concurrently, except that `wait` runs beside the others; operations on different machines are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
class Placement:
    """Where a started machine is, in a form that survives a restart of hostd.

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
    """Runs machines. Raises `vmm.errors.MachineError` and nothing else for what the caller or the host can cause."""

    @property
    def name(self) -> str:
        """Short name of the driver, as in `host.info`."""
        ...

    def capabilities(self) -> Capabilities:
        """What this driver can do on this host. Valid after `open`."""
        ...

    def templates(self) -> Sequence[TemplateInfo]:
        """Templates that `start` accepts, by name or alias."""
        ...

    async def open(self) -> None:
        """Get the host ready; `adopt` for each known machine comes next, then `sweep`, then everything else.

        Raises MachineError(`driver_failed`) with the fix in its message when the host cannot run machines.
        """
        ...

    async def close(self) -> None:
        """Give back what `open` took. Machines that still run are left alone, so that they can be adopted."""
        ...

    async def start(self, spec: MachineSpec, *, token: str) -> Placement:
        """Start a machine and return as soon as its agent can be expected to listen.

        token: what the agent will ask of whoever connects (`SANDGATE_AGENT_TOKEN`).
        Raises MachineError: `template_not_found`, `no_capacity`, `driver_failed`. After an error or a cancellation
        nothing of the machine is left.
        """
        ...

    async def adopt(self, machine_id: str, placement: Placement) -> bool:
        """Take over a machine that an earlier process of hostd started. False when it does not run any more."""
        ...

    async def dial(self, machine_id: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """Connect to the machine's agent. Raises OSError while it does not listen."""
        ...

    async def wait(self, machine_id: str) -> Exit:
        """Return when a started or adopted machine has ended by itself or was destroyed. May be cancelled."""
        ...

    async def stats(self, machine_id: str) -> MachineStats:
        """Resource use as the host accounts it. Raises MachineError(`machine_not_running`)."""
        ...

    async def freeze(self, machine_id: str) -> None:
        """Stop every process of the machine where it is. Raises MachineError(`machine_not_running`)."""
        ...

    async def thaw(self, machine_id: str) -> None:
        """Undo `freeze`; no effect on a machine that is not frozen."""
        ...

    async def destroy(self, machine_id: str) -> None:
        """End a machine and free all it used. Works from the id alone, whatever state an interrupted call left."""
        ...

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        """Destroy every machine of this instance that is not in `keep`; returns their ids."""
        ...
