"""The five criteria by which NNCF sorts layers for 4 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.statistics import importance_table, matrices, observe, runs, sequences_of
from mpsearch.tables import SensitivityTable

Criterion = Literal[
    "max_activation_variance",
    "mean_activation_variance",
    "mean_activation_magnitude",
    "hessian_input_activation",
    "weight_quantization_error",
]
CRITERIA: tuple[Criterion, ...] = (
    "max_activation_variance",
    "mean_activation_variance",
    "mean_activation_magnitude",
    "hessian_input_activation",
    "weight_quantization_error",
)
#: Added to an error that is divided by: the step of float32 at 1.
EPSILON = 2.0**-23


@dataclass(frozen=True)
class Nncf:
    """A criterion of NNCF's mixed-precision weight compression, times the format's error.

    With x a layer's inputs (tokens x channels) and e the greatest over output channels of the mean squared error of
    8-bit asymmetric rounding, plus 2^-23:

    - ``max_activation_variance``: max over channels of the variance over tokens, divided by e;
    - ``mean_activation_variance``: mean over channels of it, divided by e;
    - ``mean_activation_magnitude``: mean over channels of max over tokens of |x|, divided by e;
    - ``weight_quantization_error``: 1 / e, without data;
    - ``hessian_input_activation``: 2 mean(x^2), the mean diagonal of the local Hessian.

    score = sum over the decision's layers of criterion x ||Q(W) - W||^2 / ||W||^2 for the first four, which are
    rankings in NNCF, and of 2 mean(x^2) ||Q(W) - W||^2 for the last. Relative errors do not count a layer's size; the
    last is a sum over weights, twice the squared output error of a token if channels do not correlate. (NNCF
    multiplies it by the norm, not its square, at 8 bits.)

    Numbers are those of a batch, averaged over batches with equal weight; NNCF's running mean of the Hessian criterion
    discounts early batches, which is not repeated here. A 1 / e in the first four means: what 8 bits hold well is
    sensitive; e hangs on the weights' scale. An embedding's inputs are one-hot vectors. Stacked experts are observed by
    ``weight_quantization_error`` only. Standard error: from batch to batch. Cost: one forward pass at most.
    Source: openvinotoolkit/nncf, weight_compression/mixed_precision.py.

    Attributes:
        criterion: which one.

    >>> import torch
    >>> x = torch.tensor([[[-4.0, 1.0], [0.0, 3.0]]])
    >>> [activation_criterion(x, name) for name in CRITERIA[:4]]
    [4.0, 2.5, 3.5, 13.0]
    """

    criterion: Criterion = "max_activation_variance"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward"

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise InputError("E113", f"nncf: criterion is {self.criterion!r}; give one of {', '.join(CRITERIA)}")

    @property
    def needs(self) -> Sequence[str]:
        """Batches, for the criteria that look at inputs."""
        return () if self.criterion == "weight_quantization_error" else ("data",)

    def refuses(self, model: Model) -> str:
        return runs(model) if self.needs else ""

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        if not self.needs:
            found = {x.name: 1.0 / int8_error(model, x) for x in layers if x.kind != "kv_cache"}
            table = importance_table(model, layers, formats, found, "nncf", spread=0.0)
            return SensitivityTable.mean([table] * max(1, len(batches)))
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        calls: dict[str, list[tuple[float, int]]] = {}

        def see(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
            one_hot = isinstance(module, nn.Embedding)
            value = one_hot_criterion(x, layer.rows, self.criterion) if one_hot else activation_criterion(
                sequences_of(module, x), self.criterion
            )  # fmt: skip
            calls.setdefault(layer.name, []).append((value, x.numel()))

        observe(model, batch, layers, see)
        found = {
            name: math.fsum(value * n for value, n in parts) / sum(n for _, n in parts) for name, parts in calls.items()
        }
        if self.criterion != "hessian_input_activation":
            by_name = {x.name: x for x in layers}
            found = {name: value / int8_error(model, by_name[name]) for name, value in found.items()}
            return importance_table(model, layers, formats, found, "nncf")

        def squared(layer: Layer, fmt: Format) -> float:
            return float(Deltas.of(model)(layer, fmt).double().square().sum())

        unit = "2 x squared output error/token"
        return importance_table(model, layers, formats, found, "nncf", error=squared, unit=unit)


def activation_criterion(x: Tensor, criterion: Criterion) -> float:
    """A criterion's statistic of one input, (sequences, tokens, channels): all tokens are one set."""
    wide = x.double().flatten(0, -2)
    if criterion == "hessian_input_activation":
        return 2.0 * float(wide.square().mean())
    if criterion == "mean_activation_magnitude":
        return float(wide.abs().amax(dim=0).mean())
    variance = wide.var(dim=0, correction=0)
    return float(variance.max() if criterion == "max_activation_variance" else variance.mean())


def one_hot_criterion(tokens: Tensor, entries: int, criterion: Criterion) -> float:
    """The same for token numbers as one-hot vectors.

    >>> one_hot_criterion(torch.tensor([0, 0, 1, 2]), 4, "max_activation_variance")
    0.25
    """
    shares = torch.bincount(tokens.flatten(), minlength=entries).double() / tokens.numel()
    if criterion == "hessian_input_activation":
        return 2.0 / entries
    if criterion == "mean_activation_magnitude":
        return float((shares > 0).double().mean())
    variance = shares * (1 - shares)
    return float(variance.max() if criterion == "max_activation_variance" else variance.mean())


def int8_error(model: Model, layer: Layer) -> float:
    """Greatest over output channels of the mean squared error of 8-bit asymmetric rounding, plus 2^-23."""
    rows = matrices(layer, model.weight(layer.name)).flatten(0, 1)
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    zero = (-low / scale).round().clamp(0, 255)
    rounded = ((rows / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    return float((rounded - rows).square().mean(dim=1).max()) + EPSILON
