"""One operation over links that may break: what may be repeated is, until the caller's deadline.

Deadlines are `time.monotonic()` seconds, the event loop's own clock. An operation that has been sent and may not be
repeated raises LinkError when the link breaks: nobody knows then whether it took effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from vmm.errors import LinkError, MachineError, VmmError
from vmm.link import Link
from vmm.stream import Stream

#: Gives an open link, making one if need be; raises LinkError when it cannot before the deadline.
LinkProvider = Callable[[float], Awaitable[Link]]

#: For callers without a deadline of their own.
CALL_TIMEOUT_S = 30.0

#: hostd redials a broken agent connection within milliseconds; an agent gone for this long will hardly come back.
_UNREACHABLE_PATIENCE_S = 2.0

_DELAY_MIN_S = 0.02
_DELAY_MAX_S = 0.5

_T = TypeVar("_T")


class Patience:
    """How long to go on after breaks: waits a little longer each time, and raises the error once time is up."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._delay_s = _DELAY_MIN_S
        self._unreachable_until: float | None = None

    async def after(self, error: VmmError) -> None:
        """Wait before another try, or raise `error` when it is no break or the time for it is over."""
        now = time.monotonic()
        until = self.deadline
        if isinstance(error, MachineError):
            self._unreachable_until = self._unreachable_until or now + _UNREACHABLE_PATIENCE_S
            until = min(until, self._unreachable_until)
        if not is_break(error) or now + self._delay_s > until:
            raise error
        await asyncio.sleep(self._delay_s)
        self._delay_s = min(self._delay_s * 2, _DELAY_MAX_S)


def is_break(error: VmmError) -> bool:
    """Whether a connection failed, here or between hostd and the agent, rather than the operation."""
    if isinstance(error, LinkError):
        return error.code == "link_lost"
    return isinstance(error, MachineError) and error.code == "agent_unreachable"


def limit_of(deadline: float | None) -> float:
    """The deadline that holds for a caller who may have given none."""
    return time.monotonic() + CALL_TIMEOUT_S if deadline is None else deadline


@asynccontextmanager
async def within(deadline: float | None) -> AsyncIterator[None]:
    """Raise LinkError `no_answer` once the deadline passes. Not for getting a link: its provider says what is wrong."""
    try:
        async with asyncio.timeout_at(limit_of(deadline)):
            yield
    except TimeoutError as error:
        raise LinkError("no_answer", "there was no answer in time") from error


async def call(
    links: LinkProvider, op: Mapping[str, Any], *, deadline: float | None, is_repeatable: bool
) -> dict[str, Any]:
    """Run an operation that answers with a REPLY and nothing else."""
    patience = Patience(limit_of(deadline))
    while True:
        try:
            stream, reply = await ask(links, op, patience)
        except VmmError as error:
            if not is_repeatable:
                raise
            await patience.after(error)
        else:
            stream.close()
            return reply


async def ask(links: LinkProvider, op: Mapping[str, Any], patience: Patience) -> tuple[Stream, dict[str, Any]]:
    """Open a stream and wait for its reply. It is left again when there is none."""
    stream = await open_stream(links, op, patience)
    try:
        async with within(patience.deadline):
            return stream, await stream.reply()
    except BaseException:
        stream.close()
        raise


async def open_stream(links: LinkProvider, op: Mapping[str, Any], patience: Patience) -> Stream:
    """Open a stream on a link that works. Repeats by itself: an OPEN that fails has not been sent."""
    while True:
        link = await links(patience.deadline)
        try:
            return link.open(op)
        except LinkError as error:
            await patience.after(error)


def decode(shape: type[_T], message: Any) -> _T:
    """Check and convert what a peer sent. Raises LinkError when it is not of that shape."""
    try:
        return msgspec.convert(message, shape)
    except msgspec.ValidationError as error:
        raise LinkError("bad_frame", "the peer sent something unexpected", detail=str(error)) from error
