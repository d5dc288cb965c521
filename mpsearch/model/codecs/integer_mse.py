"""Integer scales of least squared error.

For each group a few dozen scales are tried, and the one of least ``sum (w - q)^2`` is kept; of equal ones the first.
What is tried makes two laws exact: the rule is never worse than the scale of the largest weight, and one more bit is
never worse.

The lattice of ``b`` bits and step ``s`` is part of the lattice of ``b + 1`` bits and step ``s / 2`` (with zero point
``2 z``), and also of that of step ``s`` and zero point ``z``. `_finer` takes the first where fp16 holds ``s / 2``, else
the second.

- Symmetric grids: ``fp16(max|w| t / 2)`` for each ``t`` of `SHRINK` and the octave above it, made finer ``b - 2``
  times, and the scale of the largest weight of every width up to ``b``, made finer as often as there are bits between.
- Asymmetric ones: the widths from 2 to ``b`` in turn, each with the range shrunk by every ``t``, and the best of
  the width before, made finer. This takes ``b - 1`` times as long.

Rounding again may change a group: a lattice whose ends are not reached is not always tried again.

Source: the search over clipping ranges that post-training tools share (AWQ, arXiv:2306.00978, shrinks in steps of the
range); the nesting is our own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpsearch.formats.integer import Integer
from mpsearch.model.codecs.lattice import Grid, Lattice, spanning

_SIXTEENTHS = tuple(2.0 ** -(n / 16) for n in range(16))
#: How far ranges are shrunk: sixteenths of an octave down to 1/2, then eighths to 1/4, then quarters to 1/16.
SHRINK = (*_SIXTEENTHS, *(2.0 ** -(1 + n / 8) for n in range(8)), *(2.0 ** -(2 + n / 4) for n in range(9)))
#: Weights searched at a time: few enough to stay in a processor's cache, many enough to fill a GPU.
_CHUNK = {"cpu": 2**18, "cuda": 2**25}


def least_error(values: Tensor, fmt: Integer, weight: Tensor | None = None) -> Lattice:
    """Find the lattices of least squared error.

    Args:
        values: float32 weights, groups along the last axis; left as they are.
        fmt: the format.
        weight: the weight whose reach an error tells, when ``values`` is not it.

    Raises:
        RangeError: the scale of the largest weight passes what fp16 holds.

    >>> least_error(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), Integer(2)).scale.tolist()
    [[1.2421875]]
    """
    first = spanning(values, fmt, weight)
    flat = values.reshape(-1, values.shape[-1])
    rows = max(1, _CHUNK.get(values.device.type, 2**25) // flat.shape[1])
    search = _asymmetric if fmt.asymmetric else _symmetric
    found = [search(part, fmt) for part in torch.split(flat, rows)]
    scale = torch.cat([part.scale for part in found]).reshape(first.scale.shape)
    zeros = [part.zero for part in found if part.zero is not None]
    return Lattice(first.grid, scale, torch.cat(zeros).reshape(scale.shape) if zeros else None)


class _Best:
    """The best lattices so far."""

    def __init__(self, values: Tensor, lattice: Lattice) -> None:
        self.values = values
        self.lattice = lattice
        self.error = _error(values, lattice)

    def offer(self, other: Lattice) -> None:
        """Take the groups that another lattice is better for."""
        error = _error(self.values, other)
        # An infinite scale makes an error of NaN, which is never less.
        better = error < self.error
        zero = self.lattice.zero
        if zero is not None and other.zero is not None:
            zero = torch.where(better, other.zero, zero)
        self.lattice = Lattice(other.grid, torch.where(better, other.scale, self.lattice.scale), zero)
        self.error = torch.where(better, error, self.error)


def _error(values: Tensor, lattice: Lattice) -> Tensor:
    found = lattice.values(lattice.codes(values))
    return found.sub_(values).square_().sum(-1, keepdim=True)


def _symmetric(values: Tensor, fmt: Integer) -> Lattice:
    best = _Best(values, spanning(values, fmt))
    largest = values.abs().amax(-1, keepdim=True)
    widths = [(bits, largest / Grid.of(replace(fmt, bits=bits)).steps) for bits in range(2, fmt.bits)]
    for bits, exact in [*widths, *((2, largest * (shrink / 2)) for shrink in (*(2 * t for t in _SIXTEENTHS), *SHRINK))]:
        scale = exact.to(torch.float16)
        for _ in range(bits, fmt.bits):
            scale = _finer(scale)
        best.offer(Lattice(best.lattice.grid, scale))
    return best.lattice


def _asymmetric(values: Tensor, fmt: Integer) -> Lattice:
    high, low = values.amax(-1, keepdim=True).clamp_(min=0), values.amin(-1, keepdim=True).clamp_(max=0)
    lattice = None
    for bits in range(2, fmt.bits + 1):
        best = _Best(values, spanning(values, replace(fmt, bits=bits)))
        grid = best.lattice.grid
        if lattice is not None and lattice.zero is not None:
            scale = _finer(lattice.scale)
            best.offer(Lattice(grid, scale, torch.where(scale == lattice.scale, lattice.zero, 2 * lattice.zero)))
        for shrink in SHRINK[1:]:
            scale = ((high - low) * (shrink / grid.steps)).to(torch.float16)
            zero = (low * -shrink).div_(Lattice(grid, scale).step).round_().clamp_(0, grid.high)
            best.offer(Lattice(grid, scale, zero))
        lattice = best.lattice
    assert lattice is not None
    return lattice


def _finer(scale: Tensor) -> Tensor:
    """Half of an fp16 scale where fp16 holds it, else the same."""
    half = scale / 2
    return torch.where(half * 2 == scale, half, scale)
