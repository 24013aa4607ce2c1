"""One build: a machine from the base template, the steps in it, what it starts, a snapshot of its memory.

    queued ─▶ building ─▶ certifying ─▶ snapshotting ─▶ ready
     ▲ └─────────┴─────────────┴─────────────┴──▶ failed(step, cause) | cancelled
     └── once, from the first step on and on another machine, when the server has stopped in its midst

The builder's machine is an ordinary one: the same isolation, the same network rules, limits like those of the
sandboxes to come. It ends with the build, whatever becomes of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import sqlalchemy as sa

from gateway.engine import build_steps
from gateway.engine.build_log import BuildLog
from gateway.engine.context import Context
from gateway.engine.plan import Origin
from gateway.engine.translate import from_vmm
from gateway.resources import Build, BuildFailure, BuildSpec, BuildState, BuildStep
from gateway.store import builds, events, templates
from vmm.agent import Agent
from vmm.errors import VmmError
from vmm.execution import Execution
from vmm.guest import Command
from vmm.stream import STDERR
from vmm.types import IdleAction, MachineSpec, MachineState, SnapshotInfo, StopCause

_log = logging.getLogger(__name__)

_FLUSH_S = 0.25
#: A sign of life at least this often; see `gateway.reconciler`.
_ALIVE_S = 2.0
_PROBE_EVERY_S = 0.25
#: What a machine of a build that nobody ends gets beyond the build's own time.
_GRACE_S = 60.0
_SNAPSHOT_S = 600.0
_DETAIL_CHARS = 2000


class BuildError(Exception):
    """The build cannot go on."""

    def __init__(self, cause: BuildFailure, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail[:_DETAIL_CHARS]


class BuildRun:
    """Runs one build to its end. origin: what its base starts from."""

    def __init__(self, context: Context, build: Build, origin: Origin) -> None:
        self._context = context
        self._build = build
        self._spec: BuildSpec = build.spec
        self._origin = origin
        self._log = BuildLog(context, build)
        self._until = 0.0

    async def run(self, turn: asyncio.Semaphore) -> None:
        """Wait for a turn, then build. Ends early, and leaves no machine, when cancelled or when the row says so."""
        work = asyncio.create_task(self._work(turn), name=f"build {self._build.id}")
        try:
            await self._watch_over(work)
        finally:
            work.cancel()
            await asyncio.wait([work])
            await self._destroy_machine()
            await self._log.flush()

    async def _watch_over(self, work: asyncio.Task[None]) -> None:
        """Store the log until the work is done; returns early when the build is not open any more."""
        flushed_at = 0.0
        while not work.done():
            await asyncio.wait([work], timeout=_FLUSH_S)
            if self._log.has_lines or time.monotonic() - flushed_at > _ALIVE_S:
                flushed_at = time.monotonic()
                if not await self._log.flush():
                    return
        await work

    async def _work(self, turn: asyncio.Semaphore) -> None:
        try:
            async with turn:
                self._until = time.monotonic() + self._context.settings.build_timeout_s
                async with asyncio.timeout(self._context.settings.build_timeout_s):
                    image = await self._make()
            await self._succeed(image)
        except BuildError as error:
            await self._fail(error.cause, error.detail)
        except TimeoutError:
            await self._fail(BuildFailure.TIMED_OUT, "the build took longer than it may")
        except VmmError as error:
            await self._fail(BuildFailure.HOST_FAILED, from_vmm(error).message)

    async def _make(self) -> SnapshotInfo:
        if self._build.restarts:
            self._log.say("the server stopped during the build; it begins again")
        await self._note(BuildState.BUILDING, started_at=self._context.clock())
        agent = await self._boot()
        await agent.mkdir(self._spec.workdir, parents=True)
        for number, step in enumerate(self._spec.steps, start=1):
            self._log.step = number
            await self._note(BuildState.BUILDING, step=number, step_name=step.name)
            self._log.say(f"step {number} of {len(self._spec.steps)}: {step.name}")
            await self._do(agent, step, number)
        await agent.chown(self._spec.workdir, self._spec.user or "user", recursive=True)
        await self._note(BuildState.CERTIFYING, step_name=None)
        await self._certify(agent)
        await self._note(BuildState.SNAPSHOTTING)
        self._log.say("saving memory and files")
        try:
            return await self._context.host.create_snapshot(
                self._build.id, self._build.machine_id, deadline=time.monotonic() + _SNAPSHOT_S
            )
        except VmmError as error:
            raise BuildError(BuildFailure.SNAPSHOT_FAILED, error.detail or error.message) from error

    async def _boot(self) -> Agent:
        settings, spec, origin = self._context.settings, self._spec, self._origin
        self._log.say(f"starting from {origin.template}")
        machine = await self._context.host.create_machine(
            MachineSpec(
                id=self._build.machine_id,
                template=origin.base_template,
                hostname="build",
                cpu_count=origin.cpu_count or spec.cpu_count or settings.sandbox_cpu_count,
                memory_mib=origin.memory_mib or spec.memory_mib or settings.sandbox_memory_mib,
                disk_mib=origin.disk_mib or spec.disk_mib or settings.sandbox_disk_mib,
                env={**origin.env, **spec.env},
                expires_at=self._context.clock() + settings.build_timeout_s + _GRACE_S,
                snapshot=origin.image_id,
                idle_action=IdleAction.KEEP,
            )
        )
        if machine.state is not MachineState.RUNNING:
            raise BuildError(BuildFailure.HOST_FAILED, machine.detail or "the builder's machine did not start")
        return self._context.host.agent(machine.id)

    async def _do(self, agent: Agent, step: BuildStep, number: int) -> None:
        try:
            if step.kind == "file":
                await agent.write(step.path, step.content.encode(), mode=step.mode, user=build_steps.ROOT)
            for index, command in enumerate(build_steps.commands(step, self._spec, self._until - time.monotonic())):
                await self._run(agent, f"{number}.{index}", command)
        except VmmError as error:
            raise BuildError(BuildFailure.STEP_FAILED, f"{step.name}: {from_vmm(error).message}") from error

    async def _run(self, agent: Agent, part: str, command: Command) -> None:
        async with await agent.exec(self._exec_id(part), command) as execution:
            await self._copy_output(execution)
            ended = await execution.wait()
        self._log.end_lines()
        if ended.exit_code:
            raise BuildError(BuildFailure.STEP_FAILED, f"exit code {ended.exit_code} ({ended.reason})")

    async def _copy_output(self, execution: Execution) -> None:
        async for chunk in execution:
            self._log.write("stderr" if chunk.channel == STDERR else "stdout", chunk.data)

    async def _certify(self, agent: Agent) -> None:
        """Start what the template starts, and wait until it is ready."""
        spec = self._spec
        if spec.start_command is None and spec.probe is None:
            return
        async with contextlib.AsyncExitStack() as stack:
            started = None
            if spec.start_command is not None:
                self._log.say(f"starting: {spec.start_command}")
                started = await stack.enter_async_context(self._started(agent))
            if spec.probe is not None:
                self._log.say(f"waiting until it is ready: {spec.probe.kind}")
                await self._probe(agent, started)

    @contextlib.asynccontextmanager
    async def _started(self, agent: Agent) -> AsyncIterator[Execution]:
        try:
            execution = await agent.exec(self._exec_id("start"), build_steps.start_command(self._spec))
        except VmmError as error:
            raise BuildError(BuildFailure.START_FAILED, from_vmm(error).message) from error
        copying = asyncio.create_task(self._copy_output(execution))
        try:
            yield execution
        finally:
            copying.cancel()
            await asyncio.wait([copying])
            execution.close()
            self._log.end_lines()

    async def _probe(self, agent: Agent, started: Execution | None) -> None:
        probe = self._spec.probe
        if probe is None:
            return
        command = build_steps.probe_command(probe, self._spec)
        until, attempt = time.monotonic() + probe.timeout_s, 0
        while True:
            attempt += 1
            completed = await agent.run(self._exec_id(f"probe {attempt}"), command)
            if completed.exit.exit_code == 0:
                return
            if started is not None and started.exit is not None and started.exit.exit_code:
                raise BuildError(BuildFailure.START_FAILED, f"it ended with exit code {started.exit.exit_code}")
            if time.monotonic() > until:
                said = (completed.stderr or completed.stdout).decode("utf-8", "replace").strip()
                raise BuildError(BuildFailure.PROBE_FAILED, said or f"not ready after {probe.timeout_s:g} s")
            await asyncio.sleep(_PROBE_EVERY_S)

    def _exec_id(self, part: str) -> str:
        return str(uuid.uuid5(uuid.UUID(self._build.id), part))

    async def _note(self, state: BuildState, **values: Any) -> None:
        def job(connection: sa.Connection) -> None:
            if builds.change(connection, self._build.id, builder=self._build.machine_id, state=state.value, **values):
                _event(connection, self._build, state)

        await self._context.database.write(job)
        self._context.events.announce()

    async def _succeed(self, image: SnapshotInfo) -> None:
        self._log.say("ready")
        await self._log.flush()
        at = self._context.clock()
        build, origin, spec = self._build, self._origin, self._spec

        def job(connection: sa.Connection) -> str | None:
            ended = {"state": BuildState.READY.value, "finished_at": at, "size_bytes": image.size_bytes}
            if not builds.change(connection, build.id, builder=build.machine_id, **ended):
                # Somebody has ended it, or it is being made anew elsewhere: as an image with the same id.
                current = builds.get(connection, build.id)
                is_over = current is None or current.state in {BuildState.FAILED, BuildState.CANCELLED}
                return build.id if is_over else None
            before = templates.get(connection, build.workspace_id, build.template_id)
            templates.change(
                connection,
                build.template_id,
                state="ready",
                build_id=build.id,
                base_template=origin.base_template,
                cpu_count=image.cpu_count,
                memory_mib=image.memory_mib,
                disk_mib=image.disk_mib,
                env={**origin.env, **spec.env},
                size_bytes=image.size_bytes,
                updated_at=at,
            )
            _event(connection, build, BuildState.READY)
            return None if before is None else before.image_id

        replaced = await self._context.database.write(job)
        self._context.events.announce()
        if replaced is not None:
            await self._delete_image(replaced)

    async def _fail(self, cause: BuildFailure, detail: str) -> None:
        self._log.say(f"failed: {cause.value}: {detail}")
        await self._log.flush()
        machine_id = self._build.machine_id
        await end_build(self._context, self._build, BuildState.FAILED, cause, detail, builder=machine_id)

    async def _delete_image(self, image_id: str) -> None:
        try:
            await self._context.host.delete_snapshot(image_id)
        except VmmError as error:
            _log.info("the image of an older build is left to the reconciler: %s", error)

    async def _destroy_machine(self) -> None:
        try:
            await self._context.host.destroy_machine(self._build.machine_id, StopCause.REQUESTED)
        except VmmError as error:
            _log.warning("the machine of build %s is left to the reconciler: %s", self._build.id, error)


async def end_build(
    context: Context,
    build: Build,
    state: BuildState,
    cause: BuildFailure | None = None,
    detail: str | None = None,
    *,
    builder: str | None = None,
) -> bool:
    """Record that a build ended without success; False if it had ended already. builder: as for `builds.change`."""
    at = context.clock()

    def job(connection: sa.Connection) -> bool:
        code = None if cause is None else cause.value
        values = {"state": state.value, "error_code": code, "error_detail": detail, "finished_at": at}
        if not builds.change(connection, build.id, builder=builder, **values):
            return False
        template = templates.get(connection, build.workspace_id, build.template_id)
        if template is not None:
            # An older build goes on serving.
            serves = "ready" if template.image_id is not None else "failed"
            templates.change(connection, template.id, state=serves, updated_at=at)
        _event(connection, build, state, error=code)
        return True

    changed = await context.database.write(job)
    if changed:
        context.events.announce()
    return changed


def _event(connection: sa.Connection, build: Build, state: BuildState, **data: Any) -> None:
    events.append(
        connection,
        kind=f"template.build_{state.value}",
        workspace_id=build.workspace_id,
        resource_type="template",
        resource_id=build.template_id,
        at=time.time(),
        data={"build_id": build.id, "template_id": build.template_id, **data},
    )
