"""One sandbox under measurement, with the guest program in it and its preview at hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loadtests.http import Answer, Connection, UnexpectedAnswer
from loadtests.server import Target

PORT = 8000
_GUEST = Path(__file__).with_name("guest.py")
_UP_S = 30.0


@dataclass(slots=True)
class Box:
    """A sandbox by its id. preview: the URL of its port 8000."""

    api: Connection
    target: Target
    id: str
    preview: str = ""

    @property
    def path(self) -> str:
        return f"/sandboxes/{self.id}"

    async def post(self, what: str, body: dict[str, Any] | None = None, *, expect: int = 200) -> Any:
        """One of the sandbox's own calls; what the answer holds."""
        return (await self.api.call("POST", f"{self.path}/{what}", body or {}, expect=expect)).json()

    async def run(self, *argv: str, user: str = "user") -> str:
        """Run a command; what it printed. Raises RuntimeError when it fails."""
        done = await self.post("exec", {"cmd": list(argv), "user": user})
        if done["exit_code"] != 0:
            raise RuntimeError(f"{argv}: {done}")
        return str(done["stdout"])

    async def status(self) -> dict[str, int]:
        """What the guest's writer says of itself."""
        found: dict[str, int] = orjson.loads(await self.run("cat", "/workspace/status.json"))
        return found

    async def visit(self) -> Answer:
        """A preview request on a connection of its own, as a new visitor's."""
        async with Connection(self.preview, self.target.key) as visitor:
            return await visitor.call("GET", "/")

    async def load(self, *arguments: str) -> None:
        """Put the guest program in, start it, and wait until its preview answers."""
        await self.api.call(
            "POST", f"{self.path}/files/write", {"path": "/workspace/guest.py", "content": _GUEST.read_text()}
        )
        line = " ".join(("exec python3 /workspace/guest.py", *arguments))
        await self.post("exec", {"command": f"nohup setsid sh -c '{line}' >/dev/null 2>&1 &"})
        self.preview = (await self.post("expose", {"port": PORT}))["url"]
        async with asyncio.timeout(_UP_S):
            while not await self._answers():
                await asyncio.sleep(0.05)

    async def _answers(self) -> bool:
        try:
            await self.visit()
        except (UnexpectedAnswer, OSError, asyncio.IncompleteReadError):
            return False
        return True

    async def destroy(self) -> None:
        await self.api.call("DELETE", self.path, expect=204)


async def create(api: Connection, target: Target, **fields: Any) -> Box:
    """Make a sandbox."""
    answer = await api.call("POST", "/sandboxes", {"always_on": True, **fields}, expect=201)
    return Box(api, target, answer.json()["id"])


@asynccontextmanager
async def box(api: Connection, target: Target, *arguments: str, **fields: Any) -> AsyncIterator[Box]:
    """A sandbox for the length of a block. arguments: those of the guest program, if it is to run."""
    made = await create(api, target, **fields)
    try:
        if arguments:
            await made.load(*arguments)
        yield made
    finally:
        await made.destroy()


async def children(parent: Box, count: int) -> list[Box]:
    """Fork a sandbox."""
    answer = await parent.post("fork", {"count": count}, expect=201)
    return [Box(parent.api, parent.target, child["id"]) for child in answer["forks"]]
