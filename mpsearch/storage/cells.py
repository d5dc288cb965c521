"""Scores, one row per layer, format and batch of a scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import BigInteger, Connection, and_, cast, select

from mpsearch.errors import StorageError
from mpsearch.keys import canonical_json
from mpsearch.records import CellRow
from mpsearch.storage import conflicts
from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.portable import insert_new, listed
from mpsearch.storage.schema import cell_table as table

_KEY = ("scope", "layer", "format", "batch")
_COMPARED = ("status", "value", "spread")
_NAMES = [field.name for field in fields(CellRow)]
_COLUMNS = [table.c[name] for name in _NAMES]
_TEXT, _NUMBER, _REAL = frozenset([str]), frozenset([int]), frozenset([float])
_MAYBE = frozenset([float, type(None)])
_TYPES = (_TEXT, _TEXT, _NUMBER, _TEXT, _MAYBE, _MAYBE, _NUMBER, _TEXT, _REAL)


def put(connection: Connection, rows: Sequence[dict[str, Any]]) -> StorageError | None:
    """Insert cells; return the error to raise, after the commit, if one holds other numbers.

    Args:
        connection: inside a transaction.
        rows: columns made by `checks.cell_values`.
    """
    # One order for all writers: on a server two that insert the same keys in two orders would block each other.
    ordered = sorted(rows, key=_key)
    if insert_new(connection, table, ordered):
        return None
    stored = _stored(connection, ordered)
    found: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for row in ordered:
        kept, offered = stored[_key(row)], {name: row[name] for name in _COMPARED}
        if kept != offered:
            found.append((row, kept, offered))
    if not found:
        return None
    refused = [
        ("cell", canonical_json(_key(row)), canonical_json(kept), canonical_json(offered))
        for row, kept, offered in found
    ]
    conflicts.record_all(connection, refused)
    row, kept, offered = found[0]
    batch = "" if row["batch"] < 0 else f", batch {row['batch']}"
    what = f"cell '{row['layer']}' at {row['format']}{batch} of scope '{row['scope']}'"
    return conflicts.error(what, kept, offered, more=len(found) - 1)


def _stored(connection: Connection, rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    wanted, key = listed(connection, [_key(row) for row in rows])
    same = and_(
        table.c.scope == key[0].as_string(),
        table.c.layer == key[1].as_string(),
        table.c.format == key[2].as_string(),
        table.c.batch == cast(key[3].as_string(), BigInteger),
    )
    columns = [table.c[name] for name in _KEY + _COMPARED]
    found = connection.execute(select(*columns).join_from(wanted, table, same, isouter=True))
    return {tuple(row[:4]): dict(zip(_COMPARED, row[4:], strict=True)) for row in found}


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["scope"], row["layer"], row["format"], row["batch"]


def read(connection: Connection, scope: str) -> list[CellRow]:
    """Return the cells of a scope, ordered by layer, format and batch.

    Raises:
        UnreadableError: a column holds something that mpsearch never writes.
    """
    # The driver's own tuples: this is the one place where a study reads thousands of rows.
    cursor = connection.execute(select(*_COLUMNS).where(table.c.scope == scope)).cursor
    rows: list[tuple[Any, ...]] = list(cursor.fetchall()) if cursor is not None else []
    # SQLite keeps whatever another program writes, text in a column of numbers included.
    for name, allowed, column in zip(_NAMES, _TYPES, zip(*rows, strict=True), strict=False):
        if not allowed.issuperset(map(type, column)):
            wrong = next(row[0] for row, value in zip(rows, column, strict=True) if type(value) not in allowed)
            raise UnreadableError(f"the {name} of a cell of layer {str(wrong)[:80]!a} is of the wrong type")
    # Databases differ in how they order text; Python does not. No two rows have the same layer, format and batch.
    rows.sort()
    return [CellRow(*row) for row in rows]
