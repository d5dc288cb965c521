"""Top eigenvalue: the largest curvature of the loss in each layer, times its rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table
from mpsearch.sensitivity.derivatives import Curvature, Product, check_product, check_switches, dot, own_weight
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class HessianEigenvalue:
    """Second-order loss increase by the top eigenvalue of each layer's Hessian (HAWQ).

    score = 1/2 sum over the decision's layers of lambda_l / n_l * ||Q(W_l) - W_l||_F^2, in nats per token, with
    lambda_l the eigenvalue of largest magnitude of H_l, the Hessian of the mean loss in the layer's n_l weights. This
    is what a rounding error without preferred direction costs along the sharpest direction alone: never more than
    `hessian_trace` where the curvature is positive. With ``bound`` there is no division by n_l: 1/2 lambda_l ||d||_F^2
    is the most that an error of this size can cost, whatever its direction. HAWQ ranks layers by lambda_l / n_l for
    their bits and by lambda_l ||d||^2 for the order of their fine-tuning.

    Bias: one direction of many, and blocks of single layers only. An eigenvalue of largest magnitude can be negative,
    and is kept so. A batch's own top eigenvalue is on average larger than that of all data together. Found by `lanczos`
    from below: an eigenvalue that the first vector hardly sees can be missed.
    Standard error: over batches. Cost: per batch and layer 3 to ``max_iterations`` products, each one differentiation
    of the gradient, or two forward and backward passes (``finite_difference``). Memory: one float32 copy of the layer
    per product, up to ``max_iterations`` copies of a layer at once.

    Sources: Dong et al. 2019 (HAWQ), who use power iteration, as PyHessian does: that takes more products, and ends
    at no eigenvalue where the greatest and the least are about opposite. Lanczos 1950; Parlett 1998 (bounds).

    Attributes:
        bound: do not divide by the number of weights.
        max_iterations: most products per layer and batch.
        tolerance: relative error bound of the eigenvalue that ends the iteration.
        product: ``double_backward`` or ``finite_difference``.
        step: length of a finite difference, relative to the norm of the layer's weights; short, for the loss is
            quadratic less far along its sharpest direction.
        seed: seed of the first vectors.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(2, 1, bias=False), loss=lambda m, x: m(x).square().sum() / 2)
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
    >>> table = mp.score(model, [torch.diag(torch.tensor([2.0, 1.0]))], ["int2-tensor"], "hessian_eigenvalue")
    >>> round(float(table.value[0, 0]), 2)  # 1/2 * eigenvalue 4 / 2 weights * 0.4^2
    0.16
    """

    bound: bool = False
    max_iterations: int = 20
    tolerance: float = 1e-2
    product: Product = "double_backward"
    step: float = 1e-4
    seed: int = 0
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 2
    cost: ClassVar[str] = "about 6 second differentiations per layer"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        check_product("hessian_eigenvalue", self.product, self.step)
        check_switches("hessian_eigenvalue", bound=self.bound)
        if not isinstance(self.max_iterations, int) or self.max_iterations < 2:
            raise InputError(
                "E113", f"hessian_eigenvalue: max_iterations is {self.max_iterations!r}; give a whole number from 2"
            )
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < 1:
            raise InputError("E113", f"hessian_eigenvalue: tolerance is {self.tolerance!r}; give a number in (0, 1)")

    def refuses(self, model: Model) -> str:
        return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        values = dict(zip((layer.name for layer in layers), self.eigenvalues(model, batch, layers), strict=True))

        def cell(decision: Decision, fmt: Format) -> Cell:
            total = 0.0
            for layer in decision.layers:
                value = values[layer.name]
                if value is None:
                    return Cell(status="not_observed")
                error = float(deltas.own(layer, fmt).double().square().sum())
                total += 0.5 * value * error / (1 if self.bound else layer.weights)
            return Cell(total)

        return build_table(
            layers, formats, cell, unit="nats/token", samples=1, source={"estimator": "hessian_eigenvalue"}
        )

    def eigenvalues(self, model: Model, batch: Any, layers: Sequence[Layer]) -> list[float | None]:
        """Top eigenvalue of each layer's Hessian on one batch; None for a layer that no input reaches."""
        curvature = Curvature(model, batch, layers, self.product, self.step)
        found: list[float | None] = []
        for i, layer in enumerate(layers):
            if curvature.gradients[i] is None:
                found.append(None)
                continue
            weight = own_weight(model, layer)
            generator = torch.Generator().manual_seed(batch_seed(self.seed, layer.name))
            start = torch.randn(weight.shape, generator=generator).to(weight.device)

            def times(vector: Tensor, i: int = i) -> Tensor:
                return curvature.times({i: vector})[i]

            found.append(lanczos(times, start, self.max_iterations, self.tolerance)[0])
        return found


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 20, tolerance: float = 1e-2
) -> tuple[float, int]:
    """Find the eigenvalue of largest magnitude of a symmetric matrix by its products.

    Lanczos' method with full reorthogonalisation: theta is the Ritz value of largest magnitude over the vectors so far
    (the greatest, where several are as large up to ``tolerance``). It is off an eigenvalue by at most beta_k |s_k|, the
    length of its residual. Ends when that is at most ``tolerance`` |theta|, of theta and of the Ritz value at the other
    end if that could still become the larger one, but not before the third product; and when nothing is left to span.

    Returns:
        theta, and how many products it took; 0 where the product is zero, infinite where it is not finite.

    >>> value, products = lanczos(lambda v: torch.tensor([-3.0, 1.0]) * v, torch.ones(2))
    >>> round(value, 5), products
    (-3.0, 2)
    """
    vector = start.flatten() / torch.linalg.vector_norm(start)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    theta, noise = 0.0, 10 * torch.finfo(start.dtype).eps
    for count in range(1, min(max_iterations, start.numel()) + 1):
        basis.append(vector)
        image = product(vector.reshape(start.shape)).detach().flatten().to(start.dtype)
        size = float(torch.linalg.vector_norm(image, dtype=torch.float64))
        if not math.isfinite(size):
            return math.inf, count
        diagonal.append(dot(vector, image))
        image = _apart(image, basis)
        length = float(torch.linalg.vector_norm(image, dtype=torch.float64))
        theta, error = _ritz(diagonal, beside, length, tolerance)
        least = max(size, *map(abs, diagonal))
        if length <= noise * least or (count > 2 and error <= tolerance * abs(theta)):
            return theta, count
        beside.append(length)
        vector = image / length
    return theta, len(basis)


def _apart(image: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """What of a vector stands upright on all others; twice, for once leaves rounding errors."""
    image = image.clone()
    for _ in range(2):
        for vector in basis:
            image.sub_(vector, alpha=dot(vector, image))
    return image


def _ritz(diagonal: Sequence[float], beside: Sequence[float], length: float, tolerance: float) -> tuple[float, float]:
    """Ritz value of largest magnitude, and how far it, or what may turn out larger, can be off an eigenvalue."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    values, vectors = torch.linalg.eigh(matrix)
    sizes = values.abs()
    place = int((sizes >= (1 - tolerance) * sizes.max()).nonzero()[-1])
    residuals = length * vectors[-1].abs()
    ends = torch.tensor([0, len(values) - 1])
    rivals = ends[sizes[ends] + residuals[ends] >= sizes[place]]
    return float(values[place]), max(float(residuals[i]) for i in (place, *rivals.tolist()))
