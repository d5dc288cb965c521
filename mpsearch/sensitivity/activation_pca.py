"""Activation PCA: how much of a layer's inputs lies outside of a few directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.statistics import importance_table, observe, runs, sequences_of
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class ActivationPca:
    """Share of the inputs' variance outside of the top directions, times relative weight errors.

    score = sum over the decision's layers of v ||Q(W) - W||^2 / ||W||^2, v = 1 - (sum of the greatest floor(r d)
    eigenvalues of X^T X) / trace, of inputs of d channels; X is not centred. v lies in 0..1.

    ResQ keeps the top r = 1/8 of directions in 8 bits and the rest in 4; v is what is left unprotected. It gives no
    score per layer and format, so v multiplies relative errors, which do not count a layer's size. A layer called
    several times in a batch has the mean of its calls, weighted by energy.

    A call of no more tokens than r d says nothing of the rest, since its rank is that low: such a layer is not observed
    (for 14336 channels give batches of over 1792 tokens). Inputs of zeros give 0. An embedding reads token
    numbers: v is 1. Stacked experts are not observed. Bias: v of few tokens is too small. Standard error: from batch to
    batch. Cost: a forward pass and, per layer, the eigenvalues of a matrix of min(tokens, channels) rows in float64.
    Source: after ResQ (Saxena et al. 2024; code utkarsh-dmx/project-resq).

    Attributes:
        top: share r of directions that count as protected.

    >>> import torch
    >>> outside(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])), 1)  # 9 of 12
    0.25
    """

    top: float = 0.125
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward, 1 eigendecomposition per layer"
    needs: ClassVar[Sequence[str]] = ("data",)

    def __post_init__(self) -> None:
        if not isinstance(self.top, (int, float)) or not 0 < self.top < 1:
            raise InputError("E113", f"activation_pca: top is {self.top!r}; give a number between 0 and 1")

    def refuses(self, model: Model) -> str:
        return runs(model)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        parts: dict[str, tuple[float, float]] = {}

        def see(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
            if layer.kind == "embedding":
                parts[layer.name] = (1.0, 1.0)
                return
            rows = sequences_of(module, x).flatten(0, 1)
            count = int(self.top * rows.shape[1])
            if len(rows) <= count:
                return
            energy = float(rows.double().square().sum())
            before = parts.get(layer.name, (0.0, 0.0))
            parts[layer.name] = (before[0] + outside(rows, count) * energy, before[1] + energy)

        observe(model, batch, layers, see)
        importance = {name: share / energy if energy else 0.0 for name, (share, energy) in parts.items()}
        return importance_table(model, layers, formats, importance, "activation_pca")


def outside(rows: Tensor, count: int) -> float:
    """Share of the energy of rows outside of their ``count`` strongest directions; 0 for zeros, NaN for NaN."""
    wide = rows.double()
    # Both products have the same eigenvalues beside zeros; the smaller one is taken.
    product = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    if not bool(product.isfinite().all()):
        return float("nan")
    values = torch.linalg.eigvalsh(product).clamp(min=0)
    total = float(values.sum())
    return float(values[: len(values) - count].sum()) / total if total else 0.0
