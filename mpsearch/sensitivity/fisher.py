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
from mpsearch.parts import wholes
from mpsearch.sensitivity.activation_curvature import ReadErrors, Reads, rounds
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table, mean_cell, offered
from mpsearch.sensitivity.derivatives import cut, total
from mpsearch.sensitivity.harm import called
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

    A format that rounds a layer's input (``W@A``) adds 1/2 sum_i F_ii (Q(x_i) - x_i)^2, with g the gradient in that
    input x, of which fused layers share one; a format of a KV cache has this term alone, with x the keys (after the
    rotary embedding) or values as they are cached. Formats that round tokens as they grow old are refused.

    Bias: drops all off-diagonal terms, also those between a weight and its input. Standard error: over samples.
    Cost: one forward and backward pass of a single sample each and one forward pass per batch; memory of one gradient,
    plus the kept quantisation errors (`Deltas`), plus the inputs that are rounded and their gradients of one sample
    (of the batch where scales reach over tokens).
    Sources: Kunstner et al. 2019 for true against empirical; SqueezeLLM and LQ-LoRA for the weighting; KVQuant
    (Hooper et al. 2024) for squared gradients of keys and values, there before the rotary embedding.

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
    covers: ClassVar[Sequence[str]] = ("weights", "activations", "caches")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 2
    streams: ClassVar[Literal["", "forward", "backward"]] = "backward"
    cost: ClassVar[str] = "1 forward and backward per sample"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

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
        weights = [layer for layer in layers if layer.kind != "kv_cache"]
        whole = wholes(weights)
        reads = Reads(model, layers, formats)
        if reads.caches and self.labels == "data" and model._loss is not None:
            raise InputError(
                "E506",
                "fisher: labels='data' takes the loss that was given, which knows nothing of KV caches",
                advice="labels='model'",
            )
        errors = ReadErrors(model, batch, layers, formats, lambda: self._run(model, reads, batch))
        generator = torch.Generator().manual_seed(batch_seed(self.seed, batch))
        values: dict[tuple[str, Format], list[float]] = {}
        reached: set[str] = set()
        seen: set[str] | None = None
        moved: list[dict[tuple[str, Format], float]] = []
        for sample in samples_of(batch):
            squares, read_squares = self._squared_gradients(model, sample, whole, reads, generator)
            by_name = {layer.name: square for layer, square in zip(whole, squares, strict=True)}
            for layer, square in zip(weights, cut(weights, by_name), strict=True):
                # An expert can be called without tokens: nothing is known of it, though its gradient is 0.
                if square is not None and layer.name not in reached:
                    if not (any_there := bool(square.any())) and seen is None:
                        seen = called(model, batch, layers)
                    if any_there or layer.name in (seen or ()):
                        reached.add(layer.name)
                for fmt in formats:
                    if not fmt.refuses(layer):
                        weighted = 0.0 if square is None else _weighted(square, deltas.own(layer, fmt))
                        values.setdefault((layer.name, fmt), []).append(weighted)
            moved.append(_moved(reads, errors, read_squares, formats))

        def cell(decision: Decision, fmt: Format) -> Cell:
            # In nats, a sample that does not use a layer takes no harm from it.
            if any(layer.kind != "kv_cache" and layer.name not in reached for layer in decision.layers):
                return Cell(status="not_observed")
            assert offered(decision, fmt)
            parts = [values[x.name, fmt] for x in decision.layers if x.kind != "kv_cache"]
            parts.append([sample.get((decision.name, fmt), 0.0) for sample in moved])
            return mean_cell([math.fsum(sample) for sample in zip(*parts, strict=True)])

        return build_table(layers, formats, cell, unit="nats/token", samples=len(moved), source={"estimator": "fisher"})

    def _run(self, model: Model, reads: Reads, sample: Any) -> Tensor:
        """Logits of a sample, (predictions, classes); its summed loss for the labels of the data."""
        if self.labels == "model":
            return reads.logits(sample).flatten(0, -2)
        if reads.caches:
            logits = reads.logits(sample)[:, :-1].flatten(0, 1)
            return functional.cross_entropy(logits, sample["input_ids"][:, 1:].flatten(), reduction="sum")
        return model.loss(sample) * model.predictions(sample)

    def _squared_gradients(
        self, model: Model, sample: Any, layers: Sequence[Layer], reads: Reads, generator: torch.Generator
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Mean over draws of g^2 / T for one sample: one tensor per layer, and one per tensor that was read."""
        with reads.recording() as zeros:
            output = self._run(model, reads, sample)
        asked = [*(model.weight(layer.name) for layer in layers), *zeros]
        totals: list[Tensor | None] = [None] * len(asked)
        if self.labels == "data":
            gradients = torch.autograd.grad(output, asked, allow_unused=True)
            count = model.predictions(sample)
            totals = [None if g is None else g.square_().div_(count) for g in gradients]
            return totals[: len(layers)], totals[len(layers) :]
        with torch.no_grad():
            probabilities = torch.softmax(output, dim=-1)
        if not bool(probabilities.isfinite().all()):
            # Nothing can be drawn; the cells become `non_finite`.
            totals = [torch.full_like(tensor, torch.nan) for tensor in asked]
            return totals[: len(layers)], totals[len(layers) :]
        for draw in range(self.draws):
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            nll = functional.cross_entropy(output, drawn, reduction="sum")
            more = draw + 1 < self.draws
            gradients = torch.autograd.grad(nll, asked, allow_unused=True, retain_graph=more)
            for i, g in enumerate(gradients):
                if g is not None:
                    square = g.square_().div_(len(output) * self.draws)
                    total = totals[i]
                    totals[i] = square if total is None else total.add_(square)
        return totals[: len(layers)], totals[len(layers) :]


def _weighted(square: Tensor, delta: Tensor) -> float:
    return 0.5 * total(torch.mul(delta, delta).mul_(square))


def _moved(
    reads: Reads, errors: ReadErrors, squares: Sequence[Tensor | None], formats: Sequence[Format]
) -> dict[tuple[str, Format], float]:
    """1/2 sum_i F_ii (Q(x_i) - x_i)^2 of one sample, by decision and format."""
    found: dict[tuple[str, Format], float] = {}
    for read, square in zip(reads.found, squares, strict=True):
        known: dict[Format, float] = {}
        for fmt in formats:
            if square is None or not rounds(fmt, read.layer):
                continue
            how = fmt.activation or fmt
            if how not in known:
                known[how] = 0.5 * float((square * errors.squares(read, fmt)).sum(dtype=torch.float64))
            found[read.decision, fmt] = found.get((read.decision, fmt), 0.0) + known[how]
    return found
