"""Statements about workspaces."""

from __future__ import annotations

import time
import uuid

import sqlalchemy as sa

from gateway.store.schema import workspaces


def ensure(connection: sa.Connection, name: str) -> str:
    """The id of the workspace with that name, made if there is none."""
    found = connection.execute(sa.select(workspaces.c.id).where(workspaces.c.name == name)).scalar()
    if found is not None:
        return str(found)
    workspace_id = str(uuid.uuid4())
    connection.execute(sa.insert(workspaces), {"id": workspace_id, "name": name, "created_at": time.time()})
    return workspace_id
