"""Lower convex hulls of all rows at once, and the order in which their steps are worth taking."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._reduced import Bools, Floats, Ints

_TINY = float(np.finfo(np.float64).tiny)
_EPS = float(np.finfo(np.float64).eps)
#: Pairs are formed of this many moves, those of least reduced cost.
_MOVES = 150
#: Rounds without an end in sight are given up.
_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class Hull:
    """The steps of all rows along their hulls, the most excess saved per unit first.

    The steps of one row come in the order of its hull, so any number of first steps is a choice.

    Attributes:
        path: (N, S) cells on the hull of each row, cheapest first; the last one is repeated.
        row: (U,) row of each step.
        before: (U,) cell that it leaves.
        after: (U,) cell that it takes.
        worth: (U,) excess saved per unit; never rises.
        used: (U + 1,) units used by the first steps, above the cheapest cells.
    """

    path: Ints
    row: Ints
    before: Ints
    after: Ints
    worth: Floats
    used: Ints

    @classmethod
    def of(cls, excess: Floats, use: Ints) -> Hull:
        """Walk all hulls at once. Cost O(N F S) for hulls of S cells.

        Args:
            excess: (N, F), infinite where not offered; every row is offered one at least.
            use: (N, F) whole units; the cheapest cell of each row uses none.
        """
        path, worth = _paths(excess, use)
        there = np.stack(path, axis=1)
        ahead = np.stack(worth, axis=1) if worth else np.zeros((len(excess), 0))
        # A hull gets flatter; where rounding says otherwise, the order of its steps must not change.
        ahead = np.minimum.accumulate(ahead, axis=1)
        row, step = np.nonzero(ahead)
        order = np.lexsort((step, row, -ahead[row, step]))
        row, step = row[order], step[order]
        before, after = there[row, step], there[row, step + 1]
        used = np.concatenate([[0], np.cumsum(use[row, after] - use[row, before])])
        return cls(there, row, before, after, ahead[row, step], used)

    def choice(self, steps: int) -> Ints:
        """(N,) cells after the first steps."""
        taken = np.bincount(self.row[:steps], minlength=len(self.path))
        return self.path[np.arange(len(self.path)), taken]

    def fitting(self, slack: int) -> int:
        """Most first steps that use at most ``slack`` units."""
        return int(np.searchsorted(self.used, slack, side="right")) - 1

    def price(self, slack: int) -> float:
        """Excess saved by one more unit of ``slack``: the worth of the step that does not fit."""
        steps = self.fitting(slack)
        return float(self.worth[steps]) if steps < len(self.worth) else 0.0


def dual_value(excess: Floats, low: Ints, slack: int, price: float) -> float:
    """Total excess that no choice within ``slack`` is below, proven by a price of one unit; rounding is taken off.

    >>> dual_value(np.array([[0.5, 0.0], [0.75, 0.0]]), np.array([[0, 2], [0, 2]]), 2, 0.25) <= 0.5
    True
    """
    least = (excess + price * low).min(axis=1, initial=np.inf)
    gained, spent = math.fsum(least.tolist()), price * slack
    return max(0.0, gained - spent - 6 * _EPS * (gained + spent))


def improve(excess: Floats, use: Ints, choice: Ints, slack: int, price: float) -> Ints:
    """Move one row or two at a time, the most excess saved first, until none that fits saves anything.

    A move that fits saves excess only if its reduced cost ``excess + price * use`` rises by less than ``price`` times
    the room left; the others are not looked at. Cost O(N F + M^2) per step for M moves, of which there are few.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    for _ in range(_ROUNDS):
        gain = excess - excess[rows, choice][:, None]
        need = use - use[rows, choice][:, None]
        room = slack - int(use[rows, choice].sum())
        i, f = np.nonzero(_promising(gain, need, room, price))
        gain, need = gain[i, f], need[i, f]
        both, total = gain[:, None] + gain, need[:, None] + need
        both[i[:, None] == i] = np.inf
        # A move paired with itself stands for the move alone.
        np.fill_diagonal(both, gain)
        np.fill_diagonal(total, need)
        both[total > room] = np.inf
        if not both.size or not both.min() < 0:
            break
        first, second = np.unravel_index(int(both.argmin()), both.shape)
        choice[i[first]], choice[i[second]] = f[first], f[second]
    return choice


def _promising(gain: Floats, need: Ints, room: int, price: float) -> Bools:
    """(N, F) moves that may save excess, alone or with another one: `_MOVES` at most, but for ties."""
    rise = gain + price * need
    rise[(gain == 0) & (need == 0)] = np.inf
    most = price * room - min(0.0, float(rise.min(initial=0.0)))
    found: Bools = np.isfinite(rise) & (rise <= most)
    if found.sum() > _MOVES:
        found &= rise <= np.partition(rise[found], _MOVES)[_MOVES]
    return found


def _paths(excess: Floats, use: Ints) -> tuple[list[Ints], list[Floats]]:
    """Cells of each hull, and the worth of each step; 0 where a hull has ended."""
    offered = np.isfinite(excess)
    here = np.where(offered, use, np.iinfo(np.int64).max).argmin(axis=1) if excess.size else np.zeros(len(excess), int)
    path, worth = [here.astype(np.int64)], []
    active = np.arange(len(excess))
    while active.size:
        loss, units = excess[active], use[active]
        now, each = here[active], np.arange(len(active))
        saved, extra = loss[each, now][:, None] - loss, units - units[each, now][:, None]
        able = (saved > 0) & (extra > 0)
        value = np.where(able, np.maximum(saved / np.where(able, extra, 1), _TINY), 0.0)
        best = value.max(axis=1)
        # Of cells on one line the farthest is the vertex.
        ahead = np.where(value == best[:, None], extra, -1).argmax(axis=1)
        moves = best > 0
        active = active[moves]
        if active.size:
            here = here.copy()
            here[active] = ahead[moves]
            path.append(here.astype(np.int64))
            worth.append(np.zeros(len(excess)))
            worth[-1][active] = best[moves]
    return path, worth
