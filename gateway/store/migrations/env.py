"""Alembic's entry: applies the revisions on the connection that `gateway.store.migrate` hands over."""

from alembic import context

from gateway.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite's DDL is transactional once the driver does not commit behind our back (see sqlite_engine).
    transactional_ddl=True,
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
