"""Rounding of a layer's input as it comes.

An input is seen as (tokens, channels): the last axis holds the channels of a linear layer, the second those of a
convolution. With float32 scales:

- symmetric integers: ``scale = max|x| / n``, ``x' = scale * clamp(round(x / scale), -n, n)``, ``n = 2**(b-1) - 1``;
- asymmetric: the range ``low..high`` is widened to hold 0, ``scale = (high - low) / n``,
  ``zero = round(-low / scale)``, ``x' = scale * (clamp(round(x / scale) + zero, 0, n) - zero)``, ``n = 2**b - 1``;
- floats: ``scale = max|x| / largest``, ``x' = scale * round_to_element(x / scale)``, saturating;
- block formats as for weights, a token being a row.

``round`` takes halves to the even number. A scale of 0 becomes 1: what it was found from is all zero, or too small to
be told from 0, and stays or becomes 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.model.codec import Bytes, Evidence, RangeError, as_bytes, codec_of, divided
from mpsearch.model.floats import ELEMENTS, round_to_element


class Range(NamedTuple):
    """Least and largest input seen: () for a tensor, (channels,) for channels."""

    low: Tensor
    high: Tensor


def round_input(x: Tensor, fmt: Activation, axis: int = -1, seen: Range | None = None) -> Tensor:
    """Round an input.

    Args:
        x: any float tensor; left as it is.
        fmt: the format.
        axis: axis of the channels.
        seen: the range on the calibration data, for a static format.

    Returns:
        The rounded input, same shape and type.

    >>> fmt = Activation.read("int8-token")
    >>> round_input(torch.tensor([[1.0, 0.3], [0.0, 0.0]]), fmt).mul(127).tolist()
    [[127.0, 38.0], [0.0, 0.0]]
    """
    turned = x.movedim(axis, -1)
    rows = turned.reshape(-1, turned.shape[-1]).to(torch.float32)
    if not rows.numel():
        # An expert that no token was sent to.
        return x.clone()
    if fmt.grain == "block":
        weightlike = Format.parse(fmt.number)
        try:
            rounded = codec_of(type(weightlike)).fake(rows.contiguous(), weightlike, Evidence())
        except RangeError:
            # As a weight this is an error of the user's; here it is a state of the run, and shows as a loss.
            rounded = torch.full_like(rows, torch.nan)
    else:
        rounded = _scaled(rows, fmt, seen)
    return rounded.reshape(turned.shape).movedim(-1, axis).to(x.dtype)


def _scaled(rows: Tensor, fmt: Activation, seen: Range | None) -> Tensor:
    values = rows.reshape(len(rows), -1, fmt.group) if fmt.grain == "group" else rows.unsqueeze(1)
    axes = {"token": (2,), "group": (2,), "channel": (0,), "tensor": (0, 1, 2)}[fmt.grain]
    if seen is None:
        seen = Range(values.amin(axes, keepdim=True), values.amax(axes, keepdim=True))
    scale, zero = scale_and_zero(seen, fmt)
    if not fmt.number.startswith("int"):
        element = ELEMENTS[fmt.number.partition("-")[2]]
        return round_to_element(values / scale, element).mul_(scale).reshape(rows.shape)
    codes = (values / scale).round_().add_(zero)
    top = 2**fmt.bits - 1 if fmt.asymmetric else 2 ** (fmt.bits - 1) - 1
    return codes.clamp_(0 if fmt.asymmetric else -top, top).sub_(zero).mul_(scale).reshape(rows.shape)


def scale_and_zero(seen: Range, fmt: Activation) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point of a range; a symmetric one has zero points of 0."""
    low, high = seen
    if fmt.asymmetric:
        low = low.clamp(max=0)
        scale = _safe(divided(high.clamp(min=0) - low, 2**fmt.bits - 1))
        return scale, torch.round(-low / scale).clamp(0, 2**fmt.bits - 1)
    integer = fmt.number.startswith("int")
    top = 2 ** (fmt.bits - 1) - 1 if integer else ELEMENTS[fmt.number.partition("-")[2]].largest
    scale = _safe(divided(torch.maximum(high, -low), top))
    return scale, torch.zeros_like(scale)


def pack_range(seen: Range, fmt: Activation) -> dict[str, Bytes]:
    """The bytes that are stored of a static format: float32 scales and, asymmetric, uint8 zero points."""
    scale, zero = scale_and_zero(seen, fmt)
    packed = {"input_scales": as_bytes(scale.reshape(-1))}
    return {**packed, "input_zero_points": as_bytes(zero.reshape(-1).to(torch.uint8))} if fmt.asymmetric else packed


def _safe(scale: Tensor) -> Tensor:
    """Replace a scale of 0 by 1, which a file can hold and others can divide by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def seen_in(rows: Tensor, grain: str, before: Range | None) -> Range:
    """Widen a range by the inputs (tokens, channels) of one more call."""
    axes = (0,) if grain == "channel" else (0, 1)
    low, high = rows.amin(axes), rows.amax(axes)
    return (
        Range(low, high) if before is None else Range(torch.minimum(low, before.low), torch.maximum(high, before.high))
    )
