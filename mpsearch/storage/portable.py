"""What SQLite and PostgreSQL spell differently, and the clock."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from sqlalchemy import JSON, ColumnElement, Connection, Double, FromClause, Table, column, func, literal

#: Execution option: a server sends its numbers as they are, not as text. For statements that return thousands of rows.
BINARY = {"mpsearch_binary": True}


def insert(connection: Connection, table: Table) -> Any:
    """Return the database's own kind of INSERT, which knows ON CONFLICT."""
    return importlib.import_module(f"sqlalchemy.dialects.{connection.dialect.name}").insert(table)


def insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Insert the rows whose key is not there yet, leave the others as they are; say whether all were new."""
    statement = insert(connection, table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
    return connection.execute(statement, [dict(row) for row in rows]).rowcount == len(rows)


def insert_or_set(connection: Connection, table: Table, row: Mapping[str, Any], column: str) -> None:
    """Insert a row, or set one column of the row that has its key."""
    statement = insert(connection, table).values(**row)
    keys = [key.name for key in table.primary_key.columns]
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_={column: row[column]}))


def listed(connection: Connection, rows: Sequence[Sequence[str | int]]) -> tuple[FromClause, Any]:
    """Return rows as the left side of an outer join, and the column that holds each row as a JSON array.

    All rows travel as one variable. As a variable each they would meet SQLite's limit on their number, and a
    statement would be compiled anew for every length. The join is an outer one because SQLite, free to choose,
    goes through the rows once per entry of the table.
    """
    function = func.json_array_elements if connection.dialect.name == "postgresql" else func.json_each
    wanted = function(literal([list(row) for row in rows], JSON)).table_valued(column("value", JSON), name="wanted")
    return wanted, wanted.c.value


def chunks(rows: Iterable[Any], size: int = 2000) -> Iterator[list[Any]]:
    """Yield rows in lists short enough for one statement."""
    left = iter(rows)
    while chunk := list(islice(left, size)):
        yield chunk


def now() -> str:
    """The time in UTC as ISO 8601 of fixed width, so that text sorts as time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def clock(connection: Connection) -> ColumnElement[float]:
    """The time of the database, in seconds since 1970: one clock for all who hold leases."""
    if connection.dialect.name == "postgresql":
        # Of this statement, not of its transaction; and not of this very moment, by which no index can be searched.
        return func.date_part("epoch", func.statement_timestamp(), type_=Double)
    return (func.julianday("now", type_=Double) - 2440587.5) * 86400.0
