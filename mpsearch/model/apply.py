"""Applying formats to a model (weights, activations, KV caches), and putting everything back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.formats.kv_cache import KvCache
from mpsearch.layer import Layer
from mpsearch.model.activations import Range, round_input
from mpsearch.model.cut import part_of, put
from mpsearch.model.evidence import Calibration, channel_axis, readers
from mpsearch.model.kv_cache import find_caches
from mpsearch.model.model import Model
from mpsearch.model.quantize import Quantized, fake_quantize, quantize
from mpsearch.parts import check_apart


def quantized_weight(model: Model, layer: Layer, fmt: Format) -> Tensor:
    """The weight of a layer after a round trip through a format, float32, same shape.

    A part of a layer is rounded as a matrix of its own. What goes by rows is then what the whole layer would get there;
    a scale of the whole tensor is one of the part. Error feedback (``-gptq``) stays within the part's columns.

    Raises:
        InputError: as `fake_quantize`; also when calibration data is needed and cannot be had (E422).
    """
    evidence = Calibration.of(model).evidence(layer, fmt)
    weight = part_of(model.weight(layer.name).detach(), layer)
    return fake_quantize(weight, fmt, layer.row_axes, name=layer.name, evidence=evidence)


def quantized_parts(model: Model, layer: Layer, fmt: Format) -> Quantized:
    """What is stored of a layer in a format; dequantised it is `quantized_weight` bit for bit."""
    evidence = Calibration.of(model).evidence(layer, fmt)
    weight = part_of(model.weight(layer.name).detach(), layer)
    return quantize(weight, fmt, layer.row_axes, name=layer.name, evidence=evidence)


@dataclass(frozen=True, eq=False)
class Change:
    """Everything that formats change in a model, ready to be applied any number of times.

    Attributes:
        weights: layer -> rounded weight, float32, the shape of the layer's own.
        inputs: layer -> format of its input, and its range where the format is static.
        caches: (number of the attention layer, 0 for keys and 1 for values) -> format.
    """

    weights: Mapping[Layer, Tensor] = field(default_factory=dict)
    inputs: Mapping[Layer, tuple[Activation, Range | None]] = field(default_factory=dict)
    caches: Mapping[tuple[int, int], KvCache] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, formats: Mapping[Layer, Format]) -> Change:
        """Round what the formats ask for. Call while the model is unchanged.

        Of a layer whose parts are named, what is in none of them stays as it is.

        Raises:
            InputError: a layer cannot take its format (E130), parts have weights in common (E122), or as
                `quantized_weight`.
        """
        check_apart(formats)
        weights, inputs, caches = {}, {}, {}
        places = find_caches(model) if any(isinstance(fmt, KvCache) for fmt in formats.values()) else {}
        for layer, fmt in formats.items():
            if problem := fmt.refuses(layer):
                raise InputError("E130", f"layer '{layer.name}': {problem}")
            if isinstance(fmt, KvCache):
                place = places[layer.name]
                if not fmt.leaves(layer):
                    caches[place.number, place.side] = fmt
                continue
            weights[layer] = quantized_weight(model, layer, fmt.weight)
            activation = fmt.activation
            if activation is not None:
                assert isinstance(activation, Activation)
                seen = Calibration.of(model).input_range(layer, activation) if activation.static else None
                inputs[layer] = (activation, seen)
        return cls(weights, inputs, caches)


@contextmanager
def changed(model: Model, change: Change) -> Iterator[None]:
    """Run the body with a change applied.

    Caches are rounded where the body asks for `Model.logits`.
    """
    hooked = [(module, _rounding(*how)) for layer, how in change.inputs.items() for module in readers(model, layer)]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooked]
    try:
        with swapped(model, change.weights):
            model.caches = change.caches
            yield
    finally:
        model.caches = {}
        for handle in handles:
            handle.remove()


def _rounding(fmt: Activation, seen: Range | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (round_input(args[0], fmt, channel_axis(module), seen), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: round_input(kwargs[name], fmt, channel_axis(module), seen)}

    return hook


@contextmanager
def swapped(model: Model, weights: Mapping[Layer, Tensor]) -> Iterator[None]:
    """Run the body with other weights; afterwards every weight is the tensor it was before.

    Weights are swapped, not overwritten, so nothing needs to be restored by arithmetic, and a weight that
    several modules share changes in all of them. Parts of one layer are put together into a copy of its weight.

    Args:
        model: the model.
        weights: layer -> the weight to use, float32, the shape of the layer's own.

    Raises:
        InputError: parts have weights in common (E122).
    """
    check_apart(weights)
    parts: dict[str, dict[Layer, Tensor]] = {}
    originals: dict[Layer, Tensor] = {}
    for layer, weight in weights.items():
        if layer.is_part:
            parts.setdefault(layer.of, {})[layer] = weight
        originals.setdefault(layer.whole, model.weight(layer.name).data)
    try:
        for layer, original in originals.items():
            mine = parts.get(layer.name)
            model.weight(layer.name).data = put(mine, original.clone()) if mine else weights[layer]
        yield
    finally:
        for layer, original in originals.items():
            model.weight(layer.name).data = original


@contextmanager
def applied(model: Model, formats: Mapping[Layer, Format]) -> Iterator[None]:
    """Run the body with some layers in other formats (see `changed`).

    Args:
        model: the model.
        formats: which layers get which format.
    """
    with changed(model, Change.of(model, formats)):
        yield
