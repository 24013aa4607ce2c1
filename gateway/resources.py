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
    """provisioning → running → destroyed | error. A destroyed sandbox stays readable for a while."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    PAUSED = "paused"
    DESTROYED = "destroyed"
    ERROR = "error"


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
    """A customer's sandbox. `slug` is its name in preview hosts; `stop_cause` a `vmm.types.StopCause` value."""

    id: str
    workspace_id: str
    owner_key_id: str | None
    name: str | None
    slug: str
    state: SandboxState
    template: str
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
class Template:
    """A template sandboxes start from. `aliases` are other names it answers to."""

    id: str
    name: str
    description: str
    aliases: tuple[str, ...]
    digest: str
    size_bytes: int
    packages: tuple[str, ...]
    created_at: float


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
class Metrics:
    """What a sandbox uses now. cpu_seconds and memory are the host's view, disk the sandbox's."""

    at: float
    cpu_seconds: float
    cpu_count: float
    memory_used_bytes: int
    memory_limit_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    processes: int
    uptime_s: float


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
