"""Scores, one row per layer, format and batch of a scope."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from sqlalchemy import BigInteger, Connection, and_, cast, select

from mpsearch.errors import StorageError
from mpsearch.keys import canonical_json
from mpsearch.records import CellRow
from mpsearch.storage import conflicts
from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.portable import insert_new, listed
from mpsearch.storage.schema import cell_table as table

_KEY = ("layer", "format", "batch")
_COMPARED = ("status", "value", "spread")
_COLUMNS = [table.c[field.name] for field in fields(CellRow)]
_MAYBE = (float, type(None))
_TYPES = {(str, str, int, str, value, spread, int, str, float) for value, spread in product(_MAYBE, _MAYBE)}


def put(connection: Connection, rows: Sequence[dict[str, Any]]) -> StorageError | None:
    """Insert the cells of one scope; return the error to raise, after the commit, if one holds other numbers.

    Args:
        connection: inside a transaction.
        rows: columns made by `checks.cell_values`, all of one scope.
    """
    # One order for all writers: on a server two that insert the same keys in two orders would block each other.
    ordered = sorted(rows, key=_key)
    insert_new(connection, table, ordered)
    stored = _stored(connection, ordered)
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for row in ordered:
        kept, offered = stored[_key(row)], {name: row[name] for name in _COMPARED}
        if kept != offered:
            found.append((row, kept))
            text = canonical_json([row["scope"], *_key(row)])
            conflicts.record(connection, "cell", text, canonical_json(kept), canonical_json(offered))
    if not found:
        return None
    row, kept = found[0]
    batch = "" if row["batch"] < 0 else f", batch {row['batch']}"
    what = f"cell '{row['layer']}' at {row['format']}{batch} of scope '{row['scope']}'"
    return conflicts.error(what, kept, {name: row[name] for name in _COMPARED}, more=len(found) - 1)


def _stored(connection: Connection, rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    wanted, key = listed(connection, [_key(row) for row in rows])
    same = and_(
        table.c.scope == rows[0]["scope"],
        table.c.layer == key[0].as_string(),
        table.c.format == key[1].as_string(),
        table.c.batch == cast(key[2].as_string(), BigInteger),
    )
    columns = [table.c[name] for name in _KEY + _COMPARED]
    found = connection.execute(select(*columns).join_from(wanted, table, same, isouter=True))
    return {tuple(row[:3]): dict(zip(_COMPARED, row[3:], strict=True)) for row in found}


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["layer"], row["format"], row["batch"]


def read(connection: Connection, scope: str) -> list[CellRow]:
    """Return the cells of a scope, ordered by layer, format and batch.

    Raises:
        UnreadableError: a column holds something that mpsearch never writes.
    """
    rows: Iterable[Any] = connection.execute(select(*_COLUMNS).where(table.c.scope == scope)).all()
    for row in rows:
        # SQLite keeps whatever another program writes, text in a column of numbers included.
        if tuple(map(type, row)) not in _TYPES:
            raise UnreadableError(f"the cell of layer {str(row[0])[:80]!a} holds a value of the wrong type")
    # Databases differ in how they order text; Python does not.
    return [CellRow(*row) for row in sorted(rows, key=lambda row: tuple(row[:3]))]
