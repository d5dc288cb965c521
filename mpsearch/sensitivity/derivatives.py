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
from mpsearch.model.cut import part_of
from mpsearch.model.model import Model
from mpsearch.parts import wholes

Product = Literal["double_backward", "finite_difference"]


@contextmanager
def math_attention() -> Iterator[None]:
    """Choose the attention kernel that can be differentiated twice; torch's fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def calls(model: Model, layers: Sequence[Layer]) -> Iterator[dict[str, bool]]:
    """Note which layers run meanwhile: name of the whole layer -> whether any input held anything.

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
        for layer in wholes(layers)
        for name in (layer.name, *layer.shared)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: Model, batch: Any, layers: Sequence[Layer], *, create_graph: bool = False) -> list[Tensor | None]:
    """Gradient of a batch's mean loss in each layer's weight; None for a layer that no input reaches.

    Parts of one layer are parts of one gradient.
    """
    with calls(model, layers) as seen, math_attention() if create_graph else nullcontext():
        loss = model.loss(batch)
    whole = wholes(layers)
    weights = [model.weight(layer.name) for layer in whole]
    found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return cut(layers, {x.name: g for x, g in zip(whole, found, strict=True) if seen.get(x.name, True)})


def cut(layers: Sequence[Layer], found: Mapping[str, Tensor | None]) -> list[Tensor | None]:
    """For each layer, its part of what was found for the whole layer (by name); None where nothing was."""
    tensors = [found.get(layer.owner) for layer in layers]
    return [None if x is None else part_of(x, layer) for layer, x in zip(layers, tensors, strict=True)]


def own_weight(model: Model, layer: Layer) -> Tensor:
    """The weight of a layer; of a part its part: (rows, columns)."""
    return part_of(model.weight(layer.name).detach(), layer)


def dot(a: Tensor, b: Tensor) -> float:
    """Sum of products, in float64."""
    return float((a.double() * b.double()).sum())


def total(terms: Tensor) -> float:
    """Sum of terms that are not negative: rows in float32, which loses nothing that matters, and float64 beyond.

    Takes half the time of a sum in float64 throughout.
    """
    rows = terms.reshape(len(terms), -1).sum(1) if terms.ndim > 1 else terms
    return float(rows.sum(dtype=torch.float64))


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent random signs of a tensor's shape, float32."""
    return torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)


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
    weights = math.sqrt(math.fsum(dot(w, w) for w in (own_weight(model, x) for x in layers)))
    return step * (weights or 1.0) / length if length else 0.0


class Curvature:
    """The Hessian of one batch's mean loss, as products with vectors of some layers, or parts of layers.

    ``double_backward`` keeps the graph of the gradient, with attention that can be differentiated twice;
    ``finite_difference`` takes two gradients per product, [g(w + h v) - g(w - h v)] / 2h, wrong by O(h^2).

    Attributes:
        gradients: gradient in each layer, of a part (rows, columns); None for a layer that no input reaches.
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
            directions: number of the layer -> its part of the vector, shaped like the weight (or its part).

        Returns:
            The product's part in each of the same layers.
        """
        chosen = list(directions)
        if self._step:
            return self._by_difference(directions)
        layers = [self._layers[i] for i in chosen]
        whole = wholes(layers)
        found = torch.autograd.grad(
            [self._gradient(i) for i in chosen],
            [self._model.weight(layer.name) for layer in whole],
            [directions[i] for i in chosen],
            retain_graph=True,
            materialize_grads=True,
        )
        return self._cut(chosen, whole, found)

    def _cut(self, chosen: Sequence[int], whole: Sequence[Layer], found: Sequence[Tensor]) -> dict[int, Tensor]:
        by_name = {layer.name: product for layer, product in zip(whole, found, strict=True)}
        return {i: part_of(by_name[self._layers[i].owner], self._layers[i]) for i in chosen}

    def _gradient(self, i: int) -> Tensor:
        gradient = self.gradients[i]
        assert gradient is not None
        # A loss that is linear in a layer gives a gradient without a graph; zero times the weight gives it one.
        layer = self._layers[i]
        return gradient if gradient.requires_grad else gradient + 0.0 * part_of(self._model.weight(layer.name), layer)

    def _by_difference(self, directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        layers = {i: self._layers[i] for i in directions}
        h = step_length(self._model, list(layers.values()), list(directions.values()), self._step)
        if not h:
            return {i: torch.zeros_like(v) for i, v in directions.items()}
        whole = wholes(layers.values())
        weights = [self._model.weight(layer.name) for layer in whole]
        start = {i: own_weight(self._model, layer) for i, layer in layers.items()}
        ends = []
        for sign in (h, -h):
            with swapped(self._model, {layers[i]: start[i] + sign * v for i, v in directions.items()}):
                ends.append(torch.autograd.grad(self._model.loss(self._batch), weights))
        return self._cut(list(layers), whole, [(up - down) / (2 * h) for up, down in zip(*ends, strict=True)])
