"""Statements about the templates of workspaces. The host's own are not in SQL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.resources import BuildSpec, Template
from gateway.store.prepared import Prepared
from gateway.store.schema import sandboxes, templates

#: A sandbox that is being made still reads the image; one that runs does not need it any more.
_READING = "provisioning"

_COLUMNS = templates.columns.keys()
_NAME: sa.BindParameter[str] = sa.bindparam("name")
_BY_NAME = Prepared(
    sa.select(templates)
    .where(
        templates.c.workspace_id == sa.bindparam("workspace_id"),
        sa.or_(templates.c.slug == _NAME, templates.c.id == _NAME, templates.c.name == _NAME),
    )
    # A slug is unique, a name need not be: the newest wins.
    .order_by(sa.case((templates.c.slug == _NAME, 0), else_=1), templates.c.created_at.desc())
    .limit(1)
)


def insert(connection: sa.Connection, template: Template, workspace_id: str) -> None:
    """Add a row, without a build to start from."""
    connection.execute(
        sa.insert(templates),
        {
            "id": template.id,
            "workspace_id": workspace_id,
            "name": template.name,
            "slug": template.slug,
            "description": template.description,
            "metadata": dict(template.metadata),
            "spec": msgspec.to_builtins(template.spec),
            "state": template.state,
            "env": dict(template.env),
            "created_at": template.created_at,
            "updated_at": template.updated_at,
        },
    )


def get(connection: sa.Connection, workspace_id: str, name: str) -> Template | None:
    """A workspace's own, by id, slug or name."""
    row = _BY_NAME.first(connection, workspace_id=workspace_id, name=name)
    return _template(dict(zip(_COLUMNS, row, strict=True))) if row else None


def find(connection: sa.Connection, workspace_id: str) -> list[Template]:
    """All of a workspace, by slug."""
    rows = connection.execute(
        sa.select(templates).where(templates.c.workspace_id == workspace_id).order_by(templates.c.slug)
    )
    return [_template(row) for row in rows.mappings()]


def count(connection: sa.Connection, workspace_id: str) -> int:
    """How many a workspace has."""
    statement = sa.select(sa.func.count()).select_from(templates).where(templates.c.workspace_id == workspace_id)
    return connection.execute(statement).scalar_one()


def is_slug_taken(connection: sa.Connection, workspace_id: str, slug: str) -> bool:
    """Whether the workspace has a template of that slug."""
    statement = sa.select(templates.c.id).where(templates.c.workspace_id == workspace_id, templates.c.slug == slug)
    return connection.execute(statement).first() is not None


def is_image_in_use(connection: sa.Connection, image_id: str) -> bool:
    """Whether a sandbox is being made from a memory image right now."""
    statement = sa.select(sandboxes.c.id).where(sandboxes.c.image_id == image_id, sandboxes.c.state == _READING)
    return connection.execute(statement).first() is not None


def image_ids(connection: sa.Connection) -> set[str]:
    """The memory images that templates start from."""
    statement = sa.select(templates.c.build_id).where(templates.c.build_id.is_not(None))
    return set(connection.execute(statement).scalars())


def change(connection: sa.Connection, template_id: str, **values: Any) -> bool:
    """Set columns of one row; whether it is there."""
    statement = sa.update(templates).where(templates.c.id == template_id).values(**values)
    return connection.execute(statement).rowcount == 1


def set_spec(connection: sa.Connection, template_id: str, spec: BuildSpec, *, state: str, at: float) -> None:
    """Note what it is built from now on."""
    change(connection, template_id, spec=msgspec.to_builtins(spec), state=state, updated_at=at)


def delete(connection: sa.Connection, template_id: str) -> None:
    """Remove a row, with its builds and their logs."""
    connection.execute(sa.delete(templates).where(templates.c.id == template_id))


def _template(row: Mapping[Any, Any]) -> Template:
    return Template(
        id=row["id"],
        name=row["name"],
        slug=row["slug"],
        description=row["description"],
        aliases={},
        digest="",
        size_bytes=row["size_bytes"] or 0,
        packages=(),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        is_built_in=False,
        state=row["state"],
        base_template=row["base_template"] or "",
        # A build's image has the id of the build.
        image_id=row["build_id"],
        build_id=row["build_id"],
        cpu_count=row["cpu_count"],
        memory_mib=row["memory_mib"],
        disk_mib=row["disk_mib"],
        env=row["env"],
        metadata=row["metadata"],
        spec=msgspec.convert(row["spec"], BuildSpec),
    )
