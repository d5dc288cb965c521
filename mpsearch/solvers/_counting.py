"""Costs as whole counts, and tables gone through block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.problem import exact_sum

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BLOCK = 2**13


def blocks(count: int) -> Iterator[slice]:
    """Yield rows a few thousand at a time: what is computed of them stays in the cache.

    >>> [(rows.start, rows.stop) for rows in blocks(10_000)]
    [(0, 8192), (8192, 10000)]
    """
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def finest(values: Floats) -> int:
    """Return the largest k such that every value is a whole multiple of ``2**k``; 0 when all are zero.

    >>> finest(np.array([0.0, 12.0, 2.5])), finest(np.array([4096.0]))
    (-1, 12)
    """
    mantissa, exponent = np.frexp(values[values != 0])
    if not exponent.size:
        return 0
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    zeros = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return int((exponent.astype(np.int64) - 53 + zeros).min())


def least_cells(table: Floats, keep: Bools) -> Floats:
    """(N,) least cell in ``keep`` of each row."""
    least = np.empty(len(table))
    for rows in blocks(len(table)):
        least[rows] = np.where(keep[rows], table[rows], np.inf).min(axis=1, initial=np.inf)
    return least


def counts(cost: Floats, keep: Bools, limit: float) -> tuple[Ints, Ints, int, float]:
    """Return use (rounded up), use (rounded down; the same array when none was rounded), slack and unit."""
    least = least_cells(cost, keep)
    most, places = 0.0, []
    for rows in blocks(len(cost)):
        part = np.where(keep[rows], cost[rows], least[rows, None])
        most = max(most, float((part - least[rows, None]).max(initial=0.0)))
        places.append(finest(part))
    # A sum of N counts must stay below 2**63, and a count must be exact as a float.
    bits = min(52, 62 - len(cost).bit_length())
    scale = max(min(places, default=0), int(np.frexp(most)[1]) - bits)
    low = np.empty(cost.shape, dtype=np.int64)
    rounded, step = np.zeros(cost.shape, dtype=np.bool_), 0
    for rows in blocks(len(cost)):
        part = np.where(keep[rows], cost[rows], least[rows, None])
        low[rows], rounded[rows] = _rounded(part, least[rows, None], scale)
        step = 1 if step == 1 else int(np.gcd.reduce(low[rows], axis=None, initial=step))
    room = math.floor(exact_sum([limit, *(-least).tolist()]) / Fraction(2) ** scale)
    if rounded.any():
        return low + rounded, low, room, math.ldexp(1, scale)
    step = step or 1
    low = low if step == 1 else low // step
    return low, low, room // step, math.ldexp(step, scale)


def _rounded(cost: Floats, least: Floats, scale: int) -> tuple[Ints, Bools]:
    """Return costs above the least in whole counts of ``2**scale``, rounded down, and where that was needed."""
    high, rest = _difference(cost, least)
    scaled = np.ldexp(high, -scale)
    whole = np.floor(scaled)
    whole -= (whole == scaled) & (rest < 0)
    return whole.astype(np.int64), (np.ldexp(whole, scale) != high) | (rest != 0)


def _difference(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    """Return the rounded difference and what the rounding left over (Knuth's two-sum)."""
    high = left - right
    virtual = high - left
    return high, (left - (high - virtual)) - (right + virtual)


def stir(seal: NDArray[np.uint64], table: NDArray[Any]) -> None:
    """Stir the numbers of each row into a hash: ordered by it, rows stand the same whatever order they came in."""
    for rows in blocks(len(table)):
        part = seal[rows]
        for column in table[rows].T:
            part ^= np.ascontiguousarray(column).view(np.uint64)
            part *= np.uint64(0x9E3779B97F4A7C15)
            part ^= part >> np.uint64(29)
