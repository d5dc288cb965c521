"""Tables that users bring themselves, read from CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.errors import InputError, did_you_mean
from mpsearch.problem import Problem
from mpsearch.tables import Array

_LARGEST = 2**31
_SCALES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LIMIT = re.compile(
    r"\s*(?P<resource>.+?)\s*<=\s*(?P<amount>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf)\s*(?P<unit>%|[A-Za-z]*)\s*"
)
_KEYS = ("row", "format")
_HELP = "columns: row, format, loss (spread, and a column for each resource); or row and one column for each format"


@dataclass(frozen=True, eq=False)
class OwnTable:
    """Losses and costs of a user's own rows and formats.

    Attributes:
        rows: names of the N rows.
        formats: names of the F formats.
        loss: (N, F) losses; NaN where a format is not offered.
        spread: (N, F) their standard errors; None when there are none.
        costs: resource -> (N, F) cost.
    """

    rows: tuple[str, ...]
    formats: tuple[str, ...]
    loss: Array
    spread: Array | None
    costs: Mapping[str, Array]

    def problem(self, budgets: Sequence[str]) -> Problem:
        """Make the problem with budgets such as ``bytes <= 1.5 MiB`` or ``bytes <= 40 %`` (of the dearest choice).

        Every resource becomes a cost; one without a budget has no limit.

        Raises:
            InputError: not a budget (E111), a resource that is not in the tables (E112), or costs that are missing
                where a loss is given (E214).
        """
        limits = dict.fromkeys(self.costs, math.inf)
        for text in budgets:
            resource, limit = self._limit(text)
            limits[resource] = min(limit, limits[resource])
        for resource, cost in self.costs.items():
            holes = np.argwhere(np.isfinite(self.loss) & ~np.isfinite(cost))
            if len(holes):
                i, j = holes[0].tolist()
                raise InputError(
                    "E214",
                    f"{len(holes)} cells have a loss and no {resource}: first row '{self.rows[i]}', {self.formats[j]}",
                    advice="give the cost, or leave the loss out where a format is not offered",
                )
        return Problem(
            self.loss,
            np.array(list(self.costs.values())).reshape(len(self.costs), *self.loss.shape),
            np.array(list(limits.values())),
            self.rows,
            self.formats,
            tuple(self.costs),
        )

    def _limit(self, text: str) -> tuple[str, float]:
        match = _LIMIT.fullmatch(text)
        if match is None:
            raise InputError("E111", f"budget: got '{text}'", advice="write one like 'bytes <= 1.5 MiB'")
        resource = match["resource"]
        if resource not in self.costs:
            raise InputError(
                "E112",
                f"budget '{text}': the tables have no resource '{resource}'{did_you_mean(resource, self.costs)}",
                advice=f"there is {', '.join(self.costs) or 'none: give --costs'}",
            )
        amount = float(match["amount"])
        if match["unit"] == "%":
            offered = np.isfinite(self.loss)
            dearest = np.where(offered, self.costs[resource], -math.inf).max(axis=1)
            return resource, amount / 100 * math.fsum(dearest.tolist())
        if match["unit"] not in _SCALES:
            raise InputError(
                "E112", f"budget '{text}': no unit '{match['unit']}'", advice=f"units: {', '.join(_SCALES)}, %"
            )
        return resource, amount * _SCALES[match["unit"]]


def read_tables(scores: Path, costs: Sequence[Path] = ()) -> OwnTable:
    """Read a table of losses, with costs in it or in tables of their own.

    A table is long (``row, format, loss`` with optional ``spread`` and one column for each resource) or wide (``row``
    and one column for each format; a wide table of costs is named after its file). JSON holds a list of such records,
    or ``{"rows", "formats", "loss", "spread", "cost": {resource: …}}`` with matrices. Empty cells, NaN and inf mean not
    offered.

    Raises:
        InputError: a file that is not there (E101) or cannot be read as a table (E214).
    """
    found = _Parts(*_read(scores, "loss"))
    for path in costs:
        found.add(*_read(path, path.stem), path)
    return found.table(scores)


class _Parts:
    """Named matrices over the same rows and formats."""

    def __init__(self, rows: Sequence[str], formats: Sequence[str], matrices: Mapping[str, Array]) -> None:
        self.rows, self.formats, self.matrices = tuple(rows), tuple(formats), dict(matrices)

    def add(self, rows: Sequence[str], formats: Sequence[str], matrices: Mapping[str, Array], path: Path) -> None:
        missing = [row for row in self.rows if row not in set(rows)] or [f for f in self.formats if f not in formats]
        if missing:
            raise InputError("E214", f"{path}: '{missing[0]}' of the losses is not in it")
        there = {row: i for i, row in enumerate(rows)}
        order = [there[row] for row in self.rows]
        columns = [list(formats).index(name) for name in self.formats]
        for name, matrix in matrices.items():
            if name in self.matrices:
                raise InputError("E214", f"{path}: '{name}' is given twice")
            self.matrices[name] = matrix[np.ix_(order, columns)]

    def table(self, path: Path) -> OwnTable:
        if "loss" not in self.matrices:
            raise InputError("E214", f"{path}: there is no loss", advice=_HELP)
        loss, spread = self.matrices.pop("loss"), self.matrices.pop("spread", None)
        if np.isneginf(loss).any():
            raise InputError("E214", f"{path}: a loss is -inf")
        if spread is not None and (spread < 0).any():
            raise InputError("E214", f"{path}: a spread is below 0", advice="spreads are standard errors")
        for what, names in (("row", self.rows), ("format", self.formats)):
            if "" in names or len(set(names)) < len(names):
                twice = next(name for name in names if not name or names.count(name) > 1)
                raise InputError("E214", f"{path}: {what} '{twice}' is empty or given twice")
        return OwnTable(self.rows, self.formats, np.where(np.isfinite(loss), loss, np.nan), spread, self.matrices)


def _read(path: Path, wide_name: str) -> tuple[Sequence[str], Sequence[str], Mapping[str, Array]]:
    """Rows, formats and matrices of one file."""
    if not path.is_file():
        raise InputError("E101", f"'{path}' is not a file")
    if path.stat().st_size > _LARGEST:
        raise InputError("E214", f"{path} is larger than 2 GiB", advice="call mp.solve with arrays")
    readers: Mapping[str, Any] = {".csv": _csv_columns, ".parquet": _parquet_columns, ".json": _json_columns}
    if path.suffix not in readers:
        raise InputError("E214", f"{path}: '{path.suffix}' is no kind of table", advice="give .csv, .json or .parquet")
    try:
        columns = readers[path.suffix](path)
    except (csv.Error, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError("E214", f"{path} cannot be read: {error}", advice=_HELP) from error
    if isinstance(columns, tuple):
        rows, formats, matrices = columns
        return rows, formats, matrices
    if "row" not in columns:
        raise InputError(
            "E214", f"{path}: there is no column 'row'", because=f"found: {', '.join(columns)}", advice=_HELP
        )
    return _long(path, columns) if "format" in columns else _wide(path, columns, wide_name)


def _csv_columns(path: Path) -> dict[str, list[Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise ValueError("a column is given twice")
        rows = [row for row in reader if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"line {number + 2} has {len(row)} cells, the first one {len(header)}")
    return {name: [row[k] for row in rows] for k, name in enumerate(header)}


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("E118", "reading Parquet needs pyarrow", advice="pip install 'mpsearch[tables]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        # A broken header is an OSError to it.
        raise ValueError(str(error)) from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _json_columns(path: Path) -> Any:
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, list) and data and all(isinstance(record, dict) for record in data):
        names = dict.fromkeys(name for record in data for name in record)
        return {name: [record.get(name) for record in data] for name in names}
    if not isinstance(data, dict) or not {"rows", "formats", "loss"} <= set(data):
        raise ValueError("expected a list of records, or rows, formats and loss")
    rows, formats = [str(x) for x in data["rows"]], [str(x) for x in data["formats"]]
    given = {"loss": data["loss"], **({"spread": data["spread"]} if data.get("spread") else {}), **data.get("cost", {})}
    matrices = {name: np.array([[_number(x) for x in row] for row in rows_]) for name, rows_ in given.items()}
    for name, matrix in matrices.items():
        if matrix.shape != (len(rows), len(formats)):
            raise ValueError(f"{name} has shape {matrix.shape}, expected {(len(rows), len(formats))}")
    return rows, formats, matrices


def _long(path: Path, columns: Mapping[str, list[Any]]) -> tuple[Sequence[str], Sequence[str], Mapping[str, Array]]:
    rows = {name: i for i, name in enumerate(dict.fromkeys(map(str, columns["row"])))}
    formats = {name: i for i, name in enumerate(dict.fromkeys(map(str, columns["format"])))}
    if not rows:
        raise InputError("E214", f"{path}: there is no row in it", advice=_HELP)
    at = np.array([rows[str(x)] for x in columns["row"]]), np.array([formats[str(x)] for x in columns["format"]])
    cells = at[0] * len(formats) + at[1]
    if len(np.unique(cells)) < len(cells):
        seen: set[int] = set()
        twice = next(k for k, cell in enumerate(cells.tolist()) if cell in seen or seen.add(cell))  # type: ignore[func-returns-value]
        raise InputError("E214", f"{path}: row '{columns['row'][twice]}' has {columns['format'][twice]} twice")
    matrices = {}
    for name in columns:
        if name not in _KEYS:
            matrices[name] = np.full((len(rows), len(formats)), np.nan)
            matrices[name][at] = _numbers(path, name, columns[name])
    return tuple(rows), tuple(formats), matrices


def _wide(
    path: Path, columns: Mapping[str, list[Any]], name: str
) -> tuple[Sequence[str], Sequence[str], Mapping[str, Array]]:
    rows = [str(x) for x in columns["row"]]
    if len(set(rows)) < len(rows):
        raise InputError("E214", f"{path}: row '{next(x for x in rows if rows.count(x) > 1)}' is given twice")
    formats = [column for column in columns if column != "row"]
    matrix = np.array([_numbers(path, column, columns[column]) for column in formats]).reshape(len(formats), len(rows))
    return rows, formats, {name: matrix.T}


def _numbers(path: Path, name: str, values: Sequence[Any]) -> list[float]:
    try:
        return [_number(value) for value in values]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError("E214", f"{path}: column '{name}': {error}", advice=_HELP) from None


def _number(value: Any) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return float(value)
