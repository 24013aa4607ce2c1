"""Keeps the plane told what to route where.

SQL is the truth. After each change the sandbox's whole route is read back and pushed with its row's version, so pushes
may overtake each other or be repeated without harm. A plane that is down or slow delays nobody for longer than
`PUSH_TIMEOUT_S`: the change stands, and a plane that comes back asks for everything.
"""

from __future__ import annotations

from typing import Protocol

from gateway.store.keys import KeyRoute


class Routes(Protocol):
    """What the engine tells about routes. None of these raises."""

    async def push(self, sandbox_id: str) -> None:
        """Have what SQL says about a sandbox in force, or dropped when it lives no more."""

    async def push_key(self, key_id: str) -> None:
        """Have a new key open its workspace's previews."""

    async def drop_key(self, key: KeyRoute) -> None:
        """Have a revoked key open nothing."""

    def poke(self) -> None:
        """Tell the other workers that the event log has grown."""
