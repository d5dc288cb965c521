"""Curvature along the rounding error itself: the loss increase to second order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table, offered
from mpsearch.sensitivity.derivatives import Curvature, Product, check_product, check_switches, dot
from mpsearch.tables import SensitivityTable

#: (decision, format) -> (first-order, second-order) term; nothing where the data does not reach the decision.
_Found = Mapping[tuple[str, Format], tuple[float, float]]


@dataclass(frozen=True)
class HessianVector:
    """Second-order loss increase along the rounding error, exact in the curvature.

    score = 1/2 d^T H d, in nats per token, with d = Q(W) - W over all layers of the decision together and H the
    Hessian of the mean loss. With ``first_order`` it is g.d + 1/2 d^T H d, the whole Taylor expansion to second order;
    `terms` gives both parts.

    Bias: none to second order; the third order, and the curvature between decisions, are left out. Away from a minimum,
    as every trained language model is on calibration data, g.d can be larger than the curvature, and of either sign;
    it is left out unless asked for because signed errors of many layers do not add up as harms. 1/2 d^T H d can be
    negative as well, and is kept so.
    Standard error: over batches. Cost: one forward and backward pass per batch, then per decision and format one
    differentiation of the gradient (``double_backward``, which keeps the gradient's graph, about three times the memory
    of a backward pass) or two forward and backward passes (``finite_difference``: any attention kernel, no graph).

    Source: the quadratic form that HAWQ (Dong et al. 2019) and later methods bound or average.

    Attributes:
        first_order: add g.d.
        product: ``double_backward`` or ``finite_difference``.
        step: length of a finite difference, relative to the norm of the decision's weights.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(2, 1, bias=False), loss=lambda m, x: m(x).square().mean() / 2)
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
    >>> table = mp.score(model, [torch.eye(2)], ["int2-tensor"], "hessian_vector")
    >>> round(float(table.value[0, 0]), 4)  # 1/2 * curvature 1/2 * 0.4^2
    0.04
    """

    first_order: bool = False
    product: Product = "double_backward"
    step: float = 0.003
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 second differentiation per cell"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        check_product("hessian_vector", self.product, self.step)
        check_switches("hessian_vector", first_order=self.first_order)

    def refuses(self, model: Model) -> str:
        return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        found = [self._one(model, batch, layers, formats) for batch in batches]
        return _table(found, layers, formats, lambda g, h: g + h if self.first_order else h)

    def terms(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> tuple[SensitivityTable, SensitivityTable]:
        """The two parts of the loss increase, each with its standard error.

        Returns:
            g.d, and 1/2 d^T H d, in nats per token.
        """
        found = [self._one(model, batch, layers, formats) for batch in batches]
        return _table(found, layers, formats, lambda g, h: g), _table(found, layers, formats, lambda g, h: h)

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> _Found:
        deltas = Deltas.of(model)
        curvature = Curvature(model, batch, layers, self.product, self.step)
        place = {layer.name: i for i, layer in enumerate(layers)}
        found: dict[tuple[str, Format], tuple[float, float]] = {}
        for decision in decisions(layers):
            numbers = [place[layer.name] for layer in decision.layers]
            slopes = {i: g for i in numbers if (g := curvature.gradients[i]) is not None}
            if len(slopes) < len(numbers):
                continue
            for fmt in formats:
                if offered(decision, fmt):
                    errors = {place[x.name]: deltas.own(x, fmt) for x in decision.layers}
                    found[decision.name, fmt] = _along(curvature, slopes, errors)
        return found


def _along(curvature: Curvature, slopes: Mapping[int, Tensor], errors: Mapping[int, Tensor]) -> tuple[float, float]:
    if not all(bool(d.isfinite().all()) for d in errors.values()):
        return math.nan, math.nan
    if not any(bool(d.any()) for d in errors.values()):
        return 0.0, 0.0
    first = math.fsum(dot(slopes[i].detach(), d) for i, d in errors.items())
    products = curvature.times(errors)
    return first, 0.5 * math.fsum(dot(products[i], d) for i, d in errors.items())


def _table(
    found: Sequence[_Found],
    layers: Sequence[Layer],
    formats: Sequence[Format],
    value: Callable[[float, float], float],
) -> SensitivityTable:
    def one(part: _Found) -> SensitivityTable:
        def cell(decision: Decision, fmt: Format) -> Cell:
            terms = part.get((decision.name, fmt))
            return Cell(status="not_observed") if terms is None else Cell(value(*terms))

        return build_table(layers, formats, cell, unit="nats/token", samples=1, source={"estimator": "hessian_vector"})

    return SensitivityTable.mean([one(part) for part in found])
