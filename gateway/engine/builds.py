"""Templates that workspaces build: their making, rebuilding, deleting, and what builds write."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any

import sqlalchemy as sa

from gateway.commands import (
    BuildTemplate,
    CancelBuild,
    CreateTemplate,
    DeleteTemplate,
    GetBuild,
    GetBuildLog,
    ListBuilds,
    StreamBuildLog,
)
from gateway.engine.build_run import BuildRun, end_build
from gateway.engine.context import Context
from gateway.engine.plan import Origin, origin_of_template
from gateway.engine.templates import TemplateService
from gateway.errors import FieldProblem, GatewayError
from gateway.resources import Build, BuildFailure, BuildLine, BuildSpec, BuildState, Principal, Template
from gateway.store import builds as rows
from gateway.store import templates as template_rows
from vmm.errors import VmmError
from vmm.types import StopCause

_log = logging.getLogger(__name__)

_BUILDS_MAX = 100
_LINES_MAX = 10_000
_PAGE = 500
_OPEN_PER_WORKSPACE_MAX = 10
_RESTARTS_MAX = 1
#: How a build looks that nobody has begun.
_FROM_THE_START: dict[str, Any] = {"state": BuildState.QUEUED, "step": 0, "step_name": None}
_NOT_SLUG = re.compile(r"[^a-z0-9]+")
_SIZES = {"cpu_count": "vcpu", "memory_mib": "memoryMib", "disk_mib": "diskMib"}


class BuildService:
    """Commands about the templates of workspaces, and the builds under way in this process."""

    def __init__(self, context: Context, templates: TemplateService) -> None:
        self._context = context
        self._templates = templates
        self._turn = asyncio.Semaphore(context.settings.builds_at_once)
        self._running: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """End the builds under way; they wait for a server that takes them up."""
        tasks = dict(self._running)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for build_id in tasks:
            alive_at = self._context.clock()
            await self._context.database.write(
                partial(rows.change, build_id=build_id, alive_at=alive_at, **_FROM_THE_START)
            )

    async def create(self, principal: Principal, command: CreateTemplate) -> Template:
        """Make a template and begin its first build.

        Raises GatewayError: build_spec_invalid, name_taken, quota_exceeded.
        """
        slug = command.slug or _NOT_SLUG.sub("-", command.name.lower()).strip("-")[:80] or "template"
        await self._check_slug(slug)
        origin = await self._origin(principal, command.spec)
        wanted = _planned(command, slug, self._context.clock())
        build = self._planned_build(principal, wanted.id, _derived(command.effect_id, "build"), command.spec)

        def job(connection: sa.Connection) -> tuple[Template, bool]:
            existing = template_rows.get(connection, principal.workspace_id, wanted.id)
            if existing is not None:
                return existing, False
            self._check_room(connection, principal, wanted)
            template_rows.insert(connection, wanted, principal.workspace_id)
            rows.insert(connection, build)
            return wanted, True

        template, is_new = await self._context.database.write(job)
        if is_new:
            self._start(build, origin)
        return template

    def _check_room(self, connection: sa.Connection, principal: Principal, wanted: Template) -> None:
        limit = self._context.settings.templates_per_workspace
        if template_rows.is_slug_taken(connection, principal.workspace_id, wanted.slug):
            raise GatewayError("name_taken", f"Another template of this workspace is {wanted.slug!r}.")
        if template_rows.count(connection, principal.workspace_id) >= limit:
            raise GatewayError("quota_exceeded", f"The workspace already has {limit} templates.")
        _check_open(connection, principal)

    async def _check_slug(self, slug: str) -> None:
        if await self._templates.is_built_in(slug):
            raise GatewayError("name_taken", f"{slug!r} is a template of the server.")

    async def rebuild(self, principal: Principal, command: BuildTemplate) -> Build:
        """Build a template again. Raises template_not_found, build_spec_invalid, quota_exceeded."""
        template = await self._own(principal, command.name)
        spec = command.spec or template.spec
        if spec is None:
            raise _not_found(command.name)
        origin = await self._origin(principal, spec)
        wanted = self._planned_build(principal, template.id, command.effect_id, spec)
        wanted = replace(wanted, metadata=command.metadata)

        def job(connection: sa.Connection) -> tuple[Build, bool]:
            existing = rows.get(connection, wanted.id)
            if existing is not None:
                return existing, False
            _check_open(connection, principal)
            rows.insert(connection, wanted)
            state = "building" if template.image_id is None else "ready"
            template_rows.set_spec(connection, template.id, spec, state=state, at=wanted.created_at)
            return wanted, True

        build, is_new = await self._context.database.write(job)
        if is_new:
            self._start(build, origin)
        return build

    def _planned_build(self, principal: Principal, template_id: str, build_id: str, spec: BuildSpec) -> Build:
        now = self._context.clock()
        return Build(
            id=build_id,
            template_id=template_id,
            workspace_id=principal.workspace_id,
            machine_id=_derived(build_id, "machine"),
            spec=spec,
            metadata={},
            state=BuildState.QUEUED,
            step=0,
            step_name=None,
            steps=len(spec.steps),
            error_code=None,
            error_detail=None,
            log_bytes=0,
            size_bytes=None,
            created_at=now,
            started_at=None,
            finished_at=None,
            alive_at=now,
        )

    async def _origin(self, principal: Principal, spec: BuildSpec) -> Origin:
        """What a build starts from. Raises build_spec_invalid."""
        try:
            origin = origin_of_template(await self._templates.startable(principal, spec.base))
        except GatewayError as error:
            if error.code not in {"template_not_found", "template_not_ready"}:
                raise
            raise invalid_spec("from", error.message.rstrip(".")) from error
        for name, spelt in _SIZES.items():
            wanted, fixed = getattr(spec, name), getattr(origin, name)
            most = getattr(self._context.settings, f"sandbox_{name}_max")
            if wanted is not None and fixed is not None and wanted != fixed:
                raise invalid_spec(spelt, f"must be {fixed:g}, as in the template it starts from")
            if wanted is not None and wanted > most:
                raise invalid_spec(spelt, f"must be at most {most:g}")
        return origin

    def _start(self, build: Build, origin: Origin) -> None:
        self._context.events.announce()
        run = BuildRun(self._context, build, origin).run(self._turn)
        task = asyncio.create_task(run, name=f"build {build.id}")
        self._running[build.id] = task
        task.add_done_callback(lambda done: self._ended(build, done))

    def _ended(self, build: Build, task: asyncio.Task[None]) -> None:
        del self._running[build.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its row falls silent, and the reconciler has it taken up.
            _log.error("build %s failed by a fault of ours", build.id, exc_info=error)

    async def take_up(self, build: Build) -> None:
        """Begin a build again whose builder has gone; what has been begun again before fails."""
        if build.restarts >= _RESTARTS_MAX:
            await self._interrupt(build, "the server stopped during the build, and again when it had begun anew")
            return
        try:
            origin = await self._origin(Principal(build.workspace_id, None, frozenset()), build.spec)
        except GatewayError as error:
            await self._interrupt(build, f"the server stopped during the build; it cannot begin again: {error.message}")
            return
        restarts = build.restarts + 1
        changes: dict[str, Any] = {
            "machine_id": _derived(build.id, f"machine {restarts}"),
            "restarts": restarts,
            "started_at": None,
            "alive_at": self._context.clock(),
            **_FROM_THE_START,
        }
        take = partial(rows.change, build_id=build.id, builder=build.machine_id, **changes)
        if await self._context.database.write(take):
            await self._clear(build)
            self._start(replace(build, **changes), origin)

    async def _clear(self, build: Build) -> None:
        """Remove what the first attempt has left: its machine, and an image nobody has been told of."""
        try:
            await self._context.host.destroy_machine(build.machine_id, StopCause.LOST)
            await self._context.host.delete_snapshot(build.id)
        except VmmError as error:
            _log.info("what build %s has left behind is left to the reconciler: %s", build.id, error)

    async def _interrupt(self, build: Build, detail: str) -> None:
        machine_id = build.machine_id
        await end_build(self._context, build, BuildState.FAILED, BuildFailure.INTERRUPTED, detail, builder=machine_id)

    async def delete(self, principal: Principal, command: DeleteTemplate) -> Template:
        """Remove a template with its builds. Raises template_not_found, template_in_use."""

        def job(connection: sa.Connection) -> tuple[Template, list[Build]]:
            template = template_rows.get(connection, principal.workspace_id, command.name)
            if template is None:
                raise _not_found(command.name)
            if template.image_id is not None and template_rows.is_image_in_use(connection, template.image_id):
                raise GatewayError("template_in_use", "A sandbox is being made from the template.", retry_after_s=1)
            under_way = [build for build in rows.find_open(connection) if build.template_id == template.id]
            template_rows.delete(connection, template.id)
            return template, under_way

        template, under_way = await self._context.database.write(job)
        self._context.events.announce()
        for build in under_way:
            self._stop(build.id)
        if template.image_id is not None:
            try:
                await self._context.host.delete_snapshot(template.image_id)
            except VmmError as error:
                _log.info("the image of template %s is left to the reconciler: %s", template.slug, error)
        return template

    def _stop(self, build_id: str) -> None:
        # One of another worker's notices within seconds that its row is not open any more.
        if build_id in self._running:
            self._running[build_id].cancel()

    async def list(self, principal: Principal, command: ListBuilds) -> tuple[Build, ...]:
        """The newest builds of a template. Raises template_not_found."""
        template = await self._own(principal, command.name)
        found = await self._context.database.read(
            lambda connection: rows.find(connection, template.id, limit=_BUILDS_MAX)
        )
        return tuple(found)

    async def get(self, principal: Principal, command: GetBuild) -> Build:
        """One build. Raises build_not_found."""
        build = await self._context.database.lookup(partial(rows.get, build_id=command.build_id))
        if build is None or build.workspace_id != principal.workspace_id:
            raise GatewayError("build_not_found", "No build with that id.")
        return build

    async def cancel(self, principal: Principal, command: CancelBuild) -> Build:
        """Stop a build; one that has ended stays as it is. Raises build_not_found."""
        build = await self.get(principal, GetBuild(command.build_id))
        if await end_build(self._context, build, BuildState.CANCELLED):
            self._stop(build.id)
        return await self.get(principal, GetBuild(command.build_id))

    async def log(self, principal: Principal, command: GetBuildLog) -> tuple[BuildLine, ...]:
        """The end of what a build wrote. Raises build_not_found."""
        build = await self.get(principal, GetBuild(command.build_id))
        limit = min(max(command.lines, 1), _LINES_MAX)
        found = await self._context.database.read(lambda connection: rows.last_lines(connection, build.id, limit))
        return tuple(found)

    async def stream(self, principal: Principal, command: StreamBuildLog) -> AsyncGenerator[BuildLine | Build, None]:
        """Its lines as they come and, when it has ended, the build. Raises build_not_found."""
        await self.get(principal, GetBuild(command.build_id))
        return self._follow(command.build_id, command.after_seq or 0)

    async def _follow(self, build_id: str, cursor: int) -> AsyncGenerator[BuildLine | Build, None]:
        while True:
            mark = self._context.events.mark()
            # First the state: lines are stored before it changes, so none comes after an end seen here.
            build = await self._context.database.lookup(partial(rows.get, build_id=build_id))
            page = await self._context.database.lookup(
                partial(rows.lines_after, build_id=build_id, seq=cursor, limit=_PAGE)
            )
            for line in page:
                cursor = line.seq
                yield line
            if page:
                continue
            if build is None:
                return
            if build.state not in rows.OPEN:
                yield build
                return
            await self._context.events.wait(mark)

    async def _own(self, principal: Principal, name: str) -> Template:
        template = await self._context.database.lookup(
            partial(template_rows.get, workspace_id=principal.workspace_id, name=name)
        )
        if template is None:
            raise _not_found(name)
        return template


def _planned(command: CreateTemplate, slug: str, now: float) -> Template:
    return Template(
        id=command.effect_id,
        name=command.name,
        slug=slug,
        description=command.description,
        aliases={},
        digest="",
        size_bytes=0,
        packages=(),
        created_at=now,
        updated_at=now,
        is_built_in=False,
        state="building",
        env=command.spec.env,
        metadata=command.metadata,
        spec=command.spec,
    )


def _check_open(connection: sa.Connection, principal: Principal) -> None:
    if rows.count_open(connection, principal.workspace_id) >= _OPEN_PER_WORKSPACE_MAX:
        message = f"The workspace already has {_OPEN_PER_WORKSPACE_MAX} builds under way."
        raise GatewayError("quota_exceeded", message, retry_after_s=30)


def _derived(effect_id: str, part: str) -> str:
    return str(uuid.uuid5(uuid.UUID(effect_id), part))


def _not_found(name: str) -> GatewayError:
    return GatewayError("template_not_found", f"This workspace has no template {name!r}.")


def invalid_spec(field: str, reason: str) -> GatewayError:
    """The error for one bad field of a specification."""
    name = f"build_spec.{field}"
    return GatewayError("build_spec_invalid", f"{name}: {reason}", details=[FieldProblem(name, reason)])
