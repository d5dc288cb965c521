"""Values, cells, studies, links and conflicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "value",
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("volatile", sa.Text),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("kind", "key", name="pk_value"),
    )
    op.create_table(
        "cell",
        sa.Column("scope", sa.String(200), nullable=False),
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
        sa.CheckConstraint(
            "status IN ('ok', 'non_finite', 'not_offered', 'not_observed', 'failed')", name="ck_cell_status"
        ),
        sa.CheckConstraint("(status = 'ok') = (value IS NOT NULL)", name="ck_cell_value"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "study",
        sa.Column("id", _number(), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("updated", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_study"),
        sa.UniqueConstraint("name", name="uq_study"),
        sa.CheckConstraint(
            "state IN ('new', 'running', 'complete', 'gaps', 'failed', 'paused')", name="ck_study_state"
        ),
    )
    op.create_table(
        "link",
        sa.Column("study", _number(), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("label", sa.String(500), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("study", "kind", "key", "label", name="pk_link"),
        sa.ForeignKeyConstraint(["study"], ["study.id"], name="fk_link_study", ondelete="CASCADE"),
    )
    op.create_table(
        "conflict",
        sa.Column("id", _number(), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("stored", sa.Text, nullable=False),
        sa.Column("offered", sa.Text, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_conflict"),
        sa.UniqueConstraint("kind", "key", "digest", name="uq_conflict"),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("conflict", "link", "study", "cell", "value"):
        op.drop_table(table)
