"""The words of the machine layer: what hostd is asked for and what it answers.

A *machine* is what a driver runs; a *sandbox* is what a customer owns and is unknown here. These types cross the
hostd socket as JSON objects with the same field names (docs/protocol.md, "Machine operations").

States of a machine:

    preparing ─▶ running ◀─▶ frozen ─▶ hibernating ─▶ hibernated ─▶ waking ─▶ running
        └────────────┴─────────┴────────────┴──────────────┴───────────┴─▶ stopping ─▶ stopped(cause), failed(cause)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class MachineState(enum.StrEnum):
    """Where a machine is in its life; the arrows stand in this module's docstring."""

    PREPARING = "preparing"
    RUNNING = "running"
    FROZEN = "frozen"
    HIBERNATING = "hibernating"
    HIBERNATED = "hibernated"
    WAKING = "waking"
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


class IdleAction(enum.StrEnum):
    """What happens to a machine that nobody has used for its idle timeout."""

    DESTROY = "destroy"
    PAUSE = "pause"
    KEEP = "keep"


class Origin(enum.StrEnum):
    """How a machine came by what runs in it now: a warm one, a prepared shell, from nothing, or out of an image."""

    READY = "ready"
    SHELL = "shell"
    COLD = "cold"
    RESTORED = "restored"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What to run, and within which limits.

    id: caller's UUID, 36 characters; creating the same id twice yields the same machine.
    template: name of a template known to the host.
    cpu_count, memory_mib, disk_mib: hard limits; disk is what may be written on top of the template.
    env: variables every process in the machine starts with.
    expires_at: Unix seconds after which hostd destroys the machine, None for never.
    idle_timeout_s: seconds without activity after which hostd does `idle_action`, None for never.
    snapshot: start from this snapshot instead of the template's files; the shape has to be that of the snapshot.
    auto_resume: whether use of the paused machine wakes it.
    hibernate_after_s: seconds after which a frozen machine is written to disk, None for the host's default.
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
    snapshot: str | None = None
    idle_action: IdleAction = IdleAction.DESTROY
    auto_resume: bool = True
    hibernate_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A machine to fork off another one: the fields of `MachineSpec` that it does not share with its parent."""

    id: str
    hostname: str
    env: Mapping[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    idle_timeout_s: float | None = None
    idle_action: IdleAction = IdleAction.DESTROY
    auto_resume: bool = True
    hibernate_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """A machine as hostd sees it now.

    address: IPv4 address reachable from the host while the machine runs; a wake, restore or fork gives a new one.
    boot_ms: milliseconds from the request until its agent answered.
    snapshot: the snapshot that its memory came from, None after a start from files.
    unit: the driver's id of what runs, for the operator; None while hibernated.
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
    origin: Origin | None = None
    snapshot: str | None = None
    auto_resume: bool = True
    idle_action: IdleAction = IdleAction.DESTROY
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class ForkFailure:
    """A child that could not be made; the others may live."""

    id: str
    code: str
    message: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """The children of a fork, in the order asked for.

    pause_ms: how long the parent stood still for it, 0 if it was paused anyway.
    """

    machines: tuple[MachineInfo | ForkFailure, ...]
    pause_ms: float


class SnapshotState(enum.StrEnum):
    """pending ─▶ ready; pending ─▶ error."""

    PENDING = "pending"
    READY = "ready"
    ERROR = "error"


class SnapshotStep(enum.StrEnum):
    """What a pending snapshot is at: the machine stands still while `saving` only."""

    SAVING = "saving"
    HASHING = "hashing"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """Memory and files of a machine at one instant.

    machine: id of the machine it was taken of, empty of an imported one.
    parent: the snapshot that that machine came from.
    size_bytes: of its files unpacked.  stored_bytes: what they take on the disk.
    pause_ms: how long the machine stood still for it.
    step, progress (0 to 1): how far a pending one is.  detail: why it failed, or which hook did.
    """

    id: str
    machine: str
    state: SnapshotState
    template: str
    cpu_count: float
    memory_mib: int
    disk_mib: int
    created_at: float
    size_bytes: int = 0
    stored_bytes: int = 0
    ready_at: float | None = None
    pause_ms: float | None = None
    parent: str | None = None
    detail: str | None = None
    step: SnapshotStep | None = None
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The warm machines of one shape. refill_ms: how long making one takes, None before the first.

    thawed: of the ready ones, how many are not frozen.  claims, misses: creates, and those that found none ready.
    refills, failures: units that were made ahead, and that could not be. All four count from the host's start.
    """

    template: str
    cpu_count: float
    memory_mib: int
    disk_mib: int
    ready: int
    shells: int
    target_ready: int
    target_shells: int
    claims: int
    misses: int
    refill_ms: float | None
    thawed: int = 0
    refills: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class MachineStats:
    """Resource use of one machine as its host accounts it, agent and sandbox kernel included.

    cached_bytes: of memory_bytes, what is in files on the host's disk as well, such as images of it.
    """

    cpu_seconds: float
    memory_bytes: int
    memory_limit_bytes: int
    pids: int
    cached_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a machine had used at a time. cpu_seconds begins again when the machine gets another unit."""

    at: float
    cpu_seconds: float
    memory_bytes: int


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
    """One host: what it can do and how full it is.

    backing_bytes: memory that it keeps at hand (`vmm.host.backing`).
    """

    host_id: str
    driver: str
    capabilities: Mapping[str, bool | str]
    templates: tuple[str, ...]
    machines: int
    cpu_count: int
    memory_bytes: int
    started_at: float
    version: str
    backing_bytes: int = 0
