"""Gradients and curvature of one batch along given directions, as several estimators need them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpsearch.errors import InputError
from mpsearch.layer import Layer
from mpsearch.model.apply import swapped
from mpsearch.model.model import Model

Product = Literal["double_backward", "finite_difference"]


@contextmanager
def math_attention() -> Iterator[None]:
    """Choose the attention kernel that can be differentiated twice; torch's fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def calls(model: Model, layers: Sequence[Layer]) -> Iterator[dict[str, bool]]:
    """Note which layers run meanwhile: name -> whether any input held anything.

    An expert can be called with no tokens at all; its gradient is then zero, not missing.
    """
    seen: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            seen[name] = seen.get(name, False) or given is None or given.numel() > 0

        return hook

    handles = [
        model.holder(name).register_forward_hook(watch(layer.name), with_kwargs=True)
        for layer in layers
        for name in (layer.name, *layer.shared)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: Model, batch: Any, layers: Sequence[Layer], *, create_graph: bool = False) -> list[Tensor | None]:
    """Gradient of a batch's mean loss in each layer's weight; None for a layer that no input reaches."""
    with calls(model, layers) as seen, math_attention() if create_graph else nullcontext():
        loss = model.loss(batch)
    weights = [model.weight(layer.name) for layer in layers]
    found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [g if seen.get(layer.name, True) else None for layer, g in zip(layers, found, strict=True)]


def dot(a: Tensor, b: Tensor) -> float:
    """Sum of products, in float64."""
    return float((a.double() * b.double()).sum())


def check_product(estimator: str, product: str, step: float) -> None:
    """Refuse a way of taking derivatives that there is not (E113)."""
    if product not in ("double_backward", "finite_difference"):
        raise InputError(
            "E113", f"{estimator}: product is {product!r}", advice="product: double_backward or finite_difference"
        )
    if not isinstance(step, (int, float)) or not 0 < step < math.inf:
        raise InputError("E113", f"{estimator}: step is {step!r}; give a positive number")


def check_switches(estimator: str, **switches: object) -> None:
    """Refuse a switch that is neither on nor off (E113)."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise InputError("E113", f"{estimator}: {name} is {value!r}; give true or false")


def step_length(model: Model, layers: Sequence[Layer], directions: Sequence[Tensor], step: float) -> float:
    """How many times the directions make a change of ``step`` times the norm of the weights; 0 for no direction."""
    length = math.sqrt(math.fsum(dot(v, v) for v in directions))
    weights = math.sqrt(math.fsum(dot(w, w) for w in (model.weight(x.name).detach() for x in layers)))
    return step * (weights or 1.0) / length if length else 0.0


class Curvature:
    """The Hessian of one batch's mean loss, as products with vectors of some layers.

    ``double_backward`` keeps the graph of the gradient, with attention that can be differentiated twice;
    ``finite_difference`` takes two gradients per product, [g(w + h v) - g(w - h v)] / 2h, wrong by O(h^2).

    Attributes:
        gradients: gradient in each layer; None for a layer that no input reaches.
    """

    def __init__(
        self,
        model: Model,
        batch: Any,
        layers: Sequence[Layer],
        product: Product = "double_backward",
        step: float = 0.01,
    ) -> None:
        self._model, self._batch, self._layers = model, batch, layers
        self._step = step if product == "finite_difference" else 0.0
        self.gradients = gradients(model, batch, layers, create_graph=not self._step)

    def times(self, directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Product of the Hessian block of some layers with a vector.

        Args:
            directions: number of the layer -> its part of the vector, shaped like the weight.

        Returns:
            The product's part in each of the same layers.
        """
        chosen = list(directions)
        if self._step:
            return self._by_difference(directions)
        found = torch.autograd.grad(
            [self._gradient(i) for i in chosen],
            [self._model.weight(self._layers[i].name) for i in chosen],
            [directions[i] for i in chosen],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(chosen, found, strict=True))

    def _gradient(self, i: int) -> Tensor:
        gradient = self.gradients[i]
        assert gradient is not None
        # A loss that is linear in a layer gives a gradient without a graph; zero times the weight gives it one.
        return gradient if gradient.requires_grad else gradient + 0.0 * self._model.weight(self._layers[i].name)

    def _by_difference(self, directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        layers = {i: self._layers[i] for i in directions}
        h = step_length(self._model, list(layers.values()), list(directions.values()), self._step)
        if not h:
            return {i: torch.zeros_like(v) for i, v in directions.items()}
        weights = {i: self._model.weight(layer.name) for i, layer in layers.items()}
        start = {i: weight.detach() for i, weight in weights.items()}
        ends = []
        for sign in (h, -h):
            with swapped(self._model, {layers[i]: start[i] + sign * v for i, v in directions.items()}):
                ends.append(torch.autograd.grad(self._model.loss(self._batch), list(weights.values())))
        return {i: (up - down) / (2 * h) for i, up, down in zip(layers, *ends, strict=True)}
