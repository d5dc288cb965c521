"""The tables, and the number that names their shape."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
)

from mpsearch.errors import StorageError

#: How a cell came to be; only ``ok`` cells hold a value.
CELL_STATUSES = ("ok", "non_finite", "not_offered", "not_observed", "failed")
#: Where a study stands; ``gaps`` is done but for cells that could not be measured.
STUDY_STATES = ("new", "running", "complete", "gaps", "failed", "paused")
#: The newest schema that this code reads and writes: the number of the last file in ``migrations/versions``.
SCHEMA = 1
#: A name of our own: other programs that use Alembic keep their version in ``alembic_version``.
VERSION_TABLE = "mpsearch_schema"

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)
# SQLite numbers rows by itself only in a column of the type INTEGER.
_Number = BigInteger().with_variant(Integer(), "sqlite")

# JSON is kept as text: equality of two values is equality of their canonical text, in every database.
value_table = Table(
    "value",
    metadata,
    Column("kind", String(40), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("body", Text, nullable=False),
    Column("volatile", Text),
    Column("created", String(32), nullable=False),
)

# Without row numbers SQLite keeps the rows themselves in the order of the key, so a scope is read in one sweep.
cell_table = Table(
    "cell",
    metadata,
    Column("scope", String(200), primary_key=True),
    Column("layer", String(500), primary_key=True),
    Column("format", String(200), primary_key=True),
    Column("batch", BigInteger, primary_key=True),
    Column("status", String(20), nullable=False),
    Column("value", Double),
    Column("spread", Double),
    Column("samples", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("seconds", Double, nullable=False),
    CheckConstraint(f"status IN ({', '.join(map(repr, CELL_STATUSES))})", name="status"),
    CheckConstraint("(status = 'ok') = (value IS NOT NULL)", name="value"),
    sqlite_with_rowid=False,
)

study_table = Table(
    "study",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("spec", Text, nullable=False),
    Column("key", String(64), nullable=False),
    Column("state", String(20), nullable=False),
    Column("created", String(32), nullable=False),
    Column("updated", String(32), nullable=False),
    UniqueConstraint("name"),
    CheckConstraint(f"state IN ({', '.join(map(repr, STUDY_STATES))})", name="state"),
)

# The label is part of the key: two budgets may have the same plan for an answer.
link_table = Table(
    "link",
    metadata,
    Column("study", _Number, ForeignKey("study.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", String(40), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("label", String(500), primary_key=True),
    Column("position", BigInteger, nullable=False),
)

# The digest keeps a work that is retried for ever from filling the table with one and the same value.
conflict_table = Table(
    "conflict",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("key", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("stored", Text, nullable=False),
    Column("offered", Text, nullable=False),
    Column("created", String(32), nullable=False),
    UniqueConstraint("kind", "key", "digest"),
)

_version_table = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))


def schema_version(connection: Connection, name: str) -> int:
    """Return the schema number of a database, 0 for an empty one.

    Args:
        connection: an open connection.
        name: what messages call the database.

    Raises:
        StorageError: a database of another program (E603).
    """
    names = inspect(connection).get_table_names()
    if VERSION_TABLE in names:
        found = connection.execute(select(_version_table.c.version_num)).scalars().all()
        if not found:
            return 0
        number = str(found[0])
        if len(found) == 1 and len(number) <= 18 and number.isascii() and number.isdigit():
            return int(number)
        raise StorageError("E603", f"'{name}' is not a study database (its schema is called {number[:40]!a})")
    if names and connection.dialect.name == "sqlite":
        listed = ", ".join(ascii(table)[1:-1] for table in sorted(names)[:4])
        raise StorageError(
            "E603",
            f"'{name}' is not a study database (it holds the tables of another program: {listed})",
            advice="give another file name; nothing was changed",
        )
    return 0


def newer(name: str, found: int) -> StorageError:
    """The error for a database that a later version of mpsearch has made."""
    return StorageError(
        "E605",
        f"'{name}' has schema {found}, this version of mpsearch knows {SCHEMA}",
        because="a later version of mpsearch made it; it was not changed",
        advice="pip install -U mpsearch",
    )
