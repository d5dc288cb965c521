"""Rows that were found in a damaged file: gathered, put into a new database, and what they lack said."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import Table

from mpsearch.storage import cells
from mpsearch.storage.checks import shown
from mpsearch.storage.compact import PART, is_compact
from mpsearch.storage.layouts import Row
from mpsearch.storage.schema import cell_table, link_table, metadata, scope_table, study_table, value_table
from mpsearch.storage.shortage import Shortage, shortage
from mpsearch.storage.sound import Sound

_AGAIN = "run its study file with the new database, and what is stored there is not computed again"


class Found:
    """Rows that were found, each once.

    Args:
        sound: tells rows that mpsearch wrote.
    """

    def __init__(self, sound: Sound) -> None:
        self._sound = sound
        self._names: dict[Any, str] = {}
        #: Table -> key of a row -> row.
        self.rows: dict[str, dict[Any, Row]] = {table.name: {} for table in metadata.sorted_tables}

    def take(self, table: Table, row: Row) -> bool:
        """Keep a row if it is sound, and say whether it is."""
        if not self._sound(table.name, row):
            if table is study_table and isinstance(row.get("name"), str):
                self._names[row.get("id")] = str(row["name"])
            return False
        known = {name: value for name, value in row.items() if name in table.c}
        key = tuple(known[column.name] for column in table.primary_key.columns)
        before = self.rows[table.name].get(key)
        # A page that is no longer used may hold an older row.
        if before is None or str(known.get("updated", "")) > str(before.get("updated", "")):
            self.rows[table.name][key] = known
        return True

    def fill(self, connection: Connection, whole: bool) -> list[str]:
        """Insert the rows, parents first, and say what they name and is not there.

        Args:
            connection: of an empty database, inside a transaction.
            whole: the file was not damaged, and so holds all studies that there were.
        """
        lost = [*self._number_scopes(), *self._drop_torn_plans(), *self._drop_orphans()]
        short = Shortage({}, 0) if whole else shortage(self.rows)
        if short.dropped:
            lost.append(f"{short.dropped} cells of batches of which others are lost; {_AGAIN}")
        if not (whole or self.rows["study"] or any(line.startswith("study") for line in lost)):
            lost.append(f"every study; of each, {_AGAIN}")
        for table in metadata.sorted_tables:
            left = _insert(connection, table, list(self.rows[table.name].values()))
            if left:
                lost.append(f"{left} rows of '{table.name}' that contradict others")
        return [*lost, *_missing(connection), *self._pause_short(connection, short)]

    def _number_scopes(self) -> list[str]:
        """Give cells of schema 1 the numbers of their scopes, and find scopes whose own row is lost."""
        there, cells_found = self.rows["scope"], self.rows["cell"]
        keys: dict[Any, Any] = {row["id"]: row["key"] for row in there.values()}
        numbers = {key: number for number, key in keys.items()}
        # The unit of the scores of a scope stands under its key, and the number ends with the key's mark.
        marks = {cells.mark(str(row["key"])): row["key"] for row in self.rows["value"].values()}
        kept: dict[Any, Row] = {}
        without: Counter[Any] = Counter()
        # What the newest schema wrote comes before what is left of an older one.
        for row in sorted(cells_found.values(), key=lambda row: isinstance(row["scope"], str)):
            scope: Any = row["scope"]
            key: Any
            if isinstance(scope, str):
                key, scope = scope, numbers.get(scope) or cells.number(scope, max(keys, default=0))
            else:
                key = keys.get(scope) or marks.get(scope % (1 << cells.MARK_BITS))
            if key is None or numbers.get(key, scope) != scope:
                without[scope] += 1
                continue
            keys[scope], numbers[key] = key, scope
            there.setdefault((scope,), {"id": scope, "key": key})
            kept.setdefault((scope, row["layer"], row["format"], row["batch"]), row | {"scope": scope})
        self.rows["cell"] = kept
        return [f"{count} rows of '{cell_table.name}' whose {scope_table.name} is lost" for count in without.values()]

    def _drop_torn_plans(self) -> list[str]:
        """Leave out plans whose layers are lost: these are stored once for all plans of a model."""
        rows = self.rows["value"]
        parts = {str(row["key"]): str(row["body"]) for row in rows.values() if row["kind"] == PART}
        plans = [key for key, row in rows.items() if row["kind"] == "plan" and is_compact(str(row["body"]))]
        torn = [key for key in plans if not self._sound.plan(rows[key], parts)]
        for key in torn:
            del rows[key]
        return [f"{len(torn)} plans whose layers are lost; {_AGAIN}"] if torn else []

    def _pause_short(self, connection: Connection, short: Shortage) -> list[str]:
        """Say which studies lost cells of their scores; these are then not complete."""
        lines = []
        columns = study_table.c
        for row in sorted(self.rows["study"].values(), key=lambda row: str(row["name"])):
            links = [(str(x["kind"]), str(x["key"])) for x in self.rows["link"].values() if x["study"] == row["id"]]
            if lacks := short.of(links, self.rows["value"]):
                lines.append(f"study '{shown(str(row['name']))}': {lacks}")
                ended = and_(columns.name == row["name"], columns.state.in_(("complete", "gaps")))
                connection.execute(update(study_table).where(ended).values(state="paused"))
        return lines

    def _drop_orphans(self) -> list[str]:
        """Leave out what is of studies that are lost themselves, and say which these are."""
        studies, names = self.rows["study"], set()
        # The newest row of a name is the study; an older one may be left in a page that is no longer used.
        for key, row in sorted(studies.items(), key=lambda item: str(item[1]["updated"]), reverse=True):
            if row["name"] in names:
                del studies[key]
            names.add(row["name"])
        there = {row["id"] for row in studies.values()}
        lost: dict[Any, Counter[str]] = {number: Counter() for number, name in self._names.items() if name not in names}
        for table in metadata.sorted_tables:
            if table is study_table or "study" not in table.c:
                continue
            for key, row in list(self.rows[table.name].items()):
                if row["study"] not in there:
                    del self.rows[table.name][key]
                    lost.setdefault(row["study"], Counter())[table.name] += 1
        lines = []
        for number, counts in sorted(lost.items(), key=str):
            name = f"'{shown(self._names[number])}'" if number in self._names else f"number {number}, with its name"
            belonged = ", ".join(f"{count} rows of '{table}'" for table, count in sorted(counts.items()))
            lines.append(f"study {name}{f', and {belonged}' if belonged else ''}: {_AGAIN}")
        return lines


def _insert(connection: Connection, table: Table, rows: list[Row]) -> int:
    """Insert rows of any schema; return how many the database refused."""
    refused = 0
    by_columns: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_columns.setdefault(tuple(row), []).append(row)
    for group in by_columns.values():
        try:
            with connection.begin_nested():
                connection.execute(insert(table), group)
        except SQLAlchemyError:
            for row in group:
                try:
                    with connection.begin_nested():
                        connection.execute(insert(table), [row])
                except SQLAlchemyError:
                    refused += 1
    return refused


def _missing(connection: Connection) -> list[str]:
    """Drop links to values that are lost, and say which studies they were of; these are then not complete."""
    columns = link_table.c
    there = {(kind, key) for kind, key in connection.execute(select(value_table.c.kind, value_table.c.key))}
    chosen = select(study_table.c.id, study_table.c.name, columns.kind, columns.key)
    gone: Counter[tuple[int, str, str]] = Counter()
    rows = connection.execute(chosen.join(study_table, study_table.c.id == columns.study)).all()
    linked = {number for number, *_ in rows}
    for number, name, kind, key in rows:
        if (kind, key) not in there:
            gone[number, name, kind] += 1
            connection.execute(
                link_table.delete().where(columns.study == number, columns.kind == kind, columns.key == key)
            )
    bare = [
        (number, name)
        for number, name, state in connection.execute(select(study_table.c.id, study_table.c.name, study_table.c.state))
        if number not in linked and state in ("complete", "gaps")
    ]
    for number in {number for number, _, _ in gone} | {number for number, _ in bare}:
        connection.execute(update(study_table).where(study_table.c.id == number).values(state="paused"))
    lines = [f"study '{shown(name)}': {count} of kind {kind}" for (_, name, kind), count in sorted(gone.items())]
    return lines + [f"study '{shown(name)}': all that belonged to it" for _, name in bare]
