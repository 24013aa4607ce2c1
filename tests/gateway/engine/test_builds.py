"""Templates that a workspace builds: steps, what they start, the log, and builders that die."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec
import pytest

from gateway.commands import (
    BuildTemplate,
    CancelBuild,
    CreateSandbox,
    CreateTemplate,
    DeleteTemplate,
    Exec,
    GetBuild,
    GetBuildLog,
    GetTemplate,
    ListBuilds,
    ListTemplates,
    ReadFile,
    StreamBuildLog,
)
from gateway.engine import Engine
from gateway.errors import GatewayError
from gateway.reconciler import Pace, Reconciler
from gateway.resources import Build, BuildLine, BuildSpec, BuildState, BuildStep, Principal, Probe, Template
from gateway.settings import Settings
from gateway.store import builds
from vmm.drivers.fake import FakeDriver
from vmm.types import MachineSpec, MachineState


def new_id() -> str:
    return str(uuid.uuid4())


def spec(*commands: str, **fields: object) -> BuildSpec:
    steps = tuple(BuildStep("run", command=command) for command in commands)
    return BuildSpec("default", steps, **fields)  # type: ignore[arg-type]


async def machines(engine: Engine) -> list[str]:
    """Those that have not ended."""
    listed = await engine.context.host.list_machines()
    return [machine.id for machine in listed if machine.state is not MachineState.STOPPED]


async def until_printed(engine: Engine, principal: Principal, build: Build, lines: int = 1) -> None:
    """Wait until the commands of a build have printed so many lines."""
    async with asyncio.timeout(60):
        while len(texts(await engine.get_build_log(principal, GetBuildLog(build.id)), "stdout")) < lines:
            await asyncio.sleep(0.02)


async def until_machines(engine: Engine, wanted: list[str]) -> None:
    """A builder's machine goes just after its build has ended."""
    async with asyncio.timeout(60):
        while await machines(engine) != wanted:
            await asyncio.sleep(0.02)


async def make(engine: Engine, principal: Principal, wanted: BuildSpec, name: str = "Mine") -> Template:
    return await engine.create_template(principal, CreateTemplate(new_id(), name, wanted))


async def newest(engine: Engine, principal: Principal, template: Template) -> Build:
    return (await engine.list_builds(principal, ListBuilds(template.id)))[0]


async def until_images(engine: Engine, wanted: list[str]) -> None:
    async with asyncio.timeout(60):
        while [image.id for image in await engine.context.host.list_snapshots()] != wanted:
            await asyncio.sleep(0.01)


async def ended(engine: Engine, principal: Principal, template: Template) -> tuple[Build, list[BuildLine]]:
    build = await newest(engine, principal, template)
    items: list[BuildLine | Build] = []
    async with asyncio.timeout(60):
        async for item in await engine.stream_build_log(principal, StreamBuildLog(build.id)):
            items.append(item)  # noqa: PERF401 - the line is clearer
    last = items.pop()
    assert isinstance(last, Build)
    return last, [item for item in items if isinstance(item, BuildLine)]


def texts(lines: Sequence[BuildLine], stream: str) -> list[str]:
    return [line.text for line in lines if line.stream == stream]


async def test_a_template_is_built_and_sandboxes_start_from_its_memory(engine: Engine, principal: Principal) -> None:
    wanted = replace(
        spec("echo made", "echo wrong >&2", env={"FROM": "template", "BOTH": "template"}),
        steps=(BuildStep("file", path="/etc/made", content="by the builder", mode=0o600), *spec("echo made").steps),
        start_command="sleep 1000",
        probe=Probe("command", command="true"),
        memory_mib=256,
    )
    template = await make(engine, principal, wanted)
    assert (template.slug, template.state, template.is_built_in) == ("mine", "building", False)
    build, lines = await ended(engine, principal, template)
    assert (build.state, build.error_code, build.step) == (BuildState.READY, None, 2)
    assert texts(lines, "stdout") == ["made"]
    assert "step 1 of 2: file /etc/made" in texts(lines, "system")

    template = await engine.get_template(principal, GetTemplate("mine"))
    assert (template.state, template.image_id, template.memory_mib) == ("ready", build.id, 256)
    await until_machines(engine, [])

    command = CreateSandbox(new_id(), template="mine", env={"BOTH": "sandbox"})
    sandbox = await engine.create_sandbox(principal, command)
    assert (sandbox.template, sandbox.base_template, sandbox.memory_mib) == ("mine", "default", 256)
    assert (await engine.context.host.get_machine(sandbox.id)).snapshot is not None
    _, content = await engine.read_file(principal, ReadFile(sandbox.id, "/etc/made"))
    assert b"".join([part async for part in content]) == b"by the builder"
    seen = (await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["env"]))).stdout
    assert b"FROM=template" in seen
    assert b"BOTH=sandbox" in seen


async def test_a_step_that_fails_ends_the_build_and_says_which(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("true", "echo to stderr >&2; exit 7", "echo never"))
    build, lines = await ended(engine, principal, template)
    assert (build.state, build.error_code, build.step) == (BuildState.FAILED, "step_failed", 2)
    assert build.error_detail is not None
    assert "exit code 7" in build.error_detail
    assert "never" not in texts(lines, "stdout")
    assert (await engine.get_template(principal, GetTemplate(template.id))).state == "failed"
    with pytest.raises(GatewayError, match="template_not_ready"):
        await engine.create_sandbox(principal, CreateSandbox(new_id(), template="mine"))
    await until_machines(engine, [])
    assert await engine.context.host.list_snapshots() == []


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (spec(start_command="exit 3", probe=Probe("command", command="false", timeout_s=5)), "start_failed"),
        (spec(start_command="sleep 1000", probe=Probe("command", command="false", timeout_s=0.3)), "probe_failed"),
    ],
)
async def test_what_does_not_become_ready_fails(
    engine: Engine, principal: Principal, wanted: BuildSpec, code: str
) -> None:
    build, _ = await ended(engine, principal, await make(engine, principal, wanted))
    assert (build.state, build.error_code) == (BuildState.FAILED, code)


async def test_a_build_has_a_time_limit_and_a_log_limit(
    engine: Engine, principal: Principal, settings: Settings
) -> None:
    short = replace(settings, build_timeout_s=1.0, build_log_bytes_max=1024)
    hasty = Engine(replace(engine.context, settings=short))
    template = await make(hasty, principal, spec("yes", "sleep 1000"))
    build, lines = await ended(hasty, principal, template)
    assert (build.state, build.error_code) == (BuildState.FAILED, "timed_out")
    assert texts(lines, "system")[-1] == "the log is full; what follows is not kept"
    assert sum(len(line.text) + 1 for line in lines) < 3 * 1024
    await until_machines(engine, [])
    await hasty.close()


async def test_a_rebuild_serves_the_old_until_the_new_is_ready(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("echo one"))
    first, _ = await ended(engine, principal, template)
    command = BuildTemplate("mine", new_id(), spec("false"))
    again = await engine.build_template(principal, command)
    assert again.id == (await engine.build_template(principal, command)).id == command.effect_id
    failed, _ = await ended(engine, principal, template)
    assert failed.state is BuildState.FAILED
    serving = await engine.get_template(principal, GetTemplate("mine"))
    assert (serving.state, serving.image_id) == ("ready", first.id)

    await engine.build_template(principal, BuildTemplate("mine", new_id(), spec("echo two")))
    second, _ = await ended(engine, principal, template)
    assert (await engine.get_template(principal, GetTemplate("mine"))).image_id == second.id
    # The old one goes once the new one serves.
    await until_images(engine, [second.id])
    assert len(await engine.list_builds(principal, ListBuilds("mine"))) == 3


async def test_a_template_can_start_from_another(engine: Engine, principal: Principal) -> None:
    first = await make(engine, principal, spec("true", env={"A": "1"}, memory_mib=256), "First")
    await ended(engine, principal, first)
    upon = replace(spec("true", env={"B": "2"}), base="first")
    second = await make(engine, principal, upon, "Second")
    build, _ = await ended(engine, principal, second)
    assert build.state is BuildState.READY
    sandbox = await engine.create_sandbox(principal, CreateSandbox(new_id(), template="second"))
    assert (sandbox.memory_mib, dict(sandbox.env)) == (256, {"A": "1", "B": "2"})
    with pytest.raises(GatewayError, match=r"build_spec\.memoryMib: must be 256"):
        await make(engine, principal, replace(upon, memory_mib=512), "Third")


async def test_what_cannot_be_built_is_refused(
    engine: Engine, principal: Principal, stranger: Principal, settings: Settings
) -> None:
    with pytest.raises(GatewayError, match=r"build_spec\.from: There is no template 'node:22'"):
        await make(engine, principal, BuildSpec("node:22"))
    with pytest.raises(GatewayError, match="name_taken"):
        await make(engine, principal, spec(), "miosa-sandbox")
    template = await make(engine, principal, spec())
    await ended(engine, principal, template)
    with pytest.raises(GatewayError, match="name_taken"):
        await make(engine, principal, spec())
    with pytest.raises(GatewayError, match="template_not_found"):
        await engine.get_template(stranger, GetTemplate("mine"))
    with pytest.raises(GatewayError, match="build_not_found"):
        await engine.get_build(stranger, GetBuild((await newest(engine, principal, template)).id))
    few = Engine(replace(engine.context, settings=replace(settings, templates_per_workspace=1)))
    with pytest.raises(GatewayError, match="quota_exceeded"):
        await make(few, principal, spec(), "Another")


async def test_the_same_command_makes_one_template(engine: Engine, principal: Principal) -> None:
    command = CreateTemplate(new_id(), "Mine", spec())
    first = await engine.create_template(principal, command)
    second = await engine.create_template(principal, command)
    assert first.id == second.id == command.effect_id
    await ended(engine, principal, first)
    assert len(await engine.list_builds(principal, ListBuilds("mine"))) == 1


async def test_a_deleted_template_takes_its_builds_and_its_image_along(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec())
    build, _ = await ended(engine, principal, template)
    sandbox = await engine.create_sandbox(principal, CreateSandbox(new_id(), template="mine"))
    await engine.build_template(principal, BuildTemplate("mine", new_id(), spec("sleep 1000")))
    await engine.delete_template(principal, DeleteTemplate("mine"))
    for name in ("mine", template.id):
        with pytest.raises(GatewayError, match="template_not_found"):
            await engine.get_template(principal, GetTemplate(name))
    with pytest.raises(GatewayError, match="build_not_found"):
        await engine.get_build(principal, GetBuild(build.id))
    assert await engine.context.host.list_snapshots() == []
    assert (await engine.exec(principal, Exec(sandbox.id, new_id(), argv=["true"]))).exit_code == 0
    await until_machines(engine, [sandbox.id])


async def test_a_template_that_is_being_restored_stays(
    engine: Engine, principal: Principal, driver: FakeDriver
) -> None:
    template = await make(engine, principal, spec())
    await ended(engine, principal, template)
    driver.faults.restore_delay_s = 0.5
    creating = asyncio.create_task(engine.create_sandbox(principal, CreateSandbox(new_id(), template="mine")))
    await asyncio.sleep(0.2)
    with pytest.raises(GatewayError, match="template_in_use"):
        await engine.delete_template(principal, DeleteTemplate("mine"))
    await creating
    await engine.delete_template(principal, DeleteTemplate("mine"))


async def test_a_build_can_be_cancelled(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("sleep 1000"))
    build = await newest(engine, principal, template)
    cancelled = await engine.cancel_build(principal, CancelBuild(build.id))
    assert cancelled.state is BuildState.CANCELLED
    assert (await engine.cancel_build(principal, CancelBuild(build.id))) == cancelled
    await until_machines(engine, [])


async def test_a_build_that_another_worker_ended_stops(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("sleep 1000"))
    build = await newest(engine, principal, template)
    elsewhere = Engine(engine.context)
    await elsewhere.cancel_build(principal, CancelBuild(build.id))
    await until_machines(engine, [])


async def abandoned(engine: Engine, principal: Principal, template: Template, restarts: int) -> Build:
    """A build like the template's last one whose builder has died, with the machine it has left."""
    done, _ = await ended(engine, principal, template)
    left = replace(
        done,
        id=new_id(),
        machine_id=new_id(),
        state=BuildState.BUILDING,
        created_at=done.created_at + 1,
        finished_at=None,
        alive_at=1.0,
        restarts=restarts,
    )
    await engine.context.database.write(partial(builds.insert, build=left))
    await engine.context.host.create_machine(MachineSpec(left.machine_id, "default", "build"))
    return left


async def test_a_build_whose_builder_died_begins_again(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("echo built"))
    left = await abandoned(engine, principal, template, restarts=0)
    # An image that it had taken, and that nobody was told of.
    await engine.context.host.create_snapshot(left.id, left.machine_id)
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    done, lines = await ended(engine, principal, template)
    assert (done.id, done.state, done.restarts) == (left.id, BuildState.READY, 1)
    assert done.machine_id != left.machine_id
    assert texts(lines, "stdout") == ["built"]
    assert texts(lines, "system")[0] == "the server stopped during the build; it begins again"
    await until_machines(engine, [])
    assert (await engine.get_template(principal, GetTemplate("mine"))).image_id == left.id


async def test_a_build_begins_again_once(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("true"))
    left = await abandoned(engine, principal, template, restarts=1)
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    found = await engine.get_build(principal, GetBuild(left.id))
    assert (found.state, found.error_code) == (BuildState.FAILED, "interrupted")
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    await until_machines(engine, [])
    assert (await engine.get_template(principal, GetTemplate("mine"))).state == "ready"


async def test_a_build_that_cannot_begin_again_fails(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("true"))
    left = await abandoned(engine, principal, template, restarts=0)
    lost = replace(left, id=new_id(), machine_id=new_id(), spec=BuildSpec("no-such-base"))
    await engine.context.database.write(partial(builds.insert, build=lost))
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    found = await engine.get_build(principal, GetBuild(lost.id))
    assert (found.state, found.error_code) == (BuildState.FAILED, "interrupted")
    assert "no-such-base" in (found.error_detail or "")


async def test_a_builder_that_only_seemed_dead_changes_nothing(engine: Engine, principal: Principal) -> None:
    """Two builders of one build: the one that was given up has no say any more."""
    template = await make(engine, principal, spec("echo here", "sleep 1000"))
    first = await newest(engine, principal, template)
    await until_printed(engine, principal, first)
    elsewhere = Engine(engine.context)
    await Reconciler(elsewhere, Pace(silent_s=-60.0)).reconcile()
    await until_printed(engine, principal, first, lines=2)
    again = await engine.get_build(principal, GetBuild(first.id))
    assert (again.state, again.restarts) == (BuildState.BUILDING, 1)
    await until_machines(engine, [again.machine_id])
    await engine.cancel_build(principal, CancelBuild(first.id))
    await until_machines(engine, [])
    await elsewhere.close()


async def test_a_builder_at_work_keeps_its_machine(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("echo here", "sleep 1000"))
    build = await newest(engine, principal, template)
    await until_printed(engine, principal, build)
    await Reconciler(engine, Pace(orphan_s=0.0)).reconcile()
    assert await machines(engine) == [build.machine_id]


async def test_a_server_that_stops_leaves_its_builds_to_the_next(engine: Engine, principal: Principal) -> None:
    template = await make(engine, principal, spec("echo here", "sleep 1000"))
    build = await newest(engine, principal, template)
    await until_printed(engine, principal, build)
    await engine.close()
    found = await engine.get_build(principal, GetBuild(build.id))
    assert (found.state, found.step, found.error_detail) == (BuildState.QUEUED, 0, None)
    await until_machines(engine, [])
    quick = msgspec.to_builtins(spec("echo here"))
    await engine.context.database.write(partial(builds.change, build_id=build.id, spec=quick))
    later = Engine(engine.context)
    await Reconciler(later, Pace(silent_s=-60.0)).reconcile()
    done, lines = await ended(later, principal, template)
    assert (done.state, done.restarts) == (BuildState.READY, 1)
    assert texts(lines, "stdout") == ["here", "here"]


async def test_the_hosts_templates_and_the_workspaces_are_listed(
    engine: Engine, principal: Principal, stranger: Principal
) -> None:
    template = await make(engine, principal, spec())
    await ended(engine, principal, template)
    listed = await engine.list_templates(principal, ListTemplates())
    assert [item.slug for item in listed] == ["default", "mine"]
    assert [item.slug for item in await engine.list_templates(stranger, ListTemplates())] == ["default"]
