"""Files of saved machines: hash them, pack them into chunks that images share, send them as one stream.

Every function blocks, without the interpreter lock and on all processors where that helps: call it in a thread. All
raise OSError for what the host refuses. What an image is, and who may remove one, is `vmm.images`' business; the
formats are described in `native/crates/restore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from native import _core
from native._core import ImageCorrupt, ImageTooLarge

__all__ = [
    "INDEX",
    "ImageCorrupt",
    "ImageTooLarge",
    "collect",
    "export_to",
    "hash_file",
    "import_from",
    "pack",
    "unpack",
]

#: The file in an image's directory that says which chunks a packed image is made of.
INDEX = "index"


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and hash of a file: BLAKE3 of its segments' BLAKE3 hashes, in hex."""
    return _core.image_hash(path)


def pack(image: Path, names: Sequence[str], chunks: Path) -> int:
    """Store the named files of an image as chunks, and an index beside them; returns the bytes added.

    The files stay. `pack` and `collect` must not run at once in one directory of chunks.
    """
    return _core.image_pack(image, names, chunks)


def unpack(image: Path, chunks: Path) -> None:
    """Write an image's files again. Raises ImageCorrupt when a chunk is missing or is not what it was."""
    _core.image_unpack(image, chunks)


def collect(indexes: Sequence[Path], chunks: Path) -> int:
    """Remove chunks that none of these indexes names; returns the bytes freed. Raises ImageCorrupt for a bad index."""
    return _core.image_collect(indexes, chunks)


def export_to(target: Path, manifest: bytes, image: Path, names: Sequence[str]) -> None:
    """Write a manifest and the named files as one stream into an existing file or pipe."""
    _core.image_export(target, manifest, image, names)


def import_from(source: Path, image: Path, bytes_max: int) -> bytes:
    """Read such a stream into an empty directory; returns its manifest, which nobody has looked at.

    Raises ImageCorrupt, and ImageTooLarge beyond `bytes_max` bytes of files. What was written stays for the caller.
    """
    return _core.image_import(source, image, bytes_max)
