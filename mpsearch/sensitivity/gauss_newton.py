"""Gauss-Newton: how far the logits move along the rounding error, as the output distribution sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import swapped
from mpsearch.model.model import Model
from mpsearch.parts import wholes
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table, mean_cell, offered
from mpsearch.sensitivity.derivatives import (
    Product,
    calls,
    check_product,
    cut,
    math_attention,
    own_weight,
    step_length,
)
from mpsearch.tables import SensitivityTable

#: Layers and their directions -> change of the logits; None where it does not depend on all of them.
Pushed = Callable[[Sequence[Layer], Sequence[Tensor]], Tensor | None]


@dataclass(frozen=True)
class GaussNewton:
    """Divergence to second order: the full Gauss-Newton matrix along the rounding error.

    score = 1/2 d^T G d = mean over positions of 1/2 Var_p(J d), in nats per token, with d = Q(W) - W over all layers of
    the decision together, J d the change of the logits along d, p the model's own distribution and
    G = J^T (diag p - p p^T) J. G is the true Fisher and the Hessian of KL(original || quantised), so this is what
    `divergence` becomes for small errors and what `fisher` keeps the diagonal of. Never negative, no labels, no draws.

    Bias: none to second order; cross terms between decisions are left out, as everywhere.
    Standard error: over samples (sequences). Cost: one forward and backward pass per batch, then per decision and
    format one pass from the changed layer on (``double_backward``: J d is the derivative of J^T u in u; keeps the graph
    of J^T u, about three times the memory of a backward pass), or two forward passes without any graph
    (``finite_difference``, [z(w + h d) - z(w - h d)] / 2h). Several times the size of the logits besides.
    Sources: Schraudolph 2002 (Gauss-Newton products); Martens 2020.

    Attributes:
        product: ``double_backward`` or ``finite_difference``.
        step: length of a finite difference, relative to the norm of the decision's weights.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int2-tensor"], "gauss_newton")
    >>> round(float(table.value[0, 0]), 5)  # 1/2 * p (1 - p) * 0.4^2 with p = 0.599; the divergence is 0.01961
    0.01922
    """

    product: Product = "double_backward"
    step: float = 0.003
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 differentiation per cell"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        check_product("gauss_newton", self.product, self.step)

    def refuses(self, model: Model) -> str:
        return "" if model.has_logits else "it needs logits; wrap the module: mp.wrap(module, logits=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        logits, pushed = self.pushes(model, batch, layers)
        p = torch.softmax(logits, dim=-1)
        found: dict[tuple[str, Format], list[float] | None] = {}
        for decision in decisions(layers):
            for fmt in formats:
                if not offered(decision, fmt):
                    continue
                errors = [deltas.own(layer, fmt) for layer in decision.layers]
                if not all(bool(d.isfinite().all()) for d in errors):
                    found[decision.name, fmt] = [math.nan]
                    continue
                change = pushed(decision.layers, errors)
                found[decision.name, fmt] = None if change is None else half_variance(p, change)

        def cell(decision: Decision, fmt: Format) -> Cell:
            values = found[decision.name, fmt]
            return Cell(status="not_observed") if values is None else mean_cell(values)

        return build_table(
            layers, formats, cell, unit="nats/token", samples=len(p), source={"estimator": "gauss_newton"}
        )

    def pushes(self, model: Model, batch: Any, layers: Sequence[Layer]) -> tuple[Tensor, Pushed]:
        """Logits of a batch, and the function that gives their change J d along directions of some layers."""
        make = _by_double_backward if self.product == "double_backward" else self._by_difference
        return make(model, batch, layers)

    def _by_difference(self, model: Model, batch: Any, layers: Sequence[Layer]) -> tuple[Tensor, Pushed]:
        with torch.no_grad(), calls(model, layers) as seen:
            logits = model.logits(batch)

        def pushed(chosen: Sequence[Layer], directions: Sequence[Tensor]) -> Tensor | None:
            h = step_length(model, chosen, directions, self.step)
            ends = []
            for sign in (h, -h):
                moved = {x: own_weight(model, x) + sign * d for x, d in zip(chosen, directions, strict=True)}
                with torch.no_grad(), swapped(model, moved):
                    ends.append(model.logits(batch))
            change = (ends[0] - ends[1]) / (2 * h) if h else torch.zeros_like(logits)
            reached = all(seen.get(x.owner, False) for x in chosen)
            return change if reached or bool(change.any()) else None

        return logits, pushed


def _by_double_backward(model: Model, batch: Any, layers: Sequence[Layer]) -> tuple[Tensor, Pushed]:
    with math_attention(), calls(model, layers) as seen:
        logits = model.logits(batch)
    whole = wholes(layers)
    weights = [model.weight(layer.name) for layer in whole]
    # J^T u is linear in u, so its derivative is the same at any u.
    u = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, weights, u, create_graph=True, allow_unused=True)
    found = {x.name: g for x, g in zip(whole, back, strict=True) if seen.get(x.name, True)}
    rows = {x.name: g for x, g in zip(layers, cut(layers, found), strict=True) if g is not None}

    def pushed(chosen: Sequence[Layer], directions: Sequence[Tensor]) -> Tensor | None:
        if any(layer.name not in rows for layer in chosen):
            return None
        (change,) = torch.autograd.grad(
            [rows[layer.name] for layer in chosen], [u], list(directions), retain_graph=True, materialize_grads=True
        )
        return change

    return logits.detach(), pushed


def half_variance(p: Tensor, change: Tensor) -> list[float]:
    """Half the variance of a change of logits under p, per sample the mean over its positions.

    >>> half_variance(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]]))
    [0.5]
    """
    mean = (p * change).sum(dim=-1, keepdim=True)
    variance = (p * (change - mean).square()).sum(dim=-1, dtype=torch.float64)
    found: list[float] = (0.5 * variance.reshape(len(p), -1).mean(dim=1)).tolist()
    return found
