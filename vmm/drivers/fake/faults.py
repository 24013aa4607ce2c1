"""What may go wrong with a fake machine. The values can be changed while it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Faults:
    """All off by default.

    start_delay_s: how long a start takes.  start_error: code of the MachineError that a start raises instead.
    save_*, restore_*, freeze_error, thaw_error: the same for these.
    refuses_dial: nobody listens.  is_stalled: the agent reads and says nothing.
    reply_delay_s: how long each operation waits before it begins.
    cut_after_bytes: a connection breaks once the agent has sent this many bytes on it.
    """

    start_delay_s: float = 0.0
    start_error: str | None = None
    save_delay_s: float = 0.0
    save_error: str | None = None
    restore_delay_s: float = 0.0
    restore_error: str | None = None
    freeze_error: str | None = None
    thaw_error: str | None = None
    refuses_dial: bool = False
    is_stalled: bool = False
    reply_delay_s: float = 0.0
    cut_after_bytes: int | None = None
