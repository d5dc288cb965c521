"""Rounding to the small floats of `mpsearch.formats.elements`, and their codes.

A code is the sign bit, the exponent bits and the mantissa bits, from the top down, in the low bits of a byte: that
of ml_dtypes and of the OCP specifications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.formats.elements import ELEMENTS, Element
from mpsearch.model.codec import RangeError, all_finite, magnitude

__all__ = [
    "ELEMENTS", "Element", "from_codes", "peaks", "round_to_element", "round_to_element_", "to_codes",
]  # fmt: skip

# Numbers that fit the second-level cache of a core together with what is computed from them.
_SLAB = 1 << 15
_EXPONENT_BITS = 0x7F800000


def round_to_element(values: Tensor, element: Element) -> Tensor:
    """Round to the nearest number of an element, halves to the even code, what is beyond the largest to the largest.

    Subnormals are kept, -0 and what rounds to it stays -0, NaN stays NaN.

    Args:
        values: float32, any shape and strides; left as it is.
        element: the element.

    Returns:
        A contiguous float32 tensor of its own.

    >>> round_to_element(torch.tensor([0.25, 0.75, 2.4, -5.0, 99.0]), ELEMENTS["e2m1"]).tolist()
    [0.0, 1.0, 2.0, -4.0, 6.0]
    """
    return round_to_element_(values.to(torch.float32, copy=True, memory_format=torch.contiguous_format), element)


def round_to_element_(values: Tensor, element: Element) -> Tensor:
    """Do `round_to_element` in place, on a contiguous float32 tensor; return it.

    With ``m`` mantissa bits, numbers that begin at ``2**e`` lie ``2**(e-m)`` apart. Float32 numbers lie that far apart
    from ``2**(e-m+23)`` on, so adding ``1.5 * 2**(e-m+23)`` and taking it away again rounds as float32 itself does:
    to nearest, halves to even. The half keeps negative sums within the same power of two.
    """
    flat, spacing = values.view(-1), 1.5 * 2.0 ** (23 - element.mantissa)
    slab = _slab(flat)
    scratch = torch.empty(2, min(slab, flat.numel()), dtype=torch.float32, device=values.device)
    for part in torch.split(flat, slab):
        power, rounded = scratch[0, : len(part)], scratch[1, : len(part)]
        part.clamp_(-element.largest, element.largest)
        torch.bitwise_and(part.view(torch.int32), _EXPONENT_BITS, out=power.view(torch.int32))
        power.clamp_(min=element.smallest_normal).mul_(spacing)
        torch.add(part, power, out=rounded)
        torch.copysign(rounded.sub_(power), part, out=part)
    return values


def to_codes(values: Tensor, element: Element) -> Tensor:
    """Return the codes of numbers that an element holds: uint8 of the same shape.

    Shifted by the difference of the biases, such a number is a float16 whose bits below the element's mantissa are 0.

    >>> to_codes(torch.tensor([0.5, 6.0, -1.5, -0.0]), ELEMENTS["e2m1"]).tolist()
    [1, 7, 11, 8]
    """
    rest, flat = element.exponent + element.mantissa, values.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=values.device)
    for part, out in zip(torch.split(flat, _slab(flat)), torch.split(codes, _slab(flat)), strict=True):
        half = (part * 2.0 ** (element.bias - 15)).to(torch.float16).view(torch.int16)
        sign = (half >> (15 - rest)).bitwise_and_(1 << rest)
        out.copy_((half >> (10 - element.mantissa)).bitwise_and_((1 << rest) - 1).bitwise_or_(sign))
    return codes.reshape(values.shape)


def from_codes(codes: Tensor, element: Element) -> Tensor:
    """Return what codes stand for: float32 of the same shape, with -0, infinity and NaN where the element has them.

    >>> from_codes(torch.tensor([1, 7, 11, 8], dtype=torch.uint8), ELEMENTS["e2m1"]).tolist()
    [0.5, 6.0, -1.5, -0.0]
    """
    if element.name == "e4m3":
        # Its one NaN has no counterpart among the float16 of the same exponent.
        return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    rest, flat = element.exponent + element.mantissa, codes.reshape(-1)
    values = torch.empty(flat.shape, dtype=torch.float32, device=codes.device)
    for part, out in zip(torch.split(flat, _slab(flat)), torch.split(values, _slab(flat)), strict=True):
        wide = part.to(torch.int16)
        half = (wide & ((1 << rest) - 1)) << (10 - element.mantissa)
        half.bitwise_or_((wide & (1 << rest)) << (15 - rest))
        out.copy_(half.view(torch.float16)).mul_(2.0 ** (15 - element.bias))
    return values.reshape(codes.shape)


def _slab(flat: Tensor) -> int:
    # A slab stays in the cache through all steps; a GPU does better with one long call for each.
    return _SLAB if flat.device.type == "cpu" else max(1, flat.numel())


def peaks(values: Tensor, axes: int | tuple[int, ...], rows: Tensor) -> Tensor:
    """Return the largest magnitudes along axes, which are kept at size 1; never -0.

    Args:
        values: float32 numbers.
        axes: what shares a scale.
        rows: the weight that `values` were made from, for the message.

    Raises:
        RangeError: float64 weights beyond float32.

    >>> peaks(torch.tensor([[1.0, -3.0], [-0.0, 0.0]]), -1, torch.empty(0)).tolist()
    [[3.0], [0.0]]
    """
    # Two reductions are four times quicker than one over a copy of magnitudes.
    found = torch.maximum(values.amax(axes, keepdim=True), values.amin(axes, keepdim=True).neg_()).add_(0.0)
    if not all_finite(found):
        raise RangeError(f"weights reach {magnitude(rows):.4g}; scales are found in float32, which ends at 3.403e+38")
    return found
