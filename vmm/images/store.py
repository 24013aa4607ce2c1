"""The images below one directory: drafts that become images at once or not at all, verified before each first use.

    <id>.draft/                 being written; removed at the next start
    <id>/manifest.json          what it is (`vmm.images.manifest`); an image has one
    <id>/<file>                 its files as they are restored from, and
    <id>/index                  which chunks they are made of, of a packed one, whose files may then be missing
    <id>.gone/                  being removed; so is it at the next start
    chunks/                     the chunks that packed images share (`native/crates/restore`)

An image never changes. Its files are hashed when it is published, and again before they are first used in the life of a
process, or after something touched them. All methods block and may be called from several threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from native import images as native
from vmm.drivers.base import ImageFiles
from vmm.errors import MachineError
from vmm.images import manifest as manifests
from vmm.images.manifest import ImageFile, Manifest

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_DRAFT, _GONE = ".draft", ".gone"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class _Image:
    manifest: Manifest
    place: Path
    pins: int = 0
    #: What its files looked like when they were last known to be right.
    verified: list[tuple[int, ...]] | None = None
    #: Held while its files are checked, unpacked or packed.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def paths(self) -> list[Path]:
        return [self.place / file.name for file in self.manifest.files]

    @property
    def is_packed(self) -> bool:
        return (self.place / native.INDEX).exists()


class ImageStore:
    """See the module. disk_mib_max: what all images together may take."""

    def __init__(self, directory: Path, *, disk_mib_max: int) -> None:
        self._directory = directory
        self._chunks = directory / "chunks"
        self._bytes_max = disk_mib_max * _MIB
        self._images: dict[str, _Image] = {}
        self._chunk_bytes = 0
        #: Guards the dictionary and the pins; held for moments only.
        self._lock = threading.Lock()
        #: Packing and collecting exclude each other.
        self._packing = threading.Lock()

    def load(self) -> None:
        """Find the images that are there, and remove what an interrupted process has left. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in self._directory.iterdir():
            if place == self._chunks:
                continue
            if place.suffix in (_DRAFT, _GONE):
                shutil.rmtree(place, ignore_errors=True)
                continue
            try:
                self._images[place.name] = _Image(manifests.decode((place / manifests.NAME).read_bytes()), place)
            except (OSError, MachineError) as error:
                logger.warning("the image %s cannot be used: %s", place.name, error)
        self._chunk_bytes = sum(path.stat().st_size for path in self._chunks.rglob("*") if path.is_file())
        self._collect()

    def draft(self, image_id: str) -> Path:
        """An empty directory to save into. Raises MachineError(`no_space`)."""
        if self.used_bytes() >= self._bytes_max:
            raise MachineError("no_space", "the host's images take all the disk they may")
        place = self._draft(image_id)
        with _translated():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700)
        return place

    def discard(self, image_id: str) -> None:
        """Remove a draft, if there is one."""
        shutil.rmtree(self._draft(image_id), ignore_errors=True)

    def publish(self, manifest: Manifest, *, is_lasting: bool = True) -> Manifest:
        """Make an image of the draft with the manifest's id; returns the manifest with its files.

        is_lasting: whether it is to outlive this process. One that is not is neither hashed nor synced, which would be
        most of the time this takes; to another process it is a damaged one. Raises MachineError: `no_space`,
        `snapshot_failed`; the draft is gone then.
        """
        place = self._draft(manifest.id)
        try:
            with _translated():
                paths = sorted(path for path in place.iterdir() if path.name != manifests.NAME)
                files = _hash_and_sync(paths) if is_lasting else _unhashed(paths)
                return self._commit(replace(manifest, files=files), is_lasting)
        except BaseException:
            self.discard(manifest.id)
            raise

    def _commit(self, manifest: Manifest, is_lasting: bool) -> Manifest:
        if self.used_bytes() + manifest.size_bytes > self._bytes_max:
            raise MachineError("no_space", "the image is larger than what the host's images may still take")
        draft, place = self._draft(manifest.id), self._directory / manifest.id
        (draft / manifests.NAME).write_bytes(manifest.encode())
        if is_lasting:
            _sync([draft / manifests.NAME, draft])
        draft.rename(place)
        if is_lasting:
            _sync([self._directory])
        image = _Image(manifest, place)
        image.verified = _identities(image)
        with self._lock:
            self._images[manifest.id] = image
        return manifest

    def get(self, image_id: str) -> Manifest:
        """An image's manifest. Raises MachineError(`snapshot_not_found`)."""
        return self._find(image_id).manifest

    def has(self, image_id: str) -> bool:
        """Whether there is such an image."""
        return image_id in self._images

    def list(self) -> list[Manifest]:
        """All images."""
        with self._lock:
            return [image.manifest for image in self._images.values()]

    def is_open(self, image_id: str) -> bool:
        """Whether something reads it right now."""
        image = self._images.get(image_id)
        return image is not None and image.pins > 0

    def stored_bytes(self, image_id: str) -> int:
        """What an image takes on the disk, but for chunks that it may share with others."""
        return _size(self._find(image_id))

    def used_bytes(self) -> int:
        """What all images take on the disk."""
        with self._lock:
            images = list(self._images.values())
        return self._chunk_bytes + sum(map(_size, images))

    @contextmanager
    def open(self, image_id: str) -> Iterator[ImageFiles]:
        """An image to restore from: verified, on its way into memory, and not removed meanwhile.

        Raises MachineError: `snapshot_not_found`, `snapshot_corrupt`, `no_space`.
        """
        with self._pinned(image_id) as image:
            with image.lock, _translated():
                if not all(path.exists() for path in image.paths):
                    native.unpack(image.place, self._chunks)
                    image.verified = None
                if image.verified != _identities(image):
                    _verify(image)
                for path in image.paths:
                    _prefetch(path)
            manifest = image.manifest
            yield ImageFiles(
                manifest.id,
                image.place,
                manifest.token,
                manifest.shape,
                manifest.template_digest,
                manifest.runtime,
                manifest.is_quiet,
                manifest.size_bytes,
            )

    def delete(self, image_id: str) -> bool:
        """Remove an image; whether it was there. Raises MachineError(`in_use`) while it is open."""
        with self._lock:
            image = self._images.get(image_id)
            if image is None:
                return False
            if image.pins:
                raise MachineError("in_use", "the snapshot is being restored")
            del self._images[image_id]
        was_packed, gone = image.is_packed, self._directory / f"{image_id}{_GONE}"
        with _translated():
            image.place.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            if was_packed:
                self._collect()
        return True

    def pack(self, image_id: str) -> bool:
        """Move an image's files into compressed chunks, for the time that nobody needs it; `open` brings them back.

        False if it is open. Raises MachineError: `snapshot_not_found`, `no_space`.
        """
        image = self._find(image_id)
        if self.is_open(image_id):
            return False
        with image.lock, self._packing, _translated():
            if not image.is_packed:
                self._chunk_bytes += native.pack(
                    image.place, [file.name for file in image.manifest.files], self._chunks
                )
                _sync_all(self._directory)
            with self._lock:
                if image.pins:
                    return False
                for path in image.paths:
                    path.unlink(missing_ok=True)
        return True

    def export(self, image_id: str, target: Path) -> None:
        """Write an image as one stream into an existing file or pipe. Raises MachineError."""
        with self.open(image_id) as files, _translated():
            manifest = self.get(image_id)
            native.export_to(target, manifest.encode(), files.directory, [file.name for file in manifest.files])

    def import_(self, image_id: str, source: Path) -> Manifest:
        """Make an image of such a stream, under an id of our own. Raises MachineError, then nothing is left of it."""
        draft = self.draft(image_id)
        try:
            with _translated():
                text = native.import_from(source, draft, self._bytes_max - self.used_bytes())
                claimed = manifests.decode(text)
                published = self.publish(replace(claimed, id=image_id, files=(), is_quiet=False))
        except BaseException:
            self.discard(image_id)
            raise
        if sorted(published.files, key=_name) != sorted(claimed.files, key=_name):
            self.delete(image_id)
            raise MachineError("snapshot_corrupt", "the snapshot's files are not those it was made with")
        return published

    @contextmanager
    def _pinned(self, image_id: str) -> Iterator[_Image]:
        with self._lock:
            image = self._find(image_id)
            image.pins += 1
        try:
            yield image
        finally:
            with self._lock:
                image.pins -= 1

    def _find(self, image_id: str) -> _Image:
        image = self._images.get(image_id)
        if image is None:
            raise MachineError("snapshot_not_found", "there is no such snapshot")
        return image

    def _draft(self, image_id: str) -> Path:
        return self._directory / f"{image_id}{_DRAFT}"

    def _collect(self) -> None:
        """Remove chunks that no image needs any more; without a sound index of every packed image, none."""
        with self._packing:
            with self._lock:
                indexes = [image.place / native.INDEX for image in self._images.values() if image.is_packed]
            try:
                self._chunk_bytes -= native.collect(indexes, self._chunks)
            except (OSError, native.ImageCorrupt) as error:
                logger.warning("chunks that nobody needs stay: %s", error)


def _hash_and_sync(paths: list[Path]) -> tuple[ImageFile, ...]:
    with ThreadPoolExecutor(1) as syncing:
        synced = syncing.submit(_sync, paths)
        files = tuple(ImageFile(path.name, *native.hash_file(path)) for path in paths)
        synced.result()
    return files


def _unhashed(paths: list[Path]) -> tuple[ImageFile, ...]:
    """Files under a hash that no file has."""
    return tuple(ImageFile(path.name, path.stat().st_size, "0" * 64) for path in paths)


def _verify(image: _Image) -> None:
    before = _identities(image)
    for file, path in zip(image.manifest.files, image.paths, strict=True):
        if native.hash_file(path) != (file.size, file.hash):
            raise MachineError("snapshot_corrupt", "the snapshot is damaged", detail=f"{file.name} has another hash")
    image.verified = before


def _identities(image: _Image) -> list[tuple[int, ...]]:
    """What changes when files do."""
    found = [path.stat() for path in image.paths]
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in found]


def _size(image: _Image) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_blocks * 512 for path in image.place.iterdir())
    return 0


def _name(file: ImageFile) -> str:
    return file.name


def _prefetch(path: Path) -> None:
    """Have the kernel read a file ahead; nothing is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _sync(paths: list[Path]) -> None:
    for path in paths:
        _with_descriptor(path, os.fsync)


def _sync_all(directory: Path) -> None:
    """Sync a file system: one call where many chunks have been written."""
    if _with_descriptor(directory, _libc.syncfs):
        raise OSError(ctypes.get_errno(), "syncfs failed")


def _with_descriptor(path: Path, call: Callable[[int], int | None]) -> int | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return call(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except native.ImageCorrupt as error:
        raise MachineError("snapshot_corrupt", "the snapshot is damaged", detail=str(error)) from error
    except native.ImageTooLarge as error:
        raise MachineError("no_space", "the snapshot is larger than what the host's images may still take") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError("no_space", "the host's disk is full", detail=str(error)) from error
        raise MachineError("snapshot_failed", "the snapshot's files cannot be used", detail=str(error)) from error
