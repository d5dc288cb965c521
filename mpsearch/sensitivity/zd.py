"""ZD: how many weights stand out of their layer's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.statistics import importance_table
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Zd:
    """Share of weights with a z-score over 1, times relative weight errors.

    score = sum over the decision's layers of ZD ||Q(W) - W||^2 / ||W||^2, ZD = the share of weights with |z| > 1,
    z = (w - mean) / std over the layer, std with n - 1. With ``two_sided=False`` it is the share with z > 1.

    The paper ranks blocks by the mean of their linears' ZD; here every layer has its own. The ranking multiplies
    relative errors, which do not count a layer's size. Equal weights have no z-scores: 0. Knows nothing of the data.
    Exact, so the standard error is 0. Cost: one pass over the weights, in float64.
    Source: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415); two-sided as in published code.

    Attributes:
        two_sided: count both tails.

    >>> import torch
    >>> z_share(torch.tensor([0.0, 0.0, 0.0, 4.0])), z_share(torch.zeros(4))
    (0.25, 0.0)
    """

    two_sided: bool = True
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "weights only"
    needs: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.two_sided, bool):
            raise InputError("E113", f"zd: two_sided is {self.two_sided!r}; give true or false")

    def refuses(self, model: Model) -> str:
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        weights = {x.name: model.weight(x.name).detach() for x in layers if x.kind != "kv_cache"}
        importance = {name: z_share(weight, self.two_sided) for name, weight in weights.items()}
        return importance_table(model, layers, formats, importance, "zd", spread=0.0)


def z_share(weight: Tensor, two_sided: bool = True) -> float:
    """Share of weights further than one standard deviation from the mean; 0 when all are equal."""
    wide = weight.double()
    if wide.numel() < 2:
        return 0.0
    distance = wide - wide.mean()
    deviation = wide.std()
    # Subtracting the mean of equal numbers may leave the last bit.
    if float(deviation) <= 1e-12 * float(wide.abs().max()):
        return 0.0
    above = (distance.abs() if two_sided else distance) > deviation
    return float(above.double().mean())
