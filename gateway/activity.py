"""Passes on to hostd which sandboxes had preview traffic, so that their idle time starts again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from vmm.client import HostClient
from vmm.errors import VmmError

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


class ActivityRelay:
    """Collects ids from the plane and tells hostd; while hostd is away they are kept, each once."""

    def __init__(self, host: HostClient) -> None:
        self._host = host
        self._pending: set[str] = set()
        self._has_news = asyncio.Event()

    def note(self, sandbox_ids: Sequence[str]) -> None:
        """These had traffic. Does not wait."""
        self._pending.update(sandbox_ids)
        self._has_news.set()

    async def run(self) -> None:
        """Tell hostd until cancelled."""
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            ids, self._pending = self._pending, set()
            try:
                await self._host.touch(sorted(ids))
            except VmmError as error:
                _log.warning("hostd did not hear of activity, it is told again: %s", error)
                self._pending |= ids
                await asyncio.sleep(_RETRY_S)
                self._has_news.set()
