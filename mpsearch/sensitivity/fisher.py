"""Fisher information: how much the outputs' distribution hangs on each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table, mean_cell, offered
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Fisher:
    """Second-order loss increase by the diagonal Fisher information.

    score = 1/2 sum_i F_ii (Q(w_i) - w_i)^2, F = mean over samples of g g^T / T, in nats per token, where g is the
    gradient of one sample's summed negative log-likelihood and T its number of predictions.

    ``labels="model"`` draws each label from the model's own prediction: the true Fisher, which is the Hessian of
    the KL divergence to the original model, so there is no first-order term. ``labels="data"`` takes the data's
    labels: the empirical Fisher, which is another matrix (it is not the Hessian unless the model is perfect).
    Per sample means per sequence: the cross terms between tokens vanish only in the mean over drawn labels.

    Bias: drops all off-diagonal terms. Standard error: over samples. Cost: one forward and backward pass of a
    single sample each; memory of one gradient, plus the kept quantisation errors (`Deltas`).
    Sources: Kunstner et al. 2019 for true against empirical; SqueezeLLM and LQ-LoRA for the weighting.

    Attributes:
        labels: ``model`` (true Fisher) or ``data`` (empirical Fisher).
        draws: how many sets of labels are drawn per sample.
        seed: seed of the drawn labels.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int2-tensor"], "fisher")
    >>> round(float(table.value[0, 0]), 3) in (0.013, 0.029)  # 1/2 * 0.4^2 * (p or 1-p)^2 with p = 0.599
    True
    """

    labels: Literal["model", "data"] = "model"
    draws: int = 1
    seed: int = 0
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.labels not in ("model", "data"):
            raise InputError("E113", f"fisher: labels is {self.labels!r}; give 'model' or 'data'")
        if not isinstance(self.draws, int) or self.draws < 1:
            raise InputError("E113", f"fisher: draws is {self.draws!r}; give a whole number from 1")

    def refuses(self, model: Model) -> str:
        if self.labels == "model" and not model.has_logits:
            return "labels='model' needs logits; wrap the module: mp.wrap(module, logits=…), or use labels='data'"
        if self.labels == "data" and not model.has_loss:
            return "labels='data' needs a loss; wrap the module: mp.wrap(module, loss=…), or use labels='model'"
        return ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        generator = torch.Generator().manual_seed(batch_seed(self.seed, batch))
        values: dict[tuple[str, Format], list[float]] = {}
        unused: set[str] = set()
        for sample in samples_of(batch):
            squares = self._squared_gradients(model, sample, layers, generator)
            for layer, square in zip(layers, squares, strict=True):
                if square is None:
                    unused.add(layer.name)
                    continue
                for fmt in formats:
                    if not fmt.refuses(layer):
                        weighted = 0.5 * float((square * deltas(layer, fmt).square()).sum(dtype=torch.float64))
                        values.setdefault((layer.name, fmt), []).append(weighted)

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(layer.name in unused for layer in decision.layers):
                return Cell(status="not_observed")
            assert offered(decision, fmt)
            sums = [math.fsum(parts) for parts in zip(*(values[x.name, fmt] for x in decision.layers), strict=True)]
            return mean_cell(sums)

        samples = max((len(v) for v in values.values()), default=0)
        return build_table(layers, formats, cell, unit="nats/token", samples=samples, source={"estimator": "fisher"})

    def _squared_gradients(
        self, model: Model, sample: Any, layers: Sequence[Layer], generator: torch.Generator
    ) -> list[Tensor | None]:
        """Mean over draws of g^2 / T for one sample, one tensor per layer."""
        parameters = [model.weight(layer.name) for layer in layers]
        if self.labels == "data":
            count = model.predictions(sample)
            gradients = torch.autograd.grad(model.loss(sample) * count, parameters, allow_unused=True)
            return [None if g is None else g.square_().div_(count) for g in gradients]
        logits = model.logits(sample).flatten(0, -2)
        with torch.no_grad():
            probabilities = torch.softmax(logits, dim=-1)
        totals: list[Tensor | None] = [None] * len(parameters)
        for draw in range(self.draws):
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            nll = functional.cross_entropy(logits, drawn, reduction="sum")
            more = draw + 1 < self.draws
            gradients = torch.autograd.grad(nll, parameters, allow_unused=True, retain_graph=more)
            for i, g in enumerate(gradients):
                if g is not None:
                    square = g.square_().div_(len(logits) * self.draws)
                    total = totals[i]
                    totals[i] = square if total is None else total.add_(square)
        return totals
