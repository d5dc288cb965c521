"""Group range: what one scale for a whole row wastes against a scale per group."""

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
from mpsearch.sensitivity.statistics import importance_table, matrices
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class GroupRange:
    """Range of a row over the mean range of its groups, times relative weight errors.

    score = sum over the decision's layers of g ||Q(W) - W||^2 / ||W||^2, where g is the mean over rows of
    (max - min of the row) / mean over its groups of (max - min of the group).

    g is at least 1, and 1 where all groups are as wide as the row, or the row is one group. The last group of a row may
    be shorter. Rows of equal weights are left out; g of a layer of such rows is 1. The ratio decides in FineQuant
    whether groups are made smaller and gives no score of a format, so it multiplies relative errors, which do not
    count a layer's size. Knows nothing of the data. Exact, so the standard error is 0. Cost: one pass over the weights.
    Source: after FineQuant (Kim et al. 2023, arXiv 2308.09723), adaptive group size; here with a fixed group.

    Attributes:
        group: weights of a row that make a group.

    >>> import torch
    >>> range_ratio(torch.tensor([[[0.0, 1.0, 0.0, 4.0]]]), 2)  # 4 / mean(1, 4)
    1.6
    """

    group: int = 64
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "weights only"
    needs: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 2:
            raise InputError("E113", f"group_range: group is {self.group!r}; give a whole number from 2")

    def refuses(self, model: Model) -> str:
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        importance = {
            x.name: range_ratio(matrices(x, model.weight(x.name)), self.group) for x in layers if x.kind != "kv_cache"
        }
        return importance_table(model, layers, formats, importance, "group_range", spread=0.0)


def range_ratio(weights: Tensor, group: int) -> float:
    """Mean over the rows (last axis) of row range over mean group range; 1 where every row is flat."""
    rows = weights.reshape(-1, weights.shape[-1]).double()
    parts = torch.stack([part.amax(dim=1) - part.amin(dim=1) for part in torch.split(rows, group, dim=1)])
    groups = parts.mean(dim=0)
    whole = rows.amax(dim=1) - rows.amin(dim=1)
    # Groups that are flat each, at different heights, would make the ratio infinite: it is at most their number.
    ratios = torch.where(groups > 0, whole / groups.clamp(min=1e-300), torch.full_like(whole, float(len(parts))))
    ratios = ratios.clamp(max=float(len(parts)))[whole > 0]
    return float(ratios.mean()) if len(ratios) else 1.0
