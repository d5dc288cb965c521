"""All totals worth having, row by row: sets of choices that no other choice beats in every cost and in loss."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._digits import Digits, ranked
from mpsearch.solvers._reduced import Bools, Floats, Ints

#: Totals that are compared before a front is given up.
MOST_POINTS = 2_000_000
#: Says which totals of the first rows may still matter: row, digits used (2, R, P), excess (P,).
Keep = Callable[[int, Ints, Floats], Bools]


@dataclass(frozen=True, eq=False)
class Merged:
    """Totals that no other choice beats, the cheapest in the first resource first.

    Attributes:
        spent: (2, R, P) digits of the totals; R is 2 at most.
        excess: (P,) total excess.
        trail: for each row, (P,) the totals of the rows before that each one came from, and (P,) the cells it took.
    """

    spent: Ints
    excess: Floats
    trail: tuple[tuple[Ints, Ints], ...]

    def choice(self, point: int) -> Ints:
        """(N,) cells of one of the totals."""
        chosen = np.empty(len(self.trail), dtype=np.int64)
        for i in range(len(self.trail) - 1, -1, -1):
            came, took = self.trail[i]
            point, chosen[i] = int(came[point]), took[point]
        return chosen


def merge(excess: Floats, digits: Digits, keep: Keep, points: int) -> Merged | None:
    """Add up rows one by one, and drop what is beaten; None when more than ``points`` totals were compared.

    Args:
        excess: (N, F), infinite where not offered; a cell at least is offered in each row.
        digits: costs of R resources, R at most 2.
        keep: what need not be dropped although nothing beats it.
        points: most totals to compare over all rows.
    """
    total, spent = np.zeros(1), np.zeros((2, len(digits.whole), 1), dtype=np.int64)
    trail = []
    for i, row in enumerate(excess):
        cells = np.flatnonzero(np.isfinite(row))
        points -= len(total) * len(cells)
        if points < 0:
            return None
        both, need = (total[:, None] + row[cells]).ravel(), digits.add(spent, i, cells)
        able = np.flatnonzero(keep(i, need, both))
        best = able[unbeaten(ranked(need[:, :, able]), both[able])]
        total, spent = both[best], need[:, :, best]
        trail.append((best // len(cells), cells[best % len(cells)]))
    return Merged(spent, total, tuple(trail))


def unbeaten(use: Ints, excess: Floats) -> Ints:
    """Points that no other is as good as in every respect; of equal ones the first, sorted by use.

    >>> unbeaten(np.array([[3, 1, 2, 2]]), np.array([0.0, 2.0, 2.0, 1.0])).tolist()
    [1, 3, 0]
    """
    order = np.lexsort((excess, *use[::-1]))
    loss = excess[order]
    if len(use) == 2:
        return order[_stairs(use[1, order].tolist(), loss.tolist())]
    least = np.minimum.accumulate(loss)
    better = np.ones(len(order), dtype=np.bool_)
    better[1:] = loss[1:] < least[:-1]
    # Without a resource only the first, of least excess, is left.
    return order[better] if len(use) else order[:1]


def _stairs(use: list[int], excess: list[float]) -> list[int]:
    """Places that none before is as good as in use and excess, by a staircase of the best ones so far."""
    steps: list[int] = []
    heights: list[float] = []
    found = []
    for place, (need, loss) in enumerate(zip(use, excess, strict=True)):
        at = bisect_right(steps, need)
        if at and heights[at - 1] <= loss:
            continue
        found.append(place)
        # What uses as much or more at no less excess is beaten from here on.
        start = at - 1 if at and steps[at - 1] == need else at
        stop = start
        while stop < len(steps) and heights[stop] >= loss:
            stop += 1
        steps[start:stop], heights[start:stop] = [need], [loss]
    return found
