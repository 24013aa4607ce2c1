"""Everything that can be asked of the agent in a machine, typed.

An Agent holds no connection: it asks for a link whenever it needs one, so it outlives the links below it. Operations
that may be repeated are, when a link breaks, until the caller's deadline (`time.monotonic()` seconds; by default
`vmm.calls.CALL_TIMEOUT_S` from now). The others raise LinkError then: nobody knows whether they took effect.

Every method raises AgentError with a code of docs/protocol.md when the agent refuses, MachineError when hostd does.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vmm.calls import LinkProvider, Patience, call, decode, limit_of, within
from vmm.errors import AgentError, LinkError, MachineError
from vmm.execution import Execution
from vmm.files import FileReader, FileWatch, write_once
from vmm.guest import (
    Command,
    Completed,
    Entry,
    GuestMetrics,
    HooksRun,
    HookStage,
    ListeningPort,
    Listing,
    ProcessRecord,
    WrittenFile,
)
from vmm.stream import STDERR, STDOUT

#: What `run` keeps of each of stdout and stderr unless told otherwise.
OUTPUT_BYTES_MAX = 16 * 1024 * 1024


class Agent:
    """The agent of one machine.

    links: gives an open link to the agent, or to hostd when `to` is the machine's id.
    passive: what this object does is no activity of the machine's owner and does not keep it from idling out.
    roots: file operations stay below these directories, whatever links lie there; None for everywhere.
    """

    def __init__(
        self,
        links: LinkProvider,
        to: str | None = None,
        *,
        passive: bool = False,
        roots: Sequence[str] | None = None,
    ) -> None:
        self._links = links
        self._address = _given(to=to, passive=passive or None, roots=None if roots is None else list(roots))

    async def exec(self, exec_id: str, command: Command, *, deadline: float | None = None) -> Execution:
        """Start a process, exactly once for one `exec_id` (at most 64 characters), and return when it runs.

        deadline: of starting it, and of every recovery after a break; it does not limit how long the process runs.
        """
        return await Execution(self._links, self.exec_op(exec_id, command), deadline).start()

    def exec_op(self, exec_id: str, command: Command) -> dict[str, Any]:
        """What starts a process on a connection to hostd, for somebody else to send."""
        return command.to_op(exec_id) | self._address

    async def run(
        self,
        exec_id: str,
        command: Command,
        *,
        stdin: bytes | None = None,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
        deadline: float | None = None,
    ) -> Completed:
        """Run a process to its end. A caller that is cancelled, or fails, takes the process with it.

        output_bytes_max: what is kept of each of stdout and stderr; the rest is read and dropped.
        deadline: of the whole; None for as long as the process takes.
        """
        execution = await self.exec(exec_id, replace(command, stdin=bool(stdin)), deadline=deadline)
        try:
            async with within(math.inf if deadline is None else deadline):
                if not stdin:
                    return await _collect(execution, output_bytes_max)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_feed(execution, stdin))
                    return await _collect(execution, output_bytes_max)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            if execution.exit is None:
                execution.kill()

    async def attach(
        self,
        exec_id: str | None = None,
        *,
        pid: int | None = None,
        offsets: Mapping[int, int] | None = None,
        tail_bytes: int | None = None,
        follow: bool = True,
        deadline: float | None = None,
    ) -> Execution:
        """Join a process: what is kept of its output from `offsets` or the last `tail_bytes` on, then what comes.

        follow: False ends with what is kept now, unless the process has ended already.
        """
        op = self.attach_op(exec_id, pid=pid) | {"follow": follow}
        if offsets is not None:
            op["offsets"] = {str(channel): offset for channel, offset in offsets.items()}
        if tail_bytes is not None:
            op["tail_bytes"] = tail_bytes
        return await Execution(self._links, op, deadline).start()

    def attach_op(self, exec_id: str | None = None, *, pid: int | None = None) -> dict[str, Any]:
        """What joins a process on a connection to hostd, for somebody else to send."""
        return {"op": "attach"} | _process(exec_id, pid) | self._address

    async def processes(self, *, deadline: float | None = None) -> Sequence[ProcessRecord]:
        """Every process that the agent started and still knows."""
        reply = await self._repeatable("processes", deadline)
        return decode(list[ProcessRecord], reply.get("processes"))

    async def process(
        self, exec_id: str | None = None, *, pid: int | None = None, deadline: float | None = None
    ) -> ProcessRecord:
        """One of them."""
        return decode(ProcessRecord, await self._repeatable("process", deadline, **_process(exec_id, pid)))

    async def signal(
        self,
        signal: str | int,
        exec_id: str | None = None,
        *,
        pid: int | None = None,
        group: bool = True,
        deadline: float | None = None,
    ) -> ProcessRecord:
        """Send a signal, by default to the whole process group. Not repeated when the link breaks."""
        fields = {**_process(exec_id, pid), "signal": signal, "group": group}
        return decode(ProcessRecord, await self._once("signal", deadline, **fields))

    async def write_stdin(
        self,
        data: bytes,
        exec_id: str | None = None,
        *,
        pid: int | None = None,
        eof: bool = False,
        deadline: float | None = None,
    ) -> int:
        """Feed a background process; returns how many bytes it took. Not repeated when the link breaks."""
        encoded = base64.b64encode(data).decode()
        reply = await self._once("stdin", deadline, **_process(exec_id, pid), data_base64=encoded, eof=eof)
        return decode(int, reply.get("written"))

    async def read(
        self, path: str, *, offset: int = 0, length: int | None = None, deadline: float | None = None
    ) -> FileReader:
        """Open a file for reading; length None reads to its end.

        deadline: of opening it, and of every recovery after a break; it does not limit how long reading takes.
        """
        return await FileReader(self._links, self.read_op(path), offset, length).open(deadline)

    def read_op(self, path: str) -> dict[str, Any]:
        """What reads a whole file on a connection to hostd, for somebody else to send."""
        return {"op": "read", "path": path} | self._address

    async def read_bytes(self, path: str, *, size_max: int, deadline: float | None = None) -> bytes:
        """A whole file. Raises AgentError `too_large` when it has more than `size_max` bytes."""
        limit = limit_of(deadline)
        async with await self.read(path, length=size_max + 1, deadline=limit) as reader, within(limit):
            parts = [part async for part in reader]
        content = b"".join(parts)
        if len(content) > size_max:
            raise AgentError("too_large", f"the file has more than {size_max} bytes")
        return content

    async def write(
        self,
        path: str,
        content: bytes | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        parents: bool = True,
        append: bool = False,
        user: str | None = None,
        deadline: float | None = None,
    ) -> WrittenFile:
        """Replace a file atomically, or append to it. Bytes are repeatable unless appended, a stream is not.

        deadline: None gives each step of a stream, rather than the whole, the default time.
        """
        op = self.write_op(path, mode=mode, parents=parents, append=append, user=user)
        if not isinstance(content, bytes):
            return await write_once(self._links, op, content, deadline)
        patience = Patience(limit_of(deadline))
        while True:
            try:
                return await write_once(self._links, op, _once(content), patience.deadline)
            except (LinkError, MachineError) as error:
                if append:
                    raise
                await patience.after(error)

    def write_op(
        self, path: str, *, mode: int | None = None, parents: bool = True, append: bool = False, user: str | None = None
    ) -> dict[str, Any]:
        """What writes a file on a connection to hostd, for somebody else to send."""
        op: dict[str, Any] = {"op": "write", "path": path, "parents": parents, "append": append}
        return op | self._address | _given(mode=mode, user=user)

    async def stat(self, path: str, *, deadline: float | None = None) -> Entry:
        """One entry; a link is not followed."""
        return decode(Entry, await self._repeatable("stat", deadline, path=path))

    async def list(
        self, path: str, *, depth: int = 1, limit: int | None = None, deadline: float | None = None
    ) -> Listing:
        """The entries of a directory down to `depth`, at most 20 000."""
        fields = {} if limit is None else {"limit": limit}
        return decode(Listing, await self._repeatable("list", deadline, path=path, depth=depth, **fields))

    async def mkdir(
        self,
        path: str,
        *,
        mode: int | None = None,
        parents: bool = True,
        user: str | None = None,
        deadline: float | None = None,
    ) -> Entry:
        """Make a directory; with `parents`, an existing one is no error."""
        fields = _given(mode=mode, user=user)
        ask = self._repeatable if parents else self._once
        return decode(Entry, await ask("mkdir", deadline, path=path, parents=parents, **fields))

    async def rename(
        self, source: str, destination: str, *, overwrite: bool = True, deadline: float | None = None
    ) -> Entry:
        """Move within the machine. Not repeated when the link breaks."""
        fields = {"source": source, "destination": destination, "overwrite": overwrite}
        return decode(Entry, await self._once("rename", deadline, **fields))

    async def copy(
        self,
        source: str,
        destination: str,
        *,
        recursive: bool = False,
        user: str | None = None,
        deadline: float | None = None,
    ) -> Entry:
        """Copy within the machine. Not repeated when the link breaks."""
        fields = {"source": source, "destination": destination, "recursive": recursive, **_given(user=user)}
        return decode(Entry, await self._once("copy", deadline, **fields))

    async def chmod(self, path: str, mode: int, *, recursive: bool = False, deadline: float | None = None) -> Entry:
        """Change permission bits."""
        return decode(Entry, await self._repeatable("chmod", deadline, path=path, mode=mode, recursive=recursive))

    async def chown(self, path: str, user: str, *, recursive: bool = False, deadline: float | None = None) -> Entry:
        """Give an entry to a user."""
        return decode(Entry, await self._repeatable("chown", deadline, path=path, user=user, recursive=recursive))

    async def remove(self, path: str, *, recursive: bool = False, deadline: float | None = None) -> int:
        """Remove an entry, a directory's content only with `recursive`; returns how many went. Not repeated."""
        return decode(int, (await self._once("remove", deadline, path=path, recursive=recursive)).get("removed"))

    async def watch(self, path: str, *, recursive: bool = True, deadline: float | None = None) -> FileWatch:
        """Follow what changes below a path. Returns when it is in force; `deadline` limits that alone."""
        op = {"op": "watch", "path": path, "recursive": recursive} | self._address
        return await FileWatch(self._links, op).open(deadline)

    async def ports(self, *, deadline: float | None = None) -> Sequence[ListeningPort]:
        """TCP ports that something in the machine listens on."""
        return decode(list[ListeningPort], (await self._repeatable("ports", deadline)).get("ports"))

    async def metrics(self, *, deadline: float | None = None) -> GuestMetrics:
        """Resource use as seen from inside."""
        return decode(GuestMetrics, await self._repeatable("metrics", deadline))

    async def identity(
        self,
        *,
        hostname: str | None = None,
        env: Mapping[str, str] | None = None,
        unset: Sequence[str] = (),
        reset: bool = False,
        token: str | None = None,
        files: Mapping[str, str] | None = None,
        hooks: HookStage | None = None,
        deadline: float | None = None,
    ) -> HooksRun:
        """Set what is given, all of it in one round trip, and then run the hooks of a stage.

        env, unset: variables every later process starts with, and names it does not see; merged with earlier ones
        unless `reset`. token: what later connections have to show. files: texts by path, each replaced atomically.
        """
        fields = _given(hostname=hostname, env=_plain(env), token=token, files=_plain(files), hooks=hooks)
        reply = await self._repeatable("identity", deadline, unset=list(unset), reset=reset, **fields)
        return decode(HooksRun, reply)

    async def run_hooks(
        self, stage: HookStage, *, timeout_s: float | None = None, deadline: float | None = None
    ) -> HooksRun:
        """Run what the owner has put below /etc/sandgate/hooks.d for a stage. timeout_s: for all of them together."""
        return decode(HooksRun, await self._repeatable("hooks", deadline, stage=stage, **_given(timeout_s=timeout_s)))

    async def _repeatable(self, name: str, deadline: float | None, **fields: Any) -> dict[str, Any]:
        op = {"op": name, **fields, **self._address}
        return await call(self._links, op, deadline=deadline, is_repeatable=True)

    async def _once(self, name: str, deadline: float | None, **fields: Any) -> dict[str, Any]:
        op = {"op": name, **fields, **self._address}
        return await call(self._links, op, deadline=deadline, is_repeatable=False)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _plain(mapping: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if mapping is None else dict(mapping)


def _process(exec_id: str | None, pid: int | None) -> dict[str, Any]:
    if (exec_id is None) == (pid is None):
        raise ValueError("a process is named either by its id or by its pid")
    return _given(id=exec_id, pid=pid)


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _feed(execution: Execution, stdin: bytes) -> None:
    try:
        await execution.write(stdin)
        await execution.write_eof()
    except AgentError as error:
        # A process need not read its input: `head -1` ends before it has been sent all of it.
        if error.code != "process_exited":
            raise


async def _collect(execution: Execution, output_bytes_max: int) -> Completed:
    kept: dict[int, list[bytes]] = {STDOUT: [], STDERR: []}
    sizes = {STDOUT: 0, STDERR: 0}
    async for channel, _, data in execution:
        room = output_bytes_max - sizes[channel]
        sizes[channel] += len(data)
        if room > 0:
            kept[channel].append(data if len(data) <= room else data[:room])
    if execution.exit is None:
        raise LinkError("link_lost", "the process was left before it ended")
    return Completed(
        pid=execution.pid,
        exit=execution.exit,
        stdout=b"".join(kept[STDOUT]),
        stderr=b"".join(kept[STDERR]),
        stdout_truncated=sizes[STDOUT] > output_bytes_max,
        stderr_truncated=sizes[STDERR] > output_bytes_max,
    )
