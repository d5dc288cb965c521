"""The cells that cost hardly more than the best of their row at given weights: an optimum differs in few others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._reduced import Floats, Ints, Reduced, blocks

Found = tuple[Ints, Floats, Floats]
_EPS = float(np.finfo(np.float64).eps)
_LEAST = float(np.finfo(np.float64).smallest_subnormal)


@dataclass(frozen=True, eq=False)
class Nearest:
    """Cells by their rise, smallest first.

    Attributes:
        row: (K,) row of each cell.
        cell: (K,) its column.
        rise: (K,) ``excess + weights @ low`` above the least of the row.
        step: (R, K) ``low`` above that of the base.
        base: (N,) the cell of each row that all others are compared with; its rise is the least.
        error: how far sums of rises, one per row, can be off.
        complete: whether all other cells are here; otherwise no other rises less than the last one.
    """

    row: Ints
    cell: Ints
    rise: Floats
    step: Ints
    base: Ints
    error: float
    complete: bool


def rises(reduced: Reduced, weights: Floats) -> Iterator[tuple[slice, Floats, Floats]]:
    """Yield rows block by block, with the rise and the value of their cells, both (n, F)."""
    for rows in blocks(len(reduced.excess)):
        value = reduced.excess[rows].copy()
        for weight, table in zip(weights.tolist(), reduced.low, strict=True):
            value += weight * table[rows]
        least = value.min(axis=1, keepdims=True, initial=np.inf)
        yield rows, value - least, value


def nearest_rows(reduced: Reduced, weights: Floats, count: int) -> Ints:
    """Numbers, in rising order, of the ``count`` rows whose second best cell rises least."""
    second = np.empty(len(reduced.excess))
    for rows, rise, _ in rises(reduced, weights):
        second[rows] = np.partition(rise, 1, axis=1)[:, 1] if rise.shape[1] > 1 else np.inf
    edge = np.partition(second, count - 1)[count - 1]
    sure = np.flatnonzero(second < edge)
    return np.sort(np.r_[sure, np.flatnonzero(second == edge)[: count - len(sure)]])


def nearest(reduced: Reduced, weights: Floats, choice: Ints | None, count: int, most: float = np.inf) -> Nearest:
    """Find the cells that rise least.

    Args:
        reduced: the problem.
        weights: (R,) loss per count.
        choice: among cells that do not rise at all, that of this choice is the base.
        count: so many cells at least, if there are as many; of equal rises all or none.
        most: cells that rise more are left out, and not counted as missing.
    """
    base = np.empty(len(reduced.excess), dtype=np.int64)
    found: list[Found] = [(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))]
    held, edge, formats = 0, most, reduced.excess.shape[1]
    for rows, rise, value in rises(reduced, weights):
        base[rows] = rise.argmin(axis=1) if formats else 0
        places = np.arange(len(rise))
        if choice is not None:
            stays = rise[places, choice[rows]] <= 0
            base[rows] = np.where(stays, choice[rows], base[rows])
        rise[places, base[rows]] = np.inf
        # Far more than rounding can have added to a rise.
        cells = np.flatnonzero((rise <= edge + 1e-13 * value) & np.isfinite(rise))
        found.append((cells + rows.start * formats, rise.ravel()[cells], value.ravel()[cells]))
        held += len(cells)
        if held > 4 * count:
            found, held, last = _fewest(found, count)
            edge = min(edge, last)
    found, held, last = _fewest(found, count)
    edge = min(edge, last)
    where, rise, value = found[0]
    row, cell = np.divmod(where, max(formats, 1))
    step = reduced.low[:, row, cell] - reduced.low[:, row, base[row]]
    # The base of a row has no larger value; what lies below the range of floats is off by the least of them.
    error = 2 * (_EPS * (len(weights) + 4) * float(value.sum()) + len(value) * _LEAST)
    return Nearest(row, cell, rise, step, base, error, edge >= most)


def _fewest(found: list[Found], count: int) -> tuple[list[Found], int, float]:
    """Join what was found, the smallest rises first; return also how many are left, and the largest that is sure."""
    where, rise, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    edge = np.inf
    if len(rise) > count:
        edge = float(np.partition(rise, count - 1)[count - 1])
        few = np.flatnonzero(rise <= edge)
        where, rise, value = where[few], rise[few], value[few]
    order = np.argsort(rise, kind="stable")
    return [(where[order], rise[order], value[order])], len(order), edge
