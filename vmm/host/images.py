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
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO, ParamSpec, TypeVar

from vmm.drivers.base import Driver, ImageFiles, Saved, Shape
from vmm.errors import MachineError
from vmm.host import pipes
from vmm.host.backing import Backing
from vmm.host.crash import point
from vmm.host.journal import Record
from vmm.images.manifest import Manifest
from vmm.images.store import ImageStore
from vmm.types import SnapshotStep

_MIB = 1024 * 1024

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


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
    """store: where they lie.  is_needed: whether any record names an image."""

    def __init__(self, store: ImageStore, driver: Driver, backing: Backing, is_needed: Callable[[str], bool]) -> None:
        self._store = store
        self._driver = driver
        self._backing = backing
        self._is_needed = is_needed
        self._deletions: set[asyncio.Task[None]] = set()
        #: When an image was opened last, by the monotonic clock.
        self._used_at: dict[str, float] = {}

    def load(self) -> None:
        """Find the images of an earlier process. Blocks."""
        self._store.load()

    async def save(self, unit: str, image: str, record: Record) -> None:
        """Save a unit into a new image, complete and on the disk when this returns. Raises MachineError."""
        saved = await self.capture(unit, image)
        await self.publish(image, saved, record, lambda _: None)

    async def capture(self, unit: str, image: str) -> Saved:
        """Save a unit into a draft. Raises MachineError; then nothing is left of it."""
        try:
            draft = await _in_thread(self._store.draft, image)
            stats = await self._driver.stats(unit)
            # A little more than is written: the heap of the sandbox's kernel is not.
            self._backing.release((stats.memory_bytes - stats.cached_bytes) / _MIB)
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
        is_lasting: bool = True,
    ) -> None:
        """Make an image of a draft, or leave nothing of it. Raises MachineError.

        record: of the machine when it was saved.  is_lasting: whether it may outlive this process.
        """
        on_step(SnapshotStep.HASHING)
        point("image.drafted")
        shape, parent = Shape.of(record.spec), record.snapshot
        manifest = Manifest(
            image,
            record.token,
            shape,
            saved.template_digest,
            saved.runtime,
            time.time(),
            parent,
            is_quiet=saved.is_quiet,
        )
        await _in_thread(self._store.publish, manifest, is_lasting=is_lasting)
        on_step(SnapshotStep.PUBLISHING)
        point("image.published")

    @asynccontextmanager
    async def open(self, image: str) -> AsyncIterator[ImageFiles]:
        """An image to restore from: verified, and kept meanwhile. Raises MachineError."""
        self._used_at[image] = time.monotonic()
        with contextlib.ExitStack() as closing:
            yield await _in_thread(closing.enter_context, self._store.open(image))

    def exported(self, image: str) -> AbstractAsyncContextManager[BinaryIO]:
        """An image as one file, to be read. Raises MachineError, at its end too."""
        return pipes.reading(lambda target: self._store.export(image, target))

    def imported(self, image: str) -> AbstractAsyncContextManager[BinaryIO]:
        """Where to write a file that becomes an image. Raises MachineError, at its end; then nothing is left of it."""
        return pipes.writing(lambda source: self._store.import_(image, source))

    def manifest(self, image: str) -> Manifest:
        """What an image says of itself. Raises MachineError(`snapshot_not_found`)."""
        return self._store.get(image)

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
        task = asyncio.create_task(self.release(image), name=f"release {image}")
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def release(self, image: str) -> None:
        """An owner has let go of it."""
        if self._is_needed(image):
            return
        self._used_at.pop(image, None)
        try:
            await asyncio.to_thread(self._store.delete, image)
        except MachineError as error:
            logger.warning("image %s stays until the next start: %s (%s)", image, error, error.detail)

    async def settle(self) -> None:
        """Until all that was let go of is gone."""
        while self._deletions:
            await asyncio.wait(list(self._deletions))

    async def pack(self, unused_s: float) -> None:
        """Compress what nobody has opened for so long, one after the other."""
        now = time.monotonic()
        for manifest in self._store.list():
            if now - self._used_at.setdefault(manifest.id, now) >= unused_s and self._is_needed(manifest.id):
                try:
                    await _in_thread(self._store.pack, manifest.id)
                except MachineError as error:
                    logger.warning("image %s could not be packed: %s (%s)", manifest.id, error, error.detail)

    def sweep(self) -> None:
        """Delete what nobody owns. For the start, once all records are known."""
        for manifest in self._store.list():
            if not self._is_needed(manifest.id):
                self._store.delete(manifest.id)


async def _in_thread(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Do something that cannot be stopped half way: who is cancelled meanwhile still waits for its end."""
    task = asyncio.create_task(asyncio.to_thread(work, *arguments, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
