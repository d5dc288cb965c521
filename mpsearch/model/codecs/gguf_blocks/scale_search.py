"""How ggml finds the scale of a group of 16 or 32 weights in its K types.

Groups are columns: (16, groups) or (32, groups), float32, finite. Three searches:

- `offset_search`: value ``scale * code + low`` with ``low <= 0``; a number of steps are tried, each followed by the
  scale and offset of least weighted squared error;
- `signed_search`: value ``scale * code``; 19 scales are tried around ``-n / w`` of the widest weight ``w``;
- `coordinate_search`: value ``scale * code``; codes are moved one at a time while the error falls.

Source: ``make_qkx2_quants``, ``make_qx_quants`` and ``make_q3_quants`` of ggml (``ggml-quants.c``), without an
importance matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpsearch.model.codecs.gguf_blocks.arithmetic import first_largest, nearest, ordered_sum, quotient

# ggml takes a group of nothing larger than this for zeros.
NOTHING = 1e-15


class Steps(NamedTuple):
    """What `offset_search` tries: ``top + first + n * delta`` steps for ``n`` from 0 to ``last``.

    ``absolute`` weighs plain distances, not their squares.
    """

    top: int
    first: float
    last: int
    absolute: bool = False

    def counts(self) -> list[float]:
        """The numbers of steps, in float32 as C adds them up."""
        single = np.float32
        return [float(single(self.first) + single(0.1) * single(n) + single(self.top)) for n in range(self.last + 1)]


class Offsets(NamedTuple):
    """Scale, offset (the negated low end) and codes of each group."""

    scales: Tensor
    offsets: Tensor
    codes: Tensor


def offset_search(x: Tensor, weights: Tensor, steps: Steps) -> Offsets:
    """Find scale and low end of each group."""
    low, high = x.amin(0).clamp_(max=0.0), x.amax(0)
    total, moment = weights[0].clone(), ordered_sum(weights * x)
    for row in weights[1:]:
        total.add_(row)
    flat = high == low
    inverse = quotient(steps.top, high - low)
    scale = inverse.reciprocal()
    codes = _steps(x, low, _finite(inverse), steps.top)
    best = _error(codes, scale, low, x, weights, steps)
    # The step and low end that the best codes were made with; the codes themselves are made again at the end.
    kept, base = _finite(inverse), low.clone()
    terms = x.new_empty(len(x), 3, x.shape[1])
    for count in steps.counts():
        inverse = _finite(quotient(count, high - low))
        codes = _steps(x, low, inverse, steps.top)
        weighted = torch.mul(weights, codes, out=terms[:, 0])
        torch.mul(weighted, codes, out=terms[:, 1])
        torch.mul(weighted, x, out=terms[:, 2])
        first, second, cross = ordered_sum(terms)
        det = total * second - first * first
        new_scale = (total * cross - moment * first) / det
        new_low = (second * moment - first * cross) / det
        above = new_low > 0
        new_scale = torch.where(above, cross / second, new_scale)
        new_low.masked_fill_(above, 0.0)
        error = _error(codes, new_scale, new_low, x, weights, steps)
        better = (det > 0) & (error < best)
        kept, base = torch.where(better, inverse, kept), torch.where(better, low, base)
        best = torch.where(better, error, best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    codes = _steps(x, base, kept, steps.top).masked_fill_(flat, 0.0)
    low = torch.where(flat, base, low)
    return Offsets(scale.masked_fill_(flat, 0.0), low.neg(), codes)


def _finite(inverse: Tensor) -> Tensor:
    # Where the span is so small that 1 / span overflows, C's cast of infinity ends in code 0; so does a step of 0.
    return inverse.masked_fill(inverse.isinf(), 0.0)


def _steps(x: Tensor, low: Tensor, inverse: Tensor, top: int) -> Tensor:
    return (x - low).mul_(inverse).round_().clamp_(0, top)


def _error(codes: Tensor, scale: Tensor, low: Tensor, x: Tensor, weights: Tensor, steps: Steps) -> Tensor:
    away = codes.mul_(scale).add_(low).sub_(x)
    away = away.abs_() if steps.absolute else away.mul_(away)
    return ordered_sum(away.mul_(weights))


def signed_search(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return scale and codes (from 0 to ``2 * half - 1``) of each group; zeros get code 0."""
    widest = first_largest(x)
    cubes, squares = x * x * x, x * x
    terms = x.new_empty(len(x), 2, x.shape[1])

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = (x * inverse).round_().clamp_(-half, half - 1)
        torch.mul(cubes, codes, out=terms[:, 0])
        torch.mul(torch.mul(squares, codes, out=terms[:, 1]), codes, out=terms[:, 1])
        return tuple(ordered_sum(terms))

    kept = quotient(-half, widest)
    cross, square = fit(kept)
    scale = (cross / square).masked_fill_(square == 0, 0.0)
    best = scale * cross
    single = np.float32
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = quotient(-float(single(half) + single(0.1) * single(step)), widest)
        cross, square = fit(inverse)
        better = (square > 0) & (cross * cross > best * square)
        found = cross / square
        kept = torch.where(better, inverse, kept)
        scale = torch.where(better, found, scale)
        best = torch.where(better, found * cross, best)
    nothing = widest.abs() < NOTHING
    codes = (x * kept).round_().clamp_(-half, half - 1).add_(half).masked_fill_(nothing, 0.0)
    return scale.masked_fill_(nothing, 0.0), codes


def coordinate_search(x: Tensor, half: int, rounds: int = 5) -> tuple[Tensor, Tensor]:
    """Return scale and codes (from 0 to ``2 * half - 1``) of each group; zeros get code 0."""
    widest = first_largest(x)
    squares = x * x
    cubes = squares * x
    codes = nearest(x * quotient(-half, widest)).clamp_(-half, half - 1)
    cross, square = ordered_sum(cubes * codes), ordered_sum(squares * codes * codes)
    for _ in range(rounds):
        for place in range(len(x)):
            cross, square = _move(x[place], squares[place], cubes[place], codes[place], cross, square, half)
    nothing = widest.abs() < NOTHING
    scale = (cross / square).masked_fill_((square <= 0) | nothing, 0.0)
    return scale, codes.add_(half).masked_fill_(nothing, 0.0)


def _move(
    x: Tensor, squares: Tensor, cubes: Tensor, code: Tensor, cross: Tensor, square: Tensor, half: int
) -> tuple[Tensor, Tensor]:
    """Try the best code of one weight given all others; write it to ``code`` where it lowers the error."""
    rest_cross = cross - cubes * code
    rest_square = square - squares * code * code
    new = nearest(x * rest_square / rest_cross).clamp_(-half, half - 1)
    new_cross = rest_cross + cubes * new
    new_square = rest_square + squares * new * new
    better = new_cross * new_cross * square > cross * cross * new_square
    better &= (rest_cross > 0) & (new != code) & (new_square > 0)
    code.copy_(torch.where(better, new, code))
    return torch.where(better, new_cross, cross), torch.where(better, new_square, square)
