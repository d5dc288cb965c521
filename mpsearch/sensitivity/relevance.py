"""Relevance of layers, channels and heads for what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.layer import Layer
from mpsearch.model.evidence import channel_axis
from mpsearch.model.model import Batch, Model, samples_of
from mpsearch.sensitivity.lrp_operations import OPAQUE
from mpsearch.sensitivity.lrp_rules import Rules
from mpsearch.sensitivity.lrp_trace import Tracer

Target = Literal["top", "label"]


@dataclass(frozen=True, eq=False)
class Part:
    """Relevance of one tensor of a layer, summed over samples and positions, per channel (float64).

    Attributes:
        channels: signed sums: parts for and against the answer cancel.
        magnitudes: sums of absolute values, which do not.
    """

    channels: Tensor
    magnitudes: Tensor

    @property
    def signed(self) -> float:
        return float(self.channels.sum())

    @property
    def absolute(self) -> float:
        return float(self.magnitudes.sum())

    def heads(self, count: int) -> Part:
        """Add up neighbouring channels, those of a head each.

        Raises:
            InputError: the channels do not divide (E113).
        """
        if count < 1 or len(self.channels) % count:
            raise InputError("E113", f"{len(self.channels)} channels are not {count} heads of one size")
        return Part(self.channels.view(count, -1).sum(1), self.magnitudes.view(count, -1).sum(1))


@dataclass(frozen=True, eq=False)
class LayerRelevance:
    """Relevance of a layer, over all its calls.

    Attributes:
        output: what reaches the layer, z * g per output channel; of an embedding per entry of its table.
        input: what it passes on, x * g per input channel; of an embedding the same relevance per column of its table.
        weight: what goes through its weights, w * g summed over the positions of a call, per output channel.
    """

    output: Part
    input: Part
    weight: Part


@dataclass(frozen=True, eq=False)
class Relevance:
    """What a backward pass of relevance found.

    Attributes:
        layers: name -> relevance of the layers that were called and that relevance reached.
        explained: sum of the logits that were explained, which is the relevance that was sent back.
        arrived: relevance of the model's inputs and of what its embeddings gave. Biases and learned constants keep
            the rest.
        logits: the logits of this pass.
    """

    layers: Mapping[str, LayerRelevance]
    explained: float
    arrived: float
    logits: Tensor


class _Sums:
    """Collects the relevance of one layer."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, part: str, relevance: Tensor, axis: int) -> None:
        """Add relevance whose channels are on an axis."""
        rows = relevance.detach().movedim(axis, 0).flatten(1) if relevance.dim() > 1 else relevance.detach()[:, None]
        self.put(part, rows.sum(1, dtype=torch.float64), rows.abs().sum(1, dtype=torch.float64))

    def put(self, part: str, *channels: Tensor) -> None:
        """Add signed sums and sums of absolute values."""
        known = self.parts.setdefault(part, [torch.zeros_like(x, device="cpu") for x in channels])
        for total, found in zip(known, channels, strict=True):
            total += found.cpu()

    def found(self) -> LayerRelevance:
        return LayerRelevance(*(Part(*self.parts[part]) for part in ("output", "input", "weight")))


def _see(sums: _Sums, module: nn.Module, out_axis: int) -> Callable[..., None]:
    axis = channel_axis(module)

    def see(x: Tensor, weight: Tensor, z: Tensor, g_x: Tensor, g_w: Tensor, g: Tensor) -> None:
        sums.add("output", z * g, axis)
        sums.add("input", x * g_x, axis)
        sums.add("weight", weight * g_w, out_axis)

    return see


def _see_tokens(sums: _Sums, entries: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    def see(tokens: Tensor, output: Tensor, g: Tensor) -> None:
        found = (output * g).flatten(0, -2).double()
        used, place = torch.unique(tokens, return_inverse=True)
        place = place.flatten()
        rows = found.new_zeros(len(used), found.shape[-1]).index_add_(0, place, found)
        every = found.new_zeros(entries)
        signed = every.index_copy(0, used, rows.sum(1))
        sums.put("output", signed, every.index_add(0, tokens.flatten(), found.abs().sum(1)))
        sums.add("input", found, -1)
        sums.put("weight", signed, every.index_copy(0, used, rows.abs().sum(1)))

    return see


def why_not(model: Model, target: Target = "top") -> str:
    """Say which modules or operations of a model no rule covers; empty when there are none.

    Operations show only when the model runs: on a few tokens, or on the calibration data if there is some.
    """
    opaque = sorted({type(m).__name__ for m in model.module.modules() if isinstance(m, OPAQUE)})
    if opaque:
        return f"no rule of relevance covers the modules {', '.join(opaque)}"
    example: Batch = next(samples_of(model.calibration[0])) if model.calibration else None
    if example is None and model.tokens:
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    if example is None:
        return ""
    tracer = Tracer(Rules(), {}, {})
    with torch.enable_grad(), tracer.running(model.module):
        logits = model.logits(_lifted(example, []))
    try:
        explained_logits(model, logits, example, target)
    except InputError as error:
        return error.message
    return _names(tracer)


def _names(tracer: Tracer) -> str:
    return f"no rule of relevance covers the operations {', '.join(sorted(tracer.unknown))}" if tracer.unknown else ""


def relevance(
    model: Model, batch: Batch, layers: Sequence[Layer], rules: Rules | None = None, target: Target = "top"
) -> Relevance:
    """Send the relevance of a batch's answers back through a model.

    Cost: a forward and a backward pass, and one more product per layer for its weights; three to six times the products
    under rules that treat signs apart. Memory: as for training, without the weights' gradients.

    Args:
        model: the model; left as it was.
        batch: what to run it on.
        layers: whose relevance to collect.
        rules: which rule holds where.
        target: ``top`` explains the largest logit of every position, ``label`` that of the true label.

    Raises:
        InputError: no rule covers an operation (E506), or there are no labels (E113).

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> _ = module.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> model = Model(module, logits=lambda m, x: m(x))
    >>> found = relevance(model, torch.ones(1, 2), [Layer("", "linear", (1, 2))]).layers[""]
    >>> round(found.input.signed, 3), round(found.input.absolute, 3)
    (2.0, 4.0)
    """
    sums = {layer.name: _Sums() for layer in layers if layer.kind in ("linear", "conv", "embedding")}
    arrived = [0.0]
    tracer = _tracer(model, [x for x in layers if x.name in sums], rules or Rules(), sums, arrived)
    inputs: list[Tensor] = []
    with torch.enable_grad():
        with tracer.running(model.module):
            logits = model.logits(_lifted(batch, inputs))
        if problem := _names(tracer):
            raise InputError("E506", f"lrp cannot follow '{model.name}': {problem}")
        explained = explained_logits(model, logits, batch, target)
        if not explained.requires_grad:
            return Relevance({}, float(explained.detach()), 0.0, logits.detach())
        explained.backward()  # type: ignore[no-untyped-call]
    arrived += [float((x * x.grad).detach().sum(dtype=torch.float64)) for x in inputs if x.grad is not None]
    found = {name: part.found() for name, part in sums.items() if part.parts}
    return Relevance(found, float(explained.detach()), sum(arrived), logits.detach())


def _tracer(
    model: Model, layers: Sequence[Layer], rules: Rules, sums: Mapping[str, _Sums], arrived: list[float]
) -> Tracer:
    weights = {id(model.weight(x.name)): x for x in layers}
    see = {key: _see(sums[x.name], model.holder(x.name), x.out_axis) for key, x in weights.items()}
    tokens = {id(w): _arriving(arrived, None) for w in _tables(model)}
    tokens |= {key: _arriving(arrived, _see_tokens(sums[x.name], x.shape[0])) for key, x in weights.items()}
    return Tracer(rules, see, tokens)


def _tables(model: Model) -> Iterator[Tensor]:
    for module in model.module.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight


def _arriving(total: list[float], also: Callable[[Tensor, Tensor, Tensor], None] | None) -> Callable[..., None]:
    def see(tokens: Tensor, output: Tensor, g: Tensor) -> None:
        total[0] += float((output * g).sum(dtype=torch.float64))
        if also is not None:
            also(tokens, output, g)

    return see


def _lifted(batch: Any, inputs: list[Tensor]) -> Any:
    """The same batch with numbers that relevance can arrive at; they are added to ``inputs``."""
    if isinstance(batch, Tensor):
        if not batch.is_floating_point():
            return batch
        inputs.append(batch.detach().clone().requires_grad_(True))
        return inputs[-1]
    if isinstance(batch, Mapping):
        return {name: _lifted(value, inputs) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_lifted(value, inputs) for value in batch)
    return batch


def explained_logits(model: Model, logits: Tensor, batch: Batch, target: Target) -> Tensor:
    """Sum of the logits that are explained, in float64.

    Raises:
        InputError: ``label`` for data without labels (E113).
    """
    if target == "top":
        return logits.amax(-1).sum(dtype=torch.float64) if logits.requires_grad else logits.detach().amax(-1).sum()
    if model.tokens:
        logits, labels = logits[:, :-1], batch["input_ids"][:, 1:]
    else:
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if len(batch) > 1 else None
    whole = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32)
    if not whole or labels.shape != logits.shape[:-1]:
        raise InputError(
            "E113",
            "lrp: target 'label' needs whole-numbered labels of the shape of the logits without their last axis",
            advice="give batches of (inputs, labels) or {…, 'labels': …}, or use target='top'",
        )
    return logits.gather(-1, labels.long()[..., None]).sum(dtype=torch.float64)
