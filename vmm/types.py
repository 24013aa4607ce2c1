"""The words of the machine layer: what hostd is asked for and what it answers.

A *machine* is what a driver runs; a *sandbox* is what a customer owns and is unknown here. These types cross the
hostd socket as JSON objects with the same field names (docs/protocol.md, "Machine operations").

States of a machine:

    preparing ─▶ running ─▶ stopping ─▶ stopped(cause)
        └────────────┴──────────────▶ failed(cause)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class MachineState(enum.StrEnum):
    """Where a machine is in its life; the arrows stand in this module's docstring."""

    PREPARING = "preparing"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class StopCause(enum.StrEnum):
    """Why a machine is not running any more."""

    REQUESTED = "requested"
    TIMEOUT = "timeout"
    IDLE = "idle"
    OOM = "oom"
    EXITED = "exited"
    KILLED = "killed"
    SHUTDOWN = "shutdown"
    BOOT_FAILED = "boot_failed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What to run, and within which limits.

    id: caller's UUID, 36 characters; creating the same id twice yields the same machine.
    template: name of a template known to the host.
    cpu_count, memory_mib, disk_mib: hard limits; disk is what may be written on top of the template.
    env: variables every process in the machine starts with.
    expires_at: Unix seconds after which hostd destroys the machine, None for never.
    idle_timeout_s: seconds without activity after which hostd destroys it, None for never.
    """

    id: str
    template: str
    hostname: str
    cpu_count: float = 1.0
    memory_mib: int = 1024
    disk_mib: int = 3072
    env: Mapping[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    idle_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """A machine as hostd sees it now.

    address: IPv4 address reachable from the host while the machine runs.
    boot_ms: milliseconds from the request until its agent answered.
    last_active_at: Unix seconds of the last activity (exec, file, terminal input, preview traffic).
    """

    id: str
    template: str
    state: MachineState
    address: str | None
    created_at: float
    started_at: float | None
    stopped_at: float | None
    cause: StopCause | None
    detail: str | None
    boot_ms: float | None
    expires_at: float | None
    idle_timeout_s: float | None
    last_active_at: float


@dataclass(frozen=True, slots=True)
class MachineStats:
    """Resource use of one machine as its host accounts it, agent and sandbox kernel included."""

    cpu_seconds: float
    memory_bytes: int
    memory_limit_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """A template a host can start machines from.

    digest: hex SHA-256 of the recipe and the agent; machines started from one digest see the same files.
    """

    name: str
    digest: str
    description: str
    size_bytes: int
    created_at: float
    packages: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostInfo:
    """One host: what it can do and how full it is."""

    host_id: str
    driver: str
    capabilities: Mapping[str, bool | str]
    templates: tuple[str, ...]
    machines: int
    cpu_count: int
    memory_bytes: int
    started_at: float
    version: str
