"""Takes out of a database what no study needs any more."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select
from sqlalchemy.schema import Table

from mpsearch.storage.copying import reached
from mpsearch.storage.failures import translated
from mpsearch.storage.schema import (
    cell_table,
    conflict_table,
    event_table,
    link_table,
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
_CHUNK = 500
_DAY = 86400.0


@dataclass(frozen=True)
class Collected:
    """What was taken out, or would be.

    Attributes:
        values: kind -> how many.
        cells: scored cells.
        tasks: done tasks.
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

    What was kept in the last days stays, for somebody may be at work. While a study is not finished every value and
    cell stays, for it may need what it has not named yet. Done tasks of finished studies go, old lines of logs, and
    workers that were not seen for a day.

    Args:
        store: the database.
        dry_run: only count.
        days: age in days that values must have.
        log_days: age in days that lines of logs must have.
        shrink: give the freed space of an SQLite file back to the disk.
    """
    with store.reading() if dry_run else store.writing() as connection:
        found = _collect(connection, days * _DAY, log_days * _DAY, dry_run)
    if shrink and not dry_run and store.place.path is not None:
        with translated(store.place), closing(sqlite3.connect(store.place.path, timeout=60)) as file:
            file.execute("VACUUM")
    return found


def _collect(connection: Connection, age: float, log_age: float, dry_run: bool) -> Collected:
    busy = connection.execute(select(study_table.c.name).where(study_table.c.state.not_in(FINISHED))).scalars().all()
    values: Sequence[tuple[str, str]] = ()
    scopes: Sequence[str] = ()
    if not busy:
        values, scopes = _unneeded(connection, age)
    now = clock(connection)
    ended = select(study_table.c.id).where(study_table.c.state.in_(FINISHED))
    tasks = _count(connection, task_table, and_(task_table.c.state == "done", task_table.c.study.in_(ended)))
    events = _count(connection, event_table, event_table.c.time < now - log_age)
    at_work = select(task_table.c.worker).where(task_table.c.state == "leased")
    gone = and_(worker_table.c.seen < now - _DAY, worker_table.c.name.not_in(at_work))
    workers = _count(connection, worker_table, gone)
    cells = sum(_count(connection, cell_table, cell_table.c.scope.in_(chunk)) for chunk in _chunks(scopes))
    if not dry_run:
        for chunk in _chunks(scopes):
            connection.execute(delete(cell_table).where(cell_table.c.scope.in_(chunk)))
        for kind in dict.fromkeys(kind for kind, _ in values):
            for chunk in _chunks([key for other, key in values if other == kind]):
                connection.execute(delete(value_table).where(value_table.c.kind == kind, value_table.c.key.in_(chunk)))
        connection.execute(delete(task_table).where(task_table.c.state == "done", task_table.c.study.in_(ended)))
        connection.execute(delete(event_table).where(event_table.c.time < now - log_age))
        connection.execute(delete(worker_table).where(gone))
    kinds = dict(sorted(Counter(kind for kind, _ in values).items()))
    return Collected(kinds, cells, tasks, events, workers, tuple(sorted(busy)))


def _unneeded(connection: Connection, age: float) -> tuple[list[tuple[str, str]], list[str]]:
    """(kind, key) of values, and scopes of cells, that no study names."""
    before = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="microseconds")
    roots = set(connection.execute(select(link_table.c.key)).scalars())
    roots |= set(connection.execute(select(conflict_table.c.key)).scalars())
    roots |= set(connection.execute(select(task_table.c.key).where(task_table.c.state != "done")).scalars())
    needed: set[tuple[str, str]] = set()
    for kind, key, _, _ in reached(connection, roots):
        needed.add((kind, key))
    columns = value_table.c
    old = connection.execute(select(columns.kind, columns.key).where(columns.created < before))
    values = sorted({(str(kind), str(key)) for kind, key in old} - needed)
    values = [(kind, key) for kind, key in values if kind not in _SHARED_KINDS]
    going = set(values)
    # A scope is as old as the youngest of what was kept with its cells.
    scored = connection.execute(select(columns.kind, columns.key).where(columns.kind.in_(("scores", "score_unit"))))
    staying = {str(key) for kind, key in scored if (kind, key) not in going}
    values = [(kind, key) for kind, key in values if key not in staying]
    refused = [key for key in roots if key.startswith('["')]
    scopes = [
        scope
        for scope in connection.execute(select(cell_table.c.scope).distinct()).scalars()
        if scope not in staying and not any(key.startswith(f'["{scope}"') for key in refused)
    ]
    return values, sorted(scopes)


def clock(connection: Connection) -> float:
    """Seconds since 1970 by the clock of the database."""
    if connection.dialect.name == "sqlite":
        # An SQLite file has no clock but that of who opens it.
        return time.time()
    return float(connection.execute(select(func.extract("epoch", func.now()))).scalar_one())


def _count(connection: Connection, table: Table, condition: ColumnElement[bool]) -> int:
    return int(connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one())


def _chunks(rows: Sequence[Any]) -> Iterator[list[Any]]:
    left = iter(rows)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk
