"""The bytes of a model's weights, exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers, decisions
from mpsearch.tables import CostTable


@dataclass(frozen=True)
class Bytes:
    """Exact stored bytes of each decision in each format: codes, scales, zero points, padding.

    What is left out of the search counts with its stored bytes (``fixed``). Percentages of a budget refer to the
    model with 2 bytes per weight; bits per weight to all weights, left-out ones included.

    >>> table = Bytes().cost(Layers((Layer("fc", "linear", (8, 64)),)), [Format.parse("int4-g64")])
    >>> table.value.tolist(), table.unit
    ([[272.0]], 'bytes')
    """

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        value = [
            [
                np.nan if any(fmt.refuses(x) for x in row.layers) else float(sum(fmt.bytes(x) for x in row.layers))
                for fmt in formats
            ]
            for row in rows
        ]
        kept: tuple[Excluded, ...] = layers.excluded if isinstance(layers, Layers) else ()
        weights = sum(layer.weights for layer in layers) + sum(x.weights for x in kept)
        array = np.array(value, dtype=np.float64).reshape(len(rows), len(formats))
        return CostTable(
            tuple(row.name for row in rows),
            tuple(str(fmt) for fmt in formats),
            array,
            np.where(np.isnan(array), np.nan, 0.0),
            unit="bytes",
            resource="weights",
            kind="exact",
            fixed=float(sum(x.stored_bytes for x in kept)),
            reference=float(2 * weights),
            weights=weights,
            source={"target": "bytes"},
        )
