"""The tables, and the number that names their shape."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
)

from mpsearch.errors import StorageError

#: How a cell came to be; only ``ok`` cells hold a value.
CELL_STATUSES = ("ok", "non_finite", "not_offered", "not_observed", "failed")
#: Where a study stands; ``gaps`` is done but for cells that could not be measured.
STUDY_STATES = ("new", "submitted", "running", "complete", "gaps", "failed", "paused", "cancelled")
#: What the user wants of a study.
WANTED = ("run", "pause", "cancel")
#: Where a task stands; ``dead`` has killed too many workers.
TASK_STATES = ("ready", "leased", "done", "failed", "dead")
#: The newest schema that this code reads and writes: the number of the last file in ``migrations/versions``.
SCHEMA = 2
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

_EMPTY = text("''")

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

# Half of a row of cells would else be the key of its scope. What the number is made of is said in `cells.mark`.
scope_table = Table(
    "scope",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=False),
    Column("key", String(200), nullable=False),
    UniqueConstraint("key"),
)

# Without row numbers SQLite keeps the rows themselves in the order of the key, so a scope is read in one sweep.
cell_table = Table(
    "cell",
    metadata,
    Column("scope", _Number, ForeignKey("scope.id", ondelete="CASCADE"), primary_key=True),
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
    # The process that drives the study: a lease like that of a task, by the clock of the database.
    Column("driver", String(400), nullable=False, server_default=_EMPTY),
    Column("driver_epoch", BigInteger, nullable=False, server_default="0"),
    Column("driver_until", Double),
    Column("wanted", String(10), nullable=False, server_default="run"),
    Column("phase", String(200), nullable=False, server_default=_EMPTY),
    Column("done", BigInteger, nullable=False, server_default="0"),
    Column("total", BigInteger, nullable=False, server_default="0"),
    Column("reason", Text, nullable=False, server_default=_EMPTY),
    Column("home", String(300), nullable=False, server_default=_EMPTY),
    UniqueConstraint("name"),
    CheckConstraint(f"state IN ({', '.join(map(repr, STUDY_STATES))})", name="state"),
    CheckConstraint(f"wanted IN ({', '.join(map(repr, WANTED))})", name="wanted"),
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

# The key is that of the value which the task will give, so two studies that need one value have one task.
task_table = Table(
    "task",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("study", _Number, ForeignKey("study.id", ondelete="CASCADE"), nullable=False),
    Column("setup", String(64), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("body", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("state", String(10), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("until", Double),
    Column("worker", String(400), nullable=False),
    Column("deaths", BigInteger, nullable=False),
    Column("attempts", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("updated", Double, nullable=False),
    CheckConstraint(f"state IN ({', '.join(map(repr, TASK_STATES))})", name="state"),
    # The first finds the next task of each setup of a study, the second the leases that have lapsed.
    Index("ix_task_next", "study", "state", "setup", "position", "key"),
    Index("ix_task_until", "state", "until"),
)

worker_table = Table(
    "worker",
    metadata,
    Column("name", String(400), primary_key=True),
    Column("host", String(300), nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("started", Double, nullable=False),
    Column("seen", Double, nullable=False),
    Column("doing", String(300), nullable=False),
    Column("info", Text, nullable=False),
)

event_table = Table(
    "event",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("study", _Number, ForeignKey("study.id", ondelete="CASCADE"), nullable=False),
    Column("time", Double, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("text", Text, nullable=False),
    Index("ix_event_study", "study", "id"),
)

_version_table = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))


def schema_version(connection: Connection, name: str) -> int:
    """Return the schema number of a database, 0 for an empty one.

    Args:
        connection: an open connection.
        name: what messages call the database.

    Raises:
        StorageError: a database of another program (E603), or of a version that was never released (E605).
    """
    names = inspect(connection).get_table_names()
    if VERSION_TABLE in names:
        found = connection.execute(select(_version_table.c.version_num)).scalars().all()
        if not found:
            return 0
        number = str(found[0])
        if len(found) == 1 and len(number) <= 18 and number.isascii() and number.isdigit():
            _check_released(int(number), names, name)
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


def _check_released(found: int, tables: Sequence[str], name: str) -> None:
    if found == 2 and "cell" in tables and scope_table.name not in tables:
        raise StorageError(
            "E605",
            f"'{name}' was made by a version of mpsearch that was never released, whose schema {found} was another one",
            advice="run its study files with a new database",
        )


def newer(name: str, found: int) -> StorageError:
    """The error for a database that a later version of mpsearch has made."""
    return StorageError(
        "E605",
        f"'{name}' has schema {found}, this version of mpsearch knows {SCHEMA}",
        because="a later version of mpsearch made it; it was not changed",
        advice="pip install -U mpsearch",
    )
