"""Looks at a database without changing it: is it whole, and what fills it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy import Connection, and_, exists, func, select, text

from mpsearch.errors import ResourceError
from mpsearch.keys import content_key
from mpsearch.records import CellRow
from mpsearch.storage import cells, compact, values
from mpsearch.storage.checks import cell_values, check_text, shown
from mpsearch.storage.database import Database
from mpsearch.storage.failures import UnreadableError, translated
from mpsearch.storage.place import Place
from mpsearch.storage.schema import (
    SCHEMA,
    cell_table,
    conflict_table,
    link_table,
    metadata,
    scope_table,
    study_table,
    task_table,
    value_table,
    worker_table,
)
from mpsearch.storage.text import decode, encode

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

KeyOf = Callable[[str, Mapping[str, Any]], str | None]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a database.

    Attributes:
        what: the check that failed, such as ``json`` or ``links``.
        where: the row.
        why: what is wrong with it.
    """

    what: str
    where: str
    why: str


@dataclass(frozen=True, slots=True)
class Look:
    """What a database is, told without changing it.

    Attributes:
        shown: its address without secrets.
        kind: ``sqlite``, ``memory`` or ``postgresql``.
        schema: its schema number; 0 for an empty one.
        newest: the schema number of this version of mpsearch.
        path: its file, if it is one.
    """

    shown: str
    kind: str
    schema: int
    newest: int
    path: str


class _Unopened(Database):
    """A database that is looked at and not brought to the newest schema."""

    def _open(self) -> None:
        self.found = self._version()


def look(url: str) -> Look:
    """Say what a database is; it stays as it is.

    Raises:
        MpsearchError: as `mpsearch.storage.store.SqlStore`.
    """
    with _Unopened(url, create=False, read_only=Place.of(url).path is not None) as found:
        place = found.place
        kind = "postgresql" if place.server is not None else "sqlite" if place.path is not None else "memory"
        return Look(place.shown, kind, found.found, SCHEMA, str(place.path or ""))


def backup(url: str) -> str:
    """Copy an SQLite file beside itself, whole even while others write, and return the name of the copy.

    A server is backed up by its own tools; an empty name is then returned.

    Raises:
        ResourceError: the copy cannot be written (E701).
        MpsearchError: as `look`.
    """
    found = look(url)
    if not found.path:
        return ""
    source = Path(found.path)
    target = _free_name(source, found.schema)
    part = target.with_name(f".{target.name}.tmp")
    place = Place.of(url)
    try:
        # The copy holds what the original holds, so it is readable by its owner only.
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        try:
            with (
                translated(place),
                closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as old,
                closing(sqlite3.connect(part)) as new,
            ):
                old.backup(new)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            "E701",
            f"cannot write '{target}': {error.strerror}",
            advice="free space, or allow writing beside the database",
        ) from error
    return str(target)


def _free_name(source: Path, schema: int) -> Path:
    plain = source.with_name(f"{source.name}.schema-{schema}.bak")
    number = 1
    target = plain
    while target.exists():
        number += 1
        target = plain.with_name(f"{plain.name}{number}")
    return target


def check(store: SqlStore, key_of: KeyOf) -> tuple[list[Fault], int]:
    """Say everything that is wrong with a database, and how many conflicts it has noted.

    Args:
        store: the database.
        key_of: the key that a value of a kind must stand under; None where that cannot be told.

    Raises:
        StorageError: so damaged that it cannot be gone through (E603).
    """
    with store.reading(at_one_moment=True) as connection:
        faults = [*_structure(connection)]
        faults += _values(connection, key_of)
        faults += _scopes(connection)
        faults += _cells(connection)
        faults += _studies(connection)
        faults += _links(connection)
        faults += _tasks(connection)
        noted = connection.execute(select(func.count()).select_from(conflict_table)).scalar_one()
    return faults, int(noted)


def _structure(connection: Connection) -> Iterator[Fault]:
    if connection.dialect.name != "sqlite":
        return
    for (line,) in connection.exec_driver_sql("PRAGMA integrity_check(50)"):
        if line != "ok":
            yield Fault("structure", "file", shown(str(line))[:200])
    for table, row, other, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(50):
        yield Fault("structure", f"{table} row {row}", f"belongs to a row of {other} that is not there")


def _values(connection: Connection, key_of: KeyOf) -> Iterator[Fault]:
    columns, parts = value_table.c, values.all_parts(connection)
    rows = connection.execute(select(columns.kind, columns.key, columns.body, columns.volatile))
    for kind, key, body, volatile in rows:
        where = f"{shown(str(kind))} '{shown(str(key))[:16]}'"
        try:
            read = compact.checked(body, parts) if compact.is_compact(body) else decode(body)
            if volatile is not None:
                decode(volatile)
            if not compact.is_compact(body) and encode("value", read) != body:
                yield Fault("json", where, "not written as mpsearch writes it")
            made = content_key(read) if kind == compact.PART else key_of(kind, read)
        except UnreadableError as error:
            yield Fault("json", where, str(error))
        except Exception as error:
            # Whatever a reader of somebody's value raises is a fault of the value.
            yield Fault("content", where, f"cannot be read ({type(error).__name__}: {shown(str(error))[:120]})")
        else:
            if made is not None and made != key:
                yield Fault("key", where, "its content has another key: it was changed")


def _scopes(connection: Connection) -> Iterator[Fault]:
    for number, key in connection.execute(select(scope_table.c.id, scope_table.c.key)):
        if int(number) % (1 << cells.MARK_BITS) != cells.mark(str(key)):
            yield Fault("key", f"scope {shown(str(key))[:12]}", f"its number, {number}, is that of another one")


def _cells(connection: Connection) -> Iterator[Fault]:
    chosen = select(scope_table.c.key, *(cell_table.c[name] for name in CellRow._fields))
    for row in connection.execute(chosen.join(scope_table, scope_table.c.id == cell_table.c.scope)):
        try:
            check_text("scope", row[0])
            cell_values(row[0], CellRow(*row[1:]))
        except Exception as error:
            yield Fault(
                "cell", f"scope {shown(str(row[0]))[:12]}, layer {shown(str(row[1]))[:60]}", shown(str(error))[:160]
            )


def _studies(connection: Connection) -> Iterator[Fault]:
    columns = study_table.c
    for name, spec, key in connection.execute(select(columns.name, columns.spec, columns.key)):
        where = f"study '{shown(str(name))[:60]}'"
        try:
            if content_key(decode(spec)) != key:
                yield Fault("key", where, "its question has another key: it was changed")
        except UnreadableError as error:
            yield Fault("json", where, str(error))


def _links(connection: Connection) -> Iterator[Fault]:
    columns = link_table.c
    there = exists().where(and_(value_table.c.kind == columns.kind, value_table.c.key == columns.key))
    chosen = select(study_table.c.name, columns.kind, columns.key).join(study_table, study_table.c.id == columns.study)
    for study, kind, key in connection.execute(chosen.where(~there)):
        yield Fault("links", f"study '{shown(str(study))[:60]}'", f"{shown(str(kind))} '{str(key)[:16]}' is not there")


def _tasks(connection: Connection) -> Iterator[Fault]:
    there = exists().where(study_table.c.id == task_table.c.study)
    for key, kind, body, known in connection.execute(
        select(task_table.c.key, task_table.c.kind, task_table.c.body, there.label("known"))
    ):
        where = f"{shown(str(kind))} task '{shown(str(key))[:16]}'"
        if not known:
            yield Fault("tasks", where, "its study is not there")
        try:
            decode(body)
        except UnreadableError as error:
            yield Fault("json", where, str(error))


def stats(store: SqlStore) -> dict[str, Any]:
    """Say what fills a database: rows of each table, bytes, studies by state, oldest value, largest kinds."""
    with store.reading() as connection:
        rows = {
            table.name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
            for table in metadata.sorted_tables
        }
        size = func.sum(func.length(value_table.c.body))
        kinds = connection.execute(
            select(value_table.c.kind, func.count(), size).group_by(value_table.c.kind).order_by(size.desc())
        ).all()
        states = connection.execute(select(study_table.c.state, func.count()).group_by(study_table.c.state)).all()
        times = connection.execute(select(func.min(value_table.c.created), func.max(value_table.c.created))).one()
        return {
            "database": store.place.shown,
            "schema": SCHEMA,
            "bytes": _bytes(connection, store.place.path),
            "rows": dict(sorted(rows.items())),
            "studies": {state: int(count) for state, count in sorted(map(tuple, states))},
            "oldest": times[0],
            "newest": times[1],
            "kinds": [
                {"kind": kind, "rows": int(count), "characters": int(total or 0)} for kind, count, total in kinds
            ],
        }


def _bytes(connection: Connection, path: Path | None) -> int:
    if connection.dialect.name == "postgresql":
        names = [table.name for table in metadata.sorted_tables]
        total = [connection.execute(text("SELECT pg_total_relation_size(to_regclass(:t))"), {"t": n}) for n in names]
        return sum(int(found.scalar_one() or 0) for found in total)
    if path is None:
        pages, size = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
        )
        return int(pages) * int(size)
    files = (Path(f"{path}{end}") for end in ("", "-wal", "-shm"))
    return sum(file.stat().st_size for file in files if file.exists())


def journal(store: SqlStore) -> dict[str, Any]:
    """Say how a database keeps what it acknowledges, and how many connections a server has left."""
    with store.reading() as connection:
        if connection.dialect.name == "sqlite":
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
            return {"version": f"SQLite {sqlite3.sqlite_version}", "journal": str(mode)}
        version = str(connection.execute(text("SHOW server_version")).scalar_one())
        most = int(connection.execute(text("SHOW max_connections")).scalar_one())
        used = int(connection.execute(text("SELECT count(*) FROM pg_stat_activity")).scalar_one())
        return {"version": f"PostgreSQL {version}", "connections": most, "used": used}


def workers(store: SqlStore) -> int:
    """How many workers have said hello and not good-bye."""
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(worker_table)).scalar_one())
