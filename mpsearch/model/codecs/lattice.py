"""Lattices: the integers of a range times a step, one step (and zero point) per group of weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpsearch.formats.integer import Integer
from mpsearch.model.codec import RangeError, all_finite, divided, magnitude


class Grid(NamedTuple):
    """Lowest and highest code, and how many steps the span of a group takes."""

    low: int
    high: int
    steps: float

    @classmethod
    def of(cls, fmt: Integer) -> Grid:
        half = 2 ** (fmt.bits - 1)
        if fmt.grid == "asym":
            return cls(0, 2 * half - 1, 2 * half - 1)
        return cls(-half, half - 1, half - 0.5) if fmt.grid == "full" else cls(1 - half, half - 1, half - 1)


class Lattice(NamedTuple):
    """What weights are rounded to.

    Attributes:
        grid: the codes.
        scale: fp16 scales, with a last axis of 1 beside the weights of a group.
        zero: float32 zero points of the same shape; None without.
    """

    grid: Grid
    scale: Tensor
    zero: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """The scales that weights are divided by: float32, 1 in the place of 0."""
        return self.scale.to(torch.float32).masked_fill_(self.scale == 0, 1.0)

    def codes(self, values: Tensor, *, overwrite: bool = False) -> Tensor:
        """Round float32 weights to codes, as float32 numbers."""
        codes = values.div_(self.step) if overwrite else torch.div(values, self.step)
        codes.round_()
        if self.zero is not None:
            codes.add_(self.zero)
        return codes.clamp_(self.grid.low, self.grid.high)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that float32 codes stand for, in the memory of the codes."""
        if self.zero is not None:
            codes.sub_(self.zero)
        # Adding 0 turns -0 into the +0 that a stored code of 0 gives.
        return codes.mul_(self.scale.to(torch.float32)).add_(0.0)


def spanning(values: Tensor, fmt: Integer, weight: Tensor | None = None) -> Lattice:
    """Fit lattices to the largest weights.

    Args:
        values: float32 weights, groups along the last axis.
        fmt: the format.
        weight: the weight whose reach an error tells, when ``values`` is not it.

    Raises:
        RangeError: a scale passes what fp16 holds.
    """
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    grid = Grid.of(fmt)
    span = high.clamp_(min=0) - low.clamp_(max=0) if fmt.asymmetric else torch.maximum(high, -low)
    # Of zeros the widest may be -0, which would be stored as a scale of -0.
    exact = divided(span, grid.steps).add_(0.0)
    scale = exact.to(torch.float16)
    if not all_finite(scale):
        raise RangeError(
            f"weights reach {magnitude(values if weight is None else weight):.4g}, so {fmt} needs a scale of "
            f"{float(exact.max()):.4g}; a stored fp16 scale ends at 65504"
        )
    found = Lattice(grid, scale)
    if not fmt.asymmetric:
        return found
    return Lattice(grid, scale, low.neg_().div_(found.step).round_().clamp_(0, grid.high))
