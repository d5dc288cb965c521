"""Brings a database to the newest schema, once, whoever else tries at the same moment.

This is the only file that imports Alembic, and a database that is up to date never needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, func, select, text

from mpsearch.storage.engine import BEGIN
from mpsearch.storage.schema import SCHEMA, newer, schema_version

# Any number will do, so long as every version of mpsearch asks for the same one.
_SERVER_LOCK = 7_303_014


def migrate(engine: Engine, name: str) -> None:
    """Take the lock, look again, and upgrade if nobody else has.

    The whole upgrade is one transaction: a process that is killed on the way leaves the old schema.

    Args:
        engine: the database.
        name: what messages call it.

    Raises:
        StorageError: the schema is newer than this code (E605), or not ours (E603).
    """
    with engine.connect().execution_options(**{BEGIN: "BEGIN EXCLUSIVE"}) as connection, alone(connection):
        found = schema_version(connection, name)
        if found > SCHEMA:
            raise newer(name, found)
        if found < SCHEMA:
            upgrade(connection)
            if schema_version(connection, name) != SCHEMA:
                raise AssertionError("the migration scripts do not lead to the schema of this version")


@contextmanager
def alone(connection: Connection) -> Iterator[None]:
    """A transaction that no other migration runs beside."""
    if connection.dialect.name == "postgresql":
        with connection.begin():
            connection.execute(select(func.pg_advisory_xact_lock(_SERVER_LOCK)))
            # A large table takes longer than any statement of a worker may.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            yield
        return
    # A table that is made anew is dropped on the way, which would take the rows that refer to it along. The switch
    # does nothing inside a transaction.
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        with connection.begin():
            yield
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the scripts up to a revision inside the connection's transaction."""
    command.upgrade(_config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Run the scripts down to a revision, ``base`` for none, inside the connection's transaction."""
    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    config = Config()
    # The setting goes through a parser in which % starts a reference.
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
