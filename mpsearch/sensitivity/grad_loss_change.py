"""Loss change of single output channels, from their gradients along the rounding error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table, mean_cell
from mpsearch.sensitivity.derivatives import check_switches, gradients
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class GradLossChange:
    """Loss change of each output channel by its own gradient (MixLLM), summed over the channels.

    score = mean over samples of sum_o |g_o.d_o + 1/2 (g_o.d_o)^2| over the rows o of all the decision's layers, in nats
    per token, with g the gradient of one sample's mean loss and d = Q(W) - W. Without ``first_order`` only
    1/2 (g_o.d_o)^2; with ``diagonal`` the same of each weight in place of each row. A sum over rows is larger for
    layers of more rows, as their harm is: do not divide it by their size.

    Bias: a change of either sign counts as harm, so it bounds the first-order change of a decision from above. The
    second term is the empirical Fisher of whole samples: for a sequence of T predictions, g is a mean over them, and
    the term is about T times smaller than the Fisher per prediction that `fisher` takes. It is kept as MixLLM has it,
    where the first term outweighs it by far. MixLLM sums over samples and ranks the rows of all layers together.
    Standard error: over samples. Cost: one forward and backward pass of a single sample each; memory of one gradient,
    plus the kept quantisation errors (`Deltas`).

    Source: Zheng et al. 2024 (MixLLM) and microsoft/MixLLM, searcher.py.

    Attributes:
        first_order: keep g.d, the larger part away from a minimum.
        diagonal: leave out the products between weights of a row.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), loss=lambda m, x: m(x).sum(dim=-1).mean())
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(2, 1)], ["int2-tensor"], "grad_loss_change")
    >>> round(float(table.value[0, 0]), 4)  # the second row: 1 * 0.4 + 1/2 * 0.4^2
    0.48
    """

    first_order: bool = True
    diagonal: bool = False
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "backward"
    cost: ClassVar[str] = "1 forward and backward per sample"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        check_switches("grad_loss_change", first_order=self.first_order, diagonal=self.diagonal)

    def refuses(self, model: Model) -> str:
        return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        values = {(layer.name, fmt): list[float]() for layer in layers for fmt in formats if not fmt.refuses(layer)}
        reached: set[str] = set()
        count = 0
        for sample in samples_of(batch):
            count += 1
            for layer, g in zip(layers, gradients(model, sample, layers), strict=True):
                if g is not None:
                    reached.add(layer.name)
                for fmt in formats:
                    if (layer.name, fmt) in values:
                        # A sample that never meets the layer does not change with it.
                        rows = None if g is None else self.rows(layer, g, deltas.own(layer, fmt))
                        values[layer.name, fmt].append(0.0 if rows is None else float(rows.sum()))

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(layer.name not in reached for layer in decision.layers):
                return Cell(status="not_observed")
            parts = (values[layer.name, fmt] for layer in decision.layers)
            return mean_cell([math.fsum(sums) for sums in zip(*parts, strict=True)])

        return build_table(
            layers, formats, cell, unit="nats/token", samples=count, source={"estimator": "grad_loss_change"}
        )

    def rows(self, layer: Layer, gradient: Tensor, delta: Tensor) -> Tensor:
        """Loss change of each output channel of a layer on one sample.

        Args:
            layer: the layer.
            gradient: of the sample's mean loss in the weight.
            delta: Q(W) - W.

        Returns:
            (rows,) changes, float64, none below zero.
        """
        axes = layer.row_axes
        turned = (gradient.double() * delta.double()).movedim(axes, tuple(range(len(axes)))).reshape(layer.rows, -1)
        along = turned if self.diagonal else turned.sum(dim=1, keepdim=True)
        change = 0.5 * along.square()
        if self.first_order:
            change = change + along
        return torch.abs(change).sum(dim=1)
