"""The images of a host: saved units that machines wake from, snapshots name, and forks are made of.

An image belongs to whoever names it in a record: a hibernated machine, a snapshot, or both. It is deleted when the last
of them has gone (`release`), or at the next start (`sweep`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from vmm.drivers.base import Driver, ImageFiles, Saved, Shape
from vmm.errors import MachineError
from vmm.host.crash import point
from vmm.host.journal import Record
from vmm.types import SnapshotStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capture:
    """A machine that has been saved: its record then.

    saved: None when `image` was there already.  detail: hooks that failed.
    """

    record: Record
    image: str
    saved: Saved | None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is of and needs."""

    id: str
    token: str
    shape: Shape
    template_digest: str
    runtime: str
    size_bytes: int


class Images:
    """find: the image of a snapshot. is_needed: whether any record names an image."""

    def __init__(
        self, directory: Path, driver: Driver, find: Callable[[str], str], is_needed: Callable[[str], bool]
    ) -> None:
        self.find = find
        self._directory = directory
        self._driver = driver
        self._is_needed = is_needed
        self._open: list[str] = []
        self._deletions: set[asyncio.Task[None]] = set()

    async def save(self, unit: str, image: str, record: Record) -> None:
        """Save a unit into a new image, complete and verified when this returns."""
        saved = await self.capture(unit, image)
        await self.publish(image, saved, record, lambda _: None)

    async def capture(self, unit: str, image: str) -> Saved:
        """Save a unit into a draft."""
        draft = self._directory / f"{image}.draft"
        draft.mkdir(parents=True)
        try:
            return await self._driver.save(unit, draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    async def publish(self, image: str, saved: Saved, record: Record, on_step: Callable[[SnapshotStep], None]) -> None:
        """Make an image of a draft. record: of the machine when it was saved."""
        on_step(SnapshotStep.PUBLISHING)
        point("image.drafted")
        shape = Shape.of(record.spec)
        manifest = Manifest(image, record.token, shape, saved.template_digest, saved.runtime, saved.size_bytes)
        draft = self._directory / f"{image}.draft"
        (draft / "manifest.json").write_text(json.dumps(asdict(manifest)))
        draft.rename(self._directory / image)
        point("image.published")

    @asynccontextmanager
    async def open(self, image: str) -> AsyncIterator[ImageFiles]:
        """An image to restore from: verified, and kept meanwhile."""
        manifest = self.get(image)
        self._open.append(image)
        try:
            yield ImageFiles(
                manifest.id,
                self._directory / image,
                manifest.token,
                manifest.shape,
                manifest.template_digest,
                manifest.runtime,
            )
        finally:
            self._open.remove(image)

    def get(self, image: str) -> Manifest:
        """What is known of it."""
        try:
            return msgspec.json.decode((self._directory / image / "manifest.json").read_bytes(), type=Manifest)
        except FileNotFoundError as error:
            raise MachineError("snapshot_not_found", "the image is gone") from error

    def has(self, image: str | None) -> bool:
        """Whether an image is complete."""
        return image is not None and (self._directory / image).exists()

    def is_open(self, image: str) -> bool:
        """Whether something is restored from it right now."""
        return image in self._open

    def sizes(self, image: str) -> tuple[int, int]:
        """Bytes of its files, and bytes on the disk."""
        size = self.get(image).size_bytes
        return size, size

    def release_later(self, image: str) -> None:
        """As `release`, behind the caller's back."""
        task = asyncio.create_task(self.release(image))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def release(self, image: str) -> None:
        """An owner has let go of it."""
        if not self._is_needed(image):
            shutil.rmtree(self._directory / image, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what nobody owns. For the start, once all records are known."""
        for path in self._directory.glob("*"):
            if not self._is_needed(path.name):
                shutil.rmtree(path)
