"""Tables of rows that read as cards on a narrow screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpsearch.web.markup import Html, tag


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: what it holds.
        source: how its numbers came about and their unit, such as ``measured, nats/token``.
        numeric: whether to align it right.
    """

    title: str
    source: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its cells, the first one naming it; marked or not; number of its plan."""

    cells: Sequence[object]
    marked: bool = False
    plan: int | None = None


def data_table(name: str, columns: Sequence[Column], rows: Iterable[Row]) -> Html:
    """Write a table; cells that are not HTML are escaped.

    Args:
        name: id of the table.
        columns: what the columns hold.
        rows: cells in the order of the columns.
    """
    head = tag("tr", *(_heading(column) for column in columns))
    table = tag(
        "table", tag("thead", head), tag("tbody", *(_row(columns, row) for row in rows)), class_="list", id=name
    )
    return tag("div", table, class_="scroll")


def _heading(column: Column) -> Html:
    source = tag("small", column.source) if column.source else ""
    return tag("th", column.title, source, scope="col", class_="n" if column.numeric else None)


def _row(columns: Sequence[Column], row: Row) -> Html:
    first, *others = row.cells
    cells = (
        tag(
            "td",
            cell,
            data_label=f"{column.title}{', ' if column.source else ''}{column.source}",
            class_="n" if column.numeric else None,
        )
        for column, cell in zip(columns[1:], others, strict=True)
    )
    return tag("tr", tag("th", first, scope="row"), *cells, class_="chosen" if row.marked else None, data_plan=row.plan)
