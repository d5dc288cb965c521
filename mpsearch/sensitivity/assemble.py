"""Putting single numbers into a table, and the quantisation errors that estimators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import quantized_weight
from mpsearch.model.cut import part_of, put
from mpsearch.model.digest import digest_of
from mpsearch.model.model import Model
from mpsearch.spread import mean_and_error
from mpsearch.tables import SensitivityTable, Status

#: Quantisation errors of all layers in all formats are kept up to this many bytes, else computed again.
KEEP_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Cell:
    """One score: value, standard error (NaN where unknown), status."""

    value: float = math.nan
    spread: float = math.nan
    status: Status = "ok"


def mean_cell(values: Sequence[float]) -> Cell:
    """Mean and standard error of one number per sample; ``non_finite`` if any is not finite."""
    if not all(math.isfinite(x) for x in values):
        return Cell(status="non_finite")
    return Cell(*mean_and_error(values))


def offered(decision: Decision, fmt: Format) -> bool:
    """Whether every layer of a decision can take a format."""
    return not any(fmt.refuses(layer) for layer in decision.layers)


def build_table(
    layers: Sequence[Layer],
    formats: Sequence[Format],
    cell: Callable[[Decision, Format], Cell],
    *,
    unit: str,
    samples: int,
    source: Mapping[str, Any],
) -> SensitivityTable:
    """Ask for every cell that is offered and put the answers into a table.

    A value that is not finite becomes the status ``non_finite``.
    """
    rows = decisions(layers)
    found = [
        [_checked(cell(row, fmt)) if offered(row, fmt) else Cell(status="not_offered") for fmt in formats]
        for row in rows
    ]
    shape = (len(rows), len(formats))
    return SensitivityTable(
        tuple(row.name for row in rows),
        tuple(str(fmt) for fmt in formats),
        np.array([[c.value for c in row] for row in found]).reshape(shape),
        np.array([[c.spread for c in row] for row in found]).reshape(shape),
        unit,
        tuple(tuple(c.status for c in row) for row in found),
        samples,
        source,
    )


def _checked(cell: Cell) -> Cell:
    return Cell(status="non_finite") if cell.status == "ok" and not math.isfinite(cell.value) else cell


def batch_seed(seed: int, batch: Any) -> int:
    """Make a seed from a seed and a batch's content, so that random draws do not depend on who scores the batch."""
    return int(digest_of([seed, batch])[:14], 16)


class Deltas:
    """Quantisation errors Q(W) - W, kept while they fit.

    Memory: one float32 copy of the weights per format, or `KEEP_BYTES`, whichever is less. Of a part of a layer only
    the part is kept.
    """

    def __init__(self, model: Model, keep_bytes: int = KEEP_BYTES) -> None:
        self._model = model
        self._kept: dict[tuple[str, Format], Tensor] = {}
        self._room = keep_bytes

    @classmethod
    def of(cls, model: Model) -> Deltas:
        """Return the errors of this model, shared between the estimators that use them."""
        return model.memo("deltas", model, lambda: cls(model, getattr(model, "keep_bytes", KEEP_BYTES)))

    def __call__(self, layer: Layer, fmt: Format) -> Tensor:
        """Q(W) - W of a layer in a format: float32, the weight's shape; NaN where the format cannot hold the weight.

        Of a part of a layer: in the shape of the whole weight, zero outside of the part.
        """
        delta = self.own(layer, fmt)
        if not layer.is_part:
            return delta
        return put({layer: delta}, torch.zeros_like(self._model.weight(layer.name).detach()))

    def own(self, layer: Layer, fmt: Format) -> Tensor:
        """As a call, but of a part of a layer only the part: (rows, columns)."""
        fmt = fmt.weight
        known = self._kept.get((layer.name, fmt))
        if known is not None:
            return known
        weight = part_of(self._model.weight(layer.name).detach(), layer)
        try:
            delta = quantized_weight(self._model, layer, fmt) - weight
        except InputError as error:
            if error.code != "E421":
                raise
            # The format cannot hold these weights: its cells become `non_finite`, and it is not chosen.
            return torch.full_like(weight, torch.nan)
        size = delta.numel() * delta.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[layer.name, fmt] = delta
        return delta
