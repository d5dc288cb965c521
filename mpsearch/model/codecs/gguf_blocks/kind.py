"""What a block type is to the codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Kind(NamedTuple):
    """How one block type is written and read.

    Attributes:
        encode: (blocks, weights) float32, finite, maybe the caller's own -> (blocks, bytes) uint8.
        decode: (blocks, bytes) uint8 -> (blocks, weights) float32, in memory of its own.
        halves: places of the fp16 numbers in a block, which must stay finite.
        top: largest magnitude that can be held whatever the scales, 0 when fp16 scales set the limit.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    halves: tuple[int, ...] = ()
    top: float = 0.0
