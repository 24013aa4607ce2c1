"""What the engine asks of whoever routes previews. `gateway.engine.plane` is who does."""

from __future__ import annotations

from typing import Protocol


class Routes(Protocol):
    """None of these raises: a route that cannot be put in force now is put in force later."""

    async def push(self, sandbox_id: str) -> None:
        """Have what SQL says about a sandbox in force, or dropped when it runs no more."""

    async def push_key(self, key_id: str) -> None:
        """Have a key open its workspace's previews, or nothing when it is revoked."""

    def poke(self) -> None:
        """Tell the other workers that the event log has grown."""
