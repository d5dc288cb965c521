"""Weight KL: how much rounding changes the distribution of a layer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.statistics import importance_table
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class WeightKl:
    """KL divergence of the histograms of the weights before and after rounding.

    score = sum over the decision's layers of KL(p || q) in nats; p and q are the shares of weights and of rounded
    weights in ``bins`` equal bins from the smallest to the greatest of both, after half a count is added to every bin,
    so that an empty bin gives no infinity.

    Each layer counts once, whatever its size. Bias: only distributions are compared: it does not see which weight went
    where, the half counts pull small layers towards 0, and rounding finer than a bin costs almost nothing. Knows
    nothing of the data. Exact, so the standard error is 0. Cost: one quantisation and two histograms per cell.
    Source: AdaPT (Kummer et al. 2021, arXiv 2107.13490), which lowers the bits until this divergence is no longer 0.

    Attributes:
        bins: number of bins.

    >>> import torch
    >>> round(histogram_kl(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]), 2), 6)
    0.087177
    """

    bins: int = 100
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "2 histograms per cell"
    needs: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or self.bins < 2:
            raise InputError("E113", f"weight_kl: bins is {self.bins!r}; give a whole number from 2")

    def refuses(self, model: Model) -> str:
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        deltas = Deltas.of(model)

        def error(layer: Layer, fmt: Format) -> float:
            weight = model.weight(layer.name).detach()
            return histogram_kl(weight, weight + deltas(layer, fmt), self.bins)

        every = {x.name: 1.0 for x in layers if x.kind != "kv_cache"}
        return importance_table(model, layers, formats, every, "weight_kl", spread=0.0, error=error, unit="nats")


def histogram_kl(before: Tensor, after: Tensor, bins: int) -> float:
    """KL(before || after) of the histograms of two tensors of one size; NaN where ``after`` is not finite."""
    if not bool(torch.isfinite(after).all()):
        return float("nan")
    values = torch.stack([before.double().flatten(), after.double().flatten()])
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 0.0
    places = ((values - low) / (high - low) * bins).long().clamp_(max=bins - 1)
    counts = torch.stack([torch.bincount(row, minlength=bins) for row in places]).double() + 0.5
    p, q = counts / counts.sum(dim=1, keepdim=True)
    return max(0.0, float((p * (p / q).log()).sum()))
