"""The tables. A change here needs a migration; a test compares the two.

Times are Unix seconds. `version` columns are microseconds since the epoch and only grow: they order what is pushed to
the plane. `events.seq` is given in the order of commits, so it serves as a cursor.
"""

from __future__ import annotations

import sqlalchemy as sa

from gateway.store.types import Labels

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_ID = sa.String(36)
_HASH = sa.String(64)

#: States in which a sandbox holds a name, a slug and a place in its workspace's limit.
LIVING = ("provisioning", "running", "paused")
#: The same as a condition, spelt as in the partial indexes below: SQLite uses those for nothing else.
IS_LIVING = sa.text("state IN ('provisioning', 'running', 'paused')")

workspaces = sa.Table(
    "workspaces",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", sa.String(120), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("workspace_id", _ID, sa.ForeignKey("workspaces.id"), nullable=False),
    sa.Column("name", sa.String(80), nullable=False),
    sa.Column("hash", _HASH, nullable=False, unique=True),
    sa.Column("prefix", sa.String(16), nullable=False),
    sa.Column("scopes", Labels, nullable=False),
    sa.Column("is_test", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("last_used_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
    sa.Column("external_user_id", sa.String(255)),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Index("ix_api_keys_workspace_id_created_at", "workspace_id", "created_at"),
)

sandboxes = sa.Table(
    "sandboxes",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("workspace_id", _ID, sa.ForeignKey("workspaces.id"), nullable=False),
    sa.Column("owner_key_id", _ID),
    sa.Column("name", sa.String(64)),
    sa.Column("slug", sa.String(63), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("template", sa.String(128), nullable=False),
    # The host's template below it, and the memory image it starts from, if any.
    sa.Column("base_template", sa.String(128), nullable=False),
    sa.Column("image_id", _ID),
    sa.Column("snapshot_id", _ID),
    sa.Column("parent_id", _ID),
    # Of the newest restore in place: what asked for it.
    sa.Column("restore_id", _ID),
    sa.Column("cpu_count", sa.Double, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("disk_mib", sa.Integer, nullable=False),
    sa.Column("env", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("tags", Labels, nullable=False),
    sa.Column("project_id", sa.String(255)),
    sa.Column("external_workspace_id", sa.String(255)),
    sa.Column("external_user_id", sa.String(255)),
    sa.Column("external_project_id", sa.String(255)),
    sa.Column("region", sa.String(64), nullable=False),
    sa.Column("address", sa.String(64)),
    sa.Column("timeout_s", sa.Double),
    sa.Column("idle_timeout_s", sa.Double),
    sa.Column("always_on", sa.Boolean, nullable=False),
    sa.Column("idle_action", sa.String(8), nullable=False),
    sa.Column("auto_resume", sa.Boolean, nullable=False),
    sa.Column("hibernate_after_s", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("paused_at", sa.Double),
    sa.Column("pause_kind", sa.String(16)),
    # Of the pauses that have ended; `pauses` has each.
    sa.Column("paused_s", sa.Double, nullable=False),
    sa.Column("destroyed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("stop_cause", sa.String(32)),
    sa.Column("stop_detail", sa.Text),
    sa.Column("boot_ms", sa.Double),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Index("ix_sandboxes_workspace_id_created_at", "workspace_id", "created_at"),
    sa.Index("ix_sandboxes_state_expires_at", "state", "expires_at"),
    sa.Index(
        "uq_sandboxes_living_name",
        "workspace_id",
        "name",
        unique=True,
        sqlite_where=IS_LIVING,
        postgresql_where=IS_LIVING,
    ),
    sa.Index("uq_sandboxes_living_slug", "slug", unique=True, sqlite_where=IS_LIVING, postgresql_where=IS_LIVING),
)

pauses = sa.Table(
    "pauses",
    metadata,
    sa.Column("sandbox_id", _ID, sa.ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("began_at", sa.Double, primary_key=True),
    sa.Column("ended_at", sa.Double),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("workspace_id", _ID, sa.ForeignKey("workspaces.id"), nullable=False),
    # No foreign keys: a snapshot outlives its sandbox and the snapshot that one came from.
    sa.Column("sandbox_id", _ID, nullable=False),
    sa.Column("parent_id", _ID),
    sa.Column("label", sa.String(500)),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("step", sa.String(16)),
    sa.Column("progress", sa.Double, nullable=False),
    sa.Column("template", sa.String(128), nullable=False),
    sa.Column("base_template", sa.String(128), nullable=False),
    sa.Column("cpu_count", sa.Double, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("disk_mib", sa.Integer, nullable=False),
    sa.Column("env", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("stored_bytes", sa.BigInteger),
    sa.Column("pause_ms", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("ready_at", sa.Double),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_detail", sa.Text),
    sa.Index("ix_snapshots_workspace_id_created_at", "workspace_id", "created_at"),
    sa.Index("ix_snapshots_sandbox_id_created_at", "sandbox_id", "created_at"),
    sa.Index("ix_snapshots_state", "state"),
)

templates = sa.Table(
    "templates",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("workspace_id", _ID, sa.ForeignKey("workspaces.id"), nullable=False),
    sa.Column("name", sa.String(120), nullable=False),
    sa.Column("slug", sa.String(80), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # Of the newest build that succeeded: what sandboxes start from.
    sa.Column("build_id", _ID),
    sa.Column("base_template", sa.String(128)),
    sa.Column("cpu_count", sa.Double),
    sa.Column("memory_mib", sa.Integer),
    sa.Column("disk_mib", sa.Integer),
    sa.Column("env", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.UniqueConstraint("workspace_id", "slug"),
)

builds = sa.Table(
    "builds",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("template_id", _ID, sa.ForeignKey("templates.id", ondelete="CASCADE"), nullable=False),
    sa.Column("workspace_id", _ID, nullable=False),
    sa.Column("machine_id", _ID, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("step_name", sa.String(200)),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_detail", sa.Text),
    sa.Column("log_bytes", sa.BigInteger, nullable=False),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    # Who builds says so now and then; one that has fallen silent has died.
    sa.Column("alive_at", sa.Double, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
    sa.Index("ix_builds_template_id_created_at", "template_id", "created_at"),
    sa.Index("ix_builds_state", "state"),
)

build_lines = sa.Table(
    "build_lines",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("build_id", _ID, sa.ForeignKey("builds.id", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("stream", sa.String(8), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index("ix_build_lines_build_id_seq", "build_id", "seq"),
    sqlite_autoincrement=True,
)

previews = sa.Table(
    "previews",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("sandbox_id", _ID, sa.ForeignKey("sandboxes.id", ondelete="CASCADE"), nullable=False),
    sa.Column("port", sa.Integer, nullable=False),
    sa.Column("visibility", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("policy", sa.JSON(none_as_null=True)),
    sa.UniqueConstraint("sandbox_id", "port"),
)

shares = sa.Table(
    "shares",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("sandbox_id", _ID, sa.ForeignKey("sandboxes.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("preview_id", _ID, sa.ForeignKey("previews.id", ondelete="CASCADE"), index=True),
    sa.Column("port", sa.Integer),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("scope", sa.String(32), nullable=False),
    sa.Column("hash", _HASH, nullable=False, unique=True),
    sa.Column("prefix", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("workspace_id", _ID, nullable=False),
    sa.Column("resource_type", sa.String(32), nullable=False),
    sa.Column("resource_id", _ID, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Index("ix_events_workspace_id_seq", "workspace_id", "seq"),
    sa.Index("ix_events_resource_id_seq", "resource_id", "seq"),
    sa.Index("ix_events_at", "at"),
    # Without it SQLite reuses the numbers of pruned rows, and a cursor would skip what comes next.
    sqlite_autoincrement=True,
)

tickets = sa.Table(
    "tickets",
    metadata,
    sa.Column("hash", _HASH, primary_key=True),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("resource_id", _ID),
    sa.Column("workspace_id", _ID, nullable=False),
    sa.Column("key_id", _ID),
    sa.Column("scopes", Labels, nullable=False),
    sa.Column("is_test", sa.Boolean, nullable=False),
    sa.Column("external_user_id", sa.String(255)),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("holder", _ID, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
