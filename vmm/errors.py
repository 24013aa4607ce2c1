"""Errors of the machine layer.

    VmmError
    ├── AgentError          the operation reached the machine's agent, which refused it
    ├── MachineError        hostd refused it or could not do it
    └── LinkError           the connection to hostd or the agent broke; nothing is known about the effect

`code` is one of the codes listed in docs/protocol.md; the gateway translates it, strangers never see these classes.
"""

from __future__ import annotations

from typing import Literal

Source = Literal["caller", "us", "sandbox", "host"]

#: Codes that a second try cannot mend belong to whoever has to change something; these are ours or the host's.
_US = frozenset({"bad_frame", "unauthorized", "internal"})
_HOST = frozenset(
    {
        "driver_failed",
        "host_unreachable",
        "link_lost",
        "no_capacity",
        "snapshot_corrupt",
        "snapshot_failed",
        "snapshot_incompatible",
        "wake_timeout",
    }
)
_SANDBOX = frozenset({"agent_unreachable", "machine_not_running", "no_answer", "no_space", "io_error"})
_RETRYABLE = frozenset(
    {
        "agent_unreachable",
        "host_unreachable",
        "link_lost",
        "no_answer",
        "no_capacity",
        "snapshot_failed",
        "wake_timeout",
    }
)


class VmmError(Exception):
    """Root of this package's errors. `message` is fit for strangers, `detail` is for the log."""

    def __init__(self, code: str, message: str, *, detail: str | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.detail = detail

    @property
    def source(self) -> Source:
        """Who has to act: the caller, us, the sandbox or the host."""
        if self.code in _US:
            return "us"
        if self.code in _HOST:
            return "host"
        return "sandbox" if self.code in _SANDBOX else "caller"

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without any change by the caller."""
        return self.code in _RETRYABLE


class AgentError(VmmError):
    """The agent inside the machine refused the operation."""


class MachineError(VmmError):
    """hostd refused the operation or the driver failed."""

    @property
    def source(self) -> Source:
        """As for every error, but the disk that is full is the host's."""
        return "host" if self.code == "no_space" else super().source


class LinkError(VmmError):
    """The connection broke or was refused before an answer came."""
