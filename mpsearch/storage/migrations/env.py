"""Alembic's way in: `mpsearch.storage.migrate` hands over an open connection that already holds the lock."""

from __future__ import annotations

from alembic import context

from mpsearch.storage.schema import VERSION_TABLE


def run() -> None:
    """Run the scripts that Alembic has picked."""
    context.configure(
        connection=context.config.attributes["connection"],
        version_table=VERSION_TABLE,
        # SQLite cannot alter most things in place; a batch copies the table.
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


# Alembic loads this file under this name. A tool that only imports every module must not start a migration.
if __name__ == "env_py":
    run()
