"""The log of each study: its newest lines."""

from __future__ import annotations

from sqlalchemy import Connection, delete, select

from mpsearch.records import EventRow
from mpsearch.storage.checks import plain
from mpsearch.storage.portable import clock
from mpsearch.storage.schema import event_table as table
from mpsearch.storage.schema import study_table

#: Lines kept of a study.
LINES = 10_000


def add(connection: Connection, study: int, kind: str, text: str) -> None:
    """Write a line, and drop the oldest ones that are too many.

    Args:
        connection: inside a transaction.
        study: number of the study.
        kind: such as ``refused``.
        text: what happened; cut when it is long.
    """
    # On a server numbers are given out before the commit. Writers of one study wait for each other, so that a reader
    # who has seen a number has seen all that are smaller.
    connection.execute(select(study_table.c.id).where(study_table.c.id == study).with_for_update(key_share=True))
    row = {"study": study, "kind": kind, "text": plain(text), "time": clock(connection)}
    connection.execute(table.insert().values(row))
    newest = select(table.c.id).where(table.c.study == study).order_by(table.c.id.desc())
    oldest = newest.offset(LINES).limit(1).scalar_subquery()
    connection.execute(delete(table).where(table.c.study == study, table.c.id <= oldest))


def read(connection: Connection, study: int, after: int, limit: int) -> list[EventRow]:
    """Return the lines after one, oldest first."""
    columns = (table.c.id, table.c.time, table.c.kind, table.c.text)
    found = select(*columns).where(table.c.study == study, table.c.id > after).order_by(table.c.id).limit(limit)
    return [EventRow(*row) for row in connection.execute(found)]
