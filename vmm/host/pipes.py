"""Files that a thread reads or writes at one end while the event loop's side has the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO


@asynccontextmanager
async def reading(write: Callable[[Path], object]) -> AsyncIterator[BinaryIO]:
    """What `write`, in a thread, puts into the file that it is given. Raises what it raises, at the end."""
    ours, theirs = os.pipe()
    work = asyncio.create_task(asyncio.to_thread(_with, theirs, write))
    try:
        with open(ours, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            yield file
    finally:
        # It is at its end, or finds that nobody reads any more.
        error = await _end_of(work)
    if error is not None:
        raise error


@asynccontextmanager
async def writing(read: Callable[[Path], object]) -> AsyncIterator[BinaryIO]:
    """What `read`, in a thread, takes from the file that it is given. Raises what it raises, at the end."""
    theirs, ours = os.pipe()
    work = asyncio.create_task(asyncio.to_thread(_with, theirs, read))
    try:
        # Nobody reads on: what is wrong with it is about to be told.
        with contextlib.suppress(BrokenPipeError), open(ours, "wb", buffering=0) as file:  # noqa: PTH123
            yield file
    finally:
        error = await _end_of(work)
    if error is not None:
        raise error


async def _end_of(work: asyncio.Task[None]) -> BaseException | None:
    await asyncio.wait([work])
    return work.exception()


def _with(descriptor: int, use: Callable[[Path], object]) -> None:
    try:
        use(Path(f"/dev/fd/{descriptor}"))
    finally:
        os.close(descriptor)
