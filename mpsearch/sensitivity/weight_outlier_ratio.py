"""Weight outlier ratio: how far single weights stand out of what one input feeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.statistics import importance_table, matrices
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class WeightOutlierRatio:
    """Greatest over mean size of the weights of one input, times relative weight errors.

    score = sum over the decision's layers of r ||Q(W) - W||^2 / ||W||^2,
    r = max_j (max_i |W_ij| / mean_i |W_ij|), i over output channels and j over inputs; of stacked experts, or
    of the groups of a convolution, the greatest.

    A column of zeros stands out nowhere and is left out; r of a weight of zeros is 1. r lies in 1..rows. The paper
    ranks linears by r alone, so it multiplies relative errors, which do not count a layer's size. Knows nothing of the
    data, and hangs on one column. Exact, so the standard error is 0. Cost: one pass over the weights, in float64.
    Source: QuantMoE-Bench (Li et al. 2024; code UNITES-Lab/moe-quantization), "outlier-aware linear layer scorer".

    >>> import torch
    >>> outlier_ratio(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]))
    1.5
    """

    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 2
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "weights only"
    needs: ClassVar[Sequence[str]] = ()

    def refuses(self, model: Model) -> str:
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        importance = {x.name: outlier_ratio(matrices(x, model.weight(x.name))) for x in layers if x.kind != "kv_cache"}
        return importance_table(model, layers, formats, importance, "weight_outlier_ratio", spread=0.0)


def outlier_ratio(weights: Tensor) -> float:
    """Greatest ratio over the columns of (experts, rows, columns); 1 for zeros."""
    size = weights.abs()
    mean, most = size.mean(dim=1), size.amax(dim=1)
    ratios = torch.where(mean > 0, most / mean.clamp(min=1e-300), torch.ones_like(mean))
    return float(ratios.max())
