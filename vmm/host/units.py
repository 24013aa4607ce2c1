"""Gives machines their units: a start from files, a claim from the pool, or a restore; ready to be used by its owner.

A unit is told who it is before anybody can reach it: its line is up and its names are written when it is handed over.
Those of a claimed one are on their way: its agent takes what comes on its line in order, so nobody is ahead of them.
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
from dataclasses import dataclass, field, replace

from vmm.drivers.base import Driver, ImageFiles, Placement, Shape
from vmm.errors import AgentError, MachineError, VmmError
from vmm.guest import HooksRun, HookStage
from vmm.host.backing import Backing
from vmm.host.crash import point
from vmm.host.line import AgentLine
from vmm.host.names import warm_up, write_names
from vmm.types import MachineSpec, Origin

logger = logging.getLogger(__name__)

_DESTROY_ATTEMPTS = 3
_DESTROY_RETRY_S = 1.0
#: MiB that a sandbox takes anew: its kernel, its first process, and reading an image besides what is in it.
_SHELL_MIB, _BOOT_MIB, _RESTORE_MIB = 12, 24, 24
_MIB = 1024 * 1024
_GIVEN_UP = MachineError("machine_not_running", "the machine runs elsewhere now")


@dataclass(frozen=True, slots=True)
class Unit:
    """One incarnation of a machine. line: up, and nobody else's.  naming: ends when its names are written."""

    id: str
    token: str
    placement: Placement
    line: AgentLine
    origin: Origin
    hooks: HooksRun = field(default_factory=HooksRun)
    naming: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Shell:
    """A unit in which nothing runs yet. token: what its agent will ask for if it is booted."""

    id: str
    token: str


class Units:
    """boot_timeout_s: from the start of a unit to the first answer of its agent."""

    def __init__(self, driver: Driver, backing: Backing, *, boot_timeout_s: float) -> None:
        self._driver = driver
        self._backing = backing
        self._boot_timeout_s = boot_timeout_s
        self._ends: set[asyncio.Task[str | None]] = set()

    async def prepare(self, shape: Shape) -> Shell:
        """A unit for later. Raises MachineError, as every method does."""
        shell = _new_shell()
        await self._driver.prepare(shell.id, shape, token=shell.token)
        return shell

    async def warm(self, shape: Shape) -> Unit:
        """A unit for later that needs but a name: booted, its agent at hand, and frozen."""
        shell = _new_shell()
        async with self._undone_on_failure(shell.id):
            placement = await self._driver.start(shell.id, shape, token=shell.token)
            unit = self.join(shell.id, shell.token, placement, Origin.READY)
            async with self._agent_answering(unit):
                await warm_up(unit.line, placement)
            unit.line.hold()
            await self._driver.freeze(unit.id)
            return unit

    async def claim(self, spec: MachineSpec, unit: Unit) -> Unit:
        """Give a warm unit to a machine."""
        async with self._undone_on_failure(unit.id):
            if unit.line.is_held:
                await self._driver.thaw(unit.id)
                unit.line.release()
            point("claim.thawed")
            async with self._agent_answering(unit):
                return replace(unit, naming=self.name(spec, unit))

    def name(self, spec: MachineSpec, unit: Unit) -> asyncio.Task[None]:
        """Tell a warm unit whose it is, ahead of all that is asked of it from now on."""
        task = asyncio.create_task(self._name(spec, unit), name=f"name {unit.id}")
        # The machine may end before it looks.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _name(self, spec: MachineSpec, unit: Unit) -> None:
        async with self._agent_answering(unit):
            await write_names(unit.line, spec, unit.placement, has_resolvers=True)
        point("claim.named")

    async def start(self, spec: MachineSpec, shell: Shell | None = None) -> Unit:
        """A unit with the template's files, in a shell or from nothing."""
        origin = Origin.COLD if shell is None else Origin.SHELL
        given = shell or _new_shell()
        async with self._undone_on_failure(given.id):
            self._backing.release(_BOOT_MIB if shell else _SHELL_MIB + _BOOT_MIB)
            if shell is None:
                placement = await self._driver.start(given.id, Shape.of(spec), token=given.token)
            else:
                placement = await self._driver.boot(given.id)
            point("start.started")
            joined = self.join(given.id, given.token, placement, origin)
            async with self._agent_answering(joined):
                return replace(joined, hooks=await write_names(joined.line, spec, placement))

    async def restore(
        self, spec: MachineSpec, image: ImageFiles, shell: Shell | None = None, *, is_own: bool = False
    ) -> Unit:
        """A unit that goes on where the image was saved, under this machine's name.

        is_own: it is this machine that was saved, so its memory has what was set of its variables since it was made.
        """
        if Shape.of(spec) != image.shape:
            raise MachineError("snapshot_incompatible", "the snapshot is of a machine of another template or size")
        unit = (shell or _new_shell()).id
        async with self._undone_on_failure(unit):
            if shell is None:
                self._backing.release(_SHELL_MIB)
                await self._driver.prepare(unit, image.shape, token=image.token)
            self._backing.release(image.size_bytes / _MIB + _RESTORE_MIB)
            point("restore.prepared")
            placement = await self._driver.restore(unit, image)
            point("restore.restored")
            joined = self.join(unit, image.token, placement, Origin.RESTORED)
            # The image's is shared by all copies.
            token, line = secrets.token_hex(32), joined.line
            async with self._agent_answering(joined):
                stage = HookStage.AFTER_RESTORE
                hooks = await write_names(line, spec, placement, keeps_env=is_own, token=token, hooks=stage)
            line.token = token
            return replace(joined, token=token, hooks=hooks)

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

    @asynccontextmanager
    async def _agent_answering(self, unit: Unit) -> AsyncIterator[None]:
        """Talk to a unit's agent once it answers, all within the time a boot may take."""
        line = unit.line
        try:
            async with asyncio.timeout(self._boot_timeout_s):
                await self._until_up(unit.id, line)
                yield
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


def _new_shell() -> Shell:
    return Shell(str(uuid.uuid4()), secrets.token_hex(32))


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
