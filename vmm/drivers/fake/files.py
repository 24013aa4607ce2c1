"""The file tree of a fake machine: in memory, with the agent's rules for paths and its error codes."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vmm.errors import AgentError

_STANDARD = ("/etc", "/home/user", "/tmp", "/workspace")  # noqa: S108 - a name in a tree that no disk holds

_LIST_MAX = 20_000


@dataclass(slots=True)
class Node:
    """A file (`data`) or a directory (`children`)."""

    mode: int
    data: bytes = b""
    children: dict[str, Node] | None = None
    owner: str = "user"
    modified_at: float = field(default_factory=time.time)


Change = Literal["created", "modified", "deleted", "renamed"]
Listener = Callable[[dict[str, Any]], None]


class FileTree:
    """Paths are absolute. Every change is told to the listeners whose path it lies below."""

    def __init__(self) -> None:
        self._root = Node(0o755, children={}, owner="root")
        self._listeners: list[tuple[str, bool, Listener]] = []
        for path in _STANDARD:
            self.mkdir(path)

    def dump(self) -> Any:
        """Everything, in plain values."""
        return _dump(self._root)

    def load(self, dumped: Any) -> None:
        """Become what was dumped."""
        self._root = _load(dumped)

    def entry(self, path: str) -> dict[str, Any]:
        """The entry at a path as the agent describes it."""
        path = _clean(path)
        return _describe(path, self._find(path))

    def read(self, path: str) -> tuple[bytes, dict[str, Any]]:
        """A file's content and what `read` tells of it."""
        node = self._find(_clean(path))
        if node.children is not None:
            raise AgentError("is_a_directory", "the path is a directory")
        return node.data, {"size": len(node.data), "mode": node.mode, "modified_at": node.modified_at}

    def write(self, path: str, data: bytes, *, mode: int | None, parents: bool, append: bool) -> dict[str, Any]:
        """Replace a file or append to it."""
        path = _clean(path)
        if parents:
            self.mkdir(posixpath.dirname(path))
        siblings, name = self._place(path)
        old = siblings.get(name)
        if old is not None and old.children is not None:
            raise AgentError("is_a_directory", "the path is a directory")
        kept_mode = 0o644 if old is None else old.mode
        before = old.data if append and old is not None else b""
        siblings[name] = Node(kept_mode if mode is None else mode, before + data)
        self._tell("created" if old is None else "modified", path, is_dir=False)
        return {"path": path, "size": len(before) + len(data)}

    def list(self, path: str, depth: int, limit: int) -> dict[str, Any]:
        """What lies below a directory, depth first."""
        path = _clean(path)
        if depth < 1 or limit < 1:
            raise AgentError("bad_request", "depth and limit start at 1")
        node = self._find(path)
        if node.children is None:
            raise AgentError("not_a_directory", "the path is no directory")
        entries: list[dict[str, Any]] = []
        limit = min(limit, _LIST_MAX)
        for child_path, child in _walk(path, node, depth):
            if len(entries) == limit:
                return {"path": path, "entries": entries, "truncated": True}
            entries.append(_describe(child_path, child))
        return {"path": path, "entries": entries, "truncated": False}

    def mkdir(self, path: str, *, mode: int | None = None, parents: bool = True) -> dict[str, Any]:
        """Make a directory, with those above it if asked to."""
        path = _clean(path)
        node, here = self._root, ""
        for name in [part for part in path.split("/") if part]:
            here += "/" + name
            children = _children(node)
            if name not in children:
                if not parents and here != path:
                    raise AgentError("not_found", f"{here} does not exist")
                children[name] = Node(0o755 if mode is None else mode, children={})
                self._tell("created", here, is_dir=True)
            elif here == path and not parents:
                raise AgentError("exists", f"{path} exists")
            node = children[name]
        if node.children is None:
            raise AgentError("exists", f"{path} exists and is no directory")
        return _describe(path, node)

    def rename(self, source: str, destination: str, *, overwrite: bool) -> dict[str, Any]:
        """Move an entry."""
        source, destination = _clean(source), _clean(destination)
        node = self._find(source)
        target = self._target(source, destination, overwrite=overwrite)
        siblings, name = self._place(source)
        del siblings[name]
        target[posixpath.basename(destination)] = node
        self._tell("renamed", destination, is_dir=node.children is not None, old_path=source)
        return _describe(destination, node)

    def copy(self, source: str, destination: str, *, recursive: bool) -> dict[str, Any]:
        """Copy an entry."""
        source, destination = _clean(source), _clean(destination)
        node = self._find(source)
        if node.children is not None and not recursive:
            raise AgentError("is_a_directory", "copying a directory needs `recursive`")
        target = self._target(source, destination, overwrite=True)
        copied = target[posixpath.basename(destination)] = _copy(node)
        self._tell("created", destination, is_dir=copied.children is not None)
        return _describe(destination, copied)

    def change(
        self, path: str, *, mode: int | None = None, owner: str | None = None, recursive: bool = False
    ) -> dict[str, Any]:
        """chmod and chown."""
        path = _clean(path)
        node = self._find(path)
        below = _walk(path, node, None) if recursive and node.children is not None else iter(())
        for each in (node, *(child for _, child in below)):
            each.mode = each.mode if mode is None else mode
            each.owner = each.owner if owner is None else owner
        self._tell("modified", path, is_dir=node.children is not None)
        return _describe(path, node)

    def remove(self, path: str, *, recursive: bool) -> int:
        """Remove an entry; returns how many went."""
        path = _clean(path)
        node = self._find(path)
        count = 1 if node.children is None else 1 + sum(1 for _ in _walk(path, node, None))
        if count > 1 and not recursive:
            raise AgentError("not_empty", "the directory is not empty")
        siblings, name = self._place(path)
        del siblings[name]
        self._tell("deleted", path, is_dir=node.children is not None)
        return count

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(len(node.data) for _, node in _walk("/", self._root, None))

    def listen(self, path: str, *, recursive: bool, listener: Listener) -> Callable[[], None]:
        """Tell `listener` of every change below a path; returns what ends it."""
        path = _clean(path)
        self._find(path)
        item = (path, recursive, listener)
        self._listeners.append(item)
        return lambda: self._listeners.remove(item)

    def _find(self, path: str) -> Node:
        node = self._root
        for name in [part for part in path.split("/") if part]:
            child = _children(node).get(name)
            if child is None:
                raise AgentError("not_found", f"{path} does not exist")
            node = child
        return node

    def _place(self, path: str) -> tuple[dict[str, Node], str]:
        parent, name = posixpath.split(path)
        if not name:
            raise AgentError("invalid_path", "the root directory cannot be replaced or removed")
        return _children(self._find(parent)), name

    def _target(self, source: str, destination: str, *, overwrite: bool) -> dict[str, Node]:
        if f"{destination}/".startswith(f"{source}/"):
            raise AgentError("invalid_path", "a directory cannot go into itself")
        siblings, name = self._place(destination)
        if name in siblings and not overwrite:
            raise AgentError("exists", f"{destination} exists")
        if name in siblings and siblings[name].children:
            raise AgentError("not_empty", f"{destination} is not empty")
        return siblings

    def _tell(self, change: Change, path: str, *, is_dir: bool, old_path: str | None = None) -> None:
        event = {"type": change, "path": path, "is_dir": is_dir}
        if old_path is not None:
            event["old_path"] = old_path
        for root, recursive, listener in list(self._listeners):
            parent = posixpath.dirname(path)
            if parent == root or (recursive and is_below(path, root)):
                listener(event)


def is_below(path: str, root: str) -> bool:
    """Whether a path is `root` or lies in it. There are no links here to lead elsewhere."""
    return f"{_clean(path)}/".startswith(f"{_clean(root).rstrip('/')}/")


def _clean(path: Any) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise AgentError("invalid_path", "a path has to be absolute and without NUL")
    return posixpath.normpath(path).replace("//", "/")


def _children(node: Node) -> dict[str, Node]:
    if node.children is None:
        raise AgentError("not_a_directory", "a part of the path is no directory")
    return node.children


def _walk(path: str, node: Node, depth: int | None) -> Iterator[tuple[str, Node]]:
    for name, child in sorted((node.children or {}).items()):
        child_path = posixpath.join(path, name)
        yield child_path, child
        if child.children is not None and depth != 1:
            yield from _walk(child_path, child, None if depth is None else depth - 1)


def _dump(node: Node) -> Any:
    children = None if node.children is None else {name: _dump(child) for name, child in node.children.items()}
    return [node.mode, node.data, children, node.owner, node.modified_at]


def _load(dumped: Any) -> Node:
    mode, data, children, owner, modified_at = dumped
    loaded = None if children is None else {name: _load(child) for name, child in children.items()}
    return Node(mode, data, loaded, owner, modified_at)


def _copy(node: Node) -> Node:
    children = None if node.children is None else {name: _copy(child) for name, child in node.children.items()}
    return replace(node, children=children, modified_at=time.time())


def _describe(path: str, node: Node) -> dict[str, Any]:
    is_dir = node.children is not None
    return {
        "name": posixpath.basename(path) or "/",
        "path": path,
        "type": "dir" if is_dir else "file",
        "size": len(node.data),
        "mode": node.mode,
        "is_dir": is_dir,
        "is_symlink": False,
        "modified_at": node.modified_at,
        "owner": node.owner,
    }
