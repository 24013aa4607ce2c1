"""Gives machines their units: a start from files, a claim from the pool, or a restore; ready to be used by its owner.

A unit is told who it is before anybody can reach it: its line is up and its names are written when it is handed over.
What goes wrong on the way takes the unit along. Units that are given up are destroyed behind their owner's back, and
`settle` waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from vmm.drivers.base import Driver, ImageFiles, Placement, Shape
from vmm.errors import AgentError, MachineError, VmmError
from vmm.guest import HooksRun, HookStage
from vmm.host.crash import point
from vmm.host.line import AgentLine
from vmm.host.names import write_names
from vmm.types import MachineSpec, Origin

logger = logging.getLogger(__name__)

_DESTROY_ATTEMPTS = 3
_DESTROY_RETRY_S = 1.0
_GIVEN_UP = MachineError("machine_not_running", "the machine runs elsewhere now")


@dataclass(frozen=True, slots=True)
class Unit:
    """One incarnation of a machine. line: up, and nobody else's."""

    id: str
    token: str
    placement: Placement
    line: AgentLine
    origin: Origin
    hooks: HooksRun = field(default_factory=HooksRun)


class Units:
    """boot_timeout_s: from the start of a unit to the first answer of its agent."""

    def __init__(self, driver: Driver, *, boot_timeout_s: float) -> None:
        self._driver = driver
        self._boot_timeout_s = boot_timeout_s
        self._ends: set[asyncio.Task[str | None]] = set()

    async def start(self, spec: MachineSpec) -> Unit:
        """A unit with the template's files. Raises MachineError, as every method does."""
        token = secrets.token_hex(32)
        unit = str(uuid.uuid4())
        async with self._undone_on_failure(unit):
            placement = await self._driver.start(unit, Shape.of(spec), token=token)
            point("start.started")
            return await self._introduce(spec, unit, placement, token, Origin.COLD)

    async def restore(self, spec: MachineSpec, image: ImageFiles, *, is_own: bool = False) -> Unit:
        """A unit that goes on where the image was saved, under this machine's name.

        is_own: it is this machine that was saved, so its memory has what was set of its variables since it was made.
        """
        if Shape.of(spec) != image.shape:
            raise MachineError("snapshot_incompatible", "the snapshot is of a machine of another template or size")
        unit = str(uuid.uuid4())
        async with self._undone_on_failure(unit):
            await self._driver.prepare(unit, image.shape, token=image.token)
            point("restore.prepared")
            placement = await self._driver.restore(unit, image)
            point("restore.restored")
            return await self._introduce(spec, unit, placement, image.token, Origin.RESTORED, keeps_env=is_own)

    def join(self, unit: str, token: str, placement: Placement, origin: Origin, *, is_held: bool = False) -> Unit:
        """A unit that exists already, with a line that is being made, or is held until the unit runs."""
        line = AgentLine(unit, lambda protocol: self._driver.dial(unit, protocol), token)
        if is_held:
            line.hold()
        line.start()
        return Unit(unit, token, placement, line, origin)

    def discard(self, unit: Unit) -> None:
        """Give a unit up, behind the caller's back."""
        unit.line.close(_GIVEN_UP)
        self.destroy_later(unit.id)

    def destroy_later(self, unit: str) -> None:
        """As `destroy`, behind the caller's back."""
        task = asyncio.create_task(self.destroy(unit), name=f"destroy {unit}")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def destroy(self, unit: str) -> str | None:
        """Free all that a unit holds; returns what went wrong, or None. The next start sweeps what is left."""
        left = None
        for attempt in range(_DESTROY_ATTEMPTS):
            try:
                await self._driver.destroy(unit)
            except MachineError as error:
                left = f"{error.message}: {error.detail}" if error.detail else error.message
                logger.warning("unit %s cannot be freed (attempt %d): %s", unit, attempt + 1, left)
                await asyncio.sleep(_DESTROY_RETRY_S)
            else:
                return None
        return left

    async def settle(self) -> None:
        """Until everything given up is gone."""
        while self._ends:
            await asyncio.wait(list(self._ends))

    @asynccontextmanager
    async def _undone_on_failure(self, unit: str) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            self.destroy_later(unit)
            raise

    async def _introduce(
        self,
        spec: MachineSpec,
        unit: str,
        placement: Placement,
        token: str,
        origin: Origin,
        *,
        keeps_env: bool = False,
    ) -> Unit:
        """Wait for its agent and tell it who it is. A copy gets a token of its own: the image's is shared."""
        is_copy = origin is Origin.RESTORED
        new_token = secrets.token_hex(32) if is_copy else token
        joined = self.join(unit, token, placement, origin)
        line = joined.line
        try:
            async with asyncio.timeout(self._boot_timeout_s):
                await self._until_up(unit, line)
                hooks = await write_names(
                    line,
                    spec,
                    placement,
                    keeps_env=keeps_env,
                    token=new_token if is_copy else None,
                    hooks=HookStage.AFTER_RESTORE if is_copy else None,
                )
            line.token = new_token
            return Unit(unit, new_token, placement, line, origin, hooks)
        except BaseException as error:
            line.close(_GIVEN_UP)
            if isinstance(error, TimeoutError):
                message = "the machine's agent did not answer in time"
                raise MachineError("driver_failed", message, detail=line.last_error) from error
            if isinstance(error, AgentError):
                message = "the machine's agent refused to set it up"
                raise MachineError("driver_failed", message, detail=str(error)) from error
            raise

    async def _until_up(self, unit: str, line: AgentLine) -> None:
        if line.is_up.is_set():
            return
        up = asyncio.create_task(line.is_up.wait())
        ended = asyncio.create_task(self._driver.wait(unit))
        try:
            await asyncio.wait({up, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                why = ended.result().detail
                raise MachineError("driver_failed", "the machine ended while it booted", detail=why)
        finally:
            up.cancel()
            ended.cancel()


def explain(error: VmmError) -> str:
    """An error as one line, for a machine's detail and the log."""
    return f"{error.message}: {error.detail}" if error.detail else error.message


def failures(hooks: HooksRun) -> str | None:
    """Which hooks failed, or None."""
    failed = [f"{hook.path} ({hook.reason})" for hook in hooks.failed]
    return f"hooks failed: {', '.join(failed)}" if failed else None


async def give_up_waiting(task: asyncio.Task[object]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait([task])
