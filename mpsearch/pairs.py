"""Interactions: what two decisions do together beyond what each does alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError, did_you_mean
from mpsearch.keys import content_key
from mpsearch.spread import student_factor
from mpsearch.tables import Array, SensitivityTable, Status

Places = NDArray[np.int32]
_PLACES = ("i", "f", "j", "g")
#: `PairTable.dense` makes matrices of at most this many rows.
_MOST_DENSE = 8192


@dataclass(frozen=True, eq=False)
class PairTable:
    """Interactions of pairs of cells: row ``i`` in format ``f`` together with row ``j`` in format ``g``.

    With ``singles``, the predicted loss of a choice c is
    sum_i singles[i, c_i] + sum_{i < j} value[(i, c_i), (j, c_j)]; pairs that are not in the table add nothing.

    Attributes:
        layers: names of the L decisions.
        formats: names of the F formats.
        i: row of the first cell of each of the P pairs; pairs are kept in the order of (i, f, j, g).
        f: its format.
        j: row of the second cell, larger than ``i``.
        g: its format.
        value: (P,) harm of both less the harm of each alone, in ``unit``; may be negative; NaN unless ``ok``.
        spread: (P,) standard error of ``value``; NaN where unknown.
        unit: such as ``nats/token``.
        status: (P,) ``ok``, or ``non_finite`` where the two give values that are not finite; made when left out.
        samples: how many independent samples stand behind each value.
        source: what made the table.
        singles: harm of each cell alone on the same samples, when it is known.

    >>> table = PairTable(("a", "b"), ("int2", "int4"), [0], [0], [1], [1], [-0.5], [0.1], "nats/token")
    >>> table.total(np.array([0, 1])), table.total(np.array([1, 1]))
    (-0.5, 0.0)
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    i: Places
    f: Places
    j: Places
    g: Places
    value: Array
    spread: Array
    unit: str
    status: tuple[Status, ...] = ()
    samples: int = 1
    source: Mapping[str, Any] = field(default_factory=dict)
    singles: SensitivityTable | None = None

    def __post_init__(self) -> None:
        for name in _PLACES:
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.int32))
        for name in ("value", "spread"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
        if not self.status:
            made = tuple("ok" if math.isfinite(x) else "non_finite" for x in self.value.tolist())
            object.__setattr__(self, "status", made)
        self._check()
        order = np.lexsort((self.g, self.j, self.f, self.i))
        for name in (*_PLACES, "value", "spread"):
            array = getattr(self, name)[order]
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "status", tuple(self.status[k] for k in order.tolist()))

    def _check(self) -> None:
        count = len(self.value)
        if any(getattr(self, name).shape != (count,) for name in (*_PLACES, "spread")) or len(self.status) != count:
            raise ValueError(f"a table of {count} pairs needs that many rows, formats, spreads and statuses")
        cells = [(self.i, self.f), (self.j, self.g)]
        rows, columns = len(self.layers), len(self.formats)
        if any(((a < 0) | (a >= rows) | (b < 0) | (b >= columns)).any() for a, b in cells):
            raise ValueError(f"a pair names a row or a format beyond the {rows} rows and {columns} formats")
        if (self.i >= self.j).any():
            raise ValueError("a pair must name two rows, the one that comes first in the table first")
        places = np.stack([getattr(self, name) for name in _PLACES], axis=1)
        if len(np.unique(places, axis=0)) < count:
            raise ValueError("a pair is given twice")
        if any((s == "ok") != math.isfinite(x) for s, x in zip(self.status, self.value.tolist(), strict=True)):
            raise ValueError("a pair is 'ok' exactly when its value is finite")
        alone = self.singles
        if alone is not None and (alone.layers, alone.formats, alone.unit) != (self.layers, self.formats, self.unit):
            raise ValueError("the singles have other rows, formats or another unit than the pairs")

    def __len__(self) -> int:
        return len(self.value)

    @property
    def key(self) -> str:
        """Content key of the table."""
        return content_key(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "formats": list(self.formats),
            **{name: getattr(self, name).tolist() for name in _PLACES},
            **{name: [x if math.isfinite(x) else None for x in getattr(self, name).tolist()] for name in _NUMBERS},
            "unit": self.unit,
            "status": list(self.status),
            "samples": self.samples,
            "source": dict(self.source),
            "singles": None if self.singles is None else self.singles.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PairTable:
        def numbers(name: str) -> Any:
            return np.array([math.nan if x is None else x for x in data[name]], dtype=np.float64)

        return cls(
            tuple(data["layers"]),
            tuple(data["formats"]),
            data["i"],
            data["f"],
            data["j"],
            data["g"],
            numbers("value"),
            numbers("spread"),
            str(data["unit"]),
            tuple(data["status"]),
            int(data["samples"]),
            dict(data["source"]),
            None if data["singles"] is None else SensitivityTable.from_json(data["singles"]),
        )

    @classmethod
    def mean(cls, parts: Sequence[PairTable]) -> PairTable:
        """Average tables of independent batches of equal size, as `SensitivityTable.mean` does.

        Only pairs that are in every table are kept: one that a batch did not reach is not known.

        Raises:
            ValueError: no tables, or tables of different layers, formats or units.
        """
        if not parts:
            raise ValueError("the mean of no tables is not defined")
        first = parts[0]
        if len(parts) == 1:
            return first
        if any((p.layers, p.formats, p.unit) != (first.layers, first.formats, first.unit) for p in parts):
            raise ValueError("tables to average must have the same layers, formats and unit")
        codes = [part._codes() for part in parts]
        common = codes[0]
        for other in codes[1:]:
            common = np.intersect1d(common, other, assume_unique=True)
        rows = [np.searchsorted(code, common) for code in codes]
        values = np.stack([p.value[at] for p, at in zip(parts, rows, strict=True)])
        value, spread = mean_and_errors(values)
        singles = [p.singles for p in parts if p.singles is not None]
        at = rows[0]
        return cls(
            first.layers, first.formats, first.i[at], first.f[at], first.j[at], first.g[at], value, spread, first.unit,
            (), sum(p.samples for p in parts), first.source,
            SensitivityTable.mean(singles) if len(singles) == len(parts) else None,
        )  # fmt: skip

    def _codes(self) -> NDArray[np.int64]:
        """One number per pair, rising."""
        rows, columns = len(self.layers), len(self.formats)
        cell = self.i.astype(np.int64) * columns + self.f
        return (cell * rows + self.j) * columns + self.g

    def dense(self, *, singles: bool = False) -> Array:
        """Return the symmetric matrix M with which x^T M x / 2 is the interaction of a choice x.

        x has one entry per cell, row by row: x[i * F + f] is 1 where row i takes format f, else 0. Pairs that are not
        in the table are 0, and so is the diagonal, or twice the harm of the single cells, so that x^T M x / 2 is the
        whole predicted loss. Cells and pairs without a finite value are +inf: they are barred, and a solver must take
        them out before it multiplies.

        Args:
            singles: put the single cells on the diagonal.

        Raises:
            InputError: more than 8192 cells, or no singles are known (E212).
        """
        columns = len(self.formats)
        size = len(self.layers) * columns
        if size > _MOST_DENSE:
            raise InputError(
                "E212",
                f"interactions: {size} cells would make a matrix of {size * size * 8 / 2**30:.1f} GiB",
                advice=f"take the sparse arrays, or the rows of interest with `of`; at most {_MOST_DENSE} cells",
            )
        found: Array = np.zeros((size, size))
        a, b = self.i * columns + self.f, self.j * columns + self.g
        found[a, b] = found[b, a] = np.where(np.isfinite(self.value), self.value, np.inf)
        if singles:
            alone = self._alone().value.reshape(-1)
            np.fill_diagonal(found, np.where(np.isfinite(alone), 2 * alone, np.inf))
        return found

    def total(self, choice: NDArray[np.int64], *, singles: bool = False) -> float:
        """Return the sum of the interactions of a choice; infinite when it holds a pair that is barred.

        Args:
            choice: (L,) column of each row.
            singles: add the harm of the single cells: the whole predicted loss.

        Raises:
            InputError: no singles are known (E212).
        """
        taken = np.asarray(choice)
        if taken.shape != (len(self.layers),) or ((taken < 0) | (taken >= len(self.formats))).any():
            raise ValueError(f"a choice names one of {len(self.formats)} columns for each of {len(self.layers)} rows")
        values = self.value[(taken[self.i] == self.f) & (taken[self.j] == self.g)].tolist()
        if singles:
            values += self._alone().value[np.arange(len(taken)), taken].tolist()
        return math.fsum(values) if all(map(math.isfinite, values)) else math.inf

    def of(self, layers: Iterable[str]) -> PairTable:
        """Return the pairs among some decisions, in the table's own order.

        Raises:
            InputError: no such decision (E120).
        """
        wanted = set(layers)
        for name in sorted(wanted - set(self.layers)):
            raise InputError("E120", f"interactions: no decision '{name}'{did_you_mean(name, self.layers)}")
        kept = [row for row, name in enumerate(self.layers) if name in wanted]
        place = np.full(len(self.layers), -1, dtype=np.int32)
        place[kept] = np.arange(len(kept))
        at = np.flatnonzero((place[self.i] >= 0) & (place[self.j] >= 0))
        alone = self.singles
        return PairTable(
            tuple(self.layers[row] for row in kept), self.formats, place[self.i[at]], self.f[at], place[self.j[at]],
            self.g[at], self.value[at], self.spread[at], self.unit, tuple(self.status[k] for k in at.tolist()),
            self.samples, self.source, None if alone is None else alone.take(kept),
        )  # fmt: skip

    def _alone(self) -> SensitivityTable:
        if self.singles is None:
            raise InputError("E212", "interactions: the harm of the single cells is not known")
        return self.singles


_NUMBERS = ("value", "spread")


def mean_and_errors(values: Array) -> tuple[Array, Array]:
    """Mean and standard error over the first axis, widened for few samples as in `mean_and_error`.

    Both are NaN where any sample is not finite; the error of a single sample is NaN.

    >>> mean, error = mean_and_errors(np.array([[1.0], [2.0], [3.0]]))
    >>> float(mean[0]), round(float(error[0]) / student_factor(2), 4)
    (2.0, 0.5774)
    """
    count = len(values)
    finite = np.isfinite(values).all(axis=0)
    kept = np.where(finite, values, 0.0)
    mean: Array = np.where(finite, kept.mean(axis=0), np.nan)
    if count < 2:
        return mean, np.full(mean.shape, np.nan)
    error = np.sqrt(kept.var(axis=0, ddof=1) / count) * student_factor(count - 1)
    return mean, np.where(finite, error, np.nan)
