"""Makes the snapshots in SQL and the images on the host agree, for gateway/reconciler.py.

Snapshots first, then what is left on the host: an image is older than nothing it could belong to, because its row is
written before the host is asked for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import sqlalchemy as sa

from gateway.engine.engine import Engine
from gateway.resources import Snapshot, SnapshotState
from gateway.store import builds, snapshots, templates
from vmm.errors import VmmError
from vmm.types import SnapshotInfo
from vmm.types import SnapshotState as ImageState

_log = logging.getLogger(__name__)


class ImageReconciler:
    """young_s: age below which a pending snapshot or an image is left alone."""

    def __init__(self, engine: Engine, *, young_s: float) -> None:
        self._engine = engine
        self._context = engine.context
        self._young_s = young_s

    async def reconcile(self) -> None:
        """One pass. Raises VmmError when the host cannot be asked."""
        images = {image.id: image for image in await self._context.host.list_snapshots()}
        known = await self._context.database.read(
            lambda connection: snapshots.find_in_states(
                connection, [SnapshotState.PENDING, SnapshotState.READY, SnapshotState.DELETING]
            )
        )
        for snapshot in known:
            await self._settle(snapshot, images.get(snapshot.id))
        await self._delete_orphans(images)

    async def _settle(self, snapshot: Snapshot, image: SnapshotInfo | None) -> None:
        service = self._engine.snapshots
        if snapshot.state is SnapshotState.DELETING:
            await self._finish_deleting(snapshot)
        elif image is not None and snapshot.state is SnapshotState.PENDING:
            await service.note(image)
        elif self._is_young(snapshot.created_at):
            return
        elif snapshot.state is SnapshotState.PENDING and not service.is_taking(snapshot.id):
            await service.fail(snapshot, "snapshot_failed", "the server stopped while it was being taken")
        elif snapshot.state is SnapshotState.READY and (image is None or image.state is ImageState.ERROR):
            _log.error("the image of snapshot %s is gone", snapshot.id)
            await service.note_lost(snapshot)

    async def _finish_deleting(self, snapshot: Snapshot) -> None:
        try:
            await self._engine.snapshots.finish_deleting(snapshot)
        except VmmError as error:
            _log.warning("the image of snapshot %s cannot be deleted now: %s", snapshot.id, error)

    async def _delete_orphans(self, images: Mapping[str, SnapshotInfo]) -> None:
        # Asked for again: what was pending above may have a template of its own by now.
        owned = await self._context.database.read(_owned)
        for image in images.values():
            if image.id in owned or image.state is ImageState.PENDING or self._is_young(image.created_at):
                continue
            _log.warning("image %s belongs to no snapshot and no template, deleting it", image.id)
            try:
                await self._context.host.delete_snapshot(image.id)
            except VmmError as error:
                _log.warning("image %s cannot be deleted now: %s", image.id, error)

    def _is_young(self, created_at: float) -> bool:
        return self._context.clock() - created_at < self._young_s


def _owned(connection: sa.Connection) -> set[str]:
    """Ids of all images that belong to something."""
    under_way = {build.id for build in builds.find_open(connection)}
    return snapshots.ids(connection) | templates.image_ids(connection) | under_way
