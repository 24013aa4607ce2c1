"""Tasks that are to run for as long as their owner does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def run_in_background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a task whose end by an error is logged. Who calls this keeps the task and ends it with `stop`."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_death)
    return task


async def stop(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it has ended."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has died", task.get_name(), exc_info=error)
