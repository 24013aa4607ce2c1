"""Named places at which a test can have hostd, or what it runs, die.

Recovery is a claim about every step between two writes; `point("label")` gives each of them a name. Nothing happens at
a point unless it is armed, by `arm` or by the environment:

    SANDGATE_CRASH_AT=hibernate.saved       kill -9 of this process when it gets there
    SANDGATE_CRASH_AT=hibernate.saved:3     … for the third time

Not for use in production, where the variable is not set and a point is one comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

VARIABLE = "SANDGATE_CRASH_AT"


def point(label: str) -> None:
    """Die here if a test wants that."""
    if _on_point is not None:
        _on_point(label)


def arm(on_point: Callable[[str], None] | None) -> None:
    """Have `on_point` called at every point, with its label; None for nothing."""
    global _on_point  # noqa: PLW0603 - one process has one fate
    _on_point = on_point


def killer(target: str) -> Callable[[str], None]:
    """What kills this process at a label, given as in the variable."""
    label, _, number = target.partition(":")
    left = int(number or 1)

    def on_point(reached: str) -> None:
        nonlocal left
        left -= reached == label
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_point


_on_point: Callable[[str], None] | None = killer(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
