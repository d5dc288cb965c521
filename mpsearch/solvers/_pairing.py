"""Pairs of sets of deviations that fill the budgets together: two halves of the rows, met in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._core import Sets
from mpsearch.solvers._reduced import Floats, Ints

#: Pairs that are looked at, in all and at a time.
_MOST_PAIRS = 60_000_000
_AT_ONCE = 500_000
#: Pairs that are handed out.
_TIES = 64
#: Sets are parted by their rise into so many classes: those of large rises have no partners among each other.
_CLASSES = 24
#: A class is worth its while from so many sets on.
_CLASS = 500
#: Windows are found in sums that are rounded to so many bits.
_BITS = 30


@dataclass(frozen=True, eq=False)
class Joined:
    """What all sets together have to offer.

    Attributes:
        cost: rise of the sets found, and the price of what they leave unused; least first.
        members: deviations of each.
        full: whether all pairs up to the limit are here; otherwise there may be more that cost as much as the last one.
        sharp: whether, then, none is missing that is better only by rounding.
    """

    cost: list[float]
    members: list[list[int]]
    full: bool
    sharp: bool


@dataclass(frozen=True, eq=False)
class _Side:
    """Sets of one half, or some of them; ``place`` says which."""

    place: Ints
    rise: Floats
    step: Ints


def join(one: Sets, two: Sets, room: Ints, weights: Floats, most: float, slip: float, deadline: float) -> Joined | None:
    """Pair the sets of two halves that fit together, the cheapest ones; None when there are too many pairs.

    Args:
        one: sets of the one half.
        two: sets of the other half.
        room: (R,) counts that they may use together.
        weights: (R,) price of a count that is left unused.
        most: largest total of rise and of what is left unused.
        slip: pairs that cost so much more than the best one are left out.
        deadline: when to give up, as of `time.monotonic`.
    """
    best = _Best(most, slip)
    first, second = np.argsort(one.rise, kind="stable"), np.argsort(two.rise, kind="stable")
    left = _Side(first, one.rise[first], one.step[:, first])
    looked = 0
    for part in _classes(two.rise[second], most):
        places = second[part]
        right = _Side(places, two.rise[places], two.step[:, places])
        for a, b in _pairs(left, right, room, weights, best.most):
            looked += len(a)
            if looked > _MOST_PAIRS or time.monotonic() > deadline:
                return None
            best.take(left, right, a, b, room, weights)
    members = [one.members(a) + two.members(b) for a, b in zip(best.left.tolist(), best.right.tolist(), strict=True)]
    return Joined(best.cost.tolist(), members, best.full, not (one.thinned or two.thinned))


class _Best:
    """The cheapest pairs so far, and what a pair may cost to be among them."""

    def __init__(self, most: float, slip: float) -> None:
        self.most, self.slip, self.full = most, slip, True
        self.cost, self.left, self.right = np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def take(self, one: _Side, two: _Side, a: Ints, b: Ints, room: Ints, weights: Floats) -> None:
        """Look at some pairs."""
        cost = one.rise[a] + two.rise[b]
        for have, weight, mine, its in zip(room.tolist(), weights.tolist(), one.step, two.step, strict=True):
            unused = have - mine[a] - its[b]
            kept = np.flatnonzero((unused >= 0) & (cost + weight * unused <= self.most))
            a, b, cost = a[kept], b[kept], cost[kept] + weight * unused[kept]
        if not cost.size:
            return
        cost = np.r_[self.cost, cost]
        order = np.argsort(cost, kind="stable")
        self.most = min(self.most, float(cost[order[0]]) + self.slip)
        order = order[cost[order] <= self.most]
        if len(order) > _TIES:
            self.full, self.most = False, float(cost[order[_TIES - 1]])
            order = order[:_TIES]
        left, right = np.r_[self.left, one.place[a]], np.r_[self.right, two.place[b]]
        self.cost, self.left, self.right = cost[order], left[order], right[order]


def _classes(rise: Floats, most: float) -> list[slice]:
    """Part sets, ordered by their rise, into classes of much the same rise."""
    top, classes = min(most, float(rise[-1])), min(1 + len(rise) // _CLASS, _CLASSES)
    edges = np.searchsorted(rise, np.linspace(0.0, top, classes + 1)[1:], side="right").tolist()
    starts = [0, *edges[:-1]]
    return [slice(start, stop) for start, stop in zip(starts, edges, strict=True) if stop > start]


def _pairs(one: _Side, two: _Side, room: Ints, weights: Floats, most: float) -> Iterator[tuple[Ints, Ints]]:
    """Yield pairs, some at a time; those that fit and cost ``most`` together are among them.

    What a set leaves of two resources must be used up to what is left unused for the rest of ``most``. The sets of the
    other side are sorted by the cell of a grid over the one resource that is as wide as that, then by the other one.
    """
    able = int(np.searchsorted(one.rise, most - float(two.rise[0]), side="right"))
    if not able or not len(room):
        yield np.zeros(able, dtype=np.int64)[:1], np.zeros(able, dtype=np.int64)[:1]
        return
    left = most - one.rise[:able] - float(two.rise[0])
    windows = [
        _Window.of(mine[:able], its, int(have), float(weight), left)
        for mine, its, have, weight in zip(one.step, two.step, room, weights, strict=True)
    ]
    windows.sort(key=lambda window: window.share)
    grid, line = windows[0], windows[min(1, len(windows) - 1)]
    key = (grid.cell(grid.its) << _BITS) + line.place(line.its)
    sort = np.argsort(key, kind="stable")
    key = key[sort]
    from_cell, to_cell = grid.cell(grid.low), grid.cell(grid.high)
    inside = (grid.low <= grid.high) & (line.low <= line.high)
    low, high = line.place(line.low), line.place(line.high)
    for cell, rows in ((to_cell, inside), (from_cell, inside & (from_cell < to_cell))):
        mine = np.flatnonzero(rows)
        base = cell[mine] << _BITS
        start = np.searchsorted(key, base + low[mine], side="left")
        stop = np.searchsorted(key, base + high[mine], side="right")
        for a, b in _ranges(start, stop):
            yield mine[a], sort[b]


@dataclass(frozen=True, eq=False)
class _Window:
    """What sets of the other side may use of one resource, for each set of this side.

    Attributes:
        its: counts of the sets of the other side.
        low: (A,) the least that a partner may use.
        high: (A,) the most; below ``low`` where there is no partner.
        width: no window is wider.
        share: width as a share of what the sets of the other side use.
    """

    its: Ints
    low: Ints
    high: Ints
    width: int
    share: float

    @classmethod
    def of(cls, mine: Ints, its: Ints, room: int, weight: float, left: Floats) -> _Window:
        least, most = int(its.min()), int(its.max())
        waste = left * (1 + 1e-9) / weight if weight > 0 else np.full(len(left), np.inf)
        # One count more for rounding, and no more than a count can hold.
        wide = np.minimum(waste, 2.0**61).astype(np.int64) + 1
        low = np.maximum(room - mine - wide, least)
        high = np.minimum(room - mine, most)
        span = most - least + 1
        width = max(min(int(wide.max()) + 1, span), (span >> _BITS) + 1)
        return cls(its, low, high, width, width / span)

    def cell(self, counts: Ints) -> Ints:
        """Number of the cell of a grid of windows; windows reach over two cells at most."""
        return (counts - int(self.its.min())) // self.width

    def place(self, counts: Ints) -> Ints:
        """Counts from 0 on, rounded down to so few bits that a number of a cell goes before them."""
        least, most = int(self.its.min()), int(self.its.max())
        shift = max(0, (most - least).bit_length() - _BITS)
        return (np.clip(counts, least, most) - least) >> shift


def _ranges(start: Ints, stop: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield each row with each number from its start on, up to its stop, some at a time."""
    count = np.maximum(stop - start, 0)
    ends = np.cumsum(count)
    first = 0
    while first < len(count):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _AT_ONCE, side="right")))
        here = count[first:last]
        left = np.repeat(np.arange(first, last), here)
        offset = np.arange(len(left)) - np.repeat(np.cumsum(here) - here, here)
        yield left, np.repeat(start[first:last], here) + offset
        first = last
