"""The bytes of a model's weights, exact: in our own files, or in the checkpoint formats of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.format import Format
from mpsearch.hardware.containers import check_container, kept_bytes, refuses, stored_bytes
from mpsearch.layer import Decision, Excluded, Layer, Layers, decisions
from mpsearch.tables import CostTable


@dataclass(frozen=True)
class Bytes:
    """Exact stored bytes of each decision in each format: codes, scales, zero points, padding.

    What is left out of the search counts with its stored bytes (``fixed``). Percentages of a budget refer to the
    model with 2 bytes per weight; bits per weight to all weights, left-out ones included. A format that the container
    cannot hold for a layer is not offered there (NaN).

    Attributes:
        container: checkpoint format, one of `mpsearch.hardware.containers.CONTAINERS`. The targets ``bytes@gptq``,
            ``bytes@awq``, ``bytes@compressed-tensors``, ``bytes@gguf`` and ``bytes@onnxruntime`` are this one with a
            container.

    >>> layers, formats = Layers((Layer("fc", "linear", (32, 64)),)), [Format.parse("int4-g64")]
    >>> [Bytes(where).cost(layers, formats).value.tolist() for where in ("native", "gptq", "gguf")]
    [[[1088.0]], [[1360.0]], [[nan]]]
    """

    container: str = "native"

    def __post_init__(self) -> None:
        check_container(self.container)

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        value = [[self._bytes(row, fmt) for fmt in formats] for row in rows]
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
            fixed=float(sum(kept_bytes(x, self.container) for x in kept)),
            reference=float(2 * weights),
            weights=weights,
            source={"target": "bytes" if self.container == "native" else f"bytes@{self.container}"},
        )

    def _bytes(self, row: Decision, fmt: Format) -> float:
        if any(refuses(fmt, layer, self.container) for layer in row.layers):
            return np.nan
        return float(sum(sum(stored_bytes(fmt, layer, self.container).values()) for layer in row.layers))


def gptq() -> Bytes:
    """The target ``bytes@gptq``."""
    return Bytes("gptq")


def awq() -> Bytes:
    """The target ``bytes@awq``."""
    return Bytes("awq")


def compressed_tensors() -> Bytes:
    """The target ``bytes@compressed-tensors``."""
    return Bytes("compressed-tensors")


def gguf() -> Bytes:
    """The target ``bytes@gguf``."""
    return Bytes("gguf")


def onnxruntime() -> Bytes:
    """The target ``bytes@onnxruntime``."""
    return Bytes("onnxruntime")
