"""Durable truth in SQL: SQLite embedded, written so that Postgres can take its place.

`schema` names the tables, `database` runs work against them, `migrations` brings an older file up to date, and one
module per resource holds its statements. Statements are plain functions over a SQLAlchemy `Connection`; the caller
decides by `Database.write`, `Database.read` or `Database.lookup` which transaction they share. Rules (who may, how
many, in which state) belong to `gateway.engine`.
"""

from gateway.store.database import Database, open_database
from gateway.store.migrate import migrate

__all__ = ["Database", "migrate", "open_database"]
