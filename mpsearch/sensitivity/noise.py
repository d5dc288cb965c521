"""Noise: what a format would do, from uniform noise of its step in the place of rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.integer import Integer
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import Change, quantized_parts
from mpsearch.model.digest import digest_of
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table, mean_cell, offered
from mpsearch.sensitivity.harm import AGAINST, Against, Harm, called, refusal
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Noise:
    """Harm of uniform noise as wide as a format's step, added to one decision's weights.

    score = mean over samples and draws of harm(W + s u), u uniform in [-1/2, 1/2): the KL divergence from the original
    model, or the increase of its loss. Against the loss each u is used with both signs, which cancels its first-order
    term.

    s is the step between neighbouring codes: for integers the stored scale of the weight's group. Other formats have
    no one step; s is then that of the uniform noise with the format's squared error in the weight's output channel,
    s^2 / 12 = mean (Q(w) - w)^2. Noise of a step has the error s^2 / 12 of rounding that never
    clips and whose weights lie anywhere between two codes; unlike rounding it is independent of the weight, so that
    the average over draws does not hang on how this one rounding happened to fall.

    Bias: blind to what rounding does that noise does not: clipping, errors that follow the weights (few bits), and the
    error feedback of ``-gptq``. Standard error: over samples, from batch to batch when there are several, each of
    which draws noise of its own. Cost: ``draws`` forward passes per decision and format (twice that against the loss),
    for language models from the changed layer on, and one rounding per batch. Memory: the kept errors (`Deltas`).
    Source: additive noise in the place of rounding, as in NIPQ (Shin et al. 2023) and DiffQ (Défossez et al. 2022).

    Attributes:
        draws: noises per batch.
        seed: seed of the noise.
        against: ``kl`` (divergence from the original) or ``loss``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), loss=lambda m, x: m(x).square().sum())
    >>> _ = model.module.weight.data.copy_(torch.tensor([[7.0], [7.0]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int4-tensor"], "noise", draws=1000, against="loss")
    >>> bool(abs(table.value[0, 0] - 2 / 12) < 0.01)  # two weights of step 1
    True
    """

    draws: int = 2
    seed: int = 0
    against: Against = "kl"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 forward per cell"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        if not isinstance(self.draws, int) or isinstance(self.draws, bool) or self.draws < 1:
            raise InputError("E113", f"noise: draws is {self.draws!r}; give a whole number from 1")
        if not isinstance(self.seed, int):
            raise InputError("E113", f"noise: seed is {self.seed!r}; give a whole number")
        if self.against not in AGAINST:
            raise InputError("E113", f"noise: against is {self.against!r}; give 'kl' or 'loss'")

    def refuses(self, model: Model) -> str:
        return refusal(model, self.against)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        seen = called(model, batch, layers)
        harm = Harm(model, batch, self.against)
        seed = batch_seed(self.seed, batch)
        found: dict[tuple[str, Format], list[float]] = {}
        for row in decisions(layers):
            if all(layer.name in seen and layer.kind != "kv_cache" for layer in row.layers):
                harm.prepare(row.layers)
                for fmt in formats:
                    if offered(row, fmt):
                        found[row.name, fmt] = self._values(model, harm, row, fmt, seed)

        def cell(decision: Decision, fmt: Format) -> Cell:
            known = found.get((decision.name, fmt))
            return Cell(status="not_observed") if known is None else mean_cell(known)

        samples = max((len(values) for values in found.values()), default=0)
        unit = "nats/token" if self.against == "kl" or model.tokens else "loss"
        return build_table(layers, formats, cell, unit=unit, samples=samples, source={"estimator": "noise"})

    def _values(self, model: Model, harm: Harm, decision: Decision, fmt: Format, seed: int) -> list[float]:
        # The same draws for every format, so that their steps alone tell them apart.
        generator = torch.Generator().manual_seed(int(digest_of([seed, decision.name])[:14], 16))
        steps = {layer: steps_of(model, layer, fmt) for layer in decision.layers}
        if any(not bool(torch.isfinite(step).all()) for step in steps.values()):
            return [math.nan]
        signs = (1.0, -1.0) if self.against == "loss" else (1.0,)
        draws = []
        for _ in range(self.draws):
            noise = {
                layer: torch.rand(step.shape, generator=generator).to(step.device).sub_(0.5).mul_(step)
                for layer, step in steps.items()
            }
            for sign in signs:
                changed = {layer: model.weight(layer.name).detach() + sign * u for layer, u in noise.items()}
                draws.append(harm.values(Change(changed)))
        return [sum(values) / len(values) for values in zip(*draws, strict=True)]


def steps_of(model: Model, layer: Layer, fmt: Format) -> Tensor:
    """The step of a format at each weight of a layer: float32, the weight's shape; NaN where it cannot hold them."""
    delta = Deltas.of(model)(layer, fmt)
    axes = layer.row_axes
    ahead = tuple(range(len(axes)))
    turned = delta.movedim(axes, ahead)
    if isinstance(fmt, Integer) and bool(torch.isfinite(delta).all()):
        scales = quantized_parts(model, layer, fmt).parts["scales"].float()
        groups = scales.unsqueeze(-1).expand(*scales.shape, delta.numel() // scales.numel())
        return groups.reshape(turned.shape).movedim(ahead, axes)
    error = turned.reshape(layer.rows, -1).square().mean(dim=1, keepdim=True, dtype=torch.float64)
    width = (12 * error).sqrt().float().expand(layer.rows, layer.columns)
    return width.reshape(turned.shape).movedim(ahead, axes)
