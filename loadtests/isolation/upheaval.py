"""What goes on during the requests: parts that die or are replaced, routes that change, sandboxes that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from loadtests.isolation.caller import Speaker, ask, call, make_speaker
from loadtests.server import Target

#: Parts by what their command lines have in them.
_PARTS = {"api": b"run-api", "hostd": b"run-hostd"}


class Upheaval:
    """Counts what it does in `done`; `wrong` lists answers of another sandbox than the one that was asked."""

    def __init__(self, target: Target, speakers: Sequence[Speaker], every_s: float) -> None:
        self._target = target
        self._speakers = speakers
        self._every_s = every_s
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self) -> None:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._break_parts())
            for speaker in self._speakers:
                tasks.create_task(self._change_routes(speaker))
            tasks.create_task(self._come_and_go())

    async def _break_parts(self) -> None:
        while True:
            for part in ("api", "plane", "hostd"):
                await asyncio.sleep(self._every_s)
                if part == "plane":
                    await self._replace_plane()
                else:
                    self._kill(part)

    def _kill(self, part: str) -> None:
        """End a part without warning; the supervisor starts it anew."""
        assert self._target.pid is not None
        for pid in _descendants(self._target.pid):
            try:
                if _PARTS[part] in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
        self.done[f"{part} killed"] += 1

    async def _replace_plane(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "plane", "restart"),
            env=dict(self._target.environment or {}),
            stdout=asyncio.subprocess.DEVNULL,
        )
        self.done["plane replaced" if await process.wait() == 0 else "plane not replaced"] += 1

    async def _change_routes(self, speaker: Speaker) -> None:
        """Links that come and end; each has the sandbox's route pushed anew."""
        base = f"/sandboxes/{speaker.id}/previews/{speaker.preview_id}/share"
        while True:
            await call(self._target, "POST", base, {"ttl_seconds": 600}, expect=201)
            await call(self._target, "DELETE", base, expect=204)
            self.done["routes changed"] += 2

    async def _come_and_go(self) -> None:
        """A sandbox whose address is used again soon: once it is gone its host must not answer for another."""
        while True:
            speaker = await make_speaker(self._target)
            await call(self._target, "DELETE", f"/sandboxes/{speaker.id}", expect=204)
            for _ in range(5):
                status, body = await ask(self._target, speaker)
                if status == 200:
                    self.wrong.append(f"{speaker.id} is gone, and its host answered {body!r}")
                await asyncio.sleep(0.1)
            self.done["sandboxes come and gone"] += 1


def _descendants(pid: int) -> list[int]:
    found = []
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    for child in map(int, children):
        found += [child, *_descendants(child)]
    return found
