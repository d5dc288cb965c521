"""Hessian trace: the average curvature of the loss in each layer, times its rounding error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.apply import swapped
from mpsearch.model.model import Model
from mpsearch.parts import wholes
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table, mean_cell
from mpsearch.sensitivity.derivatives import Curvature, cut, gradients, math_attention, own_weight, random_signs
from mpsearch.sensitivity.input_trace import InputTrace
from mpsearch.sensitivity.low_rank_trace import exact_trace, hutch_plus_plus, xtrace
from mpsearch.tables import SensitivityTable

#: Change of a finite difference on halving its step, relative to the sum over layers, that counts as settled.
_SETTLED = 0.05
#: Part of the step that vectors along the sharpest directions take: the loss is quadratic less far there.
_SHARPER = 0.01
#: In how many equal parts the products are spent.
_SHARES = {"hutch++": 3, "xtrace": 2}


@dataclass(frozen=True)
class HessianTrace:
    """Second-order loss increase by the average Hessian trace (HAWQ-V2).

    score = 1/2 sum over the decision's layers of tr(H_l) / n_l * ||Q(W_l) - W_l||_F^2, in nats per token, with
    H_l the Hessian of the mean loss in the layer's n_l weights and tr(H_l) by Hutchinson's estimate, the mean over
    probes of v^T H v with random signs v.

    Bias: none in the trace; the score takes all directions of a layer as equally curved, and leaves out the
    first-order term g.(Q(W) - W), which is not zero away from a minimum. A trace can be negative, and is kept so.
    Standard error: over batches, which holds that of the probes; over probes for a single batch. A batch is done
    when every layer's standard error over probes is below ``tolerance`` times the larger of its trace and the mean
    trace, or after ``probes``.

    With ``probing="joint"`` one product serves all layers, but each layer's estimate carries the cross terms with all
    others, which add sum_m ||H_lm||_F^2 to its variance. ``"layer"`` probes one layer at a time: free of them, at
    nearly one product per layer and probe. For a ranking joint probes are cheaper; for a precise trace of single layers
    they can be dearer: compare both by seconds x variance (benchmarks/RESULTS.md).
    ``product="finite_difference"`` takes the difference of two gradients, [g(w + h v) - g(w)] / h: no second graph, any
    attention kernel; its error from the third derivative is odd in v, so it has mean zero, and h is halved until the
    first probe changes by less than 5 %; where no step settles, that batch is differentiated twice instead.
    ``"double_backward"`` differentiates the gradient, with no step to choose.

    ``method="hutch++"`` and ``"xtrace"`` (`mpsearch.sensitivity.low_rank_trace`) find the large eigenvalues of each
    layer first, so they need ``probing="layer"``; ``probes`` are then the products per layer and batch, all of them
    taken (a multiple of 3 from 6, or of 2 from 4), and a layer of no more weights than that gets its exact trace. They
    gain where the curvature lies in few directions, hold ``probes`` copies of the layer in turn, and take a hundredth
    of ``step``, not halved, for finite differences along the sharpest directions.

    Of parts of layers, tr(H_l) and n_l are those of the part: v^T H v without the entries of v outside of it, from the
    same products as the whole layer's, so that the traces of all parts add up to the layer's. (The scores do not: each
    part is weighed by its own mean curvature.) The low-rank methods take products of their own for every part.

    A format that rounds a layer's input (``W@A``) adds 1/2 tr(H_x) / n_x ||Q(x) - x||^2, with H_x the Hessian of one
    sample's mean loss in all that the layer reads in that sample, averaged over samples (`InputTrace`). ``probes`` of
    these are taken per batch, by Hutchinson's method whatever ``method`` says; ``tolerance`` is that of weights alone.

    Sources: Dong et al. 2020 (HAWQ-V2); Hutchinson 1990; Meyer et al. 2021; Epperly et al. 2024. Cost: one forward and
    backward pass per batch, then per joint probe about one (finite difference) or three (double backward, through
    attention that can be differentiated twice).

    Attributes:
        probes: most probes per batch.
        least_probes: fewest probes per batch.
        tolerance: relative standard error over probes at which a batch is done.
        probing: ``joint`` or ``layer``.
        product: ``double_backward`` or ``finite_difference``.
        step: first step h, relative to the root mean square of the weights.
        seed: seed of the probes.
        method: ``hutchinson``, ``hutch++`` or ``xtrace``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(2, 1, bias=False), loss=lambda m, x: m(x).square().mean() / 2)
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
    >>> table = mp.score(model, [torch.eye(2)], ["int2-tensor"], "hessian_trace")
    >>> round(float(table.value[0, 0]), 4)  # trace 1, 2 weights, error 0.4^2
    0.04
    """

    probes: int = 16
    least_probes: int = 8
    tolerance: float = 0.1
    probing: Literal["joint", "layer"] = "joint"
    product: Literal["finite_difference", "double_backward"] = "finite_difference"
    step: float = 0.01
    seed: int = 0
    method: Literal["hutchinson", "hutch++", "xtrace"] = "hutchinson"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 + 8 to 16 times forward and backward"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        for name in ("probes", "least_probes"):
            if not isinstance(getattr(self, name), int):
                raise InputError("E113", f"hessian_trace: {name} is {getattr(self, name)!r}; give a whole number")
        if self.probing not in ("joint", "layer") or self.product not in ("double_backward", "finite_difference"):
            raise InputError(
                "E113",
                f"hessian_trace: probing is {self.probing!r} and product {self.product!r}",
                advice="probing: joint or layer; product: double_backward or finite_difference",
            )
        if not 2 <= self.least_probes <= self.probes:
            raise InputError(
                "E113", f"hessian_trace: least_probes is {self.least_probes}; give 2 to probes ({self.probes})"
            )
        self._check_method()

    def _check_method(self) -> None:
        if self.method == "hutchinson":
            return
        if self.method not in _SHARES:
            raise InputError(
                "E113",
                f"hessian_trace: method is {self.method!r}",
                advice="method: hutchinson, hutch++ or xtrace",
            )
        share = _SHARES[self.method]
        if self.probing != "layer":
            raise InputError(
                "E113", f"hessian_trace: {self.method} takes one layer at a time", advice='set probing = "layer"'
            )
        if self.probes % share or self.probes < 2 * share:
            raise InputError(
                "E113",
                f"hessian_trace: {self.method} with {self.probes} probes",
                advice=f"give a multiple of {share} from {2 * share}",
            )

    def refuses(self, model: Model) -> str:
        return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        traces = self.traces(model, batch, layers)
        inputs = InputTrace(self.probes, self.probing, self.product, self.step, self.seed)
        terms = inputs.terms(model, batch, layers, formats)
        count = len(traces)
        column = {layer.name: i for i, layer in enumerate(layers)}
        deltas = Deltas.of(model)
        errors = {
            (layer.name, fmt): float(deltas.own(layer, fmt).square().sum(dtype=torch.float64))
            for layer in layers
            for fmt in formats
            if not fmt.refuses(layer)
        }

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(math.isnan(traces[0][column[x.name]]) for x in decision.layers):
                return Cell(status="not_observed")
            per_probe = [
                math.fsum(0.5 * probe[column[x.name]] / x.weights * errors[x.name, fmt] for x in decision.layers)
                for probe in traces
            ]
            found, term = mean_cell(per_probe), terms.get((decision.name, fmt))
            if term is None:
                return found
            # The probes of weights and of inputs are drawn apart.
            return Cell(found.value + term.value, math.hypot(found.spread, term.spread), found.status)

        return build_table(
            layers, formats, cell, unit="nats/token", samples=count, source={"estimator": "hessian_trace"}
        )

    def traces(self, model: Model, batch: Any, layers: Sequence[Layer]) -> list[list[float]]:
        """Estimate the Hessian trace of each layer on one batch.

        Returns:
            (probes, layers): one estimate per probe and layer, in nats per token; NaN for a layer that the loss
            does not depend on. Their mean is the trace; their spread over the root of their number its error.
        """
        generator = torch.Generator().manual_seed(batch_seed(self.seed, batch))
        if self.method != "hutchinson":
            return self._low_rank(model, batch, layers, generator)
        found: list[list[float]] = []
        for estimate in self._estimates(model, batch, layers, generator):
            found.append(estimate)
            if len(found) == self.probes or (len(found) >= self.least_probes and self._settled(found)):
                break
        return found

    def _low_rank(
        self, model: Model, batch: Any, layers: Sequence[Layer], generator: torch.Generator
    ) -> list[list[float]]:
        curvature = Curvature(model, batch, layers, self.product, self.step * _SHARPER)
        count = self.probes // _SHARES[self.method]
        columns: list[list[float]] = []
        for i, layer in enumerate(layers):
            weight = own_weight(model, layer)

            def times(vector: Tensor, i: int = i, weight: Tensor = weight) -> Tensor:
                product: Tensor = curvature.times({i: vector.reshape(weight.shape)})[i].flatten()
                return product

            def draw(weight: Tensor = weight) -> Tensor:
                return torch.stack([random_signs(weight.flatten(), generator) for _ in range(count)], dim=1).to(
                    weight.device
                )

            gradient = curvature.gradients[i]
            if gradient is None:
                columns.append([math.nan] * count)
            elif not bool(gradient.isfinite().all()):
                columns.append([math.inf] * count)
            elif weight.numel() <= self.probes:
                columns.append([exact_trace(times, weight.flatten())] * count)
            elif self.method == "xtrace":
                columns.append(xtrace(times, draw()).tolist())
            else:
                columns.append(hutch_plus_plus(times, draw(), draw()).tolist())
        return [list(row) for row in zip(*columns, strict=True)]

    def _settled(self, found: list[list[float]]) -> bool:
        values = torch.tensor(found, dtype=torch.float64)
        values = values[:, values.isfinite().all(dim=0)]
        if not values.numel():
            return True
        mean = values.mean(dim=0).abs()
        error = values.std(dim=0) / math.sqrt(len(found))
        return bool((error <= self.tolerance * torch.maximum(mean, mean.mean())).all())

    def _estimates(
        self, model: Model, batch: Any, layers: Sequence[Layer], generator: torch.Generator
    ) -> Iterator[list[float]]:
        if self.product == "finite_difference":
            yield from self._by_difference(model, batch, layers, generator)
        else:
            yield from self._twice(model, batch, layers, generator)

    def _twice(
        self, model: Model, batch: Any, layers: Sequence[Layer], generator: torch.Generator
    ) -> Iterator[list[float]]:
        """Products by differentiating the gradient."""
        whole = wholes(layers)
        weights = [model.weight(layer.name) for layer in whole]
        with math_attention():
            first = gradients(model, batch, whole, create_graph=True)
            known = {i: g for i, g in enumerate(first) if g is not None}
            used = [i for i, g in known.items() if bool(g.isfinite().all())]
            # Together with others they would spoil those as well.
            spoilt = {whole[i].name: torch.full_like(g.detach(), torch.inf) for i, g in known.items() if i not in used}
            while True:
                signs = [random_signs(weight, generator) for weight in weights]
                found: dict[str, Tensor] = dict(spoilt)
                for group in self._groups(used):
                    products = torch.autograd.grad(
                        [known[i] for i in group],
                        [weights[i] for i in group],
                        [signs[i] for i in group],
                        retain_graph=True,
                        materialize_grads=True,
                    )
                    found |= {whole[i].name: product * signs[i] for i, product in zip(group, products, strict=True)}
                yield _sums(layers, found)

    def _groups(self, used: list[int]) -> list[list[int]]:
        """Which layers share a product."""
        return [[i] for i in used] if self.probing == "layer" else [used]

    def _by_difference(
        self, model: Model, batch: Any, layers: Sequence[Layer], generator: torch.Generator
    ) -> Iterator[list[float]]:
        whole = wholes(layers)
        weights = [model.weight(layer.name) for layer in whole]
        start = {i: g for i, g in enumerate(gradients(model, batch, whole)) if g is not None}
        squares = sum(float(weight.detach().square().sum(dtype=torch.float64)) for weight in weights)
        step = self.step * math.sqrt(squares / sum(weight.numel() for weight in weights))

        def estimate(signs: list[Tensor], h: float) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for group in self._groups(list(start)):
                with swapped(model, {whole[i]: weights[i].detach() + h * signs[i] for i in group}):
                    there = torch.autograd.grad(model.loss(batch), [weights[i] for i in group])
                for i, gradient in zip(group, there, strict=True):
                    found[whole[i].name] = (gradient - start[i]) * signs[i]
            return found

        signs = [random_signs(weight, generator) for weight in weights]
        slopes = [float(g.abs().sum(dtype=torch.float64)) for g in start.values()]
        slope = math.fsum(filter(math.isfinite, slopes))
        found = _sums(whole, estimate(signs, step), step)
        for _ in range(8):
            products = estimate(signs, step / 2)
            step /= 2
            finer = _sums(whole, products, step)
            # Layers whose derivatives are not finite have no say: their cells are barred.
            pairs = [pair for pair in zip(found, finer, strict=True) if all(map(math.isfinite, pair))]
            change = math.fsum(abs(a - b) for a, b in pairs)
            # A probe can meet no curvature at all; then only the rounding of the gradients is left to compare.
            rounding = 1e-6 * slope / step
            settled = change <= _SETTLED * math.fsum(abs(b) for _, b in pairs) + rounding
            found = finer
            if settled:
                break
        else:
            yield from self._twice(model, batch, layers, generator)
        while True:
            yield _sums(layers, products, step)
            signs = [random_signs(weight, generator) for weight in weights]
            products = estimate(signs, step)


def _sums(layers: Sequence[Layer], products: Mapping[str, Tensor], step: float = 1.0) -> list[float]:
    """Sum over each layer's own weights, over ``step``.

    NaN for a layer that there is nothing of; infinite where derivatives are not finite.
    """
    found = [None if x is None else float(x.sum(dtype=torch.float64)) / step for x in cut(layers, products)]
    return [math.nan if x is None else x if math.isfinite(x) else math.inf for x in found]
