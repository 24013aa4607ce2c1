"""The words of the agent: what it tells about processes, files and the machine it runs in.

Field names are those of docs/protocol.md ("Agent operations"). Times are Unix seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


class HookStage(enum.StrEnum):
    """When the programs below `/etc/sandgate/hooks.d/<stage>` run inside a machine."""

    BEFORE_SNAPSHOT = "before-snapshot"
    AFTER_RESTORE = "after-restore"
    BEFORE_PAUSE = "before-pause"
    AFTER_RESUME = "after-resume"


@dataclass(frozen=True, slots=True)
class FailedHook:
    """A hook that did not go well. reason: `exited`, `signaled`, `timeout`, `not_started` or an agent error's code.

    output: the end of what it printed, at most some kilobytes.
    """

    path: str
    reason: str
    output: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class HooksRun:
    """Paths of the hooks that went well, and what became of the others."""

    ran: Sequence[str] = ()
    failed: Sequence[FailedHook] = ()


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended. exit_code is 128 + signal for a signalled process and 124 for a timeout."""

    exit_code: int
    signal: int | str | None
    reason: Literal["exited", "signaled", "timeout"]
    duration_ms: float


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that the agent started. Byte counts are totals since it started, kept or not."""

    id: str
    pid: int
    state: Literal["running", "exited"]
    started_at: float
    name: str | None = None
    argv: Sequence[str] | None = None
    shell: str | None = None
    cwd: str | None = None
    user: str | None = None
    exit_code: int | None = None
    signal: int | str | None = None
    reason: Literal["exited", "signaled", "timeout"] | None = None
    exited_at: float | None = None
    duration_ms: float | None = None
    background: bool = False
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdin_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """A process that has run to its end, with what was kept of its output."""

    pid: int
    exit: ProcessExit
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry; links are not followed. `name_base64` is set when the name is not valid UTF-8."""

    name: str
    path: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: int
    is_dir: bool
    is_symlink: bool
    modified_at: float
    owner: str | None = None
    target: str | None = None
    name_base64: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory, depth first and sorted by name; `truncated` when more entries exist than were asked for."""

    path: str
    entries: Sequence[Entry]
    truncated: bool


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What `read` tells before the content."""

    size: int
    mode: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that has been replaced or appended to; `size` is its new size."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class FileEvent:
    """A change below a watched path. `overflow`: some were missed, look for yourself; it has no path."""

    type: Literal["created", "modified", "deleted", "renamed", "overflow"]
    path: str | None = None
    is_dir: bool = False
    old_path: str | None = None


@dataclass(frozen=True, slots=True)
class ListeningPort:
    """A TCP port that something in the machine listens on."""

    port: int
    address: str
    pid: int | None = None
    process: str | None = None


@dataclass(frozen=True, slots=True)
class GuestMetrics:
    """Resource use as seen from inside the machine."""

    cpu_seconds: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    processes: int
    uptime_s: float
    load1: float


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. Exactly one of argv and shell.

    timeout_s: after which the whole process group is killed, None for never.  stdin: whether input will be sent.
    pty: rows and columns of the terminal it gets, None for pipes.  log_bytes_max: output kept for later readers.
    """

    argv: Sequence[str] | None = None
    shell: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    user: str | None = None
    timeout_s: float | None = None
    stdin: bool = False
    pty: tuple[int, int] | None = None
    background: bool = False
    name: str | None = None
    log_bytes_max: int | None = None

    def to_op(self, exec_id: str) -> dict[str, object]:
        """The `exec` operation."""
        fields: dict[str, object] = {
            "argv": None if self.argv is None else list(self.argv),
            "shell": self.shell,
            "cwd": self.cwd,
            "env": None if self.env is None else dict(self.env),
            "user": self.user,
            "timeout_s": self.timeout_s,
            "stdin": self.stdin or None,
            "pty": None if self.pty is None else {"rows": self.pty[0], "cols": self.pty[1]},
            "background": self.background or None,
            "name": self.name,
            "log_bytes_max": self.log_bytes_max,
        }
        return {"op": "exec", "id": exec_id} | {key: value for key, value in fields.items() if value is not None}
