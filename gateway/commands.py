"""Everything a caller can ask of the engine: one dataclass per command, the same for every dialect.

A dialect decodes a request into exactly one of these and hands it, with the caller's `Principal`, to the method of
`gateway.engine.Engine` with the command's name in snake case. Validation that needs no look-up happens in the dialect
(it knows how the caller spelt a field); rules about state and limits are the engine's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.resources import Attribution, BuildSpec, IdleAction, PreviewPolicy, SandboxState


@dataclass(frozen=True, slots=True)
class CreateSandbox:
    """Make a sandbox and wait until it runs. None leaves a value to the template or the server's default.

    effect_id: UUID that becomes the sandbox's id; a repeated command with the same id never makes a second one.
    timeout_s: seconds after which it is destroyed; ignored when always_on.
    snapshot_id: start from this snapshot instead of a template; its sizes then hold.
    is_persistent: its timeout pauses it instead of destroying it.
    """

    effect_id: str
    template: str | None = None
    snapshot_id: str | None = None
    name: str | None = None
    slug: str | None = None
    cpu_count: float | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    always_on: bool = False
    idle_action: IdleAction | None = None
    auto_resume: bool | None = None
    hibernate_after_s: float | None = None
    is_persistent: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    region: str | None = None
    attribution: Attribution = field(default_factory=Attribution)


@dataclass(frozen=True, slots=True)
class ListSandboxes:
    """Living sandboxes, newest first; destroyed ones only when `state` asks for them. All given filters must hold."""

    page: int = 1
    page_size: int = 20
    state: SandboxState | None = None
    tags: Sequence[str] = ()
    attribution: Attribution = field(default_factory=Attribution)


@dataclass(frozen=True, slots=True)
class GetSandbox:
    """By id."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class GetSandboxByName:
    """By name or slug; living ones only."""

    name: str


@dataclass(frozen=True, slots=True)
class UpdateSandbox:
    """Change what is given. metadata and tags replace what was there."""

    sandbox_id: str
    name: str | None = None
    tags: Sequence[str] | None = None
    metadata: Mapping[str, Any] | None = None
    idle_timeout_s: float | None = None
    always_on: bool | None = None
    idle_action: IdleAction | None = None
    auto_resume: bool | None = None
    hibernate_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ExtendSandbox:
    """Move the end of its life to now + timeout_s."""

    sandbox_id: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class DestroySandbox:
    """End it. Destroying a destroyed sandbox is not an error; an unknown one is."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class PauseSandbox:
    """Stop its processes where they are. hibernate: also move its memory to disk. Pausing twice is no error."""

    sandbox_id: str
    hibernate: bool = False


@dataclass(frozen=True, slots=True)
class ResumeSandbox:
    """Let it go on where it stood. Resuming one that runs is no error."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class ForkSandbox:
    """Copy a sandbox, or one of its snapshots, `count` times. None leaves a value as the original has it.

    effect_id: UUID from which the copies' ids are made; a repeated command never makes more of them.
    """

    sandbox_id: str
    effect_id: str
    count: int = 1
    snapshot_id: str | None = None
    name: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] | None = None
    tags: Sequence[str] | None = None
    timeout_s: float | None = None
    external_user_id: str | None = None


@dataclass(frozen=True, slots=True)
class CreateSnapshot:
    """Save its memory and files of one instant; it runs on.

    effect_id: UUID that becomes the snapshot's id.
    is_awaited: answer when it is ready, not as soon as the instant is caught.
    """

    sandbox_id: str
    effect_id: str
    label: str | None = None
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class ListSnapshots:
    """Snapshots of a sandbox, or (None) of the workspace, newest first."""

    sandbox_id: str | None = None
    page: int = 1
    page_size: int = 20


@dataclass(frozen=True, slots=True)
class GetSnapshot:
    """By id. sandbox_id: it must be one of this sandbox."""

    snapshot_id: str
    sandbox_id: str | None = None


@dataclass(frozen=True, slots=True)
class DeleteSnapshot:
    """Remove it. One that a sandbox is being made from stays."""

    snapshot_id: str
    sandbox_id: str | None = None


@dataclass(frozen=True, slots=True)
class FollowSnapshot:
    """The snapshot as it is, then each change until it is ready or has failed."""

    snapshot_id: str
    sandbox_id: str | None = None


@dataclass(frozen=True, slots=True)
class RestoreSandbox:
    """Put a sandbox back to the memory and files of a snapshot. What it did since then is gone.

    effect_id: the same one never takes it back twice.
    """

    sandbox_id: str
    snapshot_id: str
    effect_id: str


@dataclass(frozen=True, slots=True)
class WaitReady:
    """Wait until it runs or failed, at most timeout_s."""

    sandbox_id: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class GetMetrics:
    """Resource use now, and in the last window_s seconds if given."""

    sandbox_id: str
    window_s: float | None = None


@dataclass(frozen=True, slots=True)
class GetUsage:
    """What one sandbox (or, sandbox_id None, the whole workspace) used between two Unix times."""

    sandbox_id: str | None
    period_start: float
    period_end: float


@dataclass(frozen=True, slots=True)
class Exec:
    """Run a command to its end. Exactly one of argv and shell.

    effect_id: id of the process at the agent; the same id never starts a second process.
    output_bytes_max: what is kept of each of stdout and stderr; the rest is read and dropped.
    """

    sandbox_id: str
    effect_id: str
    argv: Sequence[str] | None = None
    shell: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    timeout_s: float = 30.0
    stdin: bytes | None = None
    output_bytes_max: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StreamExec:
    """Run a command and yield OutputChunk items, at last one ProcessExit. Leaving early kills the process."""

    sandbox_id: str
    effect_id: str
    argv: Sequence[str] | None = None
    shell: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start a background process; it outlives the request. timeout_s None: until it ends by itself."""

    sandbox_id: str
    effect_id: str
    argv: Sequence[str] | None = None
    shell: str | None = None
    name: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class ListProcesses:
    """Processes started through the API, newest first."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class GetProcess:
    """One process by pid."""

    sandbox_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class SignalProcess:
    """Send a signal (name such as SIGTERM) to its whole group."""

    sandbox_id: str
    pid: int
    signal: str


@dataclass(frozen=True, slots=True)
class StopProcess:
    """End its whole group: SIGTERM, and SIGKILL for what is left after grace_s."""

    sandbox_id: str
    pid: int
    grace_s: float = 2.0


@dataclass(frozen=True, slots=True)
class WriteStdin:
    """Feed bytes to a background process; eof closes its input."""

    sandbox_id: str
    pid: int
    data: bytes
    eof: bool = False


@dataclass(frozen=True, slots=True)
class GetProcessOutput:
    """The last tail_bytes of what a process wrote, stdout and stderr in the order they were kept."""

    sandbox_id: str
    pid: int
    tail_lines: int | None = None


@dataclass(frozen=True, slots=True)
class StreamProcessOutput:
    """What is kept of a process's output, then what it writes from now on, then its ProcessExit."""

    sandbox_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class OpenTerminal:
    """A login shell on a PTY."""

    sandbox_id: str
    effect_id: str
    rows: int = 24
    cols: int = 80
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CloseTerminal:
    """End a terminal's shell."""

    sandbox_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Replace a file atomically with bytes given at once or as a stream (of any size, back-pressured)."""

    sandbox_id: str
    path: str
    content: bytes | AsyncIterator[bytes]
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class WriteFiles:
    """Write several files; each succeeds or fails by itself."""

    sandbox_id: str
    files: Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Open a file; the answer has its entry and an iterator over length bytes from offset (None: to the end)."""

    sandbox_id: str
    path: str
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True, slots=True)
class SendFile:
    """What reads a file, for the plane to do."""

    sandbox_id: str
    path: str


@dataclass(frozen=True, slots=True)
class ReceiveFile:
    """What replaces a file atomically, for the plane to do with a request's body."""

    sandbox_id: str
    path: str
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class StatPath:
    """One entry, links not followed."""

    sandbox_id: str
    path: str


@dataclass(frozen=True, slots=True)
class ListDirectory:
    """Entries down to depth."""

    sandbox_id: str
    path: str
    depth: int = 1


@dataclass(frozen=True, slots=True)
class GetTree:
    """A directory as a tree down to depth."""

    sandbox_id: str
    path: str
    depth: int = 3


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    """Make a directory; with parents, an existing one is no error."""

    sandbox_id: str
    path: str
    mode: int | None = None
    parents: bool = True


@dataclass(frozen=True, slots=True)
class RenamePath:
    """Move within the sandbox."""

    sandbox_id: str
    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class CopyPath:
    """Copy within the sandbox."""

    sandbox_id: str
    source: str
    destination: str
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class ChangeMode:
    """chmod."""

    sandbox_id: str
    path: str
    mode: int
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class RemovePath:
    """Remove a file, or a directory with recursive."""

    sandbox_id: str
    path: str
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class WatchPath:
    """FileChange items below a path until the caller leaves."""

    sandbox_id: str
    path: str
    recursive: bool = True


@dataclass(frozen=True, slots=True)
class ListEnv:
    """The sandbox's variables."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class SetEnv:
    """Set variables for processes started from now on; others stay."""

    sandbox_id: str
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeleteEnv:
    """Remove one variable."""

    sandbox_id: str
    name: str


@dataclass(frozen=True, slots=True)
class GetLogs:
    """The last lines written by the sandbox's API processes, oldest first."""

    sandbox_id: str
    lines: int = 100


@dataclass(frozen=True, slots=True)
class StreamLogs:
    """The same, then what comes, until the caller leaves."""

    sandbox_id: str
    lines: int = 100


@dataclass(frozen=True, slots=True)
class CreatePreview:
    """Open a port. Opening it again changes its visibility and policy, if given, and keeps its id.

    visibility_if_new: what a port gets that was not open, if no visibility is given.
    """

    sandbox_id: str
    effect_id: str
    port: int
    visibility: Literal["public", "private"] | None = None
    visibility_if_new: Literal["public", "private"] = "private"
    policy: PreviewPolicy | None = None


@dataclass(frozen=True, slots=True)
class UpdatePreview:
    """Change what is given. policy replaces the whole policy."""

    sandbox_id: str
    preview_id: str
    visibility: Literal["public", "private"] | None = None
    policy: PreviewPolicy | None = None


@dataclass(frozen=True, slots=True)
class ListPreviews:
    """All open ports of a sandbox."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class GetPreview:
    """One preview by id."""

    sandbox_id: str
    preview_id: str


@dataclass(frozen=True, slots=True)
class DeletePreview:
    """Close the port again; its shares end."""

    sandbox_id: str
    preview_id: str


@dataclass(frozen=True, slots=True)
class CreateShare:
    """A link for strangers. preview_id None: valid on every port of the sandbox."""

    sandbox_id: str
    effect_id: str
    preview_id: str | None = None
    ttl_s: float = 3600.0
    path: str = "/"
    scope: str = "read"


@dataclass(frozen=True, slots=True)
class ListShares:
    """Shares that still open something."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class RevokeShare:
    """By share id, or every share of a preview."""

    sandbox_id: str
    share_id: str | None = None
    preview_id: str | None = None


@dataclass(frozen=True, slots=True)
class CreateApiKey:
    """A new key of the caller's workspace; it cannot have scopes its maker lacks."""

    effect_id: str
    name: str
    scopes: Sequence[str] = ()
    expires_at: float | None = None
    is_test: bool = False
    external_user_id: str | None = None


@dataclass(frozen=True, slots=True)
class ListApiKeys:
    """Keys of the workspace that are not revoked, newest first."""

    page: int = 1
    page_size: int = 20


@dataclass(frozen=True, slots=True)
class RevokeApiKey:
    """From now on nobody gets in with it (in force everywhere within a second)."""

    key_id: str


@dataclass(frozen=True, slots=True)
class ListTemplates:
    """The host's templates and those of the workspace."""


@dataclass(frozen=True, slots=True)
class GetTemplate:
    """By id, name or alias."""

    name: str


@dataclass(frozen=True, slots=True)
class CreateTemplate:
    """A template of the workspace; its first build begins at once.

    effect_id: UUID that becomes its id.  slug: its name in other commands, made from `name` if None.
    """

    effect_id: str
    name: str
    spec: BuildSpec
    slug: str | None = None
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeleteTemplate:
    """Remove one of the workspace's. One that a sandbox is being made from stays."""

    name: str


@dataclass(frozen=True, slots=True)
class BuildTemplate:
    """Build it again, from a new specification if one is given. The old build serves until the new one is ready."""

    name: str
    effect_id: str
    spec: BuildSpec | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListBuilds:
    """Builds of a template, newest first."""

    name: str


@dataclass(frozen=True, slots=True)
class GetBuild:
    """One build."""

    build_id: str


@dataclass(frozen=True, slots=True)
class CancelBuild:
    """Stop a build. One that has ended stays as it is."""

    build_id: str


@dataclass(frozen=True, slots=True)
class GetBuildLog:
    """What a build has written, at most `lines` from the end."""

    build_id: str
    lines: int = 1000


@dataclass(frozen=True, slots=True)
class StreamBuildLog:
    """Lines after the cursor (None: from the start), then those that come, at last the Build that has ended."""

    build_id: str
    after_seq: int | None = None


@dataclass(frozen=True, slots=True)
class StreamEvents:
    """Events of the workspace after the cursor, then those that come. after_seq None: from now on.

    types: patterns such as "sandbox.*"; empty means all.
    """

    after_seq: int | None = None
    types: Sequence[str] = ()
    resource_type: str | None = None
    resource_id: str | None = None


@dataclass(frozen=True, slots=True)
class CreateTicket:
    """A short-lived, single-use stand-in for the caller's key where a browser cannot send headers."""

    purpose: Literal["events", "terminal"] = "events"
    ttl_s: float = 60.0
