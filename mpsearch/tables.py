"""Tables of scores and costs: one row per decision, one column per format, lower is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.keys import content_key
from mpsearch.spread import mean_and_error

Array = NDArray[np.float64]
#: How a cell came to be; only ``ok`` cells hold a value.
Status = Literal["ok", "not_offered", "non_finite", "not_observed"]


def _frozen(values: Any, shape: tuple[int, int]) -> Array:
    array: Array = np.array(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(
            f"a table of {shape[0]} rows and {shape[1]} formats needs values of that shape, got {array.shape}"
        )
    array.flags.writeable = False
    return array


def _pooled_cell(cell: Sequence[tuple[Status, float, float]], zero: bool) -> tuple[Status, float, float]:
    """Status, mean and standard error of one cell over batches.

    Args:
        cell: status, value and standard error in each batch.
        zero: whether a batch that does not reach the cell counts as 0.
    """
    for status in ("non_finite", "not_offered"):
        if any(found == status for found, _, _ in cell):
            return status, math.nan, math.nan
    seen = [(value, spread) for status, value, spread in cell if status == "ok"]
    if not seen:
        return "not_observed", math.nan, math.nan
    values = [value for value, _ in seen] + [0.0] * (len(cell) - len(seen) if zero else 0)
    return ("ok", *(seen[0] if len(values) == 1 else mean_and_error(values)))


def _reached(parts: Sequence[SensitivityTable]) -> dict[str, dict[str, list[int]]]:
    """Of decisions that some batches reached and others did not: [batches that did, batches]."""
    found: dict[str, list[int]] = {}
    for name, *rows in zip(parts[0].layers, *(p.status for p in parts), strict=True):
        there = sum("ok" in row for row in rows)
        if 0 < there < len(rows) and any("not_observed" in row for row in rows):
            found[name] = [there, len(rows)]
    return {"pooled": found} if found else {}


def _not_finite(parts: Sequence[SensitivityTable]) -> dict[str, dict[str, list[int]]]:
    """In which batches a decision had values that are not finite, where there are any."""
    found: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        for name, row in zip(part.layers, part.status, strict=True):
            if "non_finite" in row:
                found.setdefault(name, []).append(i)
    return {"not_finite": found} if found else {}


def _to_lists(values: Array) -> list[list[float | None]]:
    return [[float(x) if math.isfinite(x) else None for x in row] for row in values]


def _from_lists(rows: Sequence[Sequence[float | None]], shape: tuple[int, int]) -> Array:
    return np.array([[math.nan if x is None else x for x in row] for row in rows], dtype=np.float64).reshape(shape)


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """Predicted loss increase of each decision in each format.

    Attributes:
        layers: names of the L decisions (a layer's name, or the text of a tie).
        formats: names of the F formats.
        value: (L, F) predicted loss increase in ``unit``; NaN where the status is not ``ok``.
        spread: (L, F) standard error of ``value``, same unit; NaN where unknown.
        unit: such as ``nats/token``.
        status: (L, F) names of `Status`; made from ``value`` when left out.
        samples: how many independent samples stand behind each value.
        source: what made the table: estimator, settings, model, data.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    value: Array
    spread: Array
    unit: str
    status: tuple[tuple[Status, ...], ...] = ()
    samples: int = 1
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.formats))
        object.__setattr__(self, "value", _frozen(self.value, shape))
        object.__setattr__(self, "spread", _frozen(self.spread, shape))
        if not self.status:
            made = tuple(tuple("ok" if math.isfinite(x) else "not_offered" for x in row) for row in self.value)
            object.__setattr__(self, "status", made)
        for name, values, statuses in zip(self.layers, self.value, self.status, strict=True):
            for x, status in zip(values, statuses, strict=True):
                if (status == "ok") != math.isfinite(x):
                    raise ValueError(f"layer '{name}': a cell with value {x} has status '{status}'")

    def for_formats(self, formats: Sequence[str], harmless: Mapping[str, Sequence[bool]]) -> SensitivityTable:
        """Return the table with other columns.

        Args:
            formats: the columns, in order.
            harmless: format -> (L) whether it loses nothing; where it was not scored, it is offered there alone.

        >>> table = SensitivityTable(("a", "b"), ("int4",), np.ones((2, 1)), np.zeros((2, 1)), "nats/token")
        >>> table.for_formats(["bf16", "int4"], {"bf16": [True, False]}).value.tolist()
        [[0.0, 1.0], [nan, 1.0]]
        """
        place = {fmt: j for j, fmt in enumerate(self.formats)}
        value, spread = np.full((2, len(self.layers), len(formats)), np.nan)
        status: list[list[Status]] = [[] for _ in self.layers]
        for j, fmt in enumerate(formats):
            if fmt in place:
                value[:, j], spread[:, j] = self.value[:, place[fmt]], self.spread[:, place[fmt]]
            elif fmt in harmless:
                value[:, j] = spread[:, j] = np.where(np.array(harmless[fmt]), 0.0, np.nan)
            for i, row in enumerate(self.status):
                made: Status = "ok" if math.isfinite(value[i, j]) else "not_offered"
                status[i].append(row[place[fmt]] if fmt in place else made)
        return replace(self, formats=tuple(formats), value=value, spread=spread, status=tuple(map(tuple, status)))

    @property
    def key(self) -> str:
        """Content key of the table."""
        return content_key(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "formats": list(self.formats),
            "value": _to_lists(self.value),
            "spread": _to_lists(self.spread),
            "unit": self.unit,
            "status": [list(row) for row in self.status],
            "samples": self.samples,
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SensitivityTable:
        shape = (len(data["layers"]), len(data["formats"]))
        return cls(
            tuple(data["layers"]),
            tuple(data["formats"]),
            _from_lists(data["value"], shape),
            _from_lists(data["spread"], shape),
            str(data["unit"]),
            tuple(tuple(row) for row in data["status"]),
            int(data["samples"]),
            dict(data["source"]),
        )

    @classmethod
    def mean(cls, parts: Sequence[SensitivityTable]) -> SensitivityTable:
        """Average tables of independent batches of equal size.

        The value is the mean. The standard error comes from the spread between the batches, so it holds the doubt of
        the data as well as that of any probes, and is widened for few batches (`mean_and_error`); a single table
        keeps its own.

        A cell that is ``non_finite`` in any batch stays so. One that only some batches reached (an expert) is ``ok``:
        in nats per token the other batches count as 0, for what is not used does no harm there; in any other unit the
        mean is over those that reached it. ``source["pooled"]`` says for how many that was so: {decision: [batches that
        reached it, batches]}.

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
        zero = first.unit == "nats/token"
        values, spreads = ([p.value.tolist() for p in parts], [p.spread.tolist() for p in parts])
        cells = [
            [
                _pooled_cell(
                    [(p.status[i][j], v[i][j], s[i][j]) for p, v, s in zip(parts, values, spreads, strict=True)], zero
                )
                for j in range(len(first.formats))
            ]
            for i in range(len(first.layers))
        ]
        return cls(
            first.layers,
            first.formats,
            np.array([[cell[1] for cell in row] for row in cells]).reshape(first.value.shape),
            np.array([[cell[2] for cell in row] for row in cells]).reshape(first.value.shape),
            first.unit,
            tuple(tuple(cell[0] for cell in row) for row in cells),
            sum(p.samples for p in parts),
            {**first.source, **_not_finite(parts), **_reached(parts)},
        )

    def take(self, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> SensitivityTable:
        """Return some rows and some formats, by number, in the order they are asked for; all when left out."""
        i = list(range(len(self.layers)) if rows is None else rows)
        j = list(range(len(self.formats)) if columns is None else columns)
        return replace(
            self,
            layers=tuple(self.layers[row] for row in i),
            formats=tuple(self.formats[column] for column in j),
            value=self.value[i][:, j],
            spread=self.spread[i][:, j],
            status=tuple(tuple(self.status[row][column] for column in j) for row in i),
        )

    def non_monotone(self, costs: CostTable | Array, z: float = 2.0) -> list[tuple[str, str, str, float, float]]:
        """Name the pairs of formats where the dearer one scores worse, beyond chance.

        A pair counts when value[dearer] - value[cheaper] > z sqrt(spread[dearer]^2 + spread[cheaper]^2). Formats that
        round a layer's input differently (``W@A``) are not compared, for neither is better in every way; nor are
        scores whose error is not known. Both scores are mostly of the same samples, so the combined error is rather too
        large, and few pairs are named that are not so.

        Args:
            costs: what orders the formats of a row, such as their bytes; equal costs are not compared.
            z: how many combined standard errors a difference must exceed.

        Returns:
            (row, cheaper format, dearer format, excess, excess in combined standard errors).

        >>> table = SensitivityTable(("a",), ("int2", "int4"), [[1.0, 2.0]], [[0.3, 0.4]], "nats/token")
        >>> table.non_monotone(np.array([[2.0, 4.0]]), z=1.5)
        [('a', 'int2', 'int4', 1.0, 2.0)]
        """
        found = []
        for i, cheap, dear in self._steps(costs):
            excess = float(self.value[i, dear] - self.value[i, cheap])
            error = math.hypot(self.spread[i, cheap], self.spread[i, dear])
            if excess > z * error:
                sigmas = excess / error if error else math.inf
                found.append((self.layers[i], self.formats[cheap], self.formats[dear], excess, sigmas))
        return found

    def clamped(self, costs: CostTable | Array) -> SensitivityTable:
        """Return a table in which no dearer format scores worse than a cheaper one.

        Each cell takes the least value among its own and those of strictly cheaper formats of its row, with that
        cell's spread. That is right where more bytes can only help, as within one family of formats; a dearer format
        that really is worse is made to look as good as the cheaper one. Formats are compared as in `non_monotone`.

        >>> table = SensitivityTable(("a",), ("int2", "int4"), [[1.0, 2.0]], [[0.3, 0.4]], "nats/token")
        >>> table.clamped(np.array([[2.0, 4.0]])).value.tolist()
        [[1.0, 1.0]]
        """
        value, spread = self.value.copy(), self.spread.copy()
        for i, cheap, dear in self._steps(costs):
            if self.value[i, cheap] < value[i, dear]:
                value[i, dear], spread[i, dear] = self.value[i, cheap], self.spread[i, cheap]
        by = costs.resource if isinstance(costs, CostTable) else "cost"
        return replace(self, value=value, spread=spread, source={**self.source, "clamped": by})

    def _steps(self, costs: CostTable | Array) -> Iterator[tuple[int, int, int]]:
        """(row, cheaper column, dearer column) of all cells that can be compared."""
        cost = _frozen(costs.value if isinstance(costs, CostTable) else costs, self.value.shape)
        inputs = [name.partition("@")[2] for name in self.formats]
        for i, row in enumerate(self.status):
            there = [f for f, status in enumerate(row) if status == "ok" and math.isfinite(cost[i, f])]
            for cheap, dear in itertools.permutations(there, 2):
                if cost[i, cheap] < cost[i, dear] and inputs[cheap] == inputs[dear]:
                    yield i, cheap, dear


@dataclass(frozen=True, eq=False)
class CostTable:
    """What each decision costs in each format.

    Attributes:
        layers: names of the L decisions.
        formats: names of the F formats.
        value: (L, F) cost in ``unit``; NaN where the format is not offered.
        spread: (L, F) standard error; zeros for exact costs.
        unit: ``bytes``, ``bops/token``…
        resource: the name budgets use: ``weights``, ``bops``…
        kind: ``exact``, ``measured`` or ``modelled``.
        fixed: cost of everything that is not decided.
        reference: cost of the whole model with 16-bit weights; percentages refer to it.
        weights: number of weights of the whole model; bits per weight refer to it.
        source: what made the table.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    value: Array
    spread: Array
    unit: str
    resource: str
    kind: Literal["exact", "measured", "modelled"]
    fixed: float = 0.0
    reference: float = 0.0
    weights: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.formats))
        object.__setattr__(self, "value", _frozen(self.value, shape))
        object.__setattr__(self, "spread", _frozen(self.spread, shape))

    @property
    def key(self) -> str:
        """Content key of the table."""
        return content_key(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "formats": list(self.formats),
            "value": _to_lists(self.value),
            "spread": _to_lists(self.spread),
            "unit": self.unit,
            "resource": self.resource,
            "kind": self.kind,
            "fixed": self.fixed,
            "reference": self.reference,
            "weights": self.weights,
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostTable:
        shape = (len(data["layers"]), len(data["formats"]))
        return cls(
            tuple(data["layers"]),
            tuple(data["formats"]),
            _from_lists(data["value"], shape),
            _from_lists(data["spread"], shape),
            str(data["unit"]),
            str(data["resource"]),
            data["kind"],
            float(data["fixed"]),
            float(data["reference"]),
            int(data["weights"]),
            dict(data["source"]),
        )
