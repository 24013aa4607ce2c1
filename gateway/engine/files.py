"""Files in a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from gateway.commands import (
    ChangeMode,
    CopyPath,
    GetTree,
    ListDirectory,
    MakeDirectory,
    ReadFile,
    ReceiveFile,
    RemovePath,
    RenamePath,
    SendFile,
    StatPath,
    WatchPath,
    WriteFile,
    WriteFiles,
)
from gateway.engine.context import Context
from gateway.engine.paths import WRITE_ROOTS, readable, writable
from gateway.engine.translate import from_vmm, vmm_errors
from gateway.errors import GatewayError, invalid
from gateway.resources import DirectoryListing, FileChange, FileEntry, FileTree, Principal
from vmm.agent import Agent
from vmm.errors import VmmError
from vmm.files import FileReader, FileWatch
from vmm.guest import Entry

_DEPTH_MAX = 32
#: Files of a batch written at a time: more gain nothing on one connection.
_BATCH_WIDTH = 8


class FileService:
    """Commands about files. All raise sandbox_not_found, sandbox_not_running and the path_* codes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def write_file(self, principal: Principal, command: WriteFile) -> FileEntry:
        """Replace a file atomically. Raises disk_full, permission_denied."""
        path = writable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return await _write(agent, path, command.content, command.mode)

    async def write_files(
        self, principal: Principal, command: WriteFiles
    ) -> list[tuple[str, FileEntry | GatewayError]]:
        """Write several files; what became of each, in the order given."""
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        width = asyncio.Semaphore(_BATCH_WIDTH)

        async def write(path: str, content: bytes) -> FileEntry | GatewayError:
            async with width:
                try:
                    return await _write(agent, writable(path), content, None)
                except GatewayError as error:
                    return error
                except VmmError as error:
                    return from_vmm(error)

        async with asyncio.TaskGroup() as group:
            tasks = [(path, group.create_task(write(path, content))) for path, content in command.files]
        return [(path, task.result()) for path, task in tasks]

    async def read_file(self, principal: Principal, command: ReadFile) -> tuple[FileEntry, FileContent]:
        """Open a file. Whoever does not read to the end calls `aclose` on the content."""
        path = readable(command.path)
        if command.offset < 0 or (command.length is not None and command.length < 0):
            raise invalid("offset", "must not be negative")
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            reader = await agent.read(path, offset=command.offset, length=command.length)
        info = reader.info
        name = path.rpartition("/")[2]
        entry = FileEntry(name, path, "file", info.size, info.mode, info.modified_at)
        return entry, FileContent(reader)

    async def send_file(self, principal: Principal, command: SendFile) -> Mapping[str, Any]:
        """What the plane is to ask hostd for."""
        path = readable(command.path)
        return (await self._context.agent(principal, command.sandbox_id)).read_op(path)

    async def receive_file(self, principal: Principal, command: ReceiveFile) -> Mapping[str, Any]:
        """The same for a file to be written."""
        path = writable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        return agent.write_op(path, mode=command.mode)

    async def stat_path(self, principal: Principal, command: StatPath) -> FileEntry:
        """One entry; a link is not followed."""
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            return file_entry(await agent.stat(readable(command.path)))

    async def list_directory(self, principal: Principal, command: ListDirectory) -> DirectoryListing:
        """Entries down to `depth`, depth first and sorted by name; at most 20 000."""
        return await self._list(principal, command.sandbox_id, readable(command.path), command.depth)

    async def get_tree(self, principal: Principal, command: GetTree) -> FileTree:
        """A directory as a tree down to `depth`; at most 20 000 entries."""
        path = readable(command.path)
        listing = await self._list(principal, command.sandbox_id, path, command.depth)
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            found = tree(file_entry(await agent.stat(path)), listing.entries)
        return replace(found, is_truncated=listing.is_truncated)

    async def _list(self, principal: Principal, sandbox_id: str, path: str, depth: int) -> DirectoryListing:
        if not 1 <= depth <= _DEPTH_MAX:
            raise invalid("depth", f"must be between 1 and {_DEPTH_MAX}")
        agent = await self._context.agent(principal, sandbox_id)
        with vmm_errors():
            listing = await agent.list(path, depth=depth)
        return DirectoryListing(tuple(file_entry(entry) for entry in listing.entries), listing.truncated)

    async def make_directory(self, principal: Principal, command: MakeDirectory) -> FileEntry:
        """Make a directory; with parents, an existing one is no error."""
        path = writable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return file_entry(await agent.mkdir(path, mode=command.mode, parents=command.parents))

    async def rename_path(self, principal: Principal, command: RenamePath) -> FileEntry:
        """Move within the sandbox."""
        source, destination = writable(command.source), writable(command.destination)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return file_entry(await agent.rename(source, destination))

    async def copy_path(self, principal: Principal, command: CopyPath) -> FileEntry:
        """Copy within the sandbox."""
        source, destination = writable(command.source), writable(command.destination)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return file_entry(await agent.copy(source, destination, recursive=command.recursive))

    async def change_mode(self, principal: Principal, command: ChangeMode) -> FileEntry:
        """Change permission bits."""
        path = writable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return file_entry(await agent.chmod(path, command.mode, recursive=command.recursive))

    async def remove_path(self, principal: Principal, command: RemovePath) -> int:
        """Remove a file, or a directory with what is in it; how many entries went."""
        path = writable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id, roots=WRITE_ROOTS)
        with vmm_errors():
            return await agent.remove(path, recursive=command.recursive)

    async def watch_path(self, principal: Principal, command: WatchPath) -> FileChanges:
        """Changes below a path, in force when this returns. Whoever stops calls `aclose`."""
        path = readable(command.path)
        agent = await self._context.agent(principal, command.sandbox_id)
        with vmm_errors():
            return FileChanges(await agent.watch(path, recursive=command.recursive))


class FileContent(AsyncIterator[bytes]):
    """The bytes of a file that was opened for reading."""

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with vmm_errors():
            return await anext(self._reader)

    async def aclose(self) -> None:
        """Stop reading."""
        self._reader.close()


class FileChanges(AsyncIterator[FileChange]):
    """What changes below a watched path."""

    def __init__(self, watch: FileWatch) -> None:
        self._watch = watch

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileChange:
        with vmm_errors():
            event = await anext(self._watch)
        return FileChange(event.type, event.path or "", event.is_dir, event.old_path)

    async def aclose(self) -> None:
        """Stop watching."""
        self._watch.close()


async def _write(agent: Agent, path: str, content: bytes | AsyncIterator[bytes], mode: int | None) -> FileEntry:
    written = await agent.write(path, content, mode=mode)
    return file_entry(await agent.stat(written.path))


def file_entry(entry: Entry) -> FileEntry:
    """An entry as the agent saw it."""
    return FileEntry(
        name=entry.name,
        path=entry.path,
        kind=entry.type,
        size=entry.size,
        mode=entry.mode,
        modified_at=entry.modified_at,
        owner=entry.owner,
        target=entry.target,
    )


def tree(root: FileEntry, entries: Sequence[FileEntry]) -> FileTree:
    """Entries given depth first, below the directory they were found in."""
    below: dict[str, list[FileEntry]] = {}
    for entry in entries:
        below.setdefault(entry.path.rpartition("/")[0] or "/", []).append(entry)

    def build(entry: FileEntry) -> FileTree:
        return FileTree(entry, tuple(build(child) for child in below.get(entry.path, ())))

    return build(root)
