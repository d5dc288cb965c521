"""Maximise a Lagrangian bound by cutting planes, over all rows or only those that prices in a box do not settle."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mpsearch.solvers._reduced import Floats, Ints, Reduced, blocks
from mpsearch.solvers._summit import Summit

#: Weights (loss, where 1 is the largest, per cost of the largest cell) above this are not tried.
_HIGHEST = 2.0**60
_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)
#: Up to so many rows, prices are looked for with all rows at once.
_FEW = 2048
#: Prices of a problem are looked for in those of this share of its rows first.
_SHARE = 8
#: Tops of all cuts this close to the bound, as a share of it, are reached: of all rows, and of a sample.
_EXACT, _ROUGH = 1e-10, 1e-6

Block = tuple[Floats, Floats]


class Tables:
    """A reduced problem as the walk reads it: one line per format, costs in shares of the largest cell."""

    def __init__(self, reduced: Reduced) -> None:
        self.reduced = reduced
        self.rows = len(reduced.excess)
        # One table at a time: numpy reduces a whole array far faster than along short axes.
        largest = np.array([table.max(initial=1) for table in reduced.low], dtype=np.float64)
        # A power of two keeps every division exact.
        self.scale: Floats = np.exp2(np.ceil(np.log2(largest)))
        self.limit: Floats = reduced.slack / self.scale

    def take(self, rows: slice | Ints) -> Block:
        """Return excess (F, n) and cost (R, F, n) of some rows."""
        excess = np.ascontiguousarray(self.reduced.excess[rows].T)
        cost = np.empty((len(self.scale), *excess.shape))
        for line, table, scale in zip(cost, self.reduced.low, self.scale.tolist(), strict=True):
            np.divide(table[rows].T, scale, out=line)
        return excess, cost

    def blocks(self, count: int) -> Iterator[tuple[slice, Floats, Floats]]:
        """Yield the first ``count`` rows block by block."""
        for rows in blocks(count):
            yield (rows, *self.take(rows))

    def cheapest(self, weights: Floats) -> tuple[Floats, Ints]:
        """(N,) least of excess + weights @ cost over the formats of each row, and the first format that has it."""
        least = np.empty(self.rows)
        choice = np.empty(self.rows, dtype=np.int64)
        for rows, excess, cost in self.blocks(self.rows):
            least[rows], choice[rows] = cheapest(priced(excess, cost, weights))
        return least, choice

    def settle(self, count: int, weights: Floats, low: Floats, high: Floats) -> tuple[Ints, Floats, float]:
        """Part the first ``count`` rows by whether weights between ``low`` and ``high`` can change their choice.

        Returns:
            The rows whose choice they can change; (R,) cost and the excess of all others together.
        """
        open_rows, spent, kept = [], np.zeros(len(self.limit)), 0.0
        for rows, excess, cost in self.blocks(count):
            _, choice = cheapest(priced(excess, cost, weights))
            places = np.arange(len(choice))
            least = np.full(len(choice), np.inf)
            chosen = cost[:, choice, places]
            base = excess[choice, places]
            for f, line in enumerate(excess):
                lead = line - base
                for r, step in enumerate(cost[:, f] - chosen):
                    lead += np.minimum(low[r] * step, high[r] * step)
                np.minimum(least, lead, out=least, where=choice != f)
            closed = least > 0
            open_rows.append(np.flatnonzero(~closed) + rows.start)
            spent += chosen[:, closed].sum(axis=1)
            kept += float(base[closed].sum())
        return np.concatenate(open_rows), spent, kept


class Walk:
    """The state of the cutting-plane method. Sums are divided by ``count``."""

    def __init__(
        self, block: Block, limit: Floats, count: int, ceiling: float, kept: float = 0.0, close: float = _EXACT
    ) -> None:
        """Start.

        Args:
            block: excess and cost of the rows whose choice is open.
            limit: (R,) what they may cost together.
            count: rows, settled ones included.
            ceiling: no choice has a larger excess.
            kept: excess of the rows that are settled.
            close: how near to the best bound is near enough, as a share of it.
        """
        self.excess, self.cost = block
        self.limit, self.count, self.kept, self.ceiling, self.close = limit, max(count, 1), kept, ceiling, close
        #: Each cut (a, g) says that the mean bound at weights w is at most a + g @ w.
        self.cuts: list[tuple[float, Floats]] = []
        self.highest = self.top = ceiling / self.count or 1.0
        self.best_value = -math.inf
        self.best_weights = np.zeros(len(limit))
        #: Choices on the way that keep every limit, up to rounding, the best one last.
        self.near: list[Ints] = []
        self.near_loss = math.inf
        self.low, self.high = np.zeros(len(limit)), np.full(len(limit), 2.0**10)
        self.done = False

    def visit(self, weights: Floats) -> None:
        """Evaluate the bound at some weights, and keep its cut."""
        least, choice = cheapest(priced(self.excess, self.cost, weights))
        value = (self.kept + float(least.sum()) - float(weights @ self.limit)) / self.count
        if value > self.best_value:
            self.best_value, self.best_weights = value, weights
        over = self._cut(choice)
        # A choice that fits and pays only for budgets it uses up is an optimum, of both problems.
        self.done = bool(((over == 0) | ((weights == 0) & (over < 0))).all())

    def cut_cheapest(self) -> None:
        """Add the cut of a cheap choice: where it has room to spare, it bounds the prices from above."""
        nothing = np.where(np.isfinite(self.excess), 0.0, np.inf)
        _, choice = cheapest(priced(nothing, self.cost, 1.0 / np.maximum(self.limit, _EPS)))
        over = self._cut(choice)
        if (over < 0).all():
            self.high = np.maximum(self.cuts[-1][0] / -over, _TINY)

    def climb(self, rounds: int) -> None:
        """Visit the top of all cuts until it is no higher than the best value, or ``rounds`` is reached.

        The box grows where the top lies on its far side.
        """
        while not self.within(rounds) and self.high.max() < _HIGHEST:
            self.high, self.top = np.minimum(self.high * 2.0**10, _HIGHEST), self.highest

    def within(self, rounds: int) -> bool:
        """Climb inside the box; say whether the walk is over, which it is not where the top lies on a far side."""
        summit = Summit(self.low, self.high)
        for cut in self.cuts:
            summit.add(*cut)
        while len(self.cuts) < rounds and not self.done and self.best_value * self.count <= self.ceiling:
            weights, self.top = summit.top(self.best_value)
            if self.top - self.best_value > self.close * abs(self.best_value):
                known = self.cuts.copy()
                self.visit(weights)
                summit.add(*self.cuts[-1])
                if not any(a == self.cuts[-1][0] and (g == self.cuts[-1][1]).all() for a, g in known):
                    continue
            # Nothing is left to gain inside the box.
            edge = 0.01 * (self.high - self.low)
            inside = ((weights > self.low + edge) | (self.low == 0)) & (weights < self.high - edge)
            return bool(inside.all())
        return True

    def _cut(self, choice: Ints) -> Floats:
        """Add the cut of a choice; return its mean overrun of each limit."""
        places = np.arange(self.excess.shape[1])
        total = self.kept + float(self.excess[choice, places].sum())
        over = np.array([cost[choice, places].sum() for cost in self.cost]) - self.limit
        if total < self.near_loss and bool((over <= 1e-9 * (1 + self.limit)).all()):
            self.near.append(choice)
            self.near_loss = total
        self.cuts.append((total / self.count, over / self.count))
        return self.cuts[-1][1]


def ascend(tables: Tables, count: int, rounds: int, ceiling: float) -> Walk:
    """Walk to the best weights of the first ``count`` rows under their share of the limits.

    The order of the rows is as good as random, so a few of them show where the weights of all lie. Within a box
    around those weights most rows keep their choice: their sum is taken once, and the walk goes on with the others.
    """
    limit = tables.limit * (count / max(tables.rows, 1))
    close = _EXACT if count == tables.rows else _ROUGH
    if count > _FEW:
        guess = ascend(tables, count // _SHARE, rounds, ceiling * (count // _SHARE) / count)
        weights, width = guess.best_weights, 5 / math.sqrt(count // _SHARE)
        usual = guess.ceiling / np.maximum(guess.cost.max(axis=1, initial=0.0).sum(axis=1), _TINY)
        while width < 1.0 and math.isfinite(guess.best_value):
            span = width * np.where(weights > 0, weights, usual)
            low, high = np.maximum(weights - span, 0.0), weights + span
            rows, spent, kept = tables.settle(count, weights, low, high)
            walk = Walk(tables.take(rows), limit - spent, count, ceiling, kept, close)
            walk.low, walk.high = low, high
            walk.visit(weights)
            if walk.within(rounds):
                return walk
            weights, width = walk.best_weights, 1.5 * width
    walk = Walk(tables.take(slice(0, count)), limit, count, ceiling, 0.0, close)
    walk.visit(np.zeros(len(limit)))
    if not walk.done and len(limit):
        walk.cut_cheapest()
        walk.climb(rounds)
    return walk


def priced(excess: Floats, cost: Floats, weights: Floats) -> Floats:
    """(F, n) excess + weights @ cost."""
    value = excess.copy()
    part = np.empty_like(value)
    for weight, table in zip(weights.tolist(), cost, strict=True):
        np.multiply(table, weight, out=part)
        value += part
    return value


def cheapest(value: Floats) -> tuple[Floats, Ints]:
    """(n,) least value over the formats (F, n), and the first format that has it."""
    count = value.shape[1]
    least = np.full(count, np.inf)
    choice = np.zeros(count, dtype=np.int64)
    for f, line in enumerate(value):
        lower = line < least
        np.copyto(least, line, where=lower)
        np.copyto(choice, f, where=lower)
    return least, choice
