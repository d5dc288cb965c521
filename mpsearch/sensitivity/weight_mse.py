"""Weight error: how far the rounded weights are from the original ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class WeightMse:
    """Squared weight error of each decision.

    score = sum over the decision's layers of ||Q(W) - W||_F^2, divided by ||W||_F^2 when ``relative``. For a part of a
    layer W in the divisor is the whole weight, so that the scores of all parts add up to the layer's.

    Needs no data. Knows nothing of how much a layer matters: a baseline. Exact, so the standard error is 0.
    Cost: one quantisation per layer and format. Relative errors are what HIGGS (Malinovskii et al. 2024,
    "Pushing the Limits of LLM Quantization via the Linearity Theorem") weighs by its linearity coefficients.

    Attributes:
        relative: divide by the weights' own squared norm; the unit is then ``relative squared error``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False)))
    >>> _ = model.module[0].weight.data.copy_(torch.tensor([[3.0, 1.0, 0.4, -1.6]]))
    >>> round(float(mp.score(model, [], ["int3-channel"], "weight_mse").value[0, 0]), 4)
    0.32
    """

    relative: bool = False
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "rounding only"
    needs: ClassVar[Sequence[str]] = ()

    def refuses(self, model: Model) -> str:
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        deltas = Deltas.of(model)

        def cell(decision: Decision, fmt: Format) -> Cell:
            total = 0.0
            for layer in decision.layers:
                error = float(deltas.own(layer, fmt).double().square_().sum())
                norm = float(model.weight(layer.name).detach().double().square_().sum()) if self.relative else 1.0
                total += error / norm if error else 0.0
            return Cell(total, 0.0)

        unit = "relative squared error" if self.relative else "squared weight error"
        return build_table(layers, formats, cell, unit=unit, samples=1, source={"estimator": "weight_mse"})
