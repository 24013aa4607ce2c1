"""What can go wrong with a command, in the engine's own words.

    GatewayError
    ├── code        stable, lower case; each dialect maps every code to a status and its own spelling
    ├── source      who has to act: caller, us, sandbox, host
    └── retryable   whether the same call may succeed later unchanged

`CODES` is the closed list: an unknown code is a bug, and a dialect whose table lacks a row fails a test.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["caller", "us", "sandbox", "host"]


@dataclass(frozen=True, slots=True)
class Code:
    """One row of the table of errors. `meaning` is the sentence that docs/errors.md prints."""

    source: Source
    retryable: bool
    meaning: str


CODES: dict[str, Code] = {
    "malformed": Code("caller", False, "The request is not well-formed: broken JSON, a bad header, a bad encoding."),
    "validation_failed": Code("caller", False, "A field is missing or has an impossible value; details name it."),
    "unauthenticated": Code("caller", False, "No key, an unknown key, or one that is expired or revoked."),
    "forbidden": Code("caller", False, "The key is valid but lacks the scope for this operation."),
    "route_not_found": Code("caller", False, "No such route."),
    "method_not_allowed": Code("caller", False, "The route exists, but not with this method."),
    "not_found": Code("caller", False, "No such resource in this workspace."),
    "sandbox_not_found": Code("caller", False, "No sandbox with that id or name in this workspace."),
    "template_not_found": Code("caller", False, "No template with that name."),
    "build_not_found": Code("caller", False, "No build of a template with that id in this workspace."),
    "snapshot_not_found": Code("caller", False, "No such snapshot, or its sandbox is another one."),
    "preview_not_found": Code("caller", False, "No such preview."),
    "process_not_found": Code("caller", False, "No such process in this sandbox."),
    "path_not_found": Code("caller", False, "No such file or directory in the sandbox."),
    "path_invalid": Code("caller", False, "The path is empty, relative, too long, or has a NUL byte."),
    "path_forbidden": Code("caller", False, "The path lies outside the directories the files API may change."),
    "path_conflict": Code("caller", False, "The path is of the wrong kind: a directory, not one, or already there."),
    "permission_denied": Code("caller", False, "The sandbox's own permissions forbid it."),
    "command_invalid": Code(
        "caller", False, "The command cannot be started: not found, not executable, no such user or directory."
    ),
    "sandbox_not_running": Code("caller", False, "The sandbox is not running (any more)."),
    "sandbox_paused": Code("caller", False, "The sandbox is paused and does not wake by itself; resume it first."),
    "snapshot_not_ready": Code("caller", True, "The snapshot is still being taken, or taking it has failed."),
    "snapshot_in_use": Code("caller", True, "A sandbox is being made from the snapshot."),
    "snapshot_incompatible": Code(
        "caller", False, "The snapshot does not fit: other sizes, another template, or another release of the runtime."
    ),
    "snapshot_too_large": Code("caller", False, "The sandbox's memory and files are over the limit of a snapshot."),
    "template_not_ready": Code("caller", True, "The template has no build that succeeded."),
    "template_in_use": Code("caller", True, "A sandbox is being made from the template."),
    "build_spec_invalid": Code("caller", False, "The template's specification is wrong; details name the field."),
    "conflict": Code("caller", False, "The resource's state forbids the operation."),
    "name_taken": Code("caller", False, "Another living sandbox of this workspace has that name."),
    "idempotency_mismatch": Code("caller", False, "The idempotency key was used before with another request."),
    "idempotency_in_progress": Code("caller", True, "The first request with this idempotency key has not finished."),
    "too_large": Code("caller", False, "The body or file is over the limit of this route."),
    "rate_limited": Code("caller", True, "Too many requests; Retry-After says when to come back."),
    "quota_exceeded": Code("caller", True, "The workspace has as many sandboxes, snapshots or templates as it may."),
    "unsupported": Code("caller", False, "This server does not offer that operation."),
    "timeout": Code("sandbox", True, "The operation did not finish within its time limit."),
    "disk_full": Code("sandbox", False, "The sandbox's disk is full."),
    "agent_unavailable": Code("sandbox", True, "The sandbox's agent does not answer."),
    "no_capacity": Code("host", True, "No host has room for another sandbox now."),
    "host_unavailable": Code("host", True, "The host of this sandbox cannot be reached now."),
    "boot_failed": Code("host", True, "The sandbox could not be started."),
    "snapshot_failed": Code("host", True, "The snapshot could not be taken; the sandbox runs on."),
    "snapshot_corrupt": Code("host", False, "The snapshot's files are damaged; nothing was started from them."),
    "wake_timeout": Code("host", True, "The paused sandbox did not wake in time."),
    "internal": Code("us", True, "A fault of ours; the request id finds it in the log."),
}


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One field that failed validation. `field` is a dotted path as the caller spelt it."""

    field: str
    reason: str


class GatewayError(Exception):
    """A command failed. `message` is fit for strangers; the cause goes by `raise ... from`."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: Sequence[FieldProblem] = (),
        retry_after_s: float | None = None,
        allowed_methods: Collection[str] = (),
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.row = CODES[code]
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.retry_after_s = retry_after_s
        self.allowed_methods = tuple(sorted(allowed_methods))

    @property
    def source(self) -> Source:
        """Who has to act."""
        return self.row.source

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later unchanged."""
        return self.row.retryable


def invalid(field: str, reason: str) -> GatewayError:
    """The error for one bad field."""
    return GatewayError("validation_failed", f"{field}: {reason}", details=[FieldProblem(field, reason)])
