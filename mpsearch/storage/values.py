"""JSON values under their content key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, select

from mpsearch.errors import StorageError
from mpsearch.storage import conflicts
from mpsearch.storage.portable import insert_new, listed, now
from mpsearch.storage.schema import value_table as table
from mpsearch.storage.text import decode


def put(connection: Connection, kind: str, key: str, body: str, volatile: str | None) -> StorageError | None:
    """Insert a value; return the error to raise, after the commit, if the key holds another one."""
    row = {"kind": kind, "key": key, "body": body, "volatile": volatile, "created": now()}
    insert_new(connection, table, [row])
    stored = connection.execute(select(table.c.body).where(table.c.kind == kind, table.c.key == key)).scalar_one()
    if stored == body:
        return None
    conflicts.record(connection, kind, key, stored, body)
    return conflicts.error(f"{kind} '{key}'", decode(stored), decode(body))


def get_many(connection: Connection, kind: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the values that are there, in the order of ``keys``."""
    columns = table.c
    wanted, key_column = listed(connection, [[key] for key in keys])
    same = and_(columns.kind == kind, columns.key == key_column[0].as_string())
    statement = select(columns.key, columns.body, columns.volatile).join_from(wanted, table, same, isouter=True)
    rows = [row for row in connection.execute(statement) if row[0] is not None]
    found = {key: decode(body) | (decode(volatile) if volatile else {}) for key, body, volatile in rows}
    return {key: found[key] for key in keys if key in found}
