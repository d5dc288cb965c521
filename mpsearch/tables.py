"""Tables of scores and costs: one row per decision, one column per format, lower is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


def _worst(cell: Sequence[Status]) -> Status:
    return next((status for status in cell if status != "ok"), "ok")


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
        keeps its own. A cell counts as ``ok`` only if it is ``ok`` in every batch.

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
        cells = np.stack([p.value for p in parts]).transpose(1, 2, 0).tolist()
        found = np.array([[mean_and_error(cell) for cell in row] for row in cells]).reshape(*first.value.shape, 2)
        value, spread = found[..., 0].copy(), found[..., 1].copy()
        status = tuple(
            tuple(_worst(cell) for cell in zip(*rows, strict=True))
            for rows in zip(*(p.status for p in parts), strict=True)
        )
        bad = np.array([[s != "ok" for s in row] for row in status]).reshape(first.value.shape)
        value[bad] = math.nan
        spread[bad] = math.nan
        return cls(
            first.layers, first.formats, value, spread, first.unit, status, sum(p.samples for p in parts), first.source
        )


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
