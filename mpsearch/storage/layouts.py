"""The columns of the tables in every schema there was: of which table is a record that is found by itself?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.schema import Table

from mpsearch.storage.engine import make_engine
from mpsearch.storage.pages import Value
from mpsearch.storage.place import Place
from mpsearch.storage.schema import SCHEMA, metadata

Row = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Layout:
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


def layouts() -> Iterator[Layout]:
    """Yield the tables as each schema has them, the oldest first."""
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
                    if layout is not None and (layout.table.name, layout.columns, layout.types) not in seen:
                        seen.add((layout.table.name, layout.columns, layout.types))
                        yield layout
        finally:
            engine.dispose()


def _layout(table: Table, rows: Any) -> Layout:
    kinds = {"BIGINT": "whole", "INTEGER": "whole", "DOUBLE": "real", "FLOAT": "real", "REAL": "real"}
    declared = [str(row[2]).partition("(")[0].upper() for row in rows]
    keys = [i for i, row in enumerate(rows) if row[5]]
    alias = keys[0] if len(keys) == 1 and declared[keys[0]] == "INTEGER" else -1
    numbered = bool(table.dialect_options["sqlite"]["with_rowid"])
    return Layout(
        table,
        tuple(str(row[1]) for row in rows),
        tuple(kinds.get(kind, "text") for kind in declared),
        tuple(bool(row[3]) and i != alias for i, row in enumerate(rows)),
        numbered,
        alias,
    )
