"""Blocks whose codes name 16 unevenly spaced values: iq4_nl and iq4_xs.

A group has 32 weights. Its scale is searched: the weight of largest magnitude is put, in 15 tries, near the lowest
value (-127 ± 7); each try rounds all weights, finds the scale of least squared error with the weights ``w**2``, and the
best one is kept. Codes are then made anew with the scale that is stored.

- iq4_nl: ``d[2] codes[16]``: a group on its own, ``d`` in fp16;
- iq4_xs: ``d[2] high[2] low[4] codes[128]``: 8 groups; ``d = -s / 32`` of the scale ``s`` of largest magnitude; each
  group's scale is ``d * (n - 32)`` with 6-bit ``n``, its high 2 bits in ``high`` and its low 4 in ``low``.

Source: ``quantize_row_iq4_nl_impl`` of ggml without an importance matrix, as ``llama-quantize`` runs it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mpsearch.model.codec import divided
from mpsearch.model.codecs.gguf_blocks.arithmetic import (
    across,
    first_largest,
    half_bytes,
    halves,
    nearest,
    ordered_sum,
    quotient,
    together,
)
from mpsearch.model.codecs.gguf_blocks.kind import Kind

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TRIES = 7
# ggml takes a group of nothing larger than this for zeros.
_NOTHING = 1e-15
# All points midway between two values are multiples of a half, so the floor of twice a number names its code.
_REACH = 256


def _code_table(device: torch.device) -> Tensor:
    twice = torch.arange(-_REACH, _REACH + 1, device=device)
    middles = torch.tensor([low + high for low, high in pairwise(VALUES)], device=device)
    return torch.bucketize(twice, middles, right=True).to(torch.uint8)


def _places(positions: Tensor) -> Tensor:
    return positions.mul_(2.0).floor_().clamp_(-_REACH, _REACH).add_(_REACH).to(torch.int32).reshape(-1)


def _codes(positions: Tensor) -> Tensor:
    """Codes of the values nearest to positions, of two equally near ones the upper; positions are used up."""
    table = _code_table(positions.device)
    return table.index_select(0, _places(positions)).reshape(positions.shape)


def _search(x: Tensor) -> Tensor:
    """Return the scale of each group of (32, groups) weights."""
    squares = x * x
    widest = first_largest(x)
    nothing = widest.abs() < _NOTHING
    widest.masked_fill_(nothing, 1.0)
    table = torch.tensor(VALUES, dtype=torch.float32, device=x.device)
    table = table.index_select(0, _code_table(x.device).to(torch.int32))
    terms = x.new_empty(len(x), 2, x.shape[1])

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = table.index_select(0, _places(x * inverse)).reshape(x.shape)
        weighted = squares * values
        torch.mul(weighted, x, out=terms[:, 0])
        torch.mul(weighted, values, out=terms[:, 1])
        return tuple(ordered_sum(terms))

    cross, square = fit(divided(-widest, VALUES[0]).reciprocal_())
    scale = (cross / square).masked_fill_(square <= 0, 0.0)
    best = scale * cross
    for step in range(-_TRIES, _TRIES + 1):
        cross, square = fit(quotient(step + VALUES[0], widest))
        better = (square > 0) & (cross * cross > best * square)
        found = cross / square
        scale = torch.where(better, found, scale)
        best = torch.where(better, found * cross, best)
    return scale.masked_fill_(nothing, 0.0)


def _inverse(scale: Tensor) -> Tensor:
    return scale.reciprocal().masked_fill_(scale == 0, 0.0)


def _encode_nl(blocks: Tensor) -> Tensor:
    x = blocks.T.contiguous()
    scale = _search(x)
    return torch.cat([half_bytes(scale), together(_codes(x * _inverse(scale)).T, 2, 4, 16)], 1)


def _decode_nl(octets: Tensor) -> Tensor:
    return _values(across(octets[:, 2:], 2, 4, 15, 16)).mul_(halves(octets[:, :2]))


def _encode_xs(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 32).T.contiguous()
    scales = _search(x).reshape(-1, 8)
    widest = first_largest(scales.T)
    outer = divided(-widest, 32.0)
    numbers = nearest(_inverse(outer).unsqueeze(1) * scales).clamp_(-32, 31)
    inner = (outer.unsqueeze(1) * numbers).reshape(-1)
    codes = _codes(x * _inverse(inner)).T.reshape(len(blocks), -1)
    stored = (numbers + 32.0).to(torch.uint8)
    parts = (half_bytes(outer), together(stored >> 4, 4, 2, 1), together(stored & 15, 2, 4, 1))
    return torch.cat([*parts, together(codes, 2, 4, 16)], 1)


def _decode_xs(octets: Tensor) -> Tensor:
    stored = (across(octets[:, 2:4], 4, 2, 3, 1) << 4) | across(octets[:, 4:8], 2, 4, 15, 1)
    scales = stored.to(torch.float32).sub_(32.0).mul_(halves(octets[:, :2]))
    values = _values(across(octets[:, 8:], 2, 4, 15, 16)).reshape(-1, 8, 32)
    return values.mul_(scales.unsqueeze(2)).reshape(len(octets), 256)


def _values(codes: Tensor) -> Tensor:
    table = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


NONLINEAR_BLOCKS = {"iq4_nl": Kind(_encode_nl, _decode_nl, (0,)), "iq4_xs": Kind(_encode_xs, _decode_xs, (0,))}
