"""Gradient times rounding error: the first-order loss change of every weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.apply import swapped
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table, mean_cell
from mpsearch.sensitivity.derivatives import gradients, own_weight, total
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class GradTimesWeight:
    """First-order loss change of every weight, all counted as harm.

    score = mean over samples of sum_i |g_i (Q(w_i) - w_i)| over all weights of the decision, in nats per token, with g
    the gradient of one sample's mean loss.

    A sum over weights: a layer of more weights scores higher, as its harm can be; do not divide it by its size.
    Bias: an upper bound of the first-order change, far above it where the signs of the errors differ, and no curvature.
    ``at="original"`` takes the gradient of the model as it is, one pass per sample for all formats;
    ``at="quantized"`` takes it, as AutoRound's scheduler does, with all scored layers rounded to the format, one pass
    per sample and format: it sees that the other layers are rounded as well. Layers that cannot take the format stay as
    they are there. AutoRound adds the same sum for the layer's inputs, which is left out here.
    Standard error: over samples. Cost: one forward and backward pass of a single sample each; memory of one gradient,
    plus the kept quantisation errors (`Deltas`).

    Source: intel/auto-round, auto_scheme/delta_loss.py.

    Attributes:
        at: ``original`` or ``quantized``: the model whose gradient is taken.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(2, 1, bias=False), loss=lambda m, x: m(x).mean())
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
    >>> table = mp.score(model, [torch.tensor([[5.0, -3.0]])], ["int2-tensor"], "grad_x_weight")
    >>> round(float(table.value[0, 0]), 4)  # |-3 * (0 - 0.4)|
    1.2
    """

    at: Literal["original", "quantized"] = "original"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 2
    cost: ClassVar[str] = "1 forward and backward per sample"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        if self.at not in ("original", "quantized"):
            raise InputError("E113", f"grad_x_weight: at is {self.at!r}; give 'original' or 'quantized'")

    @property
    def streams(self) -> Literal["", "backward"]:
        """A gradient at rounded weights needs all of them at once."""
        return "backward" if self.at == "original" else ""

    def refuses(self, model: Model) -> str:
        return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        samples = list(samples_of(batch))
        values = {(layer.name, fmt): list[float]() for layer in layers for fmt in formats if not fmt.refuses(layer)}
        reached: set[tuple[str, Format]] = set()
        # Per sample, the formats that share a gradient, and the weights it is taken at.
        groups: list[tuple[Sequence[Format], Mapping[Layer, Tensor]]] = [(formats, {})]
        if self.at == "quantized":
            groups = [([fmt], _rounded(model, layers, fmt)) for fmt in formats]
        for sample in samples:
            for menu, weights in groups:
                with swapped(model, weights):
                    found = gradients(model, sample, layers)
                for layer, g in zip(layers, found, strict=True):
                    for fmt in (f for f in menu if (layer.name, f) in values):
                        if g is not None:
                            reached.add((layer.name, fmt))
                        # A sample that never meets the layer does not change with it.
                        change = 0.0 if g is None else total(torch.mul(g, deltas.own(layer, fmt)).abs_())
                        values[layer.name, fmt].append(change)

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any((layer.name, fmt) not in reached for layer in decision.layers):
                return Cell(status="not_observed")
            parts = (values[layer.name, fmt] for layer in decision.layers)
            return mean_cell([math.fsum(sums) for sums in zip(*parts, strict=True)])

        return build_table(
            layers, formats, cell, unit="nats/token", samples=len(samples), source={"estimator": "grad_x_weight"}
        )


def _rounded(model: Model, layers: Sequence[Layer], fmt: Format) -> Mapping[Layer, Tensor]:
    """The weights of all layers that a format can hold, rounded to it."""
    deltas = Deltas.of(model)
    errors = {layer: deltas.own(layer, fmt) for layer in layers if not fmt.refuses(layer)}
    return {x: own_weight(model, x) + d for x, d in errors.items() if bool(d.isfinite().all())}
