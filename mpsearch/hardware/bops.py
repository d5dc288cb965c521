"""Bit operations: multiply-adds times the bits of both factors, modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers, decisions
from mpsearch.tables import CostTable


@dataclass(frozen=True)
class Bops:
    """Bit operations per token: multiply-adds x bits of the weight x bits of the activation (HAWQ-V3).

    A model of cost, not a measurement: scales, zero points and everything that is no product of weights (attention
    scores, norms) are left out. Percentages of a budget refer to 16-bit weights and 16-bit activations.

    Attributes:
        activation_bits: bits of activations that a format leaves as they are.

    >>> table = Bops().cost([Layer("fc", "linear", (8, 64), macs=512)], [Format.parse("int4-g64")])
    >>> table.value.tolist(), table.kind
    ([[32768.0]], 'modelled')
    """

    activation_bits: int = 16

    def _input_bits(self, fmt: Format) -> int:
        return self.activation_bits if fmt.activation is None else fmt.activation.bits

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        if not any(layer.macs for layer in layers):
            raise InputError(
                "E420",
                "bops: no layer has multiply-adds",
                advice="find the layers with a batch: mp.layers(model, batch=…)",
            )
        rows = decisions(layers)
        value = [
            [
                np.nan
                if any(fmt.refuses(x) for x in row.layers)
                else float(sum(x.macs for x in row.layers) * fmt.bits * self._input_bits(fmt))
                for fmt in formats
            ]
            for row in rows
        ]
        array = np.array(value, dtype=np.float64).reshape(len(rows), len(formats))
        unit = layers.unit if isinstance(layers, Layers) else "token"
        return CostTable(
            tuple(row.name for row in rows),
            tuple(str(fmt) for fmt in formats),
            array,
            np.where(np.isnan(array), np.nan, 0.0),
            unit=f"BOPs/{unit}",
            resource="bops",
            kind="modelled",
            reference=float(sum(layer.macs for layer in layers) * 16 * self.activation_bits),
            weights=sum(layer.weights for layer in layers),
            source={"target": "bops", "activation_bits": self.activation_bits},
        )
