"""The images of a host: saved units that machines wake from, snapshots name, and forks are made of.

An image belongs to whoever names it in a record: a hibernated machine, a snapshot, or both. It is deleted when the last
of them has gone (`release`), or at the next start (`sweep`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vmm.drivers.base import Driver, ImageFiles, Saved, Shape
from vmm.errors import MachineError
from vmm.host.crash import point
from vmm.host.journal import Record
from vmm.images.manifest import Manifest
from vmm.images.store import ImageStore
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


class Images:
    """store: where they lie. find: the image of a snapshot. is_needed: whether any record names an image."""

    def __init__(
        self, store: ImageStore, driver: Driver, find: Callable[[str], str], is_needed: Callable[[str], bool]
    ) -> None:
        self.find = find
        self._store = store
        self._driver = driver
        self._is_needed = is_needed
        self._deletions: set[asyncio.Task[None]] = set()

    def load(self) -> None:
        """Find the images of an earlier process. Blocks."""
        self._store.load()

    async def save(self, unit: str, image: str, record: Record) -> None:
        """Save a unit into a new image, complete and on the disk when this returns."""
        saved = await self.capture(unit, image)
        await self.publish(image, saved, record, lambda _: None)

    async def capture(self, unit: str, image: str) -> Saved:
        """Save a unit into a draft."""
        draft = await asyncio.to_thread(self._store.draft, image)
        try:
            return await self._driver.save(unit, draft)
        except BaseException:
            self._store.discard(image)
            raise

    async def publish(
        self,
        image: str,
        saved: Saved,
        record: Record,
        on_step: Callable[[SnapshotStep], None],
        *,
        is_durable: bool = True,
    ) -> None:
        """Make an image of a draft.

        record: of the machine when it was saved.  is_durable: whether to wait for the disk.
        """
        on_step(SnapshotStep.HASHING)
        point("image.drafted")
        shape, parent = Shape.of(record.spec), record.spec.snapshot
        manifest = Manifest(image, record.token, shape, saved.template_digest, saved.runtime, time.time(), parent)
        await asyncio.to_thread(self._store.publish, manifest, is_durable=is_durable)
        on_step(SnapshotStep.PUBLISHING)
        point("image.published")

    @asynccontextmanager
    async def open(self, image: str) -> AsyncIterator[ImageFiles]:
        """An image to restore from: verified, and kept meanwhile."""
        with contextlib.ExitStack() as closing:
            opening = asyncio.create_task(asyncio.to_thread(closing.enter_context, self._store.open(image)))
            try:
                files = await asyncio.shield(opening)
            except asyncio.CancelledError:
                # The thread goes on, and what it opens has to be closed.
                await asyncio.wait([opening])
                raise
            yield files

    def has(self, image: str | None) -> bool:
        """Whether an image is complete."""
        return image is not None and self._store.has(image)

    def is_open(self, image: str) -> bool:
        """Whether something is restored from it right now."""
        return self._store.is_open(image)

    def sizes(self, image: str) -> tuple[int, int]:
        """Bytes of its files, and bytes on the disk."""
        return self._store.get(image).size_bytes, self._store.stored_bytes(image)

    def release_later(self, image: str) -> None:
        """As `release`, behind the caller's back."""
        task = asyncio.create_task(self.release(image))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def release(self, image: str) -> None:
        """An owner has let go of it."""
        if self._is_needed(image):
            return
        try:
            await asyncio.to_thread(self._store.delete, image)
        except MachineError as error:
            logger.warning("image %s stays until the next start: %s (%s)", image, error, error.detail)

    def sweep(self) -> None:
        """Delete what nobody owns. For the start, once all records are known."""
        for manifest in self._store.list():
            if not self._is_needed(manifest.id):
                self._store.delete(manifest.id)
