"""A certified lower bound on the loss of every choice that fits, and the prices of the resources behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from mpsearch.problem import Problem, Solution
from mpsearch.solvers._moves import exchange, repair, top_up
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible, refusal

#: Weights (loss, where 1 is the largest, per cost of the largest cell) above this are not tried.
_HIGHEST = 2.0**60
_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Dual:
    """What the dual problem tells.

    Attributes:
        bound: certified lower bound in the problem's unit; infinite when it proves that nothing fits.
        prices: (R,) loss saved by one more unit of each resource.
        value: the bound above the sum of the rows' least losses, in the unit of ``Reduced.excess``.
        weights: (R',) prices of one count, in the same unit.
        guess: (N,) the choice that the weights make; it may break a budget.
        choice: (N,) the best choice seen that keeps every budget, or None.
        rounds: how many weights were tried.
    """

    bound: float
    prices: tuple[float, ...]
    value: float
    weights: Floats
    guess: Ints
    choice: Ints | None
    rounds: int


@dataclass(frozen=True)
class Bound:
    """Lagrangian relaxation: the bound, and the best choice met while looking for it.

    ``L(p) = sum_i min_f (loss[i,f] + sum_r p[r] cost[r,i,f]) - sum_r p[r] limit[r]`` is, for any prices ``p >= 0``, no
    larger than the loss of any choice that fits. It is concave and piecewise linear; its maximum is found by cutting
    planes. The maximum equals that of the linear relaxation with limits rounded down to what whole steps of cost can
    reach; with one budget it is below the optimum by no more than the largest spread of loss in one row, however
    many rows there are. Losses and bounds in the unit of the table; lower is better.

    Cost: one pass over the R N F cells per round, some 10 to 40 rounds, and a linear programme of R + 1 variables.
    Memory: a few copies of the cells.

    Sources: Everett 1963, Operations Research 11(3); Kelley 1960, J. SIAM 8(4); Geoffrion 1974, Math. Programming
    Study 2.

    Attributes:
        rounds: most cutting planes before the best bound so far is taken.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 2, 4], [1, 2, 4]]]), np.array([5.0]))
    >>> s = Bound().solve(p)
    >>> s.choice.tolist(), s.loss, round(s.bound, 9), [round(x, 9) for x in s.prices]
    ([1, 1], 3.0, 2.0, [1.0])
    """

    rounds: int = 100

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the best choice met on the way, with the bound.

        Raises:
            InputError: the numbers are too large to be summed (E210).
        """
        accept(problem, "bound")
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "bound", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit), self.rounds)
        if math.isinf(dual.bound):
            return Solution.without(problem, "infeasible", "bound", reason="the bound is above every loss")
        choice = polish(reduced, dual)
        if choice is None:
            return Solution.without(problem, "unsolved", "bound", rounds=dual.rounds, lower_bound=dual.bound)
        return answer(problem, reduced.back(choice), dual.bound, dual.prices, "bound", {"rounds": dual.rounds})


def lagrangian_bound(problem: Problem, rounds: int = 100) -> tuple[float, tuple[float, ...]]:
    """Return a loss that no choice that fits is below, and the price of each resource.

    The bound holds for rounded sums too: it is no larger than `Problem.total_loss` of any choice that fits. It is
    infinite when nothing fits and the relaxation proves it. Prices are >= 0, in loss per unit of resource.

    Raises:
        InputError: the numbers are too large to be summed (E210).

    >>> p = Problem(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 2.0]]]), np.array([2.0]))
    >>> bound, prices = lagrangian_bound(p)
    >>> round(bound, 9), 1.0 <= prices[0] <= 1.5
    (2.0, True)
    """
    accept(problem, "bound")
    if impossible(problem):
        return math.inf, (0.0,) * len(problem.limit)
    dual = maximise(Reduced.of(problem), len(problem.limit), rounds)
    return dual.bound, dual.prices


def polish(reduced: Reduced, dual: Dual) -> Ints | None:
    """Return the best choice that the dual leads to: the best one seen and the repaired guess, both improved."""
    found = [dual.choice, repair(reduced, dual.guess, dual.weights)]
    better = [exchange(reduced, top_up(reduced, choice), dual.weights) for choice in found if choice is not None]
    return min(better, key=reduced.total, default=None)


def maximise(reduced: Reduced, resources: int, rounds: int = 100) -> Dual:
    """Maximise the Lagrangian bound by cutting planes.

    Args:
        reduced: the problem.
        resources: how many resources the problem had before it was reduced.
        rounds: most cutting planes.
    """
    walk = _Walk(reduced)
    walk.visit(np.zeros(len(reduced.slack)))
    if not walk.done and len(reduced.slack):
        walk.cut_cheapest()
        walk.climb(rounds)
    value = walk.certified()
    weights = walk.best_weights / walk.scale
    prices = [0.0] * resources
    for place, r in enumerate(reduced.kept):
        with np.errstate(over="ignore"):
            price = np.ldexp(weights[place], reduced.shift) / reduced.unit[place]
        prices[r] = float(min(price, np.finfo(np.float64).max))
    bound = math.inf if value > walk.ceiling else reduced.loss(value)
    return Dual(bound, tuple(prices), value, weights, walk.best_guess, walk.found, len(walk.cuts))


class _Walk:
    """The state of the cutting-plane method. Costs are in shares of the largest cell, sums are divided by N."""

    def __init__(self, reduced: Reduced) -> None:
        self.reduced = reduced
        resources, self.rows, _ = reduced.use.shape
        self.scale = np.maximum(reduced.low.max(axis=(1, 2), initial=1), 1).astype(np.float64)
        # A power of two keeps every division exact.
        self.scale = np.exp2(np.ceil(np.log2(self.scale)))
        # One row per format: the inner loops run over all rows of the problem at once.
        self.excess = np.ascontiguousarray(reduced.excess.T)
        self.cost = np.ascontiguousarray(reduced.low.transpose(0, 2, 1)) / self.scale[:, None, None]
        self.limit = reduced.slack / self.scale
        worst = np.where(np.isfinite(reduced.excess), reduced.excess, 0.0).max(axis=1, initial=0.0)
        self.ceiling = math.fsum(worst.tolist()) * (1 + 4 * _EPS)
        #: Each cut (a, g) says that the mean bound at weights w is at most a + g @ w.
        self.cuts: list[tuple[float, Floats]] = []
        self.highest = self.top = self.ceiling / max(self.rows, 1) or 1.0
        self.best_value = -math.inf
        self.best_weights = np.zeros(resources)
        self.best_guess = np.zeros(self.rows, dtype=np.int64)
        self.found: Ints | None = None
        self.found_loss = math.inf
        self.box = np.full(resources, 2.0**10)
        self.done = False

    def visit(self, weights: Floats) -> None:
        """Evaluate the bound at some weights; keep its cut, and its choice when that fits."""
        least, choice = self._cheapest(self.excess, weights)
        value = (float(least.sum()) - float(weights @ self.limit)) / max(self.rows, 1)
        if value > self.best_value:
            self.best_value, self.best_weights, self.best_guess = value, weights, choice
        over = self._cut(choice)
        # A choice that fits and pays only for budgets it uses up is an optimum, of both problems.
        self.done = bool(((over == 0) | (weights == 0)).all()) and self.reduced.fits(choice)

    def cut_cheapest(self) -> None:
        """Add the cut of a cheap choice: where it has room to spare, it bounds the prices from above."""
        nothing = np.where(np.isfinite(self.excess), 0.0, np.inf)
        _, choice = self._cheapest(nothing, 1.0 / np.maximum(self.limit, _EPS))
        over = self._cut(choice)
        if (over < 0).all():
            self.box = np.maximum(self.cuts[-1][0] / -over, _TINY)

    def climb(self, rounds: int) -> None:
        """Visit the top of all cuts until it is no higher than the best value, or ``rounds`` is reached."""
        while len(self.cuts) < rounds and not self.done and self.best_value * self.rows <= self.ceiling:
            weights, self.top = self._crossing() if len(self.box) == 1 else self._summit()
            if self.top - self.best_value > 1e-10 * abs(self.best_value):
                known = len(self.cuts)
                self.visit(weights)
                if not any(a == self.cuts[-1][0] and (g == self.cuts[-1][1]).all() for a, g in self.cuts[:known]):
                    continue
            # Nothing is left to gain inside the box.
            if (weights < 0.99 * self.box).all() or self.box.max() >= _HIGHEST:
                break
            self.box, self.top = np.minimum(self.box * 2.0**10, _HIGHEST), self.highest

    def certified(self) -> float:
        """Return the bound at the best weights, lowered by the most that rounding can have added.

        All terms of ``excess + weights @ cost`` are >= 0, so each of its R products and R sums, and the rounding of
        the excess, adds at most half an epsilon of the sum. At no weights at all the bound is 0 and exact.
        """
        least, _ = self._cheapest(self.excess, self.best_weights)
        gained, spent = math.fsum(least.tolist()), math.fsum((self.best_weights * self.limit).tolist())
        margin = _EPS * (len(self.limit) + 4) * (gained + spent)
        return max(0.0, gained - spent - margin)

    def _cheapest(self, excess: Floats, weights: Floats) -> tuple[Floats, Ints]:
        """(N,) least of excess + weights @ cost over the formats, and the first format that has it."""
        least = np.full(self.rows, np.inf)
        choice = np.zeros(self.rows, dtype=np.int64)
        for f in range(len(excess)):
            value = excess[f].copy()
            for weight, cost in zip(weights.tolist(), self.cost, strict=True):
                value += weight * cost[f]
            lower = value < least
            np.copyto(least, value, where=lower)
            np.copyto(choice, f, where=lower)
        return least, choice

    def _cut(self, choice: Ints) -> Floats:
        """Add the cut of a choice; return its mean overrun of each budget."""
        rows = np.arange(self.rows)
        total = float(self.excess[choice, rows].sum())
        over = np.array([cost[choice, rows].sum() for cost in self.cost]) - self.limit
        near = bool((over <= 1e-9 * (1 + self.limit)).all())
        if near and total < self.found_loss and self.reduced.fits(choice):
            self.found, self.found_loss = choice, total
        mean = max(self.rows, 1)
        self.cuts.append((total / mean, over / mean))
        return self.cuts[-1][1]

    def _summit(self) -> tuple[Floats, float]:
        """Return the weights in the box where the lowest of all cuts is highest, and its value there."""
        heights = np.array([a for a, _ in self.cuts])
        slopes = np.array([g for _, g in self.cuts]) * self.box
        # In shares of what is left to gain, so that the tolerances of the linear programme shrink with it.
        size = max(self.top - self.best_value, _EPS * self.highest)
        result = linprog(
            np.r_[-1.0, np.zeros(len(self.box))],
            A_ub=np.c_[np.ones(len(heights)), -slopes / size],
            b_ub=(heights - self.best_value) / size,
            bounds=[(None, None), *[(0.0, 1.0)] * len(self.box)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if result.x is None:
            return self.best_weights, self.best_value
        return np.clip(result.x[1:], 0.0, 1.0) * self.box, self.best_value + float(result.x[0]) * size

    def _crossing(self) -> tuple[Floats, float]:
        """With one budget the highest point is the lowest crossing of a rising and a falling cut."""
        heights = np.array([a for a, _ in self.cuts])
        slopes = np.array([g[0] for _, g in self.cuts])
        up, down = slopes > 0, slopes <= 0
        if not up.any():
            return self.best_weights, self.best_value
        where = np.maximum(heights[down] - heights[up][:, None], 0.0) / (slopes[up][:, None] - slopes[down])
        value = heights[up][:, None] + slopes[up][:, None] * where
        i, j = np.unravel_index(value.argmin(), value.shape)
        return np.array([where[i, j]]), float(value[i, j])
