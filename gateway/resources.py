"""What commands answer with: plain values, the same for every dialect.

Times are Unix seconds (float). A dialect turns them into its own spelling and never changes their meaning.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")


class SandboxState(enum.StrEnum):
    """provisioning → running ⇄ paused → destroyed | error. A destroyed sandbox stays readable for a while."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    PAUSED = "paused"
    DESTROYED = "destroyed"
    ERROR = "error"


class IdleAction(enum.StrEnum):
    """What becomes of a sandbox that nobody used for its idle time."""

    DESTROY = "destroy"
    PAUSE = "pause"
    KEEP = "keep"


class PauseKind(enum.StrEnum):
    """How a paused sandbox waits: frozen in memory, or hibernated on the host's disk."""

    FROZEN = "frozen"
    HIBERNATED = "hibernated"


class SnapshotState(enum.StrEnum):
    """pending → ready | error. `deleting` is one whose image is being removed; nobody is shown it."""

    PENDING = "pending"
    READY = "ready"
    ERROR = "error"
    DELETING = "deleting"


class BuildState(enum.StrEnum):
    """queued → building → certifying (start command, probe) → snapshotting → ready; or failed, or cancelled."""

    QUEUED = "queued"
    BUILDING = "building"
    CERTIFYING = "certifying"
    SNAPSHOTTING = "snapshotting"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"


class BuildFailure(enum.StrEnum):
    """Why a build failed; its `error_detail` says more, its step which one it was."""

    STEP_FAILED = "step_failed"
    START_FAILED = "start_failed"
    PROBE_FAILED = "probe_failed"
    TIMED_OUT = "timed_out"
    SNAPSHOT_FAILED = "snapshot_failed"
    HOST_FAILED = "host_failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request: a key of a workspace and what it may do.

    scopes: empty means everything. key_id: None for requests the server makes itself.
    """

    workspace_id: str
    key_id: str | None
    scopes: frozenset[str]
    is_test: bool = False
    external_user_id: str | None = None


@dataclass(frozen=True, slots=True)
class Attribution:
    """Whom the caller's own books charge: opaque ids, stored and filtered on, never interpreted."""

    project_id: str | None = None
    external_workspace_id: str | None = None
    external_user_id: str | None = None
    external_project_id: str | None = None


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A customer's sandbox. `slug` is its name in preview hosts; `stop_cause` a `vmm.types.StopCause` value.

    base_template: the host's template under `template`.  image_id: the memory image it starts from, if any.
    snapshot_id: the snapshot it was made from or last restored to.  parent_id: the sandbox it is a copy of.
    restore_id: the effect that restored it last.
    paused_s: seconds of its pauses that have ended; the present one began at `paused_at`.
    """

    id: str
    workspace_id: str
    owner_key_id: str | None
    name: str | None
    slug: str
    state: SandboxState
    template: str
    base_template: str
    cpu_count: float
    memory_mib: int
    disk_mib: int
    env: Mapping[str, str]
    metadata: Mapping[str, Any]
    tags: tuple[str, ...]
    attribution: Attribution
    region: str
    address: str | None
    timeout_s: float | None
    idle_timeout_s: float | None
    always_on: bool
    created_at: float
    started_at: float | None
    destroyed_at: float | None
    expires_at: float | None
    stop_cause: str | None
    stop_detail: str | None
    boot_ms: float | None
    image_id: str | None = None
    snapshot_id: str | None = None
    parent_id: str | None = None
    restore_id: str | None = None
    idle_action: IdleAction = IdleAction.DESTROY
    auto_resume: bool = True
    hibernate_after_s: float | None = None
    paused_at: float | None = None
    pause_kind: PauseKind | None = None
    paused_s: float = 0.0
    preview_url: str | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; `total` counts all that match."""

    items: tuple[T, ...]
    page: int
    page_size: int
    total: int


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A finished command. Output is bytes as the process wrote them; `truncated` says the tail was dropped."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    signal: int | None
    reason: Literal["exited", "signaled", "timeout"]
    duration_ms: float
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """Bytes a process wrote. `offset` counts from the process's first byte on that stream."""

    stream: Literal["stdout", "stderr", "pty"]
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """The last item of an output stream."""

    exit_code: int
    signal: int | None
    reason: Literal["exited", "signaled", "timeout"]
    duration_ms: float


@dataclass(frozen=True, slots=True)
class Process:
    """A process started through the API, running or finished."""

    pid: int
    exec_id: str
    name: str | None
    command: str
    cwd: str
    state: Literal["running", "exited"]
    exit_code: int | None
    signal: int | None
    reason: str | None
    started_at: float
    exited_at: float | None
    background: bool


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file, directory or link in a sandbox; `size` in bytes, `mode` the permission bits."""

    name: str
    path: str
    kind: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: int
    modified_at: float
    owner: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class DirectoryListing:
    """Entries of a directory; `is_truncated` when there are more than one answer holds."""

    entries: tuple[FileEntry, ...]
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class FileTree:
    """A directory with everything below it down to the depth asked for; its root says whether that is cut short."""

    entry: FileEntry
    children: tuple[FileTree, ...] = ()
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class FileChange:
    """Something happened below a watched path. kind `overflow`: look again, changes were lost."""

    kind: Literal["created", "modified", "deleted", "renamed", "overflow"]
    path: str
    is_dir: bool = False
    old_path: str | None = None


@dataclass(frozen=True, slots=True)
class PreviewPolicy:
    """What pages of other sites may do with a preview. None leaves it to the server in the sandbox.

    allowed_origins: whose scripts may read it, `*` for all.  allow_credentials: also with cookies and keys.
    frame_ancestors: who may show it in a frame; empty for nobody.
    """

    allowed_origins: Sequence[str] | None = None
    allow_credentials: bool = False
    frame_ancestors: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """A port of a sandbox opened on a host of its own. private: owner's key, browser token or share only."""

    id: str
    sandbox_id: str
    port: int
    visibility: Literal["public", "private"]
    policy: PreviewPolicy
    url: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Share:
    """A link that opens one preview (or a whole sandbox, port None) until it expires or is revoked.

    token and url are set only in the answer that made it.
    """

    id: str
    sandbox_id: str
    preview_id: str | None
    port: int | None
    path: str
    scope: str
    prefix: str
    created_at: float
    expires_at: float
    token: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret; `secret` is set only in the answer that made it."""

    id: str
    workspace_id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    external_user_id: str | None = None
    secret: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sandbox's memory and files of one instant.

    step, progress: how far a pending one is, 0 to 1.  size_bytes, stored_bytes: before and after compression.
    pause_ms: how long the sandbox stood still for it.  parent_id: the snapshot its sandbox came from.
    error_code: one of `gateway.errors.CODES`.
    """

    id: str
    workspace_id: str
    sandbox_id: str
    parent_id: str | None
    label: str | None
    state: SnapshotState
    step: str | None
    progress: float
    template: str
    base_template: str
    cpu_count: float
    memory_mib: int
    disk_mib: int
    env: Mapping[str, str]
    size_bytes: int | None
    stored_bytes: int | None
    pause_ms: float | None
    created_at: float
    ready_at: float | None
    error_code: str | None
    error_detail: str | None


@dataclass(frozen=True, slots=True)
class Template:
    """A template sandboxes start from. `aliases` are other names it answers to, each with what it really is.

    A built-in one is the host's and starts cold or from the host's pool. Any other belongs to a workspace and was
    built from `spec`: sandboxes are restored from the memory image `image_id` of its newest good build, and have its
    sizes.
    """

    id: str
    name: str
    description: str
    aliases: Mapping[str, str]
    digest: str
    size_bytes: int
    packages: tuple[str, ...]
    created_at: float
    slug: str = ""
    is_built_in: bool = True
    state: Literal["building", "ready", "failed"] = "ready"
    base_template: str = ""
    image_id: str | None = None
    build_id: str | None = None
    cpu_count: float | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    spec: BuildSpec | None = None
    updated_at: float | None = None


@dataclass(frozen=True, slots=True)
class BuildStep:
    """One step of a build. Packages for apt, pip and npm; a shell line for run; a path and its content for file."""

    kind: Literal["apt", "pip", "npm", "run", "file"]
    packages: tuple[str, ...] = ()
    command: str = ""
    path: str = ""
    content: str = ""
    mode: int = 0o644

    @property
    def name(self) -> str:
        """The step in one line, for logs and errors."""
        what = {"run": self.command, "file": self.path}.get(self.kind) or " ".join(self.packages)
        return f"{self.kind} {' '.join(what.split())}"[:200]


@dataclass(frozen=True, slots=True)
class Probe:
    """When what the start command started is ready: a shell line succeeds, or a port answers (HTTP: below 400)."""

    kind: Literal["command", "http", "port"]
    command: str = ""
    port: int = 0
    path: str = "/"
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What a template is made of. `base` is another template; sizes that are None are the base's or the default."""

    base: str
    steps: tuple[BuildStep, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/workspace"
    user: str | None = None
    start_command: str | None = None
    probe: Probe | None = None
    preview_port: int | None = None
    cpu_count: float | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Build:
    """One run of a template's specification. `step` counts from 1; `error_code` is a `BuildFailure`.

    machine_id: the builder's machine; another one after each of the `restarts`.
    """

    id: str
    template_id: str
    workspace_id: str
    machine_id: str
    spec: BuildSpec
    metadata: Mapping[str, Any]
    state: BuildState
    step: int
    step_name: str | None
    steps: int
    error_code: str | None
    error_detail: str | None
    log_bytes: int
    size_bytes: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    alive_at: float
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class BuildLine:
    """One line of a build's log. `seq` is the cursor; stream `system` is the builder itself."""

    seq: int
    at: float
    step: int
    stream: Literal["stdout", "stderr", "system"]
    text: str


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the event log. `seq` grows by time of commit and is the cursor; `type` e.g. sandbox.running."""

    seq: int
    type: str
    workspace_id: str
    resource_type: str
    resource_id: str
    at: float
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """The share of its processors that a sandbox used on the average since the one before, and its memory then."""

    at: float
    cpu_percent: float
    memory_used_bytes: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a sandbox uses now. cpu_seconds and memory are the host's view, disk the sandbox's.

    series: loads in the window that was asked for, oldest first, as far as the host remembers.
    """

    at: float
    cpu_seconds: float
    cpu_count: float
    memory_used_bytes: int
    memory_limit_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    processes: int
    uptime_s: float
    series: tuple[Load, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used over a span: running seconds and the resources they held."""

    period_start: float
    period_end: float
    sandbox_count: int
    running_s: float
    cpu_core_s: float
    memory_gib_s: float


@dataclass(frozen=True, slots=True)
class TerminalSession:
    """A PTY in a sandbox, ready for one WebSocket. `ticket` opens it without the key, once, until expires_at."""

    id: str
    sandbox_id: str
    ticket: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Ticket:
    """A single-use stand-in for a key; `ticket` is the secret itself, valid until expires_at."""

    ticket: str
    purpose: str
    expires_at: float
