"""The one place where errors of the machine layer become the gateway's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gateway.errors import GatewayError
from vmm.errors import VmmError

#: Code of `vmm.errors` (docs/protocol.md) to code of `gateway.errors`.
CODES: dict[str, str] = {
    "bad_request": "validation_failed",
    "unauthorized": "internal",
    "bad_frame": "internal",
    "internal": "internal",
    "not_found": "path_not_found",
    "exists": "path_conflict",
    "not_a_directory": "path_conflict",
    "is_a_directory": "path_conflict",
    "not_empty": "path_conflict",
    "not_regular": "path_conflict",
    "invalid_path": "path_invalid",
    "forbidden_path": "path_forbidden",
    "permission_denied": "permission_denied",
    "no_space": "disk_full",
    "too_large": "too_large",
    "too_many": "conflict",
    "no_such_process": "process_not_found",
    "process_exited": "conflict",
    "command_not_found": "command_invalid",
    "not_executable": "command_invalid",
    "user_unknown": "command_invalid",
    "cwd_missing": "command_invalid",
    "io_error": "agent_unavailable",
    "unsupported": "unsupported",
    "machine_not_found": "sandbox_not_running",
    "machine_not_running": "sandbox_not_running",
    "machine_paused": "sandbox_paused",
    "agent_unreachable": "agent_unavailable",
    "template_not_found": "template_not_found",
    "no_capacity": "no_capacity",
    "limit_exceeded": "validation_failed",
    "driver_failed": "boot_failed",
    "snapshot_not_found": "snapshot_not_found",
    "snapshot_failed": "snapshot_failed",
    "snapshot_corrupt": "snapshot_corrupt",
    "snapshot_incompatible": "snapshot_incompatible",
    "in_use": "snapshot_in_use",
    "wake_timeout": "wake_timeout",
    "link_lost": "host_unavailable",
    "host_unreachable": "host_unavailable",
    "no_answer": "timeout",
}

#: What strangers are told where the machine layer speaks of machines, which they know nothing about.
_MESSAGES: dict[str, str] = {
    "machine_not_found": "The sandbox is not running any more",
    "machine_not_running": "The sandbox is not running any more",
    "machine_paused": "The sandbox is paused and does not wake by itself",
    "agent_unreachable": "The sandbox's agent does not answer",
    "link_lost": "The connection to the sandbox's host broke",
    "host_unreachable": "The sandbox's host does not answer",
}
#: Codes whose `detail` is the cause and may be shown.
_WITH_CAUSE = frozenset({"machine_not_running", "agent_unreachable"})


class Spelling(NamedTuple):
    """How an error of the machine layer is told. message None: its own; with_cause: its detail in brackets after it."""

    code: str
    message: str | None
    with_cause: bool


def spellings() -> dict[str, Spelling]:
    """What `from_vmm` does, for who must do it elsewhere; any other code is told as `internal`."""
    return {code: Spelling(own, _MESSAGES.get(code), with_cause=code in _WITH_CAUSE) for code, own in CODES.items()}


def from_vmm(error: VmmError) -> GatewayError:
    """The gateway's error for one of the machine layer. An unknown code is a fault of ours."""
    message = _MESSAGES.get(error.code, error.message)
    if error.code in _WITH_CAUSE and error.detail:
        message = f"{message} ({error.detail})"
    return GatewayError(CODES.get(error.code, "internal"), message.rstrip(".") + ".")


@contextmanager
def vmm_errors() -> Iterator[None]:
    """Raise what the machine layer raises inside as a `GatewayError`."""
    try:
        yield
    except VmmError as error:
        raise from_vmm(error) from error
