"""Scores, one row per layer, format and batch of a scope."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, and_, cast, func, null, select

from mpsearch.errors import StorageError
from mpsearch.keys import canonical_json
from mpsearch.records import CellRow
from mpsearch.storage import conflicts
from mpsearch.storage.conflicts import Refusal
from mpsearch.storage.failures import UndoneError, UnreadableError
from mpsearch.storage.portable import BINARY, chunks, insert_new, listed
from mpsearch.storage.schema import cell_table as table
from mpsearch.storage.schema import scope_table
from mpsearch.storage.text import decode

#: So many bits of a scope's number are its mark; the others count.
MARK_BITS = 40
_KEY = ("layer", "format", "batch")
_COMPARED = ("status", "value", "spread")
_COLUMNS = [table.c[name] for name in CellRow._fields]
_TEXT, _NUMBER, _REAL = frozenset([str]), frozenset([int]), frozenset([float])
_MAYBE = frozenset([float, type(None)])
_TYPES = (_TEXT, _TEXT, _NUMBER, _TEXT, _MAYBE, _MAYBE, _NUMBER, _TEXT, _REAL)


def mark(scope: str) -> int:
    """Return what the number of a scope ends with: 40 bits of the digest of its key.

    By it a scope whose row is lost in damage is found again, and cells never come under another one.

    >>> mark("s")
    18160387956
    """
    return int.from_bytes(hashlib.sha256(scope.encode()).digest()[:5])


def number(scope: str, last: int) -> int:
    """Return a number for a new scope, greater than those before: an index that grows at its end is half as large.

    Raises:
        UnreadableError: no greater one has 64 bits; eight million scopes are before it, or a number of somebody else.

    >>> number("s", 0) == (1 << 40) + mark("s")
    True
    """
    found = ((last >> MARK_BITS) + 1 << MARK_BITS) + mark(scope)
    if found >= 1 << 63:
        raise UnreadableError(f"a scope of cells has the number {last}, after which there is none")
    return found


def in_scope(scope: str) -> ColumnElement[bool]:
    """Whether a row of the table of cells is of a scope."""
    return table.c.scope == select(scope_table.c.id).where(scope_table.c.key == scope).scalar_subquery()


def put(connection: Connection, rows: Sequence[dict[str, Any]]) -> StorageError | None:
    """Insert cells; return the error to raise, after the commit, if one holds other numbers.

    Args:
        connection: inside a transaction.
        rows: columns made by `checks.cell_values`.
    """
    refused = keep(connection, rows)
    if not refused:
        return None
    conflicts.record_all(connection, refused)
    _, key, kept, offered = refused[0]
    scope, layer, fmt, batch = json.loads(key)
    what = f"cell '{layer}' at {fmt}{'' if batch < 0 else f', batch {batch}'} of scope '{scope}'"
    return conflicts.error(what, decode(kept), decode(offered), more=len(refused) - 1)


def keep(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[Refusal]:
    """Insert cells that are new, leave the others as they are, and return those that hold other numbers.

    Args:
        connection: inside a transaction.
        rows: columns made by `checks.cell_values`.
    """
    numbers = _numbers(connection, {row["scope"] for row in rows})
    # One order for all writers: on a server two that insert the same keys in two orders would block each other.
    ordered = sorted(rows, key=lambda row: (row["scope"], *_key(row)))
    if insert_new(connection, table, [row | {"scope": numbers[row["scope"]]} for row in ordered]):
        return []
    stored = _stored(connection, [(numbers[row["scope"]], *_key(row)) for row in ordered])
    if len(stored) < len({(row["scope"], *_key(row)) for row in rows}):
        raise _undone()
    found = []
    for row in ordered:
        kept = stored[(numbers[row["scope"]], *_key(row))]
        offered = {name: row[name] for name in _COMPARED}
        if kept != offered:
            place = canonical_json([row["scope"], *_key(row)])
            found.append(("cell", place, canonical_json(kept), canonical_json(offered)))
    return found


def _numbers(connection: Connection, scopes: Iterable[str]) -> dict[str, int]:
    """Return the numbers of scopes; those that are new get theirs."""
    wanted = sorted(scopes)
    found, last = _known(connection, wanted)
    new: dict[str, int] = {}
    for scope in wanted:
        if scope not in found:
            # Each counts on, for two may have one mark.
            last = new[scope] = number(scope, last)
    if not new or insert_new(connection, scope_table, [{"id": made, "key": scope} for scope, made in new.items()]):
        return found | new
    found, _ = _known(connection, wanted)
    if len(found) < len(wanted):
        # Two scopes were given one number at the same moment, or another program took one out.
        raise _undone()
    return found


def _undone() -> UndoneError:
    return UndoneError(
        "E601",
        "the scopes of cells come and go while their cells are being stored",
        advice="nothing is lost; end the other program that clears this database, and run the same command again",
    )


def _known(connection: Connection, scopes: Sequence[str]) -> tuple[dict[str, int], int]:
    """The numbers of those scopes that have one, and the greatest of all numbers."""
    # One scope as a rule, which a server finds by the index; of rows of JSON it believes that there are a hundred.
    chosen, last = select(scope_table.c.key, scope_table.c.id), select(null(), func.max(scope_table.c.id))
    found: dict[str, int] = {}
    greatest = 0
    for chunk in chunks(scopes):
        rows = connection.execute(chosen.where(scope_table.c.key.in_(chunk)).union_all(last)).all()
        found |= {key: made for key, made in rows if key is not None}
        greatest = max(made or 0 for _, made in rows)
    return found, greatest


def _stored(connection: Connection, keys: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    wanted, key = listed(connection, keys)
    same = and_(
        table.c.scope == cast(key[0].as_string(), BigInteger),
        table.c.layer == key[1].as_string(),
        table.c.format == key[2].as_string(),
        table.c.batch == cast(key[3].as_string(), BigInteger),
    )
    columns = [table.c[name] for name in ("scope", *_KEY, *_COMPARED)]
    found = connection.execute(select(*columns).join_from(wanted, table, same, isouter=True))
    return {tuple(row[:4]): dict(zip(_COMPARED, row[4:], strict=True)) for row in found if row[0] is not None}


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["layer"], row["format"], row["batch"]


def read(connection: Connection, scope: str) -> list[CellRow]:
    """Return the cells of a scope, ordered by layer, format and batch.

    Raises:
        UnreadableError: a column holds something that mpsearch never writes.
    """
    # The driver's own tuples: this is the one place where a study reads thousands of rows.
    cursor = connection.execute(select(*_COLUMNS).where(in_scope(scope)), execution_options=BINARY).cursor
    rows: list[tuple[Any, ...]] = list(cursor.fetchall()) if cursor is not None else []
    # SQLite keeps whatever another program writes, text in a column of numbers included.
    for name, allowed, column in zip(CellRow._fields, _TYPES, zip(*rows, strict=True), strict=False):
        if not allowed.issuperset(map(type, column)):
            wrong = next(row[0] for row, value in zip(rows, column, strict=True) if type(value) not in allowed)
            raise UnreadableError(f"the {name} of a cell of layer {str(wrong)[:80]!a} is of the wrong type")
    # Databases differ in how they order text; Python does not. No two rows have the same layer, format and batch.
    rows.sort()
    return list(map(CellRow._make, rows))
