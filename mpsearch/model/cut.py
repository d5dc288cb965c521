"""Taking a part of a layer out of a tensor of the whole weight's shape, and putting parts back into one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from mpsearch.layer import Layer


def part_of(whole: Tensor, layer: Layer) -> Tensor:
    """The part of a tensor that belongs to a layer; all of it for a whole layer.

    Args:
        whole: weight, gradient, … of the whole layer, in the weight's shape.
        layer: a part, or a whole layer.

    Returns:
        (rows, columns) of a part; a view where the strides allow it. Differentiable.

    >>> import torch
    >>> weight = torch.arange(6).reshape(2, 3)
    >>> part_of(weight, Layer("x", "linear", (2, 3), out_axis=1).part((1, 2))).tolist()  # (in, out), as in GPT-2
    [[1, 4]]
    """
    if not layer.is_part:
        return whole
    if tuple(whole.shape) != layer.of_shape:
        raise ValueError(f"'{layer.name}' is part of a weight of shape {layer.of_shape}, not {tuple(whole.shape)}")
    turned, (first, last), (left, right) = _turned(whole, layer)
    rows = turned.reshape(-1, layer.whole.columns)
    return rows[first:last, left:right]


def put(parts: Mapping[Layer, Tensor], into: Tensor) -> Tensor:
    """Write parts of one layer into a tensor of the whole weight's shape, and return it.

    Args:
        parts: part -> (rows, columns).
        into: where to; changed.

    >>> import torch
    >>> layer = Layer("x", "linear", (2, 3))
    >>> put({layer.part(None, (1, 2)): torch.ones(2, 1)}, torch.zeros(2, 3)).tolist()
    [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    for layer, values in parts.items():
        turned, (first, last), (left, right) = _turned(into, layer)
        rows = turned.reshape(-1, layer.whole.columns)
        rows[first:last, left:right] = values
        # Of some strides the rows are a copy; elsewhere this writes what is there already.
        if rows.data_ptr() != turned.data_ptr():
            turned.copy_(rows.reshape(turned.shape))
    return into


def _turned(whole: Tensor, layer: Layer) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """A view with the axes of output channels first, and where the part lies in its rows and columns.

    Of stacked experts the view holds only those that the part lies in.
    """
    complete = layer.whole
    axes = complete.row_axes
    first, last = layer.channels or (0, complete.rows)
    columns = layer.inputs or (0, complete.columns)
    if layer.kind == "expert":
        height = complete.shape[complete.out_axis]
        start, stop = first // height, math.ceil(last / height)
        whole = whole[start:stop]
        first, last = first - start * height, last - start * height
    return whole.movedim(axes, tuple(range(len(axes)))), (first, last), columns
