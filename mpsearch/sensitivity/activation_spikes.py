"""Activation spikes: layers whose inputs hold a few tokens far larger than the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Decision, Layer
from mpsearch.model.activations import round_input
from mpsearch.model.evidence import channel_axis
from mpsearch.model.model import Model
from mpsearch.protection import THRESHOLD
from mpsearch.sensitivity.assemble import Cell, build_table, mean_cell
from mpsearch.sensitivity.statistics import (
    Inputs,
    observe,
    relative_error,
    runs,
    sequences_of,
    spike_ratio,
    squared,
    static_ranges,
)
from mpsearch.tables import SensitivityTable

#: A massive activation is over this, and over this many times the median size.
MASSIVE, TIMES = 100.0, 1000.0


@dataclass(frozen=True, slots=True)
class Spike:
    """One number of a layer's input, and where it stands."""

    batch: int
    sequence: int
    token: int
    channel: int
    value: float


@dataclass(frozen=True, slots=True)
class SpikeReport:
    """What stands out in the inputs of one layer.

    Attributes:
        layer: name of the layer.
        ratio: mean over sequences of greatest over median token scale, the scale of a token being its greatest |x|.
        tokens: how many tokens were seen.
        peak: the greatest number; None when no input was seen.
        outlier_columns: channels with any |x| over the threshold of LLM.int8().
        kurtosis: of all numbers, 3 for a normal distribution.
        massive: numbers over 100 and over 1000 times the median |x| of their call, in order, at most ``most``.
    """

    layer: str
    ratio: float
    tokens: int
    peak: Spike | None
    outlier_columns: tuple[int, ...]
    kurtosis: float
    massive: tuple[Spike, ...]


def flagged(report: Sequence[SpikeReport], threshold: float = THRESHOLD) -> tuple[str, ...]:
    """Name the layers to keep in high precision: those whose ratio is over the threshold, greatest first.

    A ratio that is not a number (an input was not finite) counts as the greatest.

    >>> made = [SpikeReport(name, ratio, 8, None, (), 3.0, ()) for name, ratio in (("a", 2.0), ("b", 9.0))]
    >>> flagged(made), flagged(made, threshold=1.5)
    (('b',), ('b', 'a'))
    """
    ratios = {row.layer: math.inf if math.isnan(row.ratio) else row.ratio for row in report}
    found = [name for name, ratio in ratios.items() if ratio > threshold]
    return tuple(sorted(found, key=lambda name: -ratios[name]))


@dataclass(frozen=True)
class ActivationSpikes:
    """Rounding errors, weighted by how far single tokens stand out of a layer's inputs.

    score = sum over the decision's layers of r (||Q(W) - W||^2 / ||W||^2 + ||Q(x) - x||^2 / ||x||^2), where r is the
    mean over sequences of max_t s_t / median_t s_t, and s_t = max over channels of |x_t|. Without an activation format
    the second part is 0. r is 1 where no token stands out. Tokens of zeros are left out of the median, and so r is
    finite. The median of an even number of tokens is the mean of the middle two.

    The ratio and the rule "keep a layer in 16 bits where r > alpha" are those of QFeM (Yang et al. 2024, "Mitigating
    Quantization Errors Due to Activation Spikes in GLU-Based LLMs", code onnoo/activation-spikes); the paper has no
    score per format, so r multiplies relative errors, which do not count a layer's size. Outlier columns are those
    of LLM.int8() (Dettmers et al. 2022), massive activations those of Sun et al. 2024, here of every layer's input.

    An embedding reads token numbers: its r is 1. Stacked experts are not observed. Bias: r of a batch is of that
    batch's sequences. Standard error: over sequences, or batches. Cost: one forward pass; no activation is kept.

    Attributes:
        outlier: |x| over which a channel counts as an outlier column in the report.
        most: how many massive activations of a layer the report names.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)), logits=lambda m, x: m(x))
    >>> x = torch.tensor([1.0, 1.0, 9.0, 1.0]).reshape(1, 4, 1)
    >>> [(row.ratio, row.peak.token) for row in ActivationSpikes().report(model, [x], mp.layers(model))]
    [(9.0, 2)]
    """

    outlier: float = 6.0
    most: int = 16
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations")
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward"
    needs: ClassVar[Sequence[str]] = ("data",)

    def __post_init__(self) -> None:
        if not isinstance(self.outlier, (int, float)) or not 0 < self.outlier < math.inf:
            raise InputError("E113", f"activation_spikes: outlier is {self.outlier!r}; give a number over 0")
        if not isinstance(self.most, int) or self.most < 0:
            raise InputError("E113", f"activation_spikes: most is {self.most!r}; give a whole number from 0")

    def refuses(self, model: Model) -> str:
        return runs(model)

    def report(self, model: Model, batches: Sequence[Any], layers: Sequence[Layer]) -> tuple[SpikeReport, ...]:
        """Say for each layer that was called what stands out in its inputs, and on which token and channel."""
        inputs: dict[str, Inputs] = {}
        peaks: dict[str, Spike] = {}
        massive: dict[str, list[Spike]] = {}
        for number, batch in enumerate(batches):

            def see(layer: Layer, module: nn.Module, x: Tensor, output: Tensor, number: int = number) -> None:
                seen = sequences_of(module, x)
                inputs.setdefault(layer.name, Inputs()).add(seen, self.outlier)
                peak = _spike(seen, int(seen.abs().argmax()), number)
                if layer.name not in peaks or abs(peak.value) > abs(peaks[layer.name].value):
                    peaks[layer.name] = peak
                hits = massive.setdefault(layer.name, [])
                places = massive_places(seen)[: max(0, self.most - len(hits))]
                hits += [_spike(seen, place, number) for place in places]

            observe(model, batch, [x for x in layers if x.kind != "embedding"], see)
        return tuple(
            SpikeReport(
                name, found.ratio, found.tokens, peaks.get(name), found.outlier_columns, found.kurtosis,
                tuple(massive[name]),
            )
            for name, found in ((x.name, inputs[x.name]) for x in layers if x.name in inputs)
        )  # fmt: skip

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        ranges = static_ranges(model, layers, formats)
        ratios: dict[str, list[float]] = {}
        energy: dict[str, float] = {}
        errors: dict[tuple[str, Format], float] = {}

        def see(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
            if layer.kind == "embedding":
                ratios[layer.name] = [1.0]
                return
            scales = sequences_of(module, x).abs().amax(dim=-1)
            ratios.setdefault(layer.name, []).extend(spike_ratio(row) for row in scales)
            energy[layer.name] = energy.get(layer.name, 0.0) + squared(x)
            for fmt in formats:
                if isinstance(fmt.activation, Activation) and not fmt.refuses(layer):
                    rounded = round_input(x, fmt.activation, channel_axis(module), ranges.get((layer.name, fmt)))
                    errors[layer.name, fmt] = errors.get((layer.name, fmt), 0.0) + squared(rounded - x)

        observe(model, batch, layers, see)

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(layer.name not in ratios for layer in decision.layers):
                return Cell(status="not_observed")
            parts = []
            for layer in decision.layers:
                lost = errors.get((layer.name, fmt), 0.0)
                error = relative_error(model, layer, fmt) + (lost / energy[layer.name] if lost else 0.0)
                parts.append((mean_cell(ratios[layer.name]), error))
            # Ratios of tied layers come from the same input, so their errors add up as they are.
            spread = math.fsum(ratio.spread * error for ratio, error in parts)
            return Cell(math.fsum(ratio.value * error for ratio, error in parts), spread)

        unit = "spike ratio x relative squared error"
        samples = max((len(x) for x in ratios.values()), default=0)
        return build_table(layers, formats, cell, unit=unit, samples=samples, source={"estimator": "activation_spikes"})


def massive_places(x: Tensor) -> list[int]:
    """Flat positions of the numbers over 100 and at least 1000 times the median size.

    >>> import torch
    >>> massive_places(torch.tensor([0.2, -250.0, 0.3, 0.1]))
    [1]
    """
    size = x.abs().flatten()
    ordered = size.double().sort().values
    median = float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [int(i) for i in ((size > MASSIVE) & (size >= TIMES * median)).nonzero()[:, 0]]


def _spike(x: Tensor, place: int, batch: int) -> Spike:
    sequence, rest = divmod(place, x.shape[1] * x.shape[2])
    token, channel = divmod(rest, x.shape[2])
    return Spike(batch, sequence, token, channel, float(x.flatten()[place]))
