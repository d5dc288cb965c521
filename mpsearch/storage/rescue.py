"""Takes what can be read of a damaged SQLite file into a new database."""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import Table

from mpsearch.errors import InputError, MpsearchError, ResourceError, StorageError
from mpsearch.keys import content_key
from mpsearch.records import CellRow
from mpsearch.storage.checks import cell_values, check_text, shown
from mpsearch.storage.engine import make_engine
from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.inspecting import KeyOf
from mpsearch.storage.pages import Pages, Value
from mpsearch.storage.place import Place
from mpsearch.storage.schema import SCHEMA, STUDY_STATES, link_table, metadata, study_table, value_table
from mpsearch.storage.store import SqlStore
from mpsearch.storage.text import decode, encode

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
Row = dict[str, Value]


@dataclass(frozen=True)
class Rescued:
    """What a rescue brought.

    Attributes:
        whole: the file was not damaged.
        rows: table -> rows in the new database.
        lost: what is known to be missing, one line each.
    """

    whole: bool
    rows: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The columns of a table as one schema has them."""

    table: Table
    columns: tuple[str, ...]
    types: tuple[str, ...]
    needed: tuple[bool, ...]
    numbered: bool
    alias: int

    def read(self, row: int, values: tuple[Value, ...]) -> Row | None:
        """Return a record as a row, or None if it cannot be one of this table."""
        if len(values) != len(self.columns):
            return None
        found: Row = {}
        for i, (name, value) in enumerate(zip(self.columns, values, strict=True)):
            if i == self.alias and value is None:
                value = row
            if value is None and self.needed[i]:
                return None
            kind = self.types[i]
            if value is not None:
                if isinstance(value, bytes) or isinstance(value, str) != (kind == "text"):
                    return None
                if kind == "whole" and not isinstance(value, int):
                    return None
                # SQLite writes a real number without a fraction as a whole one.
                value = float(value) if kind == "real" and not isinstance(value, str) else value
            found[name] = value
        return found


def rescue(damaged: str | Path, out: str | Path, key_of: KeyOf) -> Rescued:
    """Read a damaged file row by row, after truncation or overwritten pages, into a new database.

    The damaged file stays as it is. Every row is checked as if it were put anew: a value whose content has another key
    than it stands under is left behind.

    Args:
        damaged: the SQLite file; its log ``-wal`` is read as well if it is there.
        out: file of the new database.
        key_of: the key that a value of a kind must stand under; None where that cannot be told.

    Raises:
        InputError: no such file (E101), or ``out`` is there already (E303).
        StorageError: nothing that mpsearch wrote can be read (E603).
        ResourceError: the new file cannot be written (E701).
    """
    source, target = Path(damaged), Path(out)
    _check_paths(source, target)
    checks = _checks(key_of)
    try:
        found = _from_tables(source, checks)
        whole = found is not None
        rows = found if found is not None else _from_pages(source, checks)
    except OSError as error:
        raise ResourceError(
            "E701", f"'{source}' cannot be read: {error.strerror}", advice="copy it elsewhere"
        ) from error
    if not any(rows.values()):
        raise StorageError(
            "E603",
            f"'{source}' holds nothing that mpsearch wrote and that can still be read",
            advice="go back to a copy, such as the one that `mpsearch db upgrade` made",
        )
    try:
        with SqlStore(str(target)) as store, store.writing() as connection:
            lost = _fill(connection, rows)
    except BaseException:
        for end in ("", "-wal", "-shm"):
            Path(f"{target}{end}").unlink(missing_ok=True)
        raise
    return Rescued(whole, {name: len(found) for name, found in sorted(rows.items())}, tuple(lost))


def _check_paths(source: Path, target: Path) -> None:
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise InputError(
            "E101", f"'{source}' cannot be read: {error.strerror}", advice="give a database file"
        ) from error
    if not stat.S_ISREG(mode):
        raise StorageError("E603", f"'{source}' is not a plain file", advice="give the file of a database")
    if target.exists():
        raise InputError("E303", f"'{target}' is there already; nothing was written", advice="name a new file")


def _from_tables(source: Path, checks: Mapping[str, Callable[[Row], bool]]) -> dict[str, dict[Any, Row]] | None:
    """Read the tables of a file that is whole; None if it is not."""
    found: dict[str, dict[Any, Row]] = {}
    with tempfile.TemporaryDirectory(prefix="mpsearch-rescue-") as folder:
        copy = Path(folder) / "copy.db"
        shutil.copyfile(source, copy)
        if Path(f"{source}-wal").exists():
            shutil.copyfile(f"{source}-wal", f"{copy}-wal")
        try:
            with closing(sqlite3.connect(copy)) as file:
                file.execute("PRAGMA trusted_schema=OFF")
                if file.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                    return None
                there = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                for table in metadata.sorted_tables:
                    found[table.name] = {}
                    if table.name in there:
                        cursor = file.execute(f'SELECT * FROM "{table.name}"')
                        names = [column[0] for column in cursor.description]
                        for row in cursor:
                            _keep(found, table, dict(zip(names, row, strict=True)), checks)
        except (sqlite3.Error, UnicodeDecodeError):
            return None
    return found if any(found.values()) else None


def _from_pages(source: Path, checks: Mapping[str, Callable[[Row], bool]]) -> dict[str, dict[Any, Row]]:
    """Read every record of every page, and tell by its shape and its content which table it is of."""
    layouts = list(_layouts())
    found: dict[str, dict[Any, Row]] = {table.name: {} for table in metadata.sorted_tables}
    pages = Pages(source)
    try:
        for numbered, number, values in pages.records():
            for layout in layouts:
                if layout.numbered == numbered:
                    row = layout.read(number, values)
                    if row is not None and _keep(found, layout.table, row, checks):
                        break
    finally:
        pages.close()
    return found


def _keep(
    found: dict[str, dict[Any, Row]], table: Table, row: Row, checks: Mapping[str, Callable[[Row], bool]]
) -> bool:
    try:
        if not checks.get(table.name, _printable)(row):
            return False
    except (MpsearchError, UnreadableError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError):
        return False
    known = {name: value for name, value in row.items() if name in table.c}
    key = tuple(known[column.name] for column in table.primary_key.columns)
    before = found[table.name].get(key)
    # A page that is no longer used may hold an older row.
    if before is None or str(known.get("updated", "")) > str(before.get("updated", "")):
        found[table.name][key] = known
    return True


def _layouts() -> Iterator[_Layout]:
    from mpsearch.storage.migrate import upgrade

    seen = set()
    for number in range(1, SCHEMA + 1):
        engine = make_engine(Place.of(":memory:"), busy_timeout=1.0, read_only=False)
        try:
            with engine.begin() as connection:
                upgrade(connection, f"{number:04d}")
                for table in metadata.sorted_tables:
                    rows = connection.exec_driver_sql(f'PRAGMA table_info("{table.name}")').all()
                    layout = _layout(table, rows) if rows else None
                    if layout is not None and (layout.table.name, layout.columns) not in seen:
                        seen.add((layout.table.name, layout.columns))
                        yield layout
        finally:
            engine.dispose()


def _layout(table: Table, rows: Any) -> _Layout:
    kinds = {"BIGINT": "whole", "INTEGER": "whole", "DOUBLE": "real", "FLOAT": "real", "REAL": "real"}
    declared = [str(row[2]).partition("(")[0].upper() for row in rows]
    keys = [i for i, row in enumerate(rows) if row[5]]
    alias = keys[0] if len(keys) == 1 and declared[keys[0]] == "INTEGER" else -1
    numbered = bool(table.dialect_options["sqlite"]["with_rowid"])
    return _Layout(
        table,
        tuple(str(row[1]) for row in rows),
        tuple(kinds.get(kind, "text") for kind in declared),
        tuple(bool(row[3]) and i != alias for i, row in enumerate(rows)),
        numbered,
        alias,
    )


def _checks(key_of: KeyOf) -> dict[str, Callable[[Row], bool]]:
    def value(row: Row) -> bool:
        kind, key = check_text("kind", str(row["kind"]), 40), check_text("key", str(row["key"]))
        body = decode(row["body"])
        if row["volatile"] is not None:
            decode(row["volatile"])
        made = key_of(kind, body)
        return encode("value", body) == row["body"] and made in (None, key) and _is_time(row["created"])

    return {"value": value, "cell": _cell, "study": _study, "link": _link, "conflict": _conflict, "task": _task}


def _is_time(text: Any) -> bool:
    return bool(_TIME.fullmatch(str(text)))


def _cell(row: Row) -> bool:
    names = ("layer", "format", "batch", "status", "value", "spread", "samples", "reason", "seconds")
    check_text("scope", str(row["scope"]))
    cell_values(str(row["scope"]), CellRow(**{name: row[name] for name in names}))  # type: ignore[arg-type]
    return True


def _study(row: Row) -> bool:
    check_text("study name", str(row["name"]))
    fine = row["state"] in STUDY_STATES and _is_time(row["created"]) and _is_time(row["updated"])
    return fine and content_key(decode(row["spec"])) == row["key"]


def _link(row: Row) -> bool:
    check_text("kind", str(row["kind"]), 40)
    check_text("key", str(row["key"]))
    check_text("label", str(row["label"]), 500, empty=True)
    return True


def _conflict(row: Row) -> bool:
    decode(row["stored"]), decode(row["offered"])
    return hashlib.sha256(str(row["offered"]).encode()).hexdigest() == row["digest"] and _is_time(row["created"])


def _task(row: Row) -> bool:
    decode(row["body"])
    return len(str(row["key"])) <= 64


def _printable(row: Row) -> bool:
    return all("\0" not in value for value in row.values() if isinstance(value, str))


def _fill(connection: Connection, rows: dict[str, dict[Any, Row]]) -> list[str]:
    """Insert the rows, parents first, and say what they name and is not there."""
    lost: list[str] = []
    names: set[str] = set()
    # The newest row of a name is the study; an older one may be left in a page that is no longer used.
    for key, row in sorted(rows["study"].items(), key=lambda item: str(item[1]["updated"]), reverse=True):
        if str(row["name"]) in names:
            del rows["study"][key]
        names.add(str(row["name"]))
    studies = {row["id"] for row in rows["study"].values()}
    for table in metadata.sorted_tables:
        if table is study_table or "study" not in table.c:
            continue
        orphans = [key for key, row in rows[table.name].items() if row["study"] not in studies]
        for key in orphans:
            del rows[table.name][key]
        if orphans:
            lost.append(f"{len(orphans)} rows of '{table.name}' of studies that are lost themselves")
    for table in metadata.sorted_tables:
        left = _insert(connection, table, list(rows[table.name].values()))
        if left:
            lost.append(f"{left} rows of '{table.name}' that contradict others")
    return [*lost, *_missing(connection)]


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
