"""What an image says of itself: the file `manifest.json` beside its files, and the head of an exported one.

It may come from outside, so it is decoded strictly and believed only as far as the files' hashes bear it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from vmm.drivers.base import Shape
from vmm.errors import MachineError

#: Name of the manifest in an image's directory.
NAME = "manifest.json"
VERSION = 1

_FILE_NAME = re.compile(r"[a-z0-9_-][a-z0-9_.-]{0,63}")
_HEX_64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of an image. hash: as `native.images.hash_file` gives it."""

    name: str
    size: int
    hash: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is of, needs and holds.

    token: opens the agent in it.  template_digest, runtime: what it can be restored over and by.
    created_at: Unix seconds.  parent: the image that its machine came from.
    is_quiet: as `vmm.drivers.base.Saved` says; of one from outside, nothing is believed.
    """

    id: str
    token: str
    shape: Shape
    template_digest: str
    runtime: str
    created_at: float
    parent: str | None = None
    files: tuple[ImageFile, ...] = ()
    version: int = VERSION
    is_quiet: bool = False

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)


def decode(text: bytes) -> Manifest:
    """Read a manifest, whoever wrote it. Raises MachineError: `snapshot_corrupt`, `snapshot_incompatible`."""
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MachineError("snapshot_corrupt", "the snapshot's manifest cannot be read", detail=str(error)) from error
    if manifest.version != VERSION:
        detail = f"version {manifest.version}"
        raise MachineError("snapshot_incompatible", "the snapshot was made by another version", detail=detail)
    names = [file.name for file in manifest.files]
    sound = len(set(names)) == len(names) and all(_is_sound(file) for file in manifest.files)
    if not sound or not names or not _HEX_64.fullmatch(manifest.template_digest):
        raise MachineError("snapshot_corrupt", "the snapshot's manifest makes no sense")
    return manifest


def _is_sound(file: ImageFile) -> bool:
    return bool(_FILE_NAME.fullmatch(file.name) and _HEX_64.fullmatch(file.hash)) and file.size >= 0
