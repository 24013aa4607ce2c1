"""Wakes sandboxes that the plane has visitors for: many at once, each once.

What may work a moment later (`retryable`) is tried again while visitors wait; of anything else they hear at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.errors import GatewayError

_log = logging.getLogger(__name__)


class WakeRelay:
    """Takes ids from the plane, which asks again while visitors wait, and calls `wake` for each that is not waking.

    refuse: called with the id of one that cannot be woken.
    """

    def __init__(self, wake: Callable[[str], Awaitable[None]], refuse: Callable[[str], None]) -> None:
        self._wake = wake
        self._refuse = refuse
        self._wanted: list[str] = []
        self._has_news = asyncio.Event()
        self._waking: set[str] = set()

    def note(self, sandbox_id: str) -> None:
        """Somebody waits for this one. Does not wait."""
        self._wanted.append(sandbox_id)
        self._has_news.set()

    async def run(self) -> None:
        """Wake until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                wanted, self._wanted = set(self._wanted) - self._waking, []
                for sandbox_id in wanted:
                    self._waking.add(sandbox_id)
                    tasks.create_task(self._wake_one(sandbox_id), name=f"wake {sandbox_id}")

    async def _wake_one(self, sandbox_id: str) -> None:
        try:
            await self._wake(sandbox_id)
        except GatewayError as error:
            _log.warning("sandbox %s did not wake for its visitors: %s", sandbox_id, error)
            if not error.retryable:
                self._refuse(sandbox_id)
        finally:
            self._waking.discard(sandbox_id)
