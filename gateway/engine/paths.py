"""Paths callers give for files in a sandbox, made absolute and plain.

What lies behind a link only the agent can judge; it is given the same roots and does.
"""

from __future__ import annotations

import posixpath

from gateway.engine.execution import WORKSPACE
from gateway.errors import GatewayError

#: Linux: a path has at most 4096 bytes with its NUL, a name in it at most 255.
_PATH_BYTES_MAX = 4095
_NAME_BYTES_MAX = 255

#: The files API changes nothing outside these; a process in the sandbox may, as far as its user may.
WRITE_ROOTS = (WORKSPACE, "/home", "/root", "/tmp", "/opt", "/srv", "/var/tmp")  # noqa: S108 - paths in the sandbox
#: Kernel interfaces: reading some of them waits for ever or has effects.
_UNREADABLE = ("/proc", "/sys", "/dev")


def readable(path: str) -> str:
    """The absolute path to read from. Raises path_invalid, path_forbidden."""
    plain = _plain(path)
    if _is_below(plain, _UNREADABLE):
        raise GatewayError("path_forbidden", f"{plain} is not a place for files.")
    return plain


def writable(path: str) -> str:
    """The absolute path to change. Raises path_invalid, path_forbidden."""
    plain = _plain(path)
    if not _is_below(plain, WRITE_ROOTS):
        raise GatewayError("path_forbidden", f"Files may be changed below {', '.join(WRITE_ROOTS)} only.")
    return plain


def _plain(path: str) -> str:
    if not path or "\0" in path:
        raise GatewayError("path_invalid", "A path must not be empty and must not have NUL bytes.")
    joined = posixpath.normpath(posixpath.join(WORKSPACE, path))
    # POSIX leaves two leading slashes to the system; Linux takes them for one.
    plain = "/" + joined.lstrip("/")
    try:
        encoded = plain.encode()
    except UnicodeEncodeError:
        raise GatewayError("path_invalid", "A path must be valid Unicode.") from None
    if len(encoded) > _PATH_BYTES_MAX or any(len(name) > _NAME_BYTES_MAX for name in encoded.split(b"/")):
        raise GatewayError("path_invalid", f"A path has at most {_PATH_BYTES_MAX} bytes, a name {_NAME_BYTES_MAX}.")
    return plain


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)
