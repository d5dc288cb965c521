"""Tables of latency that were measured elsewhere: our own profiles, or a user's CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.hardware.kernel import Kernel, KernelTime
from mpsearch.hardware.profile import SCHEMA, Profile

#: Name of the column of times -> how many of its unit make a second.
UNITS: Mapping[str, float] = {"seconds": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_COLUMNS = ("layer", "kind", "rows", "columns", "format", "tokens", *UNITS, "low", "high")
_HELP = (
    "columns: format, tokens, one of seconds, ms, us or ns, and either layer or rows and columns "
    "(optionally kind, low and high)"
)
#: One kernel takes neither less than a nanosecond nor more than this.
_LONGEST = 1000.0


def read_profile(path: Path) -> Profile:
    """Read a file that `mpsearch profile` wrote, or a table of one's own.

    A table has a row for each layer, or each shape, in each format and number of tokens: ``format``, ``tokens`` (rows
    of the input: all new tokens of the batch), the time in a column named after its unit (``seconds``, ``ms``, ``us``,
    ``ns``), and either ``layer`` (name of the decision) or ``rows`` and ``columns`` of the weight; optionally ``kind``
    (``linear`` when left out) and ``low`` and ``high``, the ends of a 95 % interval in the same unit. JSON is a list of
    such records, or ``{"fused": true, "rows": [...]}`` where the engine runs tied linear layers as one product.

    Raises:
        InputError: no such file (E101), or one that is no such table (E433).
    """
    if not path.is_file():
        raise InputError("E101", f"engine: '{path}' is not a file", advice="write one with: mpsearch profile")
    rows, fused = _records(path)
    if isinstance(rows, Profile):
        return rows
    if not rows:
        raise InputError("E433", f"'{path}' holds no rows", advice=_HELP)
    times: dict[Kernel, KernelTime] = {}
    layers: dict[tuple[str, str, int], KernelTime] = {}
    for number, row in enumerate(rows, start=1):
        layer, found = _time(row, f"'{path}', row {number}")
        if found.kernel in times or (layer, found.kernel.format, found.kernel.tokens) in layers:
            raise InputError("E433", f"'{path}', row {number}: a second time of {layer or found.kernel}")
        if layer:
            layers[layer, found.kernel.format, found.kernel.tokens] = found
        else:
            times[found.kernel] = found
    identity = {"measured": "elsewhere", "table": path.name}
    return Profile("table", {"fuses": True} if fused else {}, identity, tuple(times.values()), layers=layers)


def _records(path: Path) -> tuple[list[Mapping[str, Any]] | Profile, bool]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path), False
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return list(csv.DictReader(text.splitlines())), False
        data = json.loads(text)
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError("E433", f"'{path}' cannot be read: {error}", advice=_HELP) from error
    if isinstance(data, Mapping) and data.get("schema") == SCHEMA:
        return Profile.from_json(data), False
    fused = isinstance(data, Mapping) and bool(data.get("fused"))
    rows = data.get("rows") if isinstance(data, Mapping) else data
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("E433", f"'{path}' is neither a profile nor a list of rows", advice=_HELP)
    return rows, fused


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError("E433", f"'{path}': Parquet needs pyarrow", advice="pip install 'mpsearch[tables]'") from error
    try:
        found: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError("E433", f"'{path}' cannot be read: {error}") from error
    return found


def _time(row: Mapping[str, Any], where: str) -> tuple[str, KernelTime]:
    """(name of the layer or nothing, its time)."""
    for name in row:
        if str(name).lower() in ("time", "latency", "duration"):
            raise InputError("E433", f"{where}: a column '{name}' has no unit", advice=f"name it {', '.join(UNITS)}")
        if name not in _COLUMNS:
            raise InputError("E433", f"{where}: no column '{name}'{did_you_mean(str(name), _COLUMNS)}", advice=_HELP)
    units = [name for name in UNITS if row.get(name) not in (None, "")]
    if len(units) != 1:
        what = "no time" if not units else f"times in {' and '.join(units)}"
        raise InputError("E433", f"{where}: {what}", advice=_HELP)
    unit = UNITS[units[0]]
    seconds = _number(row, units[0], where) / unit
    if not 1e-9 <= seconds <= _LONGEST:
        raise InputError(
            "E433",
            f"{where}: {seconds:g} s for one kernel",
            because="a kernel takes between a nanosecond and 1,000 seconds",
            advice="is the unit of the column right?",
        )
    low, high = (_number(row, name, where) / unit if row.get(name) else seconds for name in ("low", "high"))
    if not low <= seconds <= high:
        raise InputError("E433", f"{where}: {seconds:g} s is outside of its interval from {low:g} to {high:g} s")
    if not row.get("format"):
        raise InputError("E433", f"{where}: no format", advice=_HELP)
    fmt = str(Format.parse(str(row["format"])))
    layer = str(row.get("layer") or "")
    sizes = [_count(row, name, where) if not layer or row.get(name) else 0 for name in ("rows", "columns")]
    kind = str(row.get("kind") or "linear")
    kernel = Kernel.of(kind, sizes[0], sizes[1], fmt, _count(row, "tokens", where))
    return layer, KernelTime(kernel, seconds, low, high, 1)


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise InputError("E433", f"{where}: {name} is {row[name]!r}, no time above 0", advice=_HELP)
    return value


def _count(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    try:
        count = int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        count = 0
    if count < 1 or float(value) != count:  # type: ignore[arg-type]
        raise InputError("E433", f"{where}: {name} is {value!r}, no whole number from 1", advice=_HELP)
    return count
