"""Takes out of a database what no study needs any more."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select
from sqlalchemy.schema import Table

from mpsearch.storage import values as stored_values
from mpsearch.storage.compact import PART
from mpsearch.storage.database import again
from mpsearch.storage.failures import translated
from mpsearch.storage.portable import chunks, clock
from mpsearch.storage.portions import reached
from mpsearch.storage.schema import (
    cell_table,
    conflict_table,
    event_table,
    link_table,
    scope_table,
    study_table,
    task_table,
    value_table,
    worker_table,
)

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

#: Studies in these states ask for nothing that they do not name.
FINISHED = ("complete", "gaps", "cancelled")
#: Times of kernels and models belong to the machine, and serve every later study.
_SHARED_KINDS = ("kernel_time", "whole_time")
#: Rows of one transaction, and scopes, which have thousands of cells.
_CHUNK, _SCOPES = 500, 10
_DAY = 86400.0
#: Days; longer than any database is old.
_LONGEST = 36500.0
_PASSING = (task_table, event_table, worker_table)


@dataclass(frozen=True)
class Collected:
    """What was taken out, or would be.

    Attributes:
        values: kind -> how many.
        cells: scored cells.
        tasks: tasks of finished studies.
        events: lines of logs.
        workers: workers that have not been seen.
        kept_for: unfinished studies, for which all values and cells stay.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    cells: int = 0
    tasks: int = 0
    events: int = 0
    workers: int = 0
    kept_for: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.values.values()) + self.cells + self.tasks + self.events + self.workers

    def to_json(self) -> dict[str, Any]:
        return {
            "values": dict(self.values),
            "cells": self.cells,
            "tasks": self.tasks,
            "events": self.events,
            "workers": self.workers,
            "kept_for": list(self.kept_for),
        }


def collect(
    store: SqlStore, *, dry_run: bool = True, days: float = 7.0, log_days: float = 30.0, shrink: bool = False
) -> Collected:
    """Take out values that no study names, directly or through others, and cells of no scope that is named.

    What was kept in the last days stays, for somebody may be at work. Cells have no date of their own: those of a
    scope are as old as the youngest value under its key, which comes with the first of them and with the scores.
    While a study is not finished every value and cell stays, for it may need what it has not named yet. Tasks of
    finished studies go unless somebody is at them, old lines of logs, and workers that were not seen for a day.

    What goes is looked for first, and taken out in small transactions for which nobody waits long. If a study begins
    meanwhile, the values and cells that are left stay.

    Args:
        store: the database.
        dry_run: only count.
        days: age in days that values must have.
        log_days: age in days that lines of logs must have.
        shrink: give the freed space of an SQLite file back to the disk.
    """
    before = (datetime.now(UTC) - timedelta(days=min(days, _LONGEST))).isoformat(timespec="microseconds")
    with store.reading(at_one_moment=True) as connection:
        seen = _studies(connection)
        busy = tuple(sorted(name for name, state, *_ in seen if state not in FINISHED))
        values, scopes = ([], []) if busy else _unneeded(connection, before)
        cells = sum(_count(connection, cell_table, _of(chunk)) for chunk in chunks(scopes, _CHUNK))
        counts = [_count(connection, *_passing(connection, table, log_days)) for table in _PASSING]
    kinds = Counter(kind for kind, _ in values)
    if not dry_run:
        # Cells before the values that tell their unit: without that they would be taken for known.
        cells = sum(_take_cells(store, seen, chunk) for chunk in chunks(scopes, _SCOPES))
        for kind in kinds:
            keys = [key for other, key in values if other == kind]
            kinds[kind] = sum(_take_values(store, seen, kind, chunk, before) for chunk in chunks(keys, _CHUNK))
        counts = [sum(iter(lambda: _take_passing(store, table, log_days), 0)) for table in _PASSING]  # noqa: B023
        if shrink and store.place.path is not None:
            with translated(store.place), closing(sqlite3.connect(store.place.path, timeout=60)) as file:
                file.execute("VACUUM")
    # Of what plans share nobody knows: it comes and goes with them.
    del kinds[PART]
    tasks, events, workers = counts
    return Collected(dict(sorted((+kinds).items())), cells, tasks, events, workers, busy)


def _studies(connection: Connection) -> list[tuple[Any, ...]]:
    columns = study_table.c
    chosen = select(columns.name, columns.state, columns.updated, columns.driver_epoch, columns.id)
    return sorted(tuple(row) for row in connection.execute(chosen))


def _unchanged(connection: Connection, seen: list[tuple[Any, ...]]) -> bool:
    """Whether no study began or changed, and none will until the end of the transaction."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE study IN SHARE MODE")
    return _studies(connection) == seen


@again
def _take_cells(store: SqlStore, seen: list[tuple[Any, ...]], scopes: Sequence[str]) -> int:
    with store.writing() as connection:
        if not _unchanged(connection, seen):
            return 0
        # Who stores cells of these scopes is waited for, and who begins to now finds the scopes gone.
        connection.execute(select(scope_table.c.id).where(scope_table.c.key.in_(scopes)).with_for_update())
        gone = int(connection.execute(delete(cell_table).where(_of(scopes))).rowcount)
        connection.execute(delete(scope_table).where(scope_table.c.key.in_(scopes)))
        return gone


def _of(scopes: Sequence[str]) -> ColumnElement[bool]:
    """Whether a cell is of one of the scopes."""
    return cell_table.c.scope.in_(select(scope_table.c.id).where(scope_table.c.key.in_(scopes)))


@again
def _take_values(store: SqlStore, seen: list[tuple[Any, ...]], kind: str, keys: Sequence[str], before: str) -> int:
    columns = value_table.c
    with store.writing() as connection:
        if not _unchanged(connection, seen):
            return 0
        linked = set(connection.execute(select(link_table.c.key).where(link_table.c.key.in_(keys))).scalars())
        going = [key for key in keys if key not in linked]
        if kind == PART:
            # Who stores a plan of these parts is waited for, and who begins to now finds them gone.
            held = select(columns.key).where(columns.kind == PART, columns.key.in_(going)).order_by(columns.key)
            connection.execute(held.with_for_update())
            needed = stored_values.named_parts(connection)
            going = [key for key in going if key not in needed]
        old = and_(columns.kind == kind, columns.key.in_(going), columns.created < before)
        return int(connection.execute(delete(value_table).where(old)).rowcount)


def _passing(connection: Connection, table: Table, log_days: float) -> tuple[Table, ColumnElement[bool]]:
    """What goes of a table whose rows nobody names."""
    if table is task_table:
        ended = select(study_table.c.id).where(study_table.c.state.in_(FINISHED))
        return table, and_(task_table.c.state != "leased", task_table.c.study.in_(ended))
    if table is event_table:
        return table, event_table.c.time < clock(connection) - log_days * _DAY
    at_work = select(task_table.c.worker).where(task_table.c.state == "leased")
    return table, and_(worker_table.c.seen < clock(connection) - _DAY, worker_table.c.name.not_in(at_work))


@again
def _take_passing(store: SqlStore, table: Table, log_days: float) -> int:
    (key,) = table.primary_key.columns
    with store.writing() as connection:
        _, condition = _passing(connection, table, log_days)
        chosen = select(key).where(condition).order_by(key).limit(_CHUNK).with_for_update(skip_locked=True, of=table)
        keys = connection.execute(chosen).scalars().all()
        return int(connection.execute(delete(table).where(key.in_(keys))).rowcount)


def _unneeded(connection: Connection, before: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(kind, key) of values, and scopes of cells, that no study names."""
    roots = set(connection.execute(select(link_table.c.key)).scalars())
    roots |= set(connection.execute(select(conflict_table.c.key)).scalars())
    roots |= set(connection.execute(select(task_table.c.key).where(task_table.c.state == "leased")).scalars())
    needed: set[tuple[str, str]] = set()
    for kind, key, _, _ in reached(connection, roots):
        needed.add((kind, key))
    columns = value_table.c
    old = connection.execute(select(columns.kind, columns.key).where(columns.created < before))
    values = sorted({(str(kind), str(key)) for kind, key in old} - needed)
    values = [(kind, key) for kind, key in values if kind not in _SHARED_KINDS]
    going = set(values)
    # A scope is as old as the youngest of what was kept under its key, whenever the last of its cells was.
    scored = connection.execute(select(columns.kind, columns.key).where(columns.kind.in_(("scores", "score_unit"))))
    staying = {str(key) for kind, key in scored if (kind, key) not in going}
    values = [(kind, key) for kind, key in values if key not in staying]
    # A plan that is too young to go needs its parts, however old these are.
    named = stored_values.named_parts(connection, {key for kind, key in values if kind == "plan"})
    values = [(kind, key) for kind, key in values if kind != PART or key not in named]
    refused = [key for key in roots if key.startswith('["')]
    scopes = [
        scope
        for scope in connection.execute(select(scope_table.c.key)).scalars()
        if scope not in staying and not any(key.startswith(f'["{scope}"') for key in refused)
    ]
    return values, sorted(scopes)


def _count(connection: Connection, table: Table, condition: ColumnElement[bool]) -> int:
    return int(connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one())
