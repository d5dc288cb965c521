"""Output error: how far a layer's outputs move on real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer
from mpsearch.model.activations import round_input
from mpsearch.model.evidence import Calibration, channel_axis
from mpsearch.model.model import Model
from mpsearch.model.reads import input_of
from mpsearch.parts import wholes
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table
from mpsearch.sensitivity.statistics import squared, static_ranges
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class OutputMse:
    """Squared error of each layer's output, with the original model's inputs.

    score = sum over the decision's layers and over all their calls of ||Q(W) Q(x) - W x||^2 / ||W x||^2, both
    summed over the tokens of a batch; without ``relative`` the mean over tokens of ||Q(W) Q(x) - W x||^2. Q(x) = x
    where the format leaves the input as it is. For a part of a layer the divisor is the whole layer's, so that the
    scores of its parts by output channel add up to the layer's.

    Sees the inputs but not what becomes of the error behind the layer. Bias: none in the local error.
    Standard error: from batch to batch. Cost: one forward pass, and one product per layer, format and call.
    This is the score that layer-wise reconstruction (AdaRound, GPTQ) minimises.

    Attributes:
        relative: divide by the squared output.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)), logits=lambda m, x: m(x))
    >>> _ = model.module[0].weight.data.fill_(1.0)
    >>> float(mp.score(model, [torch.ones(2, 1)], ["int8-channel"], "output_mse").value[0, 0]) < 1e-6
    True
    """

    relative: bool = True
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 2
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward, 1 product per cell"
    needs: ClassVar[Sequence[str]] = ("data",)

    def refuses(self, model: Model) -> str:
        return "" if model.has_logits or model.has_loss else "it needs logits or a loss to run the model"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        errors = {(layer.name, fmt): 0.0 for layer in layers for fmt in formats if not fmt.refuses(layer)}
        ranges = static_ranges(model, layers, formats)
        _gather(model, layers, formats)
        whole = wholes(layers)
        members: dict[str, list[Layer]] = {layer.name: [] for layer in whole}
        for layer in layers:
            members[layer.owner].append(layer)
        outputs = {layer.name: 0.0 for layer in whole}
        vectors = {layer.name: 0 for layer in whole}

        def watch(layer: Layer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                x = input_of(module, args, kwargs)
                clean = linear_part(module, x, model.weight(layer.name))
                outputs[layer.name] += squared(clean)
                # By its module: what is an embedding here may be a head there.
                looked_up = isinstance(module, nn.Embedding)
                vectors[layer.name] += x.numel() if looked_up else clean.numel() // layer.rows
                for member, fmt in ((member, fmt) for member in members[layer.name] for fmt in formats):
                    if (member.name, fmt) not in errors:
                        continue
                    if isinstance(fmt.activation, Activation):
                        rounded = round_input(x, fmt.activation, channel_axis(module), ranges.get((layer.name, fmt)))
                        weight = model.weight(layer.name) + deltas(layer, fmt)
                        errors[layer.name, fmt] += squared(linear_part(module, rounded, weight) - clean)
                    else:
                        errors[member.name, fmt] += squared(_moved(module, x, member, fmt, deltas))

            return hook

        handles = [
            model.holder(name).register_forward_hook(watch(layer), with_kwargs=True)
            for layer in whole
            if layer.kind != "expert"  # what its module is called with is not what the weight is multiplied with
            for name in (layer.name, *layer.shared)
        ]
        try:
            with torch.no_grad():
                model.logits(batch) if model.has_logits else model.loss(batch)
        finally:
            for handle in handles:
                handle.remove()

        def cell(decision: Any, fmt: Format) -> Cell:
            if any(not vectors[layer.owner] for layer in decision.layers):
                return Cell(status="not_observed")
            total = 0.0
            for layer in decision.layers:
                error, name = errors[layer.name, fmt], layer.owner
                total += (error / (outputs[name] if self.relative else vectors[name])) if error else 0.0
            return Cell(total)

        unit = "relative squared output error" if self.relative else "squared output error/token"
        return build_table(layers, formats, cell, unit=unit, samples=1, source={"estimator": "output_mse"})


def _gather(model: Model, layers: Sequence[Layer], formats: Sequence[Format]) -> None:
    """Let the model run for what rounding needs now: once layers are watched, that would be counted as well."""
    for fmt in formats:
        for layer in layers:
            if fmt.needs and layer.kind != "expert" and not fmt.refuses(layer):
                Calibration.of(model).evidence(layer, fmt.weight)


def _moved(module: nn.Module, x: Tensor, layer: Layer, fmt: Format, deltas: Deltas) -> Tensor:
    """How far the rounding error of a layer, or of a part of it, moves the output."""
    if layer.is_part and layer.kind == "linear":
        return functional.linear(x[..., slice(*layer.inputs)] if layer.inputs else x, deltas.own(layer, fmt))
    return linear_part(module, x, deltas(layer, fmt))


def linear_part(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer would give for ``x`` with another weight and no bias."""
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, weight)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        output: Tensor = module._conv_forward(x, weight, None)
        return output
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight)
    return x @ weight
