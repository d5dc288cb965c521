"""Statistics of a layer's inputs, outputs and weights, and the table that an importance of layers makes.

Collected in one forward pass per batch, without keeping the activations. An input is seen as (sequences, tokens,
channels); one of two axes is a single sequence, and of an image every position is a token. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Decision, Layer
from mpsearch.model.activations import Range
from mpsearch.model.evidence import Calibration, channel_axis
from mpsearch.model.model import Model
from mpsearch.model.reads import input_of
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table
from mpsearch.tables import SensitivityTable

See = Callable[[Layer, nn.Module, Tensor, Tensor], None]


def runs(model: Model) -> str:
    """Say why a model cannot be run; empty when it can."""
    return "" if model.has_logits or model.has_loss else "it needs logits or a loss to run the model"


def run(model: Model, batch: Any) -> None:
    """Run the model on a batch, for the hooks on its modules."""
    with torch.no_grad():
        model.logits(batch) if model.has_logits else model.loss(batch)


def observe(model: Model, batch: Any, layers: Sequence[Layer], see: See) -> None:
    """Run a batch and show (layer, module, input, output) of every call.

    Stacked experts are not shown: what their module is called with is not what a weight is multiplied with. Calls
    without any token (an expert that nothing was sent to) are not shown either.
    """

    def watch(layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = input_of(module, args, kwargs)
            if x.numel():
                see(layer, module, x.detach(), output.detach())

        return hook

    handles = [
        model.holder(name).register_forward_hook(watch(layer), with_kwargs=True)
        for layer in layers
        if layer.kind not in ("expert", "kv_cache")
        for name in (layer.name, *layer.shared)
    ]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def sequences_of(module: nn.Module, x: Tensor) -> Tensor:
    """See an input or an output of a layer as (sequences, tokens, channels).

    >>> sequences_of(nn.Linear(3, 1), torch.zeros(5, 3)).shape
    torch.Size([1, 5, 3])
    >>> sequences_of(nn.Conv2d(3, 1, 2), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 16, 3])
    """
    axis = channel_axis(module)
    turned = x.movedim(axis, -1)
    if turned.dim() < max(3, 1 - axis):
        turned = turned.unsqueeze(0)
    return turned.reshape(turned.shape[0], -1, turned.shape[-1])


@dataclass
class Inputs:
    """What was seen of the inputs of one layer.

    Attributes:
        ratios: of each sequence: greatest token scale over the median one (see `spike_ratio`).
        tokens: how many tokens.
        peaks: of each channel: greatest |x|.
        above: of each channel: how many tokens with |x| over 6.
        elements: how many numbers.
        mean: of them.
        sums: of (x - mean)^2, (x - mean)^3 and (x - mean)^4. Sums of plain powers would cancel.
    """

    ratios: list[float] = field(default_factory=list)
    tokens: int = 0
    peaks: Tensor = field(default_factory=lambda: torch.zeros(0))
    above: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    elements: int = 0
    mean: float = 0.0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, x: Tensor, threshold: float = 6.0) -> None:
        """Count one input, as (sequences, tokens, channels)."""
        size = x.abs()
        self.ratios += [spike_ratio(scales) for scales in size.amax(dim=-1)]
        self.tokens += x.shape[0] * x.shape[1]
        peaks, above = size.amax(dim=(0, 1)), (size > threshold).sum(dim=(0, 1))
        known = len(self.peaks) > 0
        self.peaks = torch.maximum(self.peaks, peaks) if known else peaks
        self.above = self.above + above if known else above
        if x.numel():
            self._merge(x.double())

    def _merge(self, x: Tensor) -> None:
        """Join the central moments of two sets (Pebay 2008, SAND2008-6212)."""
        mean = float(x.mean())
        apart = x - mean
        power = apart.square()
        b2 = float(power.sum())
        b3 = float(power.mul_(apart).sum())
        b4 = float(power.mul_(apart).sum())
        (a2, a3, a4), na, nb = self.sums, self.elements, x.numel()
        n, d = na + nb, mean - self.mean
        p, q = na / n, nb / n
        self.sums = (
            a2 + b2 + d**2 * na * q,
            a3 + b3 + d**3 * na * q * (p - q) + 3 * d * (p * b2 - q * a2),
            a4 + b4 + d**4 * na * q * (p * p - p * q + q * q)
            + 6 * d**2 * (p * p * b2 + q * q * a2) + 4 * d * (p * b3 - q * a3),
        )  # fmt: skip
        self.mean += d * q
        self.elements = n

    @property
    def ratio(self) -> float:
        """Mean over the sequences of greatest over median token scale; 1 when none was seen."""
        return math.fsum(self.ratios) / len(self.ratios) if self.ratios else 1.0

    @property
    def outlier_columns(self) -> tuple[int, ...]:
        """Channels with any |x| over the threshold: those that LLM.int8() keeps in 16 bits."""
        return tuple(int(i) for i in self.above.nonzero()[:, 0])

    @property
    def kurtosis(self) -> float:
        """m4 / m2^2 of all numbers (3 for a normal distribution); 0 when all are equal."""
        if not self.elements:
            return 0.0
        m2, m4 = self.sums[0] / self.elements, self.sums[2] / self.elements
        # Of equal numbers only the rounding of their mean is left.
        return 0.0 if m2 <= 1e-28 * self.mean**2 else m4 / m2**2


def spike_ratio(scales: Tensor) -> float:
    """Greatest token scale over the median of those that are not 0; 1 when all are 0, NaN when any is.

    The median of an even number is the mean of the middle two, as numpy has it and unlike `torch.median`.

    >>> round(spike_ratio(torch.tensor([0.4, 250.0, 7.5, 6.5])), 6)
    35.714286
    """
    if bool(scales.isnan().any()):
        return math.nan
    ordered = scales[scales > 0].double().sort().values
    if not len(ordered):
        return 1.0
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return float(ordered[-1] / middle)


def matrices(layer: Layer, weight: Tensor) -> Tensor:
    """See a weight as (experts, output channels, inputs): float64, one expert unless they are stacked.

    The groups of a convolution count as experts: a column of one is another input than that of the next.
    """
    wide = weight.detach().double()
    if layer.kind == "expert":
        return wide.movedim(layer.out_axis, 1).reshape(wide.shape[0], wide.shape[layer.out_axis], -1)
    return wide.movedim(layer.out_axis, 0).reshape(layer.groups, layer.rows // layer.groups, -1)


def relative_error(model: Model, layer: Layer, fmt: Format) -> float:
    """||Q(W) - W||^2 / ||W||^2 of a layer, NaN where the format cannot hold it."""
    error = float(Deltas.of(model)(layer, fmt).double().square_().sum())
    return relative(error, float(model.weight(layer.name).detach().double().square_().sum()))


def relative(error: float, norm: float) -> float:
    """Error over norm; where the norm is 0: 0 if the error is, else infinite.

    >>> relative(0.0, 0.0), relative(1.0, 0.0), relative(1.0, 4.0)
    (0.0, inf, 0.25)
    """
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def squared(x: Tensor) -> float:
    """Sum of squares."""
    return float(x.square().sum(dtype=torch.float64))


def static_ranges(model: Model, layers: Sequence[Layer], formats: Sequence[Format]) -> dict[tuple[str, Format], Range]:
    """Find the ranges of inputs that static formats are made from.

    Before the model is watched: finding them may run it.
    """
    return {
        (layer.name, fmt): Calibration.of(model).input_range(layer, fmt.activation)
        for fmt in formats
        if isinstance(fmt.activation, Activation) and fmt.activation.static
        for layer in layers
        if not fmt.refuses(layer)
    }


def importance_table(
    model: Model,
    layers: Sequence[Layer],
    formats: Sequence[Format],
    importance: Mapping[str, float],
    name: str,
    *,
    spread: float = math.nan,
    error: Callable[[Layer, Format], float] | None = None,
    unit: str = "importance x relative squared weight error",
) -> SensitivityTable:
    """Score = sum over a decision's layers of importance x error.

    Args:
        model: the model.
        layers: what is scored.
        formats: in which formats.
        importance: name of a layer -> importance; a layer that is missing was not observed.
        name: name of the estimator.
        spread: standard error of every cell: 0 for what needs no data, NaN for a single batch.
        error: of a layer in a format; `relative_error` when left out.
        unit: unit of the scores.
    """

    def cell(decision: Decision, fmt: Format) -> Cell:
        if any(layer.name not in importance for layer in decision.layers):
            return Cell(status="not_observed")
        found = [error(x, fmt) if error else relative_error(model, x, fmt) for x in decision.layers]
        # A format without error costs nothing, whatever the importance.
        return Cell(math.fsum(importance[x.name] * e for x, e in zip(decision.layers, found, strict=True)), spread)

    return build_table(layers, formats, cell, unit=unit, samples=1, source={"estimator": name})
