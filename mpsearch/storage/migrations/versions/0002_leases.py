"""Tasks with leases, drivers of studies, workers and log lines; scopes of cells in a table of their own."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_OLD = "state IN ('new', 'running', 'complete', 'gaps', 'failed', 'paused')"
_NEW = "state IN ('new', 'submitted', 'running', 'complete', 'gaps', 'failed', 'paused', 'cancelled')"
_WANTED = "wanted IN ('run', 'pause', 'cancel')"
_KEPT = "id, name, spec, key, state, created, updated"
_STATUS = "status IN ('ok', 'non_finite', 'not_offered', 'not_observed', 'failed')"
_SCORED = "layer, format, batch, status, value, spread, samples, reason, seconds"


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _old_columns() -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", _number(), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("updated", sa.String(32), nullable=False),
    ]


def _new_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("driver", sa.String(400), nullable=False, server_default=sa.text("''")),
        sa.Column("driver_epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("driver_until", sa.Double),
        sa.Column("wanted", sa.String(10), nullable=False, server_default="run"),
        sa.Column("phase", sa.String(200), nullable=False, server_default=sa.text("''")),
        sa.Column("done", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("total", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("reason", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("home", sa.String(300), nullable=False, server_default=sa.text("''")),
    ]


def _rebuild(columns: list[sa.schema.SchemaItem], *checks: sa.schema.SchemaItem) -> None:
    """Make SQLite's table of studies anew, because SQLite changes no check in place; links must not be enforced now."""
    keys = (sa.PrimaryKeyConstraint("id", name="pk_study"), sa.UniqueConstraint("name", name="uq_study"))
    op.create_table("study_anew", *columns, *keys, *checks)
    op.execute(f"INSERT INTO study_anew ({_KEPT}) SELECT {_KEPT} FROM study")
    op.drop_table("study")
    op.rename_table("study_anew", "study")


def _make_cell(scope: sa.Column[object], *keys: sa.schema.SchemaItem) -> None:
    op.create_table(
        "cell",
        scope,
        sa.Column("layer", sa.String(500), nullable=False),
        sa.Column("format", sa.String(200), nullable=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("spread", sa.Double),
        sa.Column("samples", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("scope", "layer", "format", "batch", name="pk_cell"),
        *keys,
        sa.CheckConstraint(_STATUS, name="ck_cell_status"),
        sa.CheckConstraint("(status = 'ok') = (value IS NOT NULL)", name="ck_cell_value"),
        sqlite_with_rowid=False,
    )


def _put_cells_aside() -> None:
    if op.get_bind().dialect.name == "postgresql":
        # The name of an index is taken as long as the index is there.
        op.drop_constraint("pk_cell", "cell")
    op.rename_table("cell", "cell_before")


def _number_scopes() -> None:
    """Give each scope a row, and its cells the number of that row instead of its key."""
    _put_cells_aside()
    op.create_table(
        "scope",
        sa.Column("id", _number(), autoincrement=False, nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_scope"),
        sa.UniqueConstraint("key", name="uq_scope"),
    )
    keys = op.get_bind().execute(sa.text("SELECT DISTINCT scope FROM cell_before ORDER BY scope")).scalars().all()
    table = sa.table("scope", sa.column("id", sa.BigInteger), sa.column("key", sa.String))
    # They count, and end with 40 bits of the digest of the key.
    marks = [int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:5]) for key in keys]
    numbers = [(count << 40) + mark for count, mark in enumerate(marks, 1)]
    op.bulk_insert(table, [{"id": number, "key": key} for number, key in zip(numbers, keys, strict=True)])
    _make_cell(
        sa.Column("scope", _number(), nullable=False),
        sa.ForeignKeyConstraint(["scope"], ["scope.id"], name="fk_cell_scope", ondelete="CASCADE"),
    )
    op.execute(
        f"INSERT INTO cell (scope, {_SCORED}) SELECT scope.id, {_SCORED} FROM cell_before "
        "JOIN scope ON scope.key = cell_before.scope ORDER BY scope.id, layer, format, batch"
    )
    op.drop_table("cell_before")


def _name_scopes() -> None:
    _put_cells_aside()
    _make_cell(sa.Column("scope", sa.String(200), nullable=False))
    op.execute(
        f"INSERT INTO cell (scope, {_SCORED}) SELECT scope.key, {_SCORED} FROM cell_before "
        "JOIN scope ON scope.id = cell_before.scope"
    )
    op.drop_table("cell_before")
    op.drop_table("scope")


def upgrade() -> None:
    """Make the tables and the columns."""
    _number_scopes()
    if op.get_bind().dialect.name == "sqlite":
        checks = (
            sa.CheckConstraint(_NEW, name="ck_study_state"),
            sa.CheckConstraint(_WANTED, name="ck_study_wanted"),
        )
        _rebuild([*_old_columns(), *_new_columns()], *checks)
    else:
        for column in _new_columns():
            op.add_column("study", column)
        op.drop_constraint("ck_study_state", "study")
        op.create_check_constraint("ck_study_state", "study", _NEW)
        op.create_check_constraint("ck_study_wanted", "study", _WANTED)
    # Nobody knows who ran them.
    op.execute("UPDATE study SET state = 'paused' WHERE state = 'running'")
    _make_task()
    op.create_table(
        "worker",
        sa.Column("name", sa.String(400), nullable=False),
        sa.Column("host", sa.String(300), nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("started", sa.Double, nullable=False),
        sa.Column("seen", sa.Double, nullable=False),
        sa.Column("doing", sa.String(300), nullable=False),
        sa.Column("info", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_worker"),
    )
    op.create_table(
        "event",
        sa.Column("id", _number(), nullable=False),
        sa.Column("study", _number(), nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
        sa.ForeignKeyConstraint(["study"], ["study.id"], name="fk_event_study", ondelete="CASCADE"),
    )
    op.create_index("ix_event_study", "event", ["study", "id"])


def _make_task() -> None:
    op.create_table(
        "task",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("study", _number(), nullable=False),
        sa.Column("setup", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("until", sa.Double),
        sa.Column("worker", sa.String(400), nullable=False),
        sa.Column("deaths", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_task"),
        sa.ForeignKeyConstraint(["study"], ["study.id"], name="fk_task_study", ondelete="CASCADE"),
        sa.CheckConstraint("state IN ('ready', 'leased', 'done', 'failed', 'dead')", name="ck_task_state"),
    )
    op.create_index("ix_task_next", "task", ["study", "state", "setup", "position", "key"])
    op.create_index("ix_task_until", "task", ["state", "until"])


def downgrade() -> None:
    """Drop them; a study that an older version does not know becomes ``paused``."""
    _name_scopes()
    for table in ("event", "worker", "task"):
        op.drop_table(table)
    op.execute("UPDATE study SET state = 'paused' WHERE state IN ('submitted', 'cancelled')")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(_old_columns(), sa.CheckConstraint(_OLD, name="ck_study_state"))
        return
    op.drop_constraint("ck_study_wanted", "study")
    op.drop_constraint("ck_study_state", "study")
    for column in _new_columns():
        op.drop_column("study", column.name)
    op.create_check_constraint("ck_study_state", "study", _OLD)
