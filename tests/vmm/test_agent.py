"""The agent's client against the real agent and the fake one, over links that are cut."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tests.vmm.agents import Rig, fake_agent, real_agent
from tests.vmm.faults import random_budgets
from vmm.agent import Agent
from vmm.errors import AgentError, LinkError
from vmm.guest import Command, FailedHook, FileEvent, HooksRun, HookStage, ProcessExit
from vmm.link import Link
from vmm.stream import CREDIT_BYTES, STDOUT

T = TypeVar("T")

_ids = itertools.count()


def new_id() -> str:
    return f"t{os.getpid()}-{next(_ids)}"


@pytest.fixture(params=["real", "fake"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    running = real_agent(tmp_path) if request.param == "real" else fake_agent()
    async with running as rig:
        yield rig
        await _until(lambda: rig.link is None or not rig.link.is_open or rig.link.stream_count == 0)


@pytest.fixture
def agent(rig: Rig) -> Agent:
    return rig.agent


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def test_a_command_is_run_to_its_end(agent: Agent) -> None:
    done = await agent.run(new_id(), Command(argv=["echo", "hello"]), deadline=soon())
    assert (done.stdout, done.stderr, done.exit.exit_code, done.exit.reason) == (b"hello\n", b"", 0, "exited")
    assert done.pid > 1
    assert not done.stdout_truncated


async def test_a_shell_line_reports_both_outputs_and_its_status(agent: Agent) -> None:
    done = await agent.run(new_id(), Command(shell="echo out; echo err >&2; exit 7"), deadline=soon())
    assert (done.stdout, done.stderr, done.exit.exit_code) == (b"out\n", b"err\n", 7)


async def test_output_beyond_the_limit_is_dropped_and_said(agent: Agent) -> None:
    done = await agent.run(
        new_id(), Command(shell="yes | head -c 3000000"), output_bytes_max=1_000_001, deadline=soon()
    )
    assert done.stdout == b"y\n" * 500_000 + b"y"
    assert done.stdout_truncated
    assert not done.stderr_truncated


async def test_input_of_any_size_reaches_the_process(agent: Agent) -> None:
    data = bytes(range(256)) * 12_000
    done = await agent.run(new_id(), Command(argv=["cat"]), stdin=data, deadline=soon())
    assert done.stdout == data


async def test_a_process_need_not_read_its_input(agent: Agent) -> None:
    done = await agent.run(new_id(), Command(argv=["true"]), stdin=bytes(3 * CREDIT_BYTES), deadline=soon())
    assert done.exit.exit_code == 0


async def test_environment_and_directory_are_passed_on(agent: Agent, rig: Rig) -> None:
    command = Command(shell="pwd; env", cwd=rig.root, env={"SOME_NAME": "some value"})
    done = await agent.run(new_id(), command, deadline=soon())
    lines = done.stdout.decode().splitlines()
    assert lines[0] == rig.root
    assert "SOME_NAME=some value" in lines


async def test_a_timeout_kills_the_process(agent: Agent) -> None:
    done = await agent.run(new_id(), Command(argv=["sleep", "60"], timeout_s=0.05), deadline=soon())
    assert (done.exit.exit_code, done.exit.reason) == (124, "timeout")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (Command(argv=["no-such-program"]), "command_not_found"),
        (Command(), "bad_request"),
        (Command(argv=["true"], shell="true"), "bad_request"),
    ],
)
async def test_what_cannot_start_is_refused(agent: Agent, command: Command, code: str) -> None:
    with pytest.raises(AgentError) as caught:
        await agent.run(new_id(), command, deadline=soon())
    assert caught.value.code == code


async def test_one_id_starts_one_process(agent: Agent) -> None:
    exec_id = new_id()
    first = await agent.exec(exec_id, Command(argv=["sleep", "60"]), deadline=soon())
    second = await agent.exec(exec_id, Command(argv=["sleep", "60"]), deadline=soon())
    assert first.pid == second.pid
    await second.signal("SIGKILL")
    assert (await second.wait()).exit_code == 137
    first.close()


async def test_an_acknowledged_process_is_forgotten(agent: Agent) -> None:
    exec_id = new_id()
    await agent.run(exec_id, Command(argv=["true"]), deadline=soon())
    await _eventually_raises(lambda: agent.process(exec_id), "no_such_process")


async def test_a_detached_process_is_joined_again_without_loss(agent: Agent) -> None:
    execution = await agent.exec(new_id(), Command(argv=["cat"], stdin=True), deadline=soon())
    await execution.write(b"first ")
    assert (await anext(execution)).data == b"first "
    execution.close()
    again = await agent.attach(execution.id, offsets={STDOUT: 6}, deadline=soon())
    assert again.record is not None
    assert again.record.stdin_bytes == 6
    await again.write(b"second")
    await again.write_eof()
    assert [chunk async for chunk in again] == [(STDOUT, 6, b"second")]
    assert again.exit is not None
    assert again.exit.exit_code == 0


async def test_a_background_process_keeps_its_output_and_record(agent: Agent) -> None:
    command = Command(shell="echo a; echo b", background=True, name="job")
    async with await agent.exec(new_id(), command, deadline=soon()) as started:
        assert (await started.wait()).exit_code == 0
    record = await agent.process(pid=started.pid)
    assert (record.state, record.name, record.exit_code, record.stdout_bytes) == ("exited", "job", 0, 4)
    assert started.id in [known.id for known in await agent.processes()]
    async with await agent.attach(pid=started.pid, tail_bytes=2, deadline=soon()) as tail:
        assert b"".join([chunk.data async for chunk in tail]) == b"b\n"


async def test_attaching_without_following_ends_with_what_is_kept(agent: Agent) -> None:
    command = Command(argv=["cat"], stdin=True, background=True)
    started = await agent.exec(new_id(), command, deadline=soon())
    assert await agent.write_stdin(b"so far", started.id, deadline=soon()) == 6
    assert (await anext(started)).data == b"so far"
    async with await agent.attach(started.id, follow=False, deadline=soon()) as kept:
        assert b"".join([chunk.data async for chunk in kept]) == b"so far"
        assert kept.exit is None
    await agent.signal("SIGTERM", started.id, deadline=soon())
    assert (await started.wait()).reason == "signaled"


async def test_leaving_a_run_kills_the_process(agent: Agent) -> None:
    exec_id = new_id()
    running = asyncio.create_task(agent.run(exec_id, Command(argv=["sleep", "600"])))
    await _eventually_succeeds(lambda: agent.process(exec_id))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    async def has_ended() -> bool:
        return (await agent.process(exec_id)).state == "exited"

    await _until_async(has_ended)


@pytest.mark.parametrize("steps", [*range(12), 20, 40])
async def test_cancelling_a_run_anywhere_leaves_neither_stream_nor_process(rig: Rig, steps: int) -> None:
    """The step at which it is cancelled is counted in turns of the loop: at each await for the first few."""
    await rig.agent.metrics()
    exec_id = new_id()
    running = asyncio.create_task(rig.agent.run(exec_id, Command(argv=["sleep", "600"], stdin=True), stdin=b"x" * 9))
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert rig.link is not None
    assert rig.link.stream_count == 0

    async def is_over() -> bool:
        return all(record.state == "exited" for record in await rig.agent.processes() if record.id == exec_id)

    await rig.agent.metrics()
    await _until_async(is_over)
    await asyncio.sleep(0.02)
    assert await is_over()


async def test_writing_after_the_end_is_refused(agent: Agent) -> None:
    execution = await agent.exec(new_id(), Command(argv=["true"], stdin=True), deadline=soon())
    await execution.wait()
    with pytest.raises(AgentError, match="process_exited"):
        await execution.write(b"x")


@pytest.mark.parametrize("seed", range(6))
async def test_no_byte_of_output_is_lost_or_repeated_over_cuts(rig: Rig, seed: int) -> None:
    size = 6_000_000
    rig.next_budget = random_budgets(seed, 2_000, 1_500_000, cuts=5)
    content = b"".join(b"%09d\n" % number for number in range(size // 10))
    path = f"{rig.root}/numbers"
    await _uncut(rig, rig.agent.write(path, content))
    done = await rig.agent.run(new_id(), Command(argv=["cat", path]), deadline=soon())
    assert done.stdout == content
    assert done.exit == ProcessExit(0, None, "exited", done.exit.duration_ms)
    assert rig.links_made > 2


@pytest.mark.parametrize("seed", range(6))
async def test_no_byte_of_input_is_lost_or_repeated_over_cuts(rig: Rig, seed: int) -> None:
    rig.next_budget = random_budgets(seed, 2_000, 1_500_000, cuts=5)
    content = b"".join(b"%09d\n" % number for number in range(300_000))
    done = await rig.agent.run(new_id(), Command(argv=["cat"]), stdin=content, deadline=soon())
    assert done.stdout == content
    assert rig.links_made > 2


@pytest.mark.parametrize("seed", range(12))
async def test_a_command_runs_once_however_its_start_is_cut(rig: Rig, seed: int) -> None:
    rig.next_budget = random_budgets(seed, 250, 900, cuts=3)
    before = {record.pid for record in await _uncut(rig, rig.agent.processes())}
    done = await rig.agent.run(new_id(), Command(argv=["echo", "x" * 100]), deadline=soon())
    assert done.stdout == b"x" * 100 + b"\n"
    after = {record.pid for record in await rig.agent.processes()} - before
    assert after <= {done.pid}


async def test_a_process_that_is_not_known_any_more_is_no_guess(rig: Rig) -> None:
    execution = await rig.agent.exec(new_id(), Command(argv=["sleep", "60"]), deadline=soon())
    rig.relay.stall()
    async with _direct_link(rig) as link:
        someone_else = Agent(lambda _: _given(link))
        other = await someone_else.attach(execution.id, deadline=soon())
        await other.signal("SIGKILL")
        await other.wait()
        await _eventually_raises(lambda: someone_else.process(execution.id), "no_such_process")
    rig.relay.cut()
    with pytest.raises(LinkError) as caught:
        await execution.wait()
    assert caught.value.code == "no_answer"


async def test_recovery_ends_at_the_deadline(rig: Rig) -> None:
    execution = await rig.agent.exec(new_id(), Command(argv=["sleep", "60"]), deadline=soon(3))
    rig.next_budget = lambda: 0
    rig.relay.cut()
    with pytest.raises(LinkError):
        await execution.wait()


async def test_bytes_written_are_read_back(agent: Agent, rig: Rig) -> None:
    path = f"{rig.root}/deep/er/a b#.bin"
    content = bytes(range(256)) * 5_000
    written = await agent.write(path, content, mode=0o600, deadline=soon())
    assert (written.path, written.size) == (path, len(content))
    entry = await agent.stat(path)
    assert (entry.name, entry.size, entry.mode & 0o777, entry.is_dir) == ("a b#.bin", len(content), 0o600, False)
    assert await agent.read_bytes(path, size_max=len(content)) == content
    async with await agent.read(path, offset=100, length=50) as reader:
        assert b"".join([part async for part in reader]) == content[100:150]
    with pytest.raises(AgentError, match="too_large"):
        await agent.read_bytes(path, size_max=len(content) - 1)


async def test_a_stream_is_written_and_appended(agent: Agent, rig: Rig) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(40):
            yield bytes([number]) * 100_000

    path = f"{rig.root}/streamed"
    assert (await agent.write(path, parts())).size == 4_000_000
    assert (await agent.write(path, b"end", append=True)).size == 4_000_003
    content = await agent.read_bytes(path, size_max=5_000_000)
    assert content == b"".join([bytes([n]) * 100_000 for n in range(40)]) + b"end"


async def test_an_unfinished_write_leaves_the_old_file(agent: Agent, rig: Rig) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield b"new"
        raise ZeroDivisionError

    path = f"{rig.root}/kept"
    await agent.write(path, b"old")
    with pytest.raises(ZeroDivisionError):
        await agent.write(path, breaks())
    assert await agent.read_bytes(path, size_max=10) == b"old"
    assert [entry.name for entry in (await agent.list(rig.root)).entries] == ["kept"]


@pytest.mark.parametrize("seed", range(4))
async def test_files_survive_cuts_both_ways(rig: Rig, seed: int) -> None:
    content = b"".join(b"%09d\n" % number for number in range(300_000))
    path = f"{rig.root}/cut"
    rig.next_budget = random_budgets(seed, 1_000, 2_500_000, cuts=6)
    assert (await rig.agent.write(path, content, deadline=soon())).size == len(content)
    assert await rig.agent.read_bytes(path, size_max=len(content), deadline=soon()) == content
    assert rig.links_made > 2


async def test_a_file_that_changed_during_a_break_is_not_stitched_together(rig: Rig) -> None:
    path = f"{rig.root}/changing"
    await rig.agent.write(path, bytes(3 * CREDIT_BYTES))
    async with await rig.agent.read(path) as reader:
        await anext(reader)
        await rig.agent.write(path, bytes(3 * CREDIT_BYTES + 1))
        rig.relay.cut()
        with pytest.raises(LinkError, match="changed"):
            async for _ in reader:
                pass


async def test_a_streamed_write_that_is_cut_is_not_repeated(rig: Rig) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"some"
        await asyncio.sleep(0)
        rig.relay.cut()
        yield bytes(CREDIT_BYTES)

    with pytest.raises(LinkError):
        await rig.agent.write(f"{rig.root}/gone", parts(), deadline=soon())


async def test_directories_are_made_listed_moved_copied_and_removed(agent: Agent, rig: Rig) -> None:
    base = f"{rig.root}/tree"
    assert (await agent.mkdir(f"{base}/a/b")).is_dir
    await agent.write(f"{base}/a/one", b"1")
    await agent.write(f"{base}/two", b"22")
    listed = await agent.list(base, depth=3)
    assert [(e.path.removeprefix(base), e.is_dir, e.size) for e in listed.entries if not e.is_dir] == [
        ("/a/one", False, 1),
        ("/two", False, 2),
    ]
    assert [e.name for e in (await agent.list(base)).entries] == ["a", "two"]
    assert (await agent.list(base, depth=3, limit=2)).truncated
    assert (await agent.rename(f"{base}/two", f"{base}/three")).name == "three"
    assert (await agent.copy(f"{base}/a", f"{base}/c", recursive=True)).is_dir
    assert await agent.read_bytes(f"{base}/c/one", size_max=10) == b"1"
    assert (await agent.chmod(f"{base}/three", 0o640)).mode & 0o777 == 0o640
    with pytest.raises(AgentError, match="not_empty"):
        await agent.remove(base)
    assert await agent.remove(base, recursive=True) == 8
    with pytest.raises(AgentError, match="not_found"):
        await agent.stat(base)


@pytest.mark.parametrize(
    ("path", "code"), [("relative", "invalid_path"), ("/a\0b", "invalid_path"), ("/no/such", "not_found")]
)
async def test_paths_that_cannot_be_are_refused(agent: Agent, path: str, code: str) -> None:
    with pytest.raises(AgentError) as caught:
        await agent.stat(path)
    assert caught.value.code == code


async def test_roots_confine_file_operations(rig: Rig) -> None:
    inside, outside = f"{rig.root}/inside", f"{rig.root}/outside"
    await rig.agent.write(f"{outside}/secret", b"x")
    confined = Agent(rig.links, roots=[inside])
    await confined.write(f"{inside}/mine", b"y")
    attempts = [
        confined.stat(f"{outside}/secret"),
        confined.read_bytes(f"{inside}/../outside/secret", size_max=10),
        confined.write(f"{outside}/new", b"z"),
        confined.rename(f"{inside}/mine", f"{outside}/mine"),
        confined.list(rig.root),
    ]
    for attempt in attempts:
        with pytest.raises(AgentError) as caught:
            await attempt
        assert caught.value.code == "forbidden_path"


async def test_changes_are_told_and_a_break_shows_as_overflow(rig: Rig) -> None:
    async with await rig.agent.watch(rig.root) as watch, asyncio.timeout(60):
        await rig.agent.write(f"{rig.root}/seen", b"x")
        while (event := await anext(watch)).path != f"{rig.root}/seen":
            pass
        assert event.type in ("created", "renamed", "modified")
        rig.relay.cut()
        while await anext(watch) != FileEvent("overflow"):
            pass
        await rig.agent.remove(f"{rig.root}/seen")
        while (event := await anext(watch)).type != "deleted":
            pass
        assert event.path == f"{rig.root}/seen"


async def test_metrics_and_ports_are_told(agent: Agent) -> None:
    metrics = await agent.metrics()
    assert metrics.uptime_s >= 0
    assert isinstance(list(await agent.ports()), list)


async def test_identity_reaches_later_processes_and_the_token(rig: Rig) -> None:
    await rig.agent.identity(env={"GIVEN": "1", "GONE": "1"}, token="t2")
    await rig.agent.identity(unset=["GONE"])
    done = await rig.agent.run(new_id(), Command(argv=["env"]), deadline=soon())
    assert b"GIVEN=1\n" in done.stdout
    assert b"GONE" not in done.stdout
    rig.token = "t2"
    rig.relay.cut()
    await rig.agent.metrics(deadline=soon())


async def test_identity_replaces_what_was_there_before(rig: Rig) -> None:
    await rig.agent.identity(env={"OLD": "1"})
    path = f"{rig.root}/hosts"
    for _ in range(2):
        run = await rig.agent.identity(reset=True, env={"NEW": "1"}, files={path: "me\n"})
        assert not run.failed
    assert await rig.agent.read_bytes(path, size_max=100) == b"me\n"
    done = await rig.agent.run(new_id(), Command(argv=["env"]), deadline=soon())
    assert b"NEW=1\n" in done.stdout
    assert b"OLD" not in done.stdout


async def test_a_stage_without_hooks_runs_nothing(rig: Rig) -> None:
    assert await rig.agent.run_hooks(HookStage.BEFORE_PAUSE, deadline=soon()) == HooksRun([], [])


async def test_a_failing_hook_is_told(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.d"
    hooks.mkdir()
    hook = hooks / "before-snapshot"
    hook.write_text("#!/bin/sh\necho no room >&2; exit 7\n")
    hook.chmod(0o755)
    async with real_agent(tmp_path, hooks=hooks) as rig:
        run = await rig.agent.run_hooks(HookStage.BEFORE_SNAPSHOT, deadline=soon())
    assert run.failed == [FailedHook(str(hook), "exited", "no room\n", 7)]


async def _uncut(rig: Rig, work: Awaitable[T]) -> T:
    """Prepare something without a cut, and leave no connection behind."""
    budget, rig.next_budget = rig.next_budget, lambda: None
    try:
        return await work
    finally:
        rig.next_budget = budget
        rig.close()
        rig.links_made = 0


@asynccontextmanager
async def _direct_link(rig: Rig) -> AsyncIterator[Link]:
    link = await Link.connect(rig.dial, role="host", token=rig.token)
    try:
        yield link
    finally:
        link.close()


async def _given(link: Link) -> Link:
    return link


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def _until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.005)


async def _eventually_raises(ask: Callable[[], Awaitable[object]], code: str) -> None:
    async def raises() -> bool:
        try:
            await ask()
        except AgentError as error:
            return error.code == code
        return False

    await _until_async(raises)


async def _eventually_succeeds(ask: Callable[[], Awaitable[object]]) -> None:
    async def succeeds() -> bool:
        try:
            await ask()
        except AgentError:
            return False
        return True

    await _until_async(succeeds)
