"""Sandgate's compiled parts: the Cython modules, the Rust extension and the Rust programs that ship beside them.

Import the typed facades (`native.frames`, …), never a private module. Nothing here imports any other package of ours.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["BinaryMissing", "agent_path", "jailer_path", "plane_path"]

_BIN = Path(__file__).resolve().parent / "bin"


class BinaryMissing(FileNotFoundError):
    """A program that the build puts into `native/bin` is not there."""


def agent_path() -> Path:
    """The static `sandgate-agent`, PID 1 of every machine. Raises BinaryMissing when it has not been built."""
    return _binary("sandgate-agent")


def jailer_path() -> Path:
    """The `sandgate-jailer`, which becomes a sandbox's kernel. Raises BinaryMissing when it has not been built."""
    return _binary("sandgate-jailer")


def plane_path() -> Path:
    """The `sandgate-plane` proxy. Raises BinaryMissing when it has not been built."""
    return _binary("sandgate-plane")


def _binary(name: str) -> Path:
    path = _BIN / name
    if not path.is_file():
        raise BinaryMissing(f"{path} does not exist; build it with `make build`")
    return path
