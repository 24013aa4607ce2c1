"""Commands, files, variables, terminals and logs in a real gVisor sandbox."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from gateway.commands import (
    ChangeMode,
    CloseTerminal,
    CopyPath,
    DeleteEnv,
    Exec,
    GetLogs,
    GetMetrics,
    GetProcess,
    GetProcessOutput,
    GetTree,
    ListDirectory,
    ListEnv,
    ListProcesses,
    MakeDirectory,
    OpenTerminal,
    ReadFile,
    ReceiveFile,
    RemovePath,
    RenamePath,
    SendFile,
    SetEnv,
    SignalProcess,
    StartProcess,
    StatPath,
    StreamExec,
    StreamLogs,
    StreamProcessOutput,
    WatchPath,
    WriteFile,
    WriteFiles,
    WriteStdin,
)
from gateway.engine import Engine
from gateway.errors import GatewayError
from gateway.resources import ExecResult, Principal, Sandbox


def new_id() -> str:
    return str(uuid.uuid4())


async def shell(engine: Engine, principal: Principal, box: Sandbox, line: str, **fields: object) -> ExecResult:
    command = replace(Exec(box.id, new_id(), shell=line), **fields)  # type: ignore[arg-type]
    return await engine.exec(principal, command)


async def read(engine: Engine, principal: Principal, box: Sandbox, path: str, **fields: object) -> bytes:
    command = replace(ReadFile(box.id, path), **fields)  # type: ignore[arg-type]
    _, content = await engine.read_file(principal, command)
    return b"".join([part async for part in content])


async def code_of(attempt: Awaitable[object]) -> str:
    return (await codes_of(attempt))[0]


async def codes_of(*attempts: Awaitable[object]) -> list[str]:
    results = await asyncio.gather(*attempts, return_exceptions=True)
    return [result.code if isinstance(result, GatewayError) else repr(result) for result in results]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.02)


async def test_a_command_tells_how_it_ended(real: Engine, principal: Principal, box: Sandbox) -> None:
    result = await shell(real, principal, box, "echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code, result.reason) == (b"out\n", b"err\n", 7, "exited")
    result = await real.exec(principal, Exec(box.id, new_id(), argv=["printf", "%s|", "a b", "$HOME"]))
    assert result.stdout == b"a b|$HOME|"


async def test_a_command_has_its_surroundings(real: Engine, principal: Principal, box: Sandbox) -> None:
    assert (await shell(real, principal, box, "pwd; id -un")).stdout == b"/workspace\nuser\n"
    result = await shell(real, principal, box, "pwd; id -un; echo $A", cwd="/tmp", user="root", env={"A": "ä b"})
    assert result.stdout.decode() == "/tmp\nroot\nä b\n"
    assert (await shell(real, principal, box, "cat", stdin=b"\0\xff" * 1000)).stdout == b"\0\xff" * 1000


async def test_output_is_bytes_and_bounded(real: Engine, principal: Principal, box: Sandbox) -> None:
    result = await shell(real, principal, box, r"printf '\377\000\n'")
    assert result.stdout == b"\xff\0\n"
    result = await shell(real, principal, box, "head -c 3000000 /dev/zero", output_bytes_max=1_000_000)
    assert (len(result.stdout), result.truncated, result.exit_code) == (1_000_000, True, 0)


async def test_a_command_over_its_time_ends_with_all_it_started(
    real: Engine, principal: Principal, box: Sandbox
) -> None:
    line = "trap '' TERM; sleep 987 & echo $!; wait"
    result = await shell(real, principal, box, line, timeout_s=2.0)
    assert (result.exit_code, result.reason) == (124, "timeout")
    assert (await shell(real, principal, box, f"kill -0 {int(result.stdout)}")).exit_code != 0


async def test_one_effect_runs_once(real: Engine, principal: Principal, box: Sandbox) -> None:
    marker = f"/tmp/{new_id()}"
    command = StartProcess(box.id, new_id(), shell=f"echo x >> {marker}; sleep 0.2")
    first, second = await real.start_process(principal, command), await real.start_process(principal, command)
    assert first.pid == second.pid
    await real.exec(principal, Exec(box.id, new_id(), shell="sleep 0.3"))
    assert await read(real, principal, box, marker) == b"x\n"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"argv": ["no-such-program"], "shell": None}, "command_invalid"),
        ({"argv": ["/etc/passwd"], "shell": None}, "command_invalid"),
        ({"cwd": "/no/such/place"}, "command_invalid"),
        ({"user": "nobody-here"}, "command_invalid"),
        ({"argv": ["true"]}, "validation_failed"),
        ({"argv": [], "shell": None}, "validation_failed"),
        ({"timeout_s": 0.05}, "validation_failed"),
        ({"timeout_s": 1e9}, "validation_failed"),
    ],
)
async def test_a_command_that_cannot_start_says_why(
    real: Engine, principal: Principal, box: Sandbox, fields: dict[str, object], code: str
) -> None:
    assert await code_of(shell(real, principal, box, "true", **fields)) == code


async def test_a_streamed_command_is_left_to_the_plane(real: Engine, principal: Principal, box: Sandbox) -> None:
    exec_id = new_id()
    op = await real.stream_exec(principal, StreamExec(box.id, exec_id, shell="true"))
    assert {"op": "exec", "to": box.id, "id": exec_id, "shell": "true", "timeout_s": 30.0}.items() <= op.items()
    assert op["ends_with_client"]
    op = await real.stream_process_output(principal, StreamProcessOutput(box.id, 7))
    assert op == {"op": "attach", "pid": 7, "to": box.id}


async def test_files_are_left_to_the_plane(real: Engine, principal: Principal, box: Sandbox) -> None:
    op = await real.send_file(principal, SendFile(box.id, "f"))
    assert op == {"op": "read", "to": box.id, "path": "/workspace/f"}
    op = await real.receive_file(principal, ReceiveFile(box.id, "/tmp/f", 0o600))
    assert {"op": "write", "to": box.id, "path": "/tmp/f", "mode": 0o600, "append": False}.items() <= op.items()
    assert "/workspace" in op["roots"]
    assert await code_of(real.send_file(principal, SendFile(box.id, "/proc/1/mem"))) == "path_forbidden"
    assert await code_of(real.receive_file(principal, ReceiveFile(box.id, "/etc/passwd"))) == "path_forbidden"
    assert await code_of(real.send_file(principal, SendFile(new_id(), "f"))) == "sandbox_not_found"
    assert await code_of(real.stream_exec(principal, StreamExec(box.id, new_id(), argv=["a"], shell="a"))) == (
        "validation_failed"
    )


async def test_a_background_process_is_fed_and_stopped(real: Engine, principal: Principal, box: Sandbox) -> None:
    line = "echo ready; while read x; do echo got $x; done; sleep 987"
    started = await real.start_process(principal, StartProcess(box.id, new_id(), shell=line, name="srv"))
    assert (started.state, started.name, started.command, started.background) == ("running", "srv", line, True)
    assert await real.write_stdin(principal, WriteStdin(box.id, started.pid, b"a\nb\n", eof=True)) == 4

    async def has_answered() -> bool:
        return b"got b\n" in await output(real, principal, box, started.pid, None)

    await until(has_answered)
    assert await output(real, principal, box, started.pid, 1) == b"got b\n"
    listed = await real.list_processes(principal, ListProcesses(box.id))
    assert started.pid in [process.pid for process in listed if process.state == "running"]
    await real.signal_process(principal, SignalProcess(box.id, started.pid, "SIGTERM"))

    async def has_ended() -> bool:
        return (await real.get_process(principal, GetProcess(box.id, started.pid))).state == "exited"

    await until(has_ended)
    ended = await real.get_process(principal, GetProcess(box.id, started.pid))
    assert (ended.state, ended.exit_code, ended.signal) == ("exited", 143, 15)
    assert (await real.signal_process(principal, SignalProcess(box.id, started.pid, "SIGKILL"))).state == "exited"


async def output(engine: Engine, principal: Principal, box: Sandbox, pid: int, lines: int | None) -> bytes:
    chunks = await engine.get_process_output(principal, GetProcessOutput(box.id, pid, lines))
    return b"".join(chunk.data for chunk in chunks)


async def test_an_unknown_process_is_not_found(real: Engine, principal: Principal, box: Sandbox) -> None:
    assert await code_of(real.get_process(principal, GetProcess(box.id, 999_999))) == "process_not_found"
    assert await code_of(real.get_process_output(principal, GetProcessOutput(box.id, 999_999))) == "process_not_found"


async def test_a_process_in_the_background_outlives_a_cut(real: Engine, principal: Principal, box: Sandbox) -> None:
    started = await real.start_process(principal, StartProcess(box.id, new_id(), shell="sleep 0.3; echo late"))

    async def is_over() -> bool:
        return (await real.get_process(principal, GetProcess(box.id, started.pid))).state == "exited"

    await until(is_over)
    assert await output(real, principal, box, started.pid, None) == b"late\n"


@pytest.mark.parametrize("name", ["a b#.txt", "ä/ö/ü", "package.json", "-rf", "new\nline", "a?b&c=d%20"])
async def test_files_come_back_byte_for_byte(real: Engine, principal: Principal, box: Sandbox, name: str) -> None:
    path = f"{new_id()}/{name}"
    content = os.urandom(3000) + b"\r\n\0"
    written = await real.write_file(principal, WriteFile(box.id, path, content))
    assert (written.path, written.size, written.kind) == (f"/workspace/{path}", len(content), "file")
    assert await read(real, principal, box, path) == content
    assert await read(real, principal, box, path, offset=10, length=20) == content[10:30]
    assert await read(real, principal, box, path, offset=len(content) + 5) == b""
    assert (await real.stat_path(principal, StatPath(box.id, path))).size == len(content)


async def test_a_file_is_streamed_both_ways(real: Engine, principal: Principal, box: Sandbox) -> None:
    block = os.urandom(1024 * 1024)

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield block

    path = f"/tmp/{new_id()}"
    written = await real.write_file(principal, WriteFile(box.id, path, blocks(), mode=0o600))
    assert (written.size, written.mode & 0o777) == (20 * len(block), 0o600)
    _, content = await real.read_file(principal, ReadFile(box.id, path))
    size = 0
    async for part in content:
        size += len(part)
    assert size == written.size
    _, content = await real.read_file(principal, ReadFile(box.id, path))
    assert await anext(content)
    await content.aclose()
    await real.remove_path(principal, RemovePath(box.id, path))


async def test_an_upload_that_breaks_leaves_the_old_file(real: Engine, principal: Principal, box: Sandbox) -> None:
    path = f"/tmp/{new_id()}"
    await real.write_file(principal, WriteFile(box.id, path, b"old"))

    async def broken() -> AsyncIterator[bytes]:
        yield b"new"
        raise ConnectionResetError("the client left")

    with pytest.raises(ConnectionResetError):
        await real.write_file(principal, WriteFile(box.id, path, broken()))
    assert await read(real, principal, box, path) == b"old"


async def test_each_file_of_a_batch_succeeds_or_fails_by_itself(
    real: Engine, principal: Principal, box: Sandbox
) -> None:
    folder = new_id()
    files = [(f"{folder}/{number}", str(number).encode()) for number in range(20)] + [("/etc/no", b""), (folder, b"")]
    outcomes = await real.write_files(principal, WriteFiles(box.id, files))
    assert [path for path, _ in outcomes] == [path for path, _ in files]
    errors = {path: outcome.code for path, outcome in outcomes if isinstance(outcome, GatewayError)}
    assert errors == {"/etc/no": "path_forbidden", folder: "path_conflict"}
    assert await read(real, principal, box, f"{folder}/19") == b"19"


async def test_directories_are_made_listed_moved_copied_and_removed(
    real: Engine, principal: Principal, box: Sandbox
) -> None:
    root = f"/workspace/{new_id()}"
    assert (await real.make_directory(principal, MakeDirectory(box.id, f"{root}/a/b"))).kind == "dir"
    assert (await real.make_directory(principal, MakeDirectory(box.id, f"{root}/a/b"))).kind == "dir"
    await real.write_file(principal, WriteFile(box.id, f"{root}/a/f", b"1"))
    await shell(real, principal, box, f"ln -s f {root}/a/link", user="root")
    listed = (await real.list_directory(principal, ListDirectory(box.id, root, depth=2))).entries
    assert [(entry.path.removeprefix(root), entry.kind) for entry in listed] == [
        ("/a", "dir"),
        ("/a/b", "dir"),
        ("/a/f", "file"),
        ("/a/link", "symlink"),
    ]
    tree = await real.get_tree(principal, GetTree(box.id, root, depth=2))
    assert [child.entry.name for child in tree.children[0].children] == ["b", "f", "link"]
    await real.rename_path(principal, RenamePath(box.id, f"{root}/a/f", f"{root}/g"))
    await real.copy_path(principal, CopyPath(box.id, f"{root}/g", f"{root}/h"))
    assert await code_of(real.copy_path(principal, CopyPath(box.id, f"{root}/a", f"{root}/z"))) == "path_conflict"
    await real.copy_path(principal, CopyPath(box.id, f"{root}/a", f"{root}/z", recursive=True))
    assert (await real.change_mode(principal, ChangeMode(box.id, f"{root}/h", 0o751))).mode & 0o777 == 0o751
    names = [entry.name for entry in (await real.list_directory(principal, ListDirectory(box.id, root))).entries]
    assert names == ["a", "g", "h", "z"]
    assert await code_of(real.remove_path(principal, RemovePath(box.id, root))) == "path_conflict"
    assert await real.remove_path(principal, RemovePath(box.id, root, recursive=True)) >= 6
    assert await code_of(real.stat_path(principal, StatPath(box.id, root))) == "path_not_found"


async def test_reading_what_is_no_file_is_refused(real: Engine, principal: Principal, box: Sandbox) -> None:
    assert await code_of(read(real, principal, box, "/workspace")) == "path_conflict"
    assert await code_of(read(real, principal, box, "/etc/none")) == "path_not_found"
    assert await code_of(read(real, principal, box, "/dev/zero")) == "path_forbidden"
    assert await code_of(real.list_directory(principal, ListDirectory(box.id, "/etc/passwd"))) == "path_conflict"
    await shell(real, principal, box, "rm -f /tmp/fifo; mkfifo /tmp/fifo")
    assert await code_of(read(real, principal, box, "/tmp/fifo")) == "path_conflict"


async def test_links_do_not_lead_out_of_the_roots(real: Engine, principal: Principal, box: Sandbox) -> None:
    link = f"/workspace/{new_id()}"
    await shell(real, principal, box, f"ln -s /etc {link}", user="root")
    codes = await codes_of(
        real.write_file(principal, WriteFile(box.id, f"{link}/passwd", b"x")),
        real.remove_path(principal, RemovePath(box.id, f"{link}/passwd")),
        real.change_mode(principal, ChangeMode(box.id, f"{link}/passwd", 0o777)),
        real.rename_path(principal, RenamePath(box.id, f"{link}/passwd", "/tmp/stolen")),
        real.make_directory(principal, MakeDirectory(box.id, f"{link}/x")),
    )
    assert codes == ["path_forbidden"] * 5
    assert (await shell(real, principal, box, "head -c 4 /etc/passwd")).stdout == b"root"


async def test_changes_are_watched(real: Engine, principal: Principal, box: Sandbox) -> None:
    root = f"/workspace/{new_id()}"
    await real.make_directory(principal, MakeDirectory(box.id, root))
    changes = await real.watch_path(principal, WatchPath(box.id, root))
    await shell(real, principal, box, f"echo x > {root}/f; mv {root}/f {root}/g; rm {root}/g", user="root")
    seen: list[tuple[str, str]] = []
    async with asyncio.timeout(60):
        async for change in changes:
            seen.append((change.kind, change.path.removeprefix(root)))
            if change.kind == "deleted":
                break
    await changes.aclose()
    assert seen[0] == ("created", "/f")
    assert seen[-1] == ("deleted", "/g")
    assert ("renamed", "/g") in seen


async def test_variables_reach_processes_started_later(real: Engine, principal: Principal, box: Sandbox) -> None:
    name = f"V{uuid.uuid4().hex}"
    env = await real.set_env(principal, SetEnv(box.id, {name: "1 ä"}))
    assert env == await real.list_env(principal, ListEnv(box.id))
    assert (await shell(real, principal, box, f"echo ${name}")).stdout.decode() == "1 ä\n"
    await real.delete_env(principal, DeleteEnv(box.id, name))
    assert (await shell(real, principal, box, f"echo ${name}")).stdout == b"\n"
    assert await code_of(real.delete_env(principal, DeleteEnv(box.id, name))) == "not_found"
    assert await code_of(real.set_env(principal, SetEnv(box.id, {name: "x" * 200_000}))) == "validation_failed"


async def test_a_terminal_outlives_its_viewers(real: Engine, principal: Principal, box: Sandbox) -> None:
    session = await real.open_terminal(principal, OpenTerminal(box.id, new_id(), rows=30, cols=100))
    terminal = await real.attach_terminal(principal, box.id, session.id)
    await terminal.write(b"stty size; echo first-$((40+2))\n")
    assert b"30 100" in await shown(terminal, b"first-42")
    await terminal.resize(50, 120)
    await terminal.write(b"stty size; echo sized-$((40+2))\n")
    assert b"50 120" in await shown(terminal, b"sized-42")
    await terminal.close()
    again = await real.attach_terminal(principal, box.id, session.id)
    assert b"first-42" in await shown(again, b"sized-42")
    await again.write(b"exit 5\n")
    async for _ in again:
        pass
    assert again.exit is not None
    assert again.exit.exit_code == 5
    await real.close_terminal(principal, CloseTerminal(box.id, session.id))


async def test_closing_a_terminal_ends_its_shell(real: Engine, principal: Principal, box: Sandbox) -> None:
    session = await real.open_terminal(principal, OpenTerminal(box.id, new_id()))
    terminal = await real.attach_terminal(principal, box.id, session.id)
    await real.close_terminal(principal, CloseTerminal(box.id, session.id))
    async with asyncio.timeout(60):
        async for _ in terminal:
            pass
    assert terminal.exit is not None
    assert await code_of(real.attach_terminal(principal, box.id, new_id())) == "process_not_found"
    assert await code_of(real.open_terminal(principal, OpenTerminal(box.id, new_id(), rows=0))) == "validation_failed"


async def shown(terminal: AsyncIterator[bytes], end: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(60):
        while end not in seen:
            seen += await anext(terminal)
    return seen


async def test_logs_gather_what_background_processes_wrote(real: Engine, principal: Principal, box: Sandbox) -> None:
    mark = new_id()
    await real.start_process(
        principal, StartProcess(box.id, new_id(), shell=f"echo {mark}-1; echo {mark}-2; sleep 987")
    )

    async def is_logged() -> bool:
        lines = await real.get_logs(principal, GetLogs(box.id, 2))
        return lines == (f"{mark}-1", f"{mark}-2")

    await until(is_logged)
    stream = await real.stream_logs(principal, StreamLogs(box.id, 100))
    later = await real.start_process(principal, StartProcess(box.id, new_id(), shell=f"echo {mark}-3"))
    seen = b""
    async with asyncio.timeout(60):
        while not all(f"{mark}-{number}".encode() in seen for number in (1, 2, 3)):
            seen += (await anext(stream)).data
    await stream.aclose()
    assert later.pid


async def test_metrics_tell_what_is_used(real: Engine, principal: Principal, box: Sandbox) -> None:
    metrics = await real.get_metrics(principal, GetMetrics(box.id))
    assert 0 < metrics.memory_used_bytes < metrics.memory_limit_bytes
    assert 0 <= metrics.disk_used_bytes < metrics.disk_total_bytes
    assert metrics.processes >= 1
    assert metrics.uptime_s > 0


async def test_a_stranger_reaches_nothing(real: Engine, stranger: Principal, box: Sandbox) -> None:
    codes = await codes_of(
        shell(real, stranger, box, "true"),
        read(real, stranger, box, "/etc/passwd"),
        real.write_file(stranger, WriteFile(box.id, "x", b"")),
        real.list_processes(stranger, ListProcesses(box.id)),
        real.attach_terminal(stranger, box.id, new_id()),
        real.set_env(stranger, SetEnv(box.id, {"A": "1"})),
        real.get_logs(stranger, GetLogs(box.id)),
        real.get_metrics(stranger, GetMetrics(box.id)),
    )
    assert codes == ["sandbox_not_found"] * 8
