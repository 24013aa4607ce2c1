"""Brings a database up to date. Run once by whoever starts the workers, before they open it."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from gateway.store.database import sqlite_engine


def migrate(url: str) -> None:
    """Create the database or apply the missing migrations; all or none of them. Blocks.

    Raises ValueError for a URL `open_database` would refuse.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise ValueError(f"unsupported database: {parsed.get_backend_name()} (use sqlite:///<path>)")
    path = Path(parsed.database)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = sqlite_engine(path)
    try:
        # One transaction around all steps; a second migrator waits at its BEGIN and then finds nothing to do.
        with engine.begin() as connection:
            command.upgrade(alembic_config(connection), "head")
    finally:
        engine.dispose()


def alembic_config(connection: sa.Connection) -> Config:
    """Alembic's configuration for work on an open connection."""
    config = Config()
    config.set_main_option("script_location", "gateway.store:migrations")
    config.attributes["connection"] = connection
    return config
