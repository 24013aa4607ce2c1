"""Saving a unit: what has to hold around the calls of `runsc.save`, and what has to hold again afterwards.

All of it is undone whatever happens, by the next hostd if this one is killed (`recover`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from vmm.drivers.base import Shape
from vmm.drivers.gvisor import bundle, network, runsc
from vmm.drivers.gvisor.cgroups import Groups
from vmm.drivers.gvisor.unit import Unit
from vmm.errors import MachineError

#: A connection that is just being opened fails a save. Most are open after a moment.
_ATTEMPTS = 3
_RETRY_S = 0.2
#: A packet to the guest takes a fraction of that, also to one that was frozen.
_QUIET_POLLS, _QUIET_POLL_S = 5, 0.001


def save(groups: Groups, sandboxes: runsc.Runsc, unit_id: str, unit: Unit, directory: Path) -> tuple[float, bool]:
    """Save a unit that runs or is frozen, and leave it so; returns what `Runsc.save` does. Blocks.

    It takes half as long if nobody is connected to its agent any more, nor to anything else in it.
    Raises MachineError: `snapshot_failed`, `no_space`. The directory is empty then.
    """
    try:
        with _thawed(groups, unit_id, unit):
            for left in reversed(range(_ATTEMPTS)):
                try:
                    # Its limits would slow it down, and what it writes counts as its memory until it is on the disk.
                    with unlimited(groups, unit_id, unit.shape):
                        if unit.counts_connections:
                            _await_quiet(sandboxes, unit_id)
                        with network.unreachable(unit.pid):
                            counts = unit.counts_connections
                            return sandboxes.save(unit_id, directory, counts_connections=counts)
                except MachineError as error:
                    if not left or not runsc.may_pass(error):
                        raise
                    clear(directory)
                time.sleep(_RETRY_S)
        raise AssertionError("the last attempt returns or raises")
    except BaseException as error:
        clear(directory)
        if isinstance(error, OSError):
            raise MachineError("snapshot_failed", "the machine could not be saved", detail=str(error)) from error
        raise


def _await_quiet(sandboxes: runsc.Runsc, unit_id: str) -> None:
    """Wait for the reset of a connection that was just closed on our side. One that stays open is not waited for."""
    for _ in range(_QUIET_POLLS):
        if sandboxes.connections(unit_id) == 0:
            return
        time.sleep(_QUIET_POLL_S)


def unlimited(groups: Groups, unit_id: str, shape: Shape) -> contextlib.AbstractContextManager[None]:
    """No limits for what gVisor itself has to do in the name of a unit."""
    quota, limit = bundle.cpu_quota_us(shape), bundle.memory_bytes(shape)
    return groups.unlimited(unit_id, cpu_quota_us=quota, memory_bytes=limit)


def limit(groups: Groups, unit_id: str, shape: Shape) -> None:
    """Set a unit's limits. Raises OSError."""
    groups.set_limits(unit_id, cpu_quota_us=bundle.cpu_quota_us(shape), memory_bytes=bundle.memory_bytes(shape))


def recover(groups: Groups, unit_id: str, unit: Unit) -> None:
    """Undo what an interrupted save has left: no limits, no packets. Raises OSError when the unit is ending."""
    network.make_reachable(unit.pid)
    limit(groups, unit_id, unit.shape)
    unit.is_frozen = groups.is_frozen(unit_id)


def clear(directory: Path) -> None:
    """Remove what a save has written."""
    for name in runsc.IMAGE_FILES:
        (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _thawed(groups: Groups, unit_id: str, unit: Unit) -> Iterator[None]:
    """A frozen sandbox does not answer."""
    if not unit.is_frozen:
        yield
        return
    groups.set_frozen(unit_id, False)
    try:
        yield
    finally:
        groups.set_frozen(unit_id, True)
