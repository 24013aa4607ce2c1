"""How many requests a workspace may make, and how many wrong keys an address may try.

The rule is the generic cell rate algorithm: one number per bucket, the *theoretical arrival time* (TAT), says when the
bucket will be full again. `gcra` is the rule; `Limits` keeps the numbers where all workers see them.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lmdb

from gateway.shared import Volatile

_NS = 1_000_000_000

#: Buckets looked at in one transaction of a sweep, so that it holds up nobody.
_SWEEP_STEP = 512


@dataclass(frozen=True, slots=True)
class Budget:
    """`limit` calls at once, refilled evenly over `period_ns`."""

    limit: int
    period_ns: int = 60 * _NS

    @property
    def step_ns(self) -> int:
        """What one call costs. Rounded up, so that no more than `limit` ever fit into a period."""
        return -(-self.period_ns // self.limit)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call may go ahead, and what its caller is told.

    remaining: calls that would be granted right now; reset_s: until the bucket is full; retry_after_s: until one call
    is granted again, 0.0 when this one was.
    """

    is_granted: bool
    limit: int
    remaining: int
    reset_s: float
    retry_after_s: float


def gcra(tat_ns: int, now_ns: int, budget: Budget) -> tuple[int, Decision]:
    """Ask for one call: the new theoretical arrival time and the decision.

    tat_ns: of the last call, any number for a new bucket. A refused call costs nothing.
    """
    span_ns = budget.step_ns * budget.limit
    # A clock that was set back, or the machine's restart, leaves numbers no call can have made.
    before = now_ns if tat_ns > now_ns + span_ns else max(tat_ns, now_ns)
    after = before + budget.step_ns
    excess_ns = after - now_ns - span_ns
    if excess_ns > 0:
        return before, Decision(False, budget.limit, 0, (before - now_ns) / _NS, excess_ns / _NS)
    return after, Decision(True, budget.limit, -excess_ns // budget.step_ns, (after - now_ns) / _NS, 0.0)


class Limits:
    """The buckets. `take` costs microseconds and does not wait; a killed worker leaves them consistent."""

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        # On Linux the monotonic clock is the same for all processes.
        self._clock_ns = clock_ns
        self._env = Volatile(path, ("buckets",))
        self._buckets = self._env.database("buckets")

    def close(self) -> None:
        """Close the files."""
        self._env.close()

    def take(self, kind: str, subject: str, budget: Budget, *, is_new: bool = True) -> Decision:
        """One call of `subject` against its bucket of that kind. is_new: False for one that was granted before."""
        key = f"{kind}:{subject}".encode()[:500]

        def decide(transaction: lmdb.Transaction) -> Decision:
            raw = transaction.get(key, db=self._buckets)
            before_ns = int.from_bytes(raw or b"") - (0 if is_new else budget.step_ns)
            tat_ns, decision = gcra(before_ns, self._clock_ns(), budget)
            if decision.is_granted and is_new:
                transaction.put(key, tat_ns.to_bytes(8), db=self._buckets)
            return decision

        return self._env.write(decide)

    def sweep(self) -> int:
        """Remove buckets that are full again; returns how many."""
        removed, position = self._env.write(partial(self._sweep_from, start=b""))
        while position:
            step, position = self._env.write(partial(self._sweep_from, start=position))
            removed += step
        return removed

    def _sweep_from(self, transaction: lmdb.Transaction, start: bytes) -> tuple[int, bytes]:
        removed = 0
        with transaction.cursor(db=self._buckets) as cursor:
            is_at_key = cursor.set_range(start)
            for _ in range(_SWEEP_STEP):
                if not is_at_key:
                    return removed, b""
                if int.from_bytes(cursor.value()) <= self._clock_ns():
                    is_at_key = cursor.delete()
                    removed += 1
                else:
                    is_at_key = cursor.next()
            return removed, bytes(cursor.key()) if is_at_key else b""


def rate_headers(decision: Decision, *, now: float) -> list[tuple[str, str]]:
    """What every limited answer says. now: Unix seconds; the reset time is a Unix time, as GitHub's and MIOSA's are."""
    return [
        ("x-ratelimit-limit", str(decision.limit)),
        ("x-ratelimit-remaining", str(decision.remaining)),
        ("x-ratelimit-reset", str(math.ceil(now + decision.reset_s))),
    ]


def address_subject(address: str) -> str:
    """What stands for a client address: itself, or the /64 of an IPv6 address, since one client has all of that."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
