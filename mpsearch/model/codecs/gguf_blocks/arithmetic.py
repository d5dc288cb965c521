"""Float32 arithmetic in the order of ggml's C code, vectorised over blocks.

Blocks lie along the last axis, the weights of a block along the first: (16, blocks) or (32, blocks). Sums run over the
first axis one weight after the other, as a C loop adds them: another order changes the last bit, and with it now and
then a code. Products and sums stay separate operations, so nothing is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Adding 1.5 * 2**23 leaves the nearest integer, halves to even, in the low bits of a float32.
_MAGIC = 12582912.0


def quotient(number: float, divisor: Tensor) -> Tensor:
    """Return ``number / divisor``; torch itself would multiply by the reciprocal."""
    return torch.div(divisor.new_full((), number), divisor)


def exact_root(values: Tensor) -> Tensor:
    """Return the correctly rounded square root; torch's own in float32 may be wrong in the last bit."""
    return values.to(torch.float64).sqrt_().to(torch.float32)


def nearest(values: Tensor) -> Tensor:
    """Round to integers as ggml's ``nearest_int``, float32; beyond 2**22 only the low bits are left, as there."""
    bits = (values + _MAGIC).view(torch.int32)
    # NaN has other low bits on each kind of processor; ggml's gives 0.
    found = bits.bitwise_and_(0x7FFFFF).sub_(0x400000).to(torch.float32)
    return found.masked_fill_(values.isnan(), 0.0)


def half_away(values: Tensor) -> Tensor:
    """Round halves away from zero, as C's ``roundf``.

    >>> half_away(torch.tensor([0.5, -1.5, 0.49999997])).tolist()
    [1.0, -2.0, 0.0]
    """
    whole = values.trunc()
    return whole.add_((values - whole).mul_(2.0).trunc_())


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the first axis, one term after the other, from 0."""
    total = terms[0] + 0.0
    for term in terms[1:]:
        total.add_(term)
    return total


def first_largest(values: Tensor) -> Tensor:
    """Return the number of largest magnitude along the first axis, sign kept, the first one of equals."""
    found, size = values[0].clone(), values[0].abs()
    for row in values[1:]:
        found = torch.where(row.abs() > size, row, found)
        size = torch.maximum(size, row.abs())
    return found


def half_bytes(values: Tensor) -> Tensor:
    """Return the fp16 of each number as 2 bytes on a new last axis."""
    return values.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def halves(octets: Tensor) -> Tensor:
    """Read (…, 2 n) bytes as (…, n) fp16 numbers, float32."""
    return octets.contiguous().view(torch.float16).to(torch.float32)


def across(octets: Tensor, shifts: int, step: int, mask: int, width: int) -> Tensor:
    """Take codes of a few bits apart: byte j of each run of ``width`` holds the codes j, j + width, …, lowest first.

    >>> across(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 2, 4, 15, 2).tolist()
    [[1, 3, 2, 4]]
    """
    count = len(octets)
    places = torch.arange(0, shifts * step, step, dtype=torch.uint8, device=octets.device).view(1, 1, shifts, 1)
    codes = octets.reshape(count, -1, 1, width) >> places
    return codes.bitwise_and_(mask).reshape(count, -1)


def together(codes: Tensor, shifts: int, step: int, width: int) -> Tensor:
    """Undo `across`: put ``shifts`` codes into each byte."""
    runs = codes.to(torch.uint8).reshape(len(codes), -1, shifts, width)
    octets = runs[:, :, 0].clone()
    for place in range(1, shifts):
        octets.bitwise_or_(runs[:, :, place] << (place * step))
    return octets.reshape(len(codes), -1)
