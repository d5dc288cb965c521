"""Greedy upgrades by the most loss saved per cost; fast, not exact, with a bound that says how far off it can be."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.problem import Problem, Solution
from mpsearch.solvers._moves import repair, shares, top_up
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible, refusal
from mpsearch.solvers.lagrangian import Dual, maximise


@dataclass(frozen=True)
class Greedy:
    """Start from cheap cells and climb each row's lower convex hull, the best step of all rows first.

    A step from cell f to cell g of a row is worth ``(loss[f] - loss[g]) / sum_r price[r] (cost[r,g] - cost[r,f])``; the
    step of a row that is worth most is the next vertex of its hull. A step that does not fit is passed over and the
    next one is tried. In the end rows move to any cell, on the hull or not, that still fits. With one budget the
    start is each row's cheapest cell, and the price only a unit. With several budgets, for which there is no one
    cheapest cell, the prices are those of the Lagrangian bound, and the start is the choice of least
    ``loss + price cost``, from which rows are moved to cheaper cells until every budget is kept.

    With one budget the loss exceeds the optimum by at most the loss of one step; with unequal rows it is not exact.
    Losses in the unit of the table; lower is better. The bound is that of `mpsearch.solvers.lagrangian`.

    Cost: O(N F log N) steps of a heap, and O(R N F^2) for the hulls. Memory: a few copies of the cells.

    Sources: Sinha and Zoltners 1979, Operations Research 27(3), for one budget; Toyoda 1975, Management Science
    21(12), and Everett 1963, Operations Research 11(3), for weighing several resources by one price.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 2, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = Greedy().solve(p)
    >>> s.choice.tolist(), s.loss, s.cost, s.status
    ([1, 2], 1.0, (6.0,), 'optimal')
    """

    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "a gap"
    cost: ClassVar[str] = "N F log N"

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the greedy choice, with the bound.

        Raises:
            InputError: the numbers are too large to be summed (E210).
        """
        accept(problem, "greedy")
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "greedy", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit))
        if math.isinf(dual.bound):
            return Solution.without(problem, "infeasible", "greedy", reason="the bound is above every loss")
        choice = grow(reduced, dual)
        if choice is None:
            return Solution.without(problem, "unsolved", "greedy", lower_bound=dual.bound)
        return answer(problem, reduced.back(choice), dual.bound, dual.prices, "greedy", {})


def grow(reduced: Reduced, dual: Dual) -> Ints | None:
    """Return the greedy choice, or None when no start could be repaired into one that fits."""
    price = np.tensordot(dual.weights, reduced.use.astype(np.float64), axes=1)
    start = _cheapest(reduced) if len(reduced.slack) < 2 else repair(reduced, dual.guess, dual.weights)
    if start is None:
        start = dual.choice
    if start is None:
        start = repair(reduced, _cheapest(reduced), dual.weights)
    return None if start is None else top_up(reduced, climb(reduced, start, price))


def climb(reduced: Reduced, choice: Ints, price: Floats) -> Ints:
    """Take the hull steps of all rows in the order of their worth, passing over what does not fit.

    Args:
        reduced: the problem.
        choice: (N,) a start that keeps every budget.
        price: (N, F) one cost per cell, all resources weighed together.
    """
    here = choice.astype(np.int64)
    following, worth = _hull(reduced.excess, price)
    rows, formats = price.shape
    first = worth[np.arange(rows), here]
    able = np.flatnonzero(first > 0)
    heap = list(zip((-first[able]).tolist(), able.tolist(), strict=True))
    heapq.heapify(heap)
    # Views give Python numbers without turning every cell into an object.
    counts = [table.ravel().data for table in reduced.use]
    ahead, value = following.ravel().data, worth.ravel().data
    room = (reduced.slack - reduced.counts(choice)).tolist()
    while heap:
        _, i = heapq.heappop(heap)
        now = i * formats + int(here[i])
        then = i * formats + ahead[now]
        left = [have - table[then] + table[now] for have, table in zip(room, counts, strict=True)]
        if left and min(left) < 0:
            continue
        here[i], room = ahead[now], left
        if value[then] > 0:
            heapq.heappush(heap, (-value[then], i))
    return here


def _cheapest(reduced: Reduced) -> Ints:
    """(N,) cell of each row with the least cost in shares of the budgets."""
    share = np.where(np.isfinite(reduced.excess), shares(reduced.use, reduced.slack), np.inf)
    return share.argmin(axis=1) if share.size else np.zeros(len(share), dtype=np.int64)


def _hull(excess: Floats, price: Floats) -> tuple[Ints, Floats]:
    """For each cell, the next vertex of its row's hull (N, F), and what the step is worth; 0 where there is none."""
    following = np.zeros(price.shape, dtype=np.int64)
    worth = np.zeros(price.shape)
    rows = np.arange(len(price))
    for f in np.flatnonzero(np.isfinite(excess).any(axis=0)).tolist():
        with np.errstate(invalid="ignore"):
            saved = excess[:, f : f + 1] - excess
        dearer = np.maximum(price - price[:, f : f + 1], np.finfo(np.float64).tiny)
        value = np.where(saved > 0, np.minimum(saved, 1.0) / dearer, 0.0)
        following[:, f] = value.argmax(axis=1)
        worth[:, f] = value[rows, following[:, f]]
    return following, worth
