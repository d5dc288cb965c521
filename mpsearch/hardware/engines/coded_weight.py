"""Random weights as codes and scales: what kernels multiply, and what their products can be checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.format import Format
from mpsearch.hardware.kernel import Kernel

#: Distance between two scales: each has few enough bits for bf16 and fp16 to hold it exactly.
_STEP = 1 / 128


@dataclass(frozen=True)
class CodedWeight:
    """A weight of integer codes with a scale per group of columns; without groups, a row is one.

    Attributes:
        codes: (rows, groups, columns of a group).
        scales: (rows, groups), exact in bf16 and fp16.
        zeros: (rows, groups) codes that stand for 0; none for a symmetric grid.
    """

    codes: NDArray[np.int16]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int16] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, groups, width = self.codes.shape
        return rows, groups * width

    def values(self) -> NDArray[np.float64]:
        """Weights (rows, columns) that the codes stand for."""
        codes = self.codes.astype(np.float64)
        if self.zeros is not None:
            codes -= self.zeros[:, :, None]
        return (codes * self.scales[:, :, None]).reshape(self.shape)


def random_weight(kernel: Kernel, seed: int = 0) -> CodedWeight:
    """Draw a weight for a kernel whose format is of the family ``int``.

    >>> drawn = random_weight(Kernel("linear", 2, 8, "int4-g4-asym", 1))
    >>> drawn.codes.shape, drawn.scales.shape, int(drawn.codes.min()) >= 0, drawn.values().shape
    ((2, 2, 4), (2, 2), True, (2, 8))
    """
    fmt: Any = Format.parse(kernel.format).weight
    rng = np.random.default_rng(seed)
    groups = kernel.columns // fmt.group if fmt.granularity == "group" else 1
    top = 2 ** (fmt.bits - 1) - 1
    low, high = (0, 2**fmt.bits - 1) if fmt.asymmetric else (-top - (fmt.grid == "full"), top)
    codes = rng.integers(low, high + 1, (kernel.rows, groups, kernel.columns // groups), dtype=np.int16)
    scales = rng.integers(32, 64, (kernel.rows, groups)).astype(np.float32) * np.float32(_STEP / 2**fmt.bits)
    if fmt.granularity == "tensor":
        scales[:] = scales[0, 0]
    zeros = rng.integers(low, high + 1, (kernel.rows, groups), dtype=np.int16) if fmt.asymmetric else None
    return CodedWeight(codes, scales, zeros)


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes of 2, 4 or 8 bits, one after the other in memory, the first in the lowest bits of a byte.

    >>> pack(np.array([1, -1, 3]), 4).tolist()
    [241, 3]
    """
    each = 8 // bits
    flat = np.ascontiguousarray(codes).reshape(-1) & (2**bits - 1)
    table = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each).astype(np.uint8)
    packed = np.zeros(len(table), dtype=np.uint8)
    for place in range(each):
        packed |= table[:, place] << (bits * place)
    return packed
