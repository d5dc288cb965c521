"""The bytes of the KV caches at a context length, exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.kv_cache import KvCache
from mpsearch.layer import Layer, decisions
from mpsearch.tables import CostTable


@dataclass(frozen=True)
class KvBytes:
    """Exact bytes of the keys and values of a batch of sequences: codes, scales, zero points, what is in 16 bits.

    Weights cost nothing here. Percentages of a budget refer to caches with 2 bytes per number. What an engine adds
    (pages that are not full, tables of pages) is left out.

    Attributes:
        context: tokens of each sequence.
        batch: sequences.

    >>> layers = [Layer("attn.k_cache", "kv_cache", (2, 64))]
    >>> KvBytes(context=100).cost(layers, [Format.parse("kv-int8-token")]).value.tolist()
    [[13200.0]]
    """

    context: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("batch", self.batch)):
            if not isinstance(value, int) or value < 1:
                raise InputError("E113", f"kv: {name} is {value!r}; give a whole number from 1")

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        value = [
            [
                np.nan
                if any(fmt.refuses(x) for x in row.layers)
                else float(sum(self.batch * self._bytes(x, fmt) for x in row.layers))
                for fmt in formats
            ]
            for row in rows
        ]
        array = np.array(value, dtype=np.float64).reshape(len(rows), len(formats))
        numbers = sum(x.rows * x.columns * self._tokens(x) for x in layers if x.kind == "kv_cache")
        return CostTable(
            tuple(row.name for row in rows),
            tuple(str(fmt) for fmt in formats),
            array,
            np.where(np.isnan(array), np.nan, 0.0),
            unit="bytes",
            resource=f"kv {self.condition}",
            kind="exact",
            reference=float(2 * numbers * self.batch),
            source={"target": "kv", "context": self.context, "batch": self.batch},
        )

    @property
    def condition(self) -> str:
        """How a budget writes it: ``at context 8192``, ``at context 8192, batch 4``."""
        return f"at context {self.context}" + (f", batch {self.batch}" if self.batch > 1 else "")

    def _tokens(self, layer: Layer) -> int:
        """Tokens of each sequence that a cache holds."""
        return min(self.context, layer.window or self.context)

    def _bytes(self, layer: Layer, fmt: Format) -> int:
        return sum(fmt.cache_bytes(layer, self.context).values()) if isinstance(fmt, KvCache) else 0
