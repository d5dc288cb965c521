"""JSON values under their content key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, select

from mpsearch.errors import StorageError
from mpsearch.storage import conflicts
from mpsearch.storage.checks import check_text
from mpsearch.storage.portable import insert_new, listed, now
from mpsearch.storage.schema import value_table as table
from mpsearch.storage.text import decode, encode


def row(kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a value as the columns of its table.

    Raises:
        InputError: a kind or key that is not printable, or text that is not text (E114).
        ValueError: NaN or infinity.
    """
    what = f"{check_text('kind', kind, 40)} '{check_text('key', key)}'"
    changing = dict(volatile or {})
    return {
        "kind": kind,
        "key": key,
        "body": encode(what, {name: item for name, item in body.items() if name not in changing}),
        "volatile": encode(what, changing) if changing else None,
        "created": now(),
    }


def put_many(connection: Connection, rows: Sequence[dict[str, Any]]) -> StorageError | None:
    """Insert values; return the error to raise, after the commit, if a key holds another one.

    Args:
        connection: inside a transaction.
        rows: columns made by `row`.
    """
    # One order for all writers: on a server two that insert the same keys in two orders would block each other.
    ordered = sorted(rows, key=lambda row: (row["kind"], row["key"]))
    if insert_new(connection, table, ordered):
        return None
    wanted, key = listed(connection, [[row["kind"], row["key"]] for row in ordered])
    same = and_(table.c.kind == key[0].as_string(), table.c.key == key[1].as_string())
    statement = select(table.c.kind, table.c.key, table.c.body).join_from(wanted, table, same, isouter=True)
    stored = {(kind, name): body for kind, name, body in connection.execute(statement)}
    found = [(row, stored[row["kind"], row["key"]]) for row in ordered]
    refused = [(row["kind"], row["key"], kept, row["body"]) for row, kept in found if kept != row["body"]]
    if not refused:
        return None
    conflicts.record_all(connection, refused)
    kind, name, kept, offered = refused[0]
    return conflicts.error(f"{kind} '{name}'", decode(kept), decode(offered), more=len(refused) - 1)


def get_many(connection: Connection, kind: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the values that are there, in the order of ``keys``."""
    columns = table.c
    wanted, key_column = listed(connection, [[key] for key in keys])
    same = and_(columns.kind == kind, columns.key == key_column[0].as_string())
    statement = select(columns.key, columns.body, columns.volatile).join_from(wanted, table, same, isouter=True)
    rows = [row for row in connection.execute(statement) if row[0] is not None]
    found = {key: decode(body) | (decode(volatile) if volatile else {}) for key, body, volatile in rows}
    return {key: found[key] for key in keys if key in found}
