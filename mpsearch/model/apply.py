"""Applying formats to a model, and putting its weights back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.model.quantize import fake_quantize


def quantized_weight(model: Model, layer: Layer, fmt: Format) -> Tensor:
    """The weight of a layer after a round trip through a format, float32, same shape."""
    return fake_quantize(model.weight(layer.name).detach(), fmt, layer.out_axis, name=layer.name)


@contextmanager
def swapped(model: Model, weights: Mapping[Layer, Tensor]) -> Iterator[None]:
    """Run the body with other weights; afterwards every weight is the tensor it was before.

    Weights are swapped, not overwritten, so nothing needs to be restored by arithmetic, and a weight that
    several modules share changes in all of them.

    Args:
        model: the model.
        weights: layer -> the weight to use, float32, the shape of the layer's own.
    """
    originals = {layer: model.weight(layer.name).data for layer in weights}
    try:
        for layer, weight in weights.items():
            model.weight(layer.name).data = weight
        yield
    finally:
        for layer, original in originals.items():
            model.weight(layer.name).data = original


@contextmanager
def applied(model: Model, formats: Mapping[Layer, Format]) -> Iterator[None]:
    """Run the body with some layers quantised (see `swapped`).

    Args:
        model: the model.
        formats: which layers get which format.
    """
    with swapped(model, {layer: quantized_weight(model, layer, fmt) for layer, fmt in formats.items()}):
        yield
