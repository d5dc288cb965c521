"""A view as little text as it takes, for the one-file report."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.planning import usable
from mpsearch.views.packed import choices, packed
from mpsearch.views.study_view import StudyView

Numbers = NDArray[np.float64]
_PATH = re.compile(r"(?:file:)?(?:~|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)")
#: Hexadecimal digits that name a plan in a link: two of a million plans have the same ones once in 500 reports.
KEY_DIGITS = 12


def compact(view: StudyView) -> dict[str, Any]:
    """Return what `mpsearch.views.packed.packed` does, less what follows from formats and tables.

    Of predicted losses, their errors, bounds and costs, an entry that the formats of its plan give to the last digit
    is ``True``; the report's script sums it up again. Keys are cut, and keys of files left out.

    Args:
        view: of the study.

    >>> from mpsearch.testing.views import pretended
    >>> compact(pretended(20, 16, 4))["points"]["predicted"][:2]
    [True, True]
    """
    data = packed(view)
    points, plain = view.points, data["points"]
    plain["key"] = [key[:KEY_DIGITS] for key in points.keys]
    plain["plan"] = []
    if view.scores is not None:
        settled = usable(view.scores)
        for name, table in (("predicted", settled.value), ("doubt", settled.spread)):
            plain[name] = _unless(plain[name], _sums(view, settled.formats, table))
        follows = zip(plain["bound"], points.bound, points.predicted, strict=True)
        plain["bound"] = [True if own == predicted else entry for entry, own, predicted in follows]
    for cost in view.costs:
        if cost.resource in plain["cost"]:
            sums = (cost.fixed + total for total in _sums(view, cost.formats, cost.value))
            plain["cost"][cost.resource] = _unless(plain["cost"][cost.resource], sums)
    return data


def without_folders(view: StudyView) -> StudyView:
    """The same view with only the last part of each path in model and provenance: a report goes to others.

    Names of layers, which may look like paths, stay.
    """
    model = {name: _last(value) for name, value in view.model.items()}
    return replace(view, model=model, provenance=_last(dict(view.provenance)))


def _last(value: Any) -> Any:
    """Plain values with the last part of what is a path."""
    if isinstance(value, Mapping):
        return {name: _last(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_last(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _unless(entries: Iterable[float | None], sums: Iterable[float]) -> list[float | bool | None]:
    """Leave out the entries that are sums."""
    return [True if entry is not None and entry == total else entry for entry, total in zip(entries, sums, strict=True)]


def _sums(view: StudyView, formats: Iterable[str], table: Numbers) -> Iterable[float]:
    """Yield the exact sum of a table over the decisions of each plan; NaN where a cell of it is not known."""
    place = {name: j for j, name in enumerate(view.points.formats)}
    wide = np.full((table.shape[0], len(place) + 1), np.nan)
    for j, name in enumerate(formats):
        wide[:, place.get(name, -1)] = table[:, j]
    wide[:, -1] = np.nan
    lead = np.array([view.rows.index(row) for row in range(len(view.layers.decisions))], dtype=np.intp)
    rows = np.arange(len(lead))
    for choice in view.points.choice:
        cells = wide[rows, choice[lead]].tolist()
        yield math.fsum(cells) if cells else math.nan


def squeezed(value: Mapping[str, Any] | bytes) -> str:
    """Return plain values, or bytes, as base 64 of zlib: nothing in it can be read as markup.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot hold.

    >>> squeezed(b"a" * 99) == squeezed(b"a" * 99), "<" in squeezed({"name": "<script>"})
    (True, False)
    """
    raw = value if isinstance(value, bytes) else _json(value)
    return base64.b64encode(zlib.compress(raw, 7)).decode("ascii")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str).encode("ascii")


def plans_of(view: StudyView) -> str:
    """Return the formats of all plans, squeezed."""
    return squeezed(choices(view))
