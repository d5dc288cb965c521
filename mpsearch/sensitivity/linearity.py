"""Linearity coefficients: how much harm a relative error of each layer does, found by adding noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.apply import Change
from mpsearch.model.digest import digest_of
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, batch_seed, build_table, offered
from mpsearch.sensitivity.harm import AGAINST, Against, Harm, called, refusal
from mpsearch.sensitivity.statistics import relative_error
from mpsearch.spread import student_factor
from mpsearch.tables import SensitivityTable


class Slope(NamedTuple):
    """A straight line through the origin: its slope and the standard error of that."""

    value: float
    error: float


def slope(squares: Sequence[float], harm: Sequence[float]) -> Slope:
    """Fit ``harm = alpha * square`` by least squares, without a constant.

    alpha = sum(t^2 harm) / sum(t^4); the standard error comes from the residuals, widened for few points.

    >>> slope([1.0, 2.0], [3.0, 6.0])
    Slope(value=3.0, error=0.0)
    """
    weight = math.fsum(x * x for x in squares)
    alpha = math.fsum(x * y for x, y in zip(squares, harm, strict=True)) / weight
    freedom = len(squares) - 1
    if freedom < 1:
        return Slope(alpha, math.nan)
    rest = math.fsum((y - alpha * x) ** 2 for x, y in zip(squares, harm, strict=True))
    return Slope(alpha, math.sqrt(rest / freedom / weight) * student_factor(freedom))


@dataclass(frozen=True)
class Linearity:
    """Harm per relative squared weight error, measured with noise, times each format's own error.

    score = sum over the decision's layers of alpha_l t_l(format)^2, t_l^2 = ||Q(W) - W||_F^2 / ||W||_F^2.

    alpha_l: ``W + t ||W||_F xi / ||xi||`` with Gaussian ``xi`` is put in the place of one layer's weight, at ``levels``
    sizes t = ``largest``/``levels``, …, ``largest``; the harm is regressed on t^2 without a constant. Noise of exact
    length is the paper's ``t ||W||_F / sqrt(d) xi`` without the chance in its length. Loss changes
    have a first-order term: against the loss each noise is used with both signs, which cancels it.

    The relative error has no unit, so layer sizes are counted once, in alpha. Negative slopes, which
    noise in the harm can give, are kept; the solver takes their standard error instead.

    Bias: takes a format's error for noise that is spread evenly over the weight, and the harm for quadratic up to
    ``largest`` (3 bits and more). Formats err less in rows of small weights, so that an embedding with rare tokens
    of small norm is overrated (by 1.7 in the bundled model, whose other decisions come within 0.8 to 1.3 of
    ``divergence`` at 4 bits). Standard error: of the regression; over batches when there are several, each of which
    draws noise of its own.
    Cost: ``levels * draws`` forward passes per layer (twice that against the loss), whatever the number of formats.
    Memory: one layer's noise, and the kept errors (`Deltas`).
    Source: HIGGS, Malinovskii et al. 2024 (arXiv:2411.17525), who take 15 levels and perplexity.

    Attributes:
        levels: sizes of noise.
        largest: the largest noise, relative to the weights.
        draws: noises of each size, per batch.
        seed: seed of the noise.
        against: ``kl`` (divergence from the original) or ``loss``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(2, 1, bias=False), loss=lambda m, x: m(x).square().mean())
    >>> _ = model.module.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> found = Linearity(against="loss").coefficients(model, torch.eye(2), mp.layers(model))
    >>> round(found[""].value, 3)  # the loss is ||W||^2 / 2, and so is what relative noise of size 1 adds
    12.5
    """

    levels: int = 4
    largest: float = 0.2
    draws: int = 1
    seed: int = 0
    against: Against = "kl"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 2
    cost: ClassVar[str] = "4 forwards per layer"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        for name in ("levels", "draws"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError("E113", f"linearity: {name} is {value!r}; give a whole number from 1")
        if self.levels * self.draws < 2:
            raise InputError("E113", "linearity: one level with one draw has no standard error; give levels=2 or more")
        if not isinstance(self.largest, (int, float)) or not 0 < self.largest <= 1:
            raise InputError("E113", f"linearity: largest is {self.largest!r}; give a number above 0, at most 1")
        if not isinstance(self.seed, int):
            raise InputError("E113", f"linearity: seed is {self.seed!r}; give a whole number")
        if self.against not in AGAINST:
            raise InputError("E113", f"linearity: against is {self.against!r}; give 'kl' or 'loss'")

    def refuses(self, model: Model) -> str:
        return refusal(model, self.against)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def coefficients(self, model: Model, batch: Any, layers: Sequence[Layer]) -> dict[str, Slope]:
        """Return alpha of every layer that the batch reaches and that is not all zeros, by name.

        NaN where the model's answers with noise are not finite.
        """
        seen = called(model, batch, layers)
        harm = Harm(model, batch, self.against)
        seed = batch_seed(self.seed, batch)
        found = {}
        for layer in layers:
            if layer.name in seen and layer.kind != "kv_cache" and bool(model.weight(layer.name).detach().any()):
                harm.prepare([layer])
                found[layer.name] = self._slope(model, harm, layer, seed)
        return found

    def _slope(self, model: Model, harm: Harm, layer: Layer, seed: int) -> Slope:
        generator = torch.Generator().manual_seed(int(digest_of([seed, layer.name])[:14], 16))
        weight = model.weight(layer.name).detach()
        signs = (1.0, -1.0) if self.against == "loss" else (1.0,)
        squares, changes = [], []
        for level in range(1, self.levels + 1):
            size = self.largest * level / self.levels
            for _ in range(self.draws):
                noise = _noise(weight, size, generator)
                values = [v for sign in signs for v in harm.values(Change({layer: weight + sign * noise}))]
                squares.append(size * size)
                changes.append(sum(values) / len(values))
        if not all(map(math.isfinite, changes)):
            return Slope(math.nan, math.nan)
        return slope(squares, changes)

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        seen = called(model, batch, layers)
        alphas = self.coefficients(model, batch, layers)
        errors = {
            (layer.name, fmt): relative_error(model, layer, fmt)
            for layer in layers
            for fmt in formats
            if layer.name in seen and not fmt.refuses(layer)
        }

        def cell(decision: Decision, fmt: Format) -> Cell:
            assert offered(decision, fmt)
            if any(layer.name not in seen for layer in decision.layers):
                return Cell(status="not_observed")
            return _predicted(alphas, {layer.name: errors[layer.name, fmt] for layer in decision.layers})

        unit = "nats/token" if self.against == "kl" or model.tokens else "loss"
        return build_table(layers, formats, cell, unit=unit, samples=1, source={"estimator": "linearity"})


def _predicted(alphas: Mapping[str, Slope], errors: Mapping[str, float]) -> Cell:
    # Layers of zeros have no slope, and no error to multiply with it.
    unknown = Slope(math.nan, math.nan)
    parts = [(alphas.get(name, unknown), error) for name, error in errors.items() if error]
    spread = math.sqrt(math.fsum((alpha.error * error) ** 2 for alpha, error in parts))
    return Cell(math.fsum(alpha.value * error for alpha, error in parts), spread)


def _noise(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
    length = weight.double().norm() / drawn.double().norm()
    return drawn.mul_(float(length) * size)
