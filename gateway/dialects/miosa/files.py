"""Files of a sandbox, in the dialects of all clients.

`/files…` is what the specification and clients up to 2.9 use, `/fs/…` what later ones use; they fall back to `/files…`
on any 404. Answers with a file's bytes are always `application/octet-stream`: clients take JSON for an envelope.
"""

from __future__ import annotations

import base64
import contextlib
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta
from starlette.responses import Response

from gateway import commands, resources
from gateway.dialects.miosa import clients, decode, errors, sse, transfer
from gateway.dialects.miosa.answers import iso_time
from gateway.dialects.miosa.decode import first
from gateway.dialects.miosa.route import BYTES, EVENT_STREAM, Route, one
from gateway.engine.reports import reply_of, written_file
from gateway.errors import GatewayError, invalid
from gateway.pipeline import Call

READ = "sandboxes:read"
WRITE = "sandboxes:write"
HOME = "/workspace"

#: Largest file in a JSON body; larger ones are streamed.
FILE_BYTES_MAX = 10 * 1024 * 1024
#: Base64 takes 4/3 of that, and the rest of the body something too.
_BODY_BYTES_MAX = 15 * 1024 * 1024

Depth = Annotated[int, Meta(ge=1, le=32)]
Mode = Annotated[int, Meta(ge=0, le=0o7777)] | decode.Octal


class WriteFileRequest(msgspec.Struct, kw_only=True):
    """A file's content: bytes in `content_base64`, or `content` in the given `encoding`.

    Without `encoding`, `content` is text; the MIOSA client libraries send base64 there and are recognised.
    """

    path: decode.Path
    content: str | None = None
    content_base64: str | None = None
    encoding: Literal["utf8", "utf-8", "base64"] | None = None
    mode: Mode | None = None


class WriteFilesRequest(msgspec.Struct):
    """Several files at once."""

    files: Annotated[list[WriteFileRequest], Meta(min_length=1, max_length=1000)]


class PathRequest(msgspec.Struct):
    """A path."""

    path: decode.Path


class MakeDirectoryRequest(msgspec.Struct, kw_only=True):
    """A directory; its parents are made too unless `recursive` is false."""

    path: decode.Path
    recursive: bool | None = None
    parents: bool | None = None
    mode: Mode | None = None


class MoveRequest(msgspec.Struct, kw_only=True):
    """From where to where, in any of the clients' spellings."""

    from_: decode.Path | None = msgspec.field(default=None, name="from")
    source: decode.Path | None = None
    old_path: decode.Path | None = None
    to: decode.Path | None = None
    destination: decode.Path | None = None
    dest: decode.Path | None = None
    new_path: decode.Path | None = None
    recursive: bool | None = None


class ChangeModeRequest(msgspec.Struct):
    """Permission bits as an octal string or a number."""

    path: decode.Path
    mode: Mode
    recursive: bool = False


class RemoveRequest(msgspec.Struct, kw_only=True):
    """What to remove; the path may stand in the query instead."""

    path: decode.Path | None = None
    recursive: bool | None = None


class RemoveQuery(msgspec.Struct, kw_only=True):
    """What to remove, for clients that send no body with DELETE."""

    path: decode.Path | None = None
    recursive: bool | None = None


class FileQuery(msgspec.Struct):
    """Which file."""

    path: decode.Path


class DirectoryQuery(msgspec.Struct):
    """Which directory, and how deep to look."""

    path: decode.Path = HOME
    depth: Depth | None = None


class UploadQuery(msgspec.Struct, kw_only=True):
    """Where to put an upload; for multipart the `path` field may say it too."""

    path: decode.Path | None = None
    mode: Mode | None = None


class FileWritten(TypedDict):
    """A file was written."""

    path: str
    size: int
    size_bytes: int
    success: bool


class FilesWritten(TypedDict):
    """Which files were written and which were not."""

    written: list[str]
    failed: list[dict[str, str]]
    success: bool


class FileInfo(TypedDict):
    """A file, directory or link."""

    name: str
    path: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    size_bytes: int
    mode: int
    is_dir: bool
    is_symlink: bool
    modified_at: str
    owner: str | None
    target: NotRequired[str]


class Directory(TypedDict):
    """Entries of a directory, depth first; `truncated` when it has more than the 20,000 that one answer holds."""

    path: str
    entries: list[FileInfo]
    files: list[FileInfo]
    truncated: bool


class FileContent(TypedDict):
    """A file with its content, base64 when it is not UTF-8."""

    path: str
    content: str
    encoding: Literal["utf8", "base64"]
    size_bytes: int


class Tree(TypedDict):
    """A directory with everything below it; the root says in `truncated` whether 20,000 entries were not all."""

    name: str
    path: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    modified_at: str
    children: list[dict[str, Any]]
    truncated: NotRequired[bool]


class Done(TypedDict):
    """It is done."""

    success: bool
    ok: bool
    path: str


def file_info(item: resources.FileEntry) -> FileInfo:
    """An entry in MIOSA's words."""
    answer = FileInfo(
        name=item.name,
        path=item.path,
        type=item.kind,
        size=item.size,
        size_bytes=item.size,
        mode=item.mode,
        is_dir=item.kind == "dir",
        is_symlink=item.kind == "symlink",
        modified_at=iso_time(item.modified_at),
        owner=item.owner,
    )
    if item.target is not None:
        answer["target"] = item.target
    return answer


def tree(item: resources.FileTree) -> Tree:
    """A tree in MIOSA's words."""
    entry = item.entry
    return Tree(
        name=entry.name,
        path=entry.path,
        type=entry.kind,
        size=entry.size,
        modified_at=iso_time(entry.modified_at),
        children=[dict(tree(child)) for child in item.children],
    )


def _written(path: str, size: int) -> FileWritten:
    return FileWritten(path=path, size=size, size_bytes=size, success=True)


def _done(path: str) -> Done:
    return Done(success=True, ok=True, path=path)


def mode_bits(mode: int | str | None) -> int | None:
    """Permission bits; a string is octal."""
    return int(mode, 8) if isinstance(mode, str) else mode


def content(call: Call, file: WriteFileRequest, *, prefix: str = "") -> bytes:
    """The bytes to write. prefix: where the file stands in the body, for the details of an error."""
    if file.content_base64 is not None:
        data = decode.base64_bytes(f"{prefix}content_base64", file.content_base64)
    elif file.content is None:
        raise invalid(f"{prefix}content", "is required")
    elif _is_base64(call, file):
        data = decode.base64_bytes(f"{prefix}content", file.content)
    else:
        data = file.content.encode()
    if len(data) > FILE_BYTES_MAX:
        message = f"A JSON body may carry files of at most {FILE_BYTES_MAX} bytes; stream larger ones to PUT fs/upload."
        raise GatewayError("too_large", message)
    return data


def _is_base64(call: Call, file: WriteFileRequest) -> bool:
    """Every library release up to 2.19.1 sends base64 in `content` without saying so; the specification means text."""
    if file.encoding is not None:
        return file.encoding == "base64"
    return clients.is_library(call.request)


async def write(call: Call, body: WriteFileRequest) -> FileWritten:
    """Write a file of at most 10 MiB, replacing it at once and whole."""
    command = commands.WriteFile(decode.sandbox_id(call), body.path, content(call, body), mode_bits(body.mode))
    written = await call.engine.write_file(call.principal, command)
    return _written(written.path, written.size)


async def write_many(call: Call, body: WriteFilesRequest) -> FilesWritten:
    """Write several files; each succeeds or fails by itself."""
    files = [(file.path, content(call, file, prefix=f"files[{index}].")) for index, file in enumerate(body.files)]
    command = commands.WriteFiles(decode.sandbox_id(call), files)
    outcomes = await call.engine.write_files(call.principal, command)
    failed = [
        {"path": path, "code": errors.TABLE[outcome.code][1], "error": outcome.message}
        for path, outcome in outcomes
        if isinstance(outcome, GatewayError)
    ]
    written = [path for path, outcome in outcomes if not isinstance(outcome, GatewayError)]
    return FilesWritten(written=written, failed=failed, success=not failed)


async def upload(call: Call, query: UploadQuery) -> FileWritten | Response:
    """Write a file of any size.

    The body is the file's bytes, or a multipart form with a file part and perhaps a `path` field ahead of it. It is
    passed on as it arrives; the file appears whole or not at all.
    """
    request, sandbox_id, mode = call.request, decode.sandbox_id(call), mode_bits(query.mode)
    if (report := transfer.report_of(request)) is not None:
        received = written_file(report)
        return _written(received.path, received.size)
    if query.path is not None and transfer.can_be_ordered(request):
        command = commands.ReceiveFile(sandbox_id, query.path, mode)
        return transfer.receiving(await call.engine.receive_file(call.principal, command), request)
    path, chunks = await transfer.incoming(request, query.path)
    written = await call.engine.write_file(call.principal, commands.WriteFile(sandbox_id, path, chunks, mode))
    return _written(written.path, written.size)


async def download(call: Call, query: FileQuery) -> Response:
    """Read a file's bytes; `Range` asks for a part."""
    return await _send(call, query.path)


async def download_by_path(call: Call) -> Response:
    """Read a file's bytes; `Range` asks for a part."""
    path = call.request.path_params["path"]
    if "\x00" in path:
        raise GatewayError("path_invalid", "The path must not contain NUL.")
    return await _send(call, "/" + path.lstrip("/"))


async def _send(call: Call, path: str) -> Response:
    sandbox_id = decode.sandbox_id(call)
    if (report := transfer.report_of(call.request)) is not None:
        reply_of(report)  # which raises: of a file that is sent only what went wrong is told
    if call.request.method == "HEAD":
        entry, chunks = await call.engine.read_file(call.principal, commands.ReadFile(sandbox_id, path, length=0))
        await chunks.aclose()
        return transfer.described(entry)
    op = await call.engine.send_file(call.principal, commands.SendFile(sandbox_id, path))
    return transfer.sending(op, transfer.requested_range(call.request))


async def read_or_list(call: Call, query: DirectoryQuery) -> FileContent | Directory:
    """Read a file of at most 10 MiB as JSON, or list a directory: the path decides."""
    sandbox_id = decode.sandbox_id(call)
    try:
        return await _list(call, query)
    except GatewayError as error:
        if error.code != "path_conflict":
            raise
    entry, chunks = await call.engine.read_file(
        call.principal, commands.ReadFile(sandbox_id, query.path, length=FILE_BYTES_MAX + 1)
    )
    async with contextlib.aclosing(chunks):
        data = b"".join([chunk async for chunk in chunks])
    if len(data) > FILE_BYTES_MAX:
        raise GatewayError("too_large", f"{entry.path} is larger than {FILE_BYTES_MAX} bytes; use fs/download.")
    return _content(entry, data)


def _content(entry: resources.FileEntry, data: bytes) -> FileContent:
    try:
        return FileContent(path=entry.path, content=data.decode(), encoding="utf8", size_bytes=len(data))
    except UnicodeDecodeError:
        text = base64.b64encode(data).decode()
        return FileContent(path=entry.path, content=text, encoding="base64", size_bytes=len(data))


async def list_directory(call: Call, query: DirectoryQuery) -> Directory:
    """List a directory."""
    return await _list(call, query)


async def _list(call: Call, query: DirectoryQuery) -> Directory:
    command = commands.ListDirectory(decode.sandbox_id(call), query.path, first(query.depth, 1))
    listing = await call.engine.list_directory(call.principal, command)
    entries = [file_info(item) for item in listing.entries]
    return Directory(path=query.path, entries=entries, files=entries, truncated=listing.is_truncated)


async def get_tree(call: Call, query: DirectoryQuery) -> Tree:
    """A directory as a tree, three levels deep unless `depth` says otherwise."""
    command = commands.GetTree(decode.sandbox_id(call), query.path, first(query.depth, 3))
    found = await call.engine.get_tree(call.principal, command)
    answer = tree(found)
    answer["truncated"] = found.is_truncated
    return answer


async def stat(call: Call, body: PathRequest) -> FileInfo:
    """What a path is; links are not followed."""
    return await _stat(call, body.path)


async def stat_by_query(call: Call, query: FileQuery) -> FileInfo:
    """What a path is; links are not followed."""
    return await _stat(call, query.path)


async def _stat(call: Call, path: str) -> FileInfo:
    return file_info(await call.engine.stat_path(call.principal, commands.StatPath(decode.sandbox_id(call), path)))


async def make_directory(call: Call, body: MakeDirectoryRequest) -> FileInfo:
    """Make a directory; an existing one is fine."""
    parents = first(body.recursive, body.parents, True)
    command = commands.MakeDirectory(decode.sandbox_id(call), body.path, mode_bits(body.mode), parents)
    return file_info(await call.engine.make_directory(call.principal, command))


def both_ends(body: MoveRequest) -> tuple[str, str]:
    """From where to where."""
    source = first(body.from_, body.source, body.old_path)
    destination = first(body.to, body.destination, body.dest, body.new_path)
    if source is None:
        raise invalid("from", "is required")
    if destination is None:
        raise invalid("to", "is required")
    return source, destination


async def rename(call: Call, body: MoveRequest) -> FileInfo:
    """Move a file or directory."""
    source, destination = both_ends(body)
    command = commands.RenamePath(decode.sandbox_id(call), source, destination)
    return file_info(await call.engine.rename_path(call.principal, command))


async def copy(call: Call, body: MoveRequest) -> FileInfo:
    """Copy a file, or with `recursive` a directory."""
    source, destination = both_ends(body)
    command = commands.CopyPath(decode.sandbox_id(call), source, destination, bool(body.recursive))
    return file_info(await call.engine.copy_path(call.principal, command))


async def change_mode(call: Call, body: ChangeModeRequest) -> FileInfo:
    """Change permission bits."""
    mode = mode_bits(body.mode) or 0
    command = commands.ChangeMode(decode.sandbox_id(call), body.path, mode, body.recursive)
    return file_info(await call.engine.change_mode(call.principal, command))


async def remove(call: Call, body: RemoveRequest, query: RemoveQuery) -> Done:
    """Remove a file, or with `recursive` a directory."""
    path = first(body.path, query.path)
    if path is None:
        raise invalid("path", "is required")
    recursive = bool(first(body.recursive, query.recursive))
    await call.engine.remove_path(call.principal, commands.RemovePath(decode.sandbox_id(call), path, recursive))
    return _done(path)


async def watch(call: Call, query: DirectoryQuery) -> Response:
    """Changes below a directory, as they happen.

    Frames `change` with `{"event", "path", "is_dir", "old_path"}`; `overflow` means: some were lost, look again.
    """
    command = commands.WatchPath(decode.sandbox_id(call), query.path)
    changes = await call.engine.watch_path(call.principal, command)

    async def frames() -> sse.Frames:
        async for change in changes:
            data: dict[str, Any] = {
                "type": change.kind,
                "event": change.kind,
                "path": change.path,
                "is_dir": change.is_dir,
            }
            if change.old_path is not None:
                data["old_path"] = change.old_path
            yield sse.frame("change", data)

    return sse.response(call, frames(), source=changes)


_FILES = "/sandboxes/{sandbox_id}/files"
_FS = "/sandboxes/{sandbox_id}/fs"
_FOREVER = float("inf")
_UPLOAD: dict[str, Any] = {"streams_body": True, "timeout_s": _FOREVER}
_DOWNLOAD = {"timeout_s": _FOREVER}
_STREAM = {"streams_answer": True, "timeout_s": _FOREVER}
_ASK = {"mutates": False}


def _family(base: str) -> tuple[Route, ...]:
    """What both families of routes offer under the same names."""
    return (
        Route("POST", f"{base}/write", write, one(FileWritten), WRITE, WriteFileRequest, _BODY_BYTES_MAX),
        Route("POST", f"{base}/write-many", write_many, one(FilesWritten), WRITE, WriteFilesRequest, _BODY_BYTES_MAX),
        Route("PUT", f"{base}/upload", upload, one(FileWritten), WRITE, query=UploadQuery, terms=_UPLOAD),
        Route("POST", f"{base}/upload", upload, one(FileWritten), WRITE, query=UploadQuery, terms=_UPLOAD),
        Route("GET", f"{base}/download", download, BYTES, READ, query=FileQuery, terms=_DOWNLOAD),
        Route("GET", f"{base}/read", download, BYTES, READ, query=FileQuery, terms=_DOWNLOAD),
        Route("GET", f"{base}/list", list_directory, one(Directory), READ, query=DirectoryQuery),
        Route("GET", f"{base}/tree", get_tree, one(Tree), READ, query=DirectoryQuery),
        Route("POST", f"{base}/stat", stat, one(FileInfo), READ, PathRequest, terms=_ASK),
        Route("GET", f"{base}/stat", stat_by_query, one(FileInfo), READ, query=FileQuery),
        Route("POST", f"{base}/mkdir", make_directory, one(FileInfo), WRITE, MakeDirectoryRequest),
        Route("POST", f"{base}/rename", rename, one(FileInfo), WRITE, MoveRequest),
        Route("POST", f"{base}/copy", copy, one(FileInfo), WRITE, MoveRequest),
        Route("POST", f"{base}/chmod", change_mode, one(FileInfo), WRITE, ChangeModeRequest),
        Route("DELETE", base, remove, one(Done), WRITE, RemoveRequest, query=RemoveQuery),
        Route("GET", f"{base}/watch", watch, EVENT_STREAM, READ, query=DirectoryQuery, terms=_STREAM),
    )


ROUTES = (
    Route("POST", _FILES, write, one(FileWritten), WRITE, WriteFileRequest, _BODY_BYTES_MAX),
    Route("GET", _FILES, read_or_list, one(FileContent, Directory), READ, query=DirectoryQuery),
    Route("POST", f"{_FILES}/batch", write_many, one(FilesWritten), WRITE, WriteFilesRequest, _BODY_BYTES_MAX),
    *_family(_FILES),
    *_family(_FS),
    # Last: the path would swallow the routes above.
    Route("GET", _FILES + "/{path:path}", download_by_path, BYTES, READ, terms=_DOWNLOAD),
)
