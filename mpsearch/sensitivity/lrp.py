"""Relevance: how much of the model's answer goes through each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.assemble import Cell, build_table, mean_cell
from mpsearch.sensitivity.harm import called
from mpsearch.sensitivity.lrp_rules import RULES, Rules
from mpsearch.sensitivity.relevance import Relevance, relevance, why_not
from mpsearch.sensitivity.statistics import relative_error
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Lrp:
    """Share of the model's relevance that goes through a layer, times the relative error of its weights.

    score = sum over the decision's layers of c_l ||Q(W) - W||^2 / ||W||^2 with c_l = mean over samples of
    r_l / sum_k r_k, where r_l is the sum of the absolute relevance of layer l (signed relevance cancels) and k runs
    over all scored layers. Neither factor grows with the layer: relevance is shared out, not made, and the error is a
    ratio.

    Relevance is that of layer-wise relevance propagation: the explained logits are sent back so that each step hands
    on what it got, in proportion to what its inputs contributed (`Rules`). In transformers the rules are those of
    AttnLRP: norms with their statistic held constant, activations passing relevance as it is, half of a product to each
    factor. A sigmoid is a gate and a divisor a constant, which get none.

    Bias: large, and of unknown sign; a heuristic. Relevance says what takes part in the answer, not what an error there
    would do to it. Biases keep what they contribute. Standard error: over samples. Cost: two forward passes and one
    backward pass of a single sample each, and one product per layer for its weights; memory as for training without
    the weights' gradients, plus the kept quantisation errors (`Deltas`).

    A layer that relevance reaches in no sample of a batch is ``not_observed``: one that is not called, queries and keys
    under ``attention="cp"``, and stacked experts. Where it reaches some, its share is 0 in the others.

    Sources: the contribution is that of LRP-QViT (Ranjan and Savakis 2024, arXiv 2401.11243), the product of importance
    and sensitivity that of Mix-QViT (2501.06357). Neither has public code and their formulas were not available,
    so this is the reading above, with the weight error for the sensitivity. Rules: Bach et al. 2015, Montavon et al.
    2019 (gamma), Ali et al. 2022 (``cp``), Achtibat et al. 2024 (AttnLRP); their results are those of zennit and LXT.

    Attributes:
        target: explain the ``top`` logit of every position, or that of the true ``label``.
        of: relevance of the layer's ``input`` (what it passes on), ``output`` (what reaches it) or ``weight``.
        rule: ``composite`` (epsilon for dense layers, gamma for convolutions), or one for all: ``epsilon``, ``gamma``,
            ``zplus``, ``alpha_beta``.
        epsilon: stabiliser of denominators; where activations are as small as it, relevance is lost.
        gamma: preference for contributions of the output's sign.
        alpha: weight of positive contributions under ``alpha_beta``; negative ones have alpha - 1.
        attention: ``attnlrp``, or ``cp``: the softmax is a constant, which conserves relevance but misses queries and
            keys.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)), logits=lambda m, x: m(x))
    >>> _ = model.module[0].weight.data.copy_(torch.tensor([[1.0, 0.6]]))
    >>> table = mp.score(model, [torch.ones(2, 2)], ["int2-channel"], "lrp")
    >>> round(float(table.value[0, 0]), 4)  # the only layer has the whole share: 0.4^2 / (1 + 0.6^2)
    0.1176
    """

    target: Literal["top", "label"] = "top"
    of: Literal["input", "output", "weight"] = "input"
    rule: Literal["composite", "epsilon", "gamma", "zplus", "alpha_beta"] = "composite"
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    attention: Literal["attnlrp", "cp"] = "attnlrp"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 2
    cost: ClassVar[str] = "2 forwards and 1 backward per sample"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        for name, value, choice in (
            ("target", self.target, ("top", "label")),
            ("of", self.of, ("output", "input", "weight")),
            ("rule", self.rule, ("composite", *RULES)),
        ):
            if value not in choice:
                raise InputError("E113", f"lrp: {name} is {value!r}; give one of {', '.join(choice)}")
        if not 1 <= self.alpha < math.inf:
            raise InputError("E113", f"lrp: alpha is {self.alpha!r}; give a number from 1")
        self.rules()

    def rules(self) -> Rules:
        """Rules that these settings stand for."""
        linear, conv = ("epsilon", "gamma") if self.rule == "composite" else (self.rule, self.rule)
        return Rules(
            linear=linear,  # type: ignore[arg-type]
            conv=conv,  # type: ignore[arg-type]
            epsilon=self.epsilon,
            gamma=self.gamma,
            alpha=self.alpha,
            beta=self.alpha - 1,
            attention=self.attention,
        )

    def refuses(self, model: Model) -> str:
        if not model.has_logits:
            return "it needs logits; wrap the module: mp.wrap(module, logits=…)"
        return why_not(model, self.target)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        shares = self.shares(model, batch, layers)
        seen = called(model, batch, layers)

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(x.name not in seen or not any(x.name in sample for sample in shares) for x in decision.layers):
                return Cell(status="not_observed")
            errors = [(layer.name, relative_error(model, layer, fmt)) for layer in decision.layers]
            return mean_cell([math.fsum(sample.get(name, 0.0) * error for name, error in errors) for sample in shares])

        unit = "relevance share x relative squared error"
        return build_table(layers, formats, cell, unit=unit, samples=len(shares), source={"estimator": "lrp"})

    def shares(self, model: Model, batch: Any, layers: Sequence[Layer]) -> list[dict[str, float]]:
        """Share of every layer that relevance reached in the sum of all, for each sample.

        Raises:
            InputError: no rule covers an operation, or the rules' model answers otherwise than the model (E506).
        """
        found = []
        for sample in samples_of(batch):
            traced = relevance(model, sample, layers, self.rules(), self.target)
            _check_answer(model, sample, traced)
            sums = {name: float(getattr(part, self.of).absolute) for name, part in traced.layers.items()}
            total = math.fsum(sums.values())
            found.append({name: part / total if total else 0.0 for name, part in sums.items()})
        return found


def _check_answer(model: Model, sample: Any, traced: Relevance) -> None:
    """Operations that were replaced must give what they gave before, or the relevance is of another model."""
    with torch.no_grad():
        logits = model.logits(sample)
    scale = float(logits.abs().max()) if logits.numel() else 0.0
    if not math.isfinite(scale):
        return  # neither has an answer to compare, and no share will be finite
    if not torch.allclose(traced.logits, logits, rtol=1e-3, atol=1e-4 * scale + 1e-12, equal_nan=True):
        raise InputError(
            "E506",
            f"lrp cannot follow '{model.name}': its answer changes when its operations are replaced",
            because="it changes tensors in place that something else still reads, or draws at random",
        )
