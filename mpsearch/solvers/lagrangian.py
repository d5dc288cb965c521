"""A certified lower bound on the loss of every choice that fits, and the prices of the resources behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.problem import Problem, Solution
from mpsearch.solvers._moves import exchange, repair, top_up
from mpsearch.solvers._nearest import nearest_rows
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible, refusal
from mpsearch.solvers._walk import Tables, ascend

_EPS = float(np.finfo(np.float64).eps)
#: Choices are repaired and improved in so many rows first.
_ACTIVE = 4096
_ROWS = 2**14
#: Up to so many rows the lowest prices are found exactly; beyond, only where they are far below those at hand.
_CLOSELY = 2000
#: Bounds that differ by less than this share are one.
_SAME = 1e-12


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
class Lagrangian:
    """Lagrangian relaxation: the bound, and the best choice met while looking for it.

    ``L(p) = sum_i min_f (loss[i,f] + sum_r p[r] cost[r,i,f]) - sum_r p[r] limit[r]`` is, for any prices ``p >= 0``, no
    larger than the loss of any choice that fits. It is concave and piecewise linear; its maximum is found by cutting
    planes. The maximum equals that of the linear relaxation with limits rounded down to what whole steps of cost can
    reach; with one budget it is below the optimum by no more than the largest spread of loss in one row, however
    many rows there are. Losses and bounds in the unit of the table; lower is better.

    Of many rows, a sample shows first where the prices lie; near them most rows keep their cell, and the rounds go
    through the others only. The bound itself is a sum over all rows. The choice of least ``loss + p cost`` is brought
    within the limits and improved by moves of rows whose second best cell is hardly worse than the best.

    Cost: some 10 to 40 rounds, each one pass over the R N F cells of up to 2,000 rows, or of a few per cent of more
    rows, and a linear programme of R + 1 variables; two or three passes over all cells. Memory: about twice the cells.

    Sources: Everett 1963, Operations Research 11(3); Kelley 1960, J. SIAM 8(4); Geoffrion 1974, Math. Programming
    Study 2.

    Attributes:
        rounds: most cutting planes before the best bound so far is taken.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 2, 4], [1, 2, 4]]]), np.array([5.0]))
    >>> s = Lagrangian().solve(p)
    >>> s.choice.tolist(), s.loss, round(s.bound, 9), [round(x, 9) for x in s.prices]
    ([1, 1], 3.0, 2.0, [1.0])
    """

    rounds: int = 100
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "a gap"
    cost: ClassVar[str] = "10 to 40 passes over the cells"

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the best choice met on the way, with the bound.

        Raises:
            InputError: the numbers are too large to be summed (E210).
        """
        accept(problem, "lagrangian")
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "lagrangian", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit), self.rounds)
        if math.isinf(dual.bound):
            return Solution.without(problem, "infeasible", "lagrangian", reason="the bound is above every loss")
        choice = polish(reduced, dual)
        if choice is None:
            return Solution.without(problem, "unsolved", "lagrangian", rounds=dual.rounds, lower_bound=dual.bound)
        return answer(problem, reduced.back(choice), dual.bound, dual.prices, "lagrangian", {"rounds": dual.rounds})


def lagrangian_bound(problem: Problem, rounds: int = 100) -> tuple[float, tuple[float, ...]]:
    """Return a loss that no choice that fits is below, and the price of each resource.

    The bound holds for rounded sums too: it is no larger than `Problem.total_loss` of any choice that fits. It is
    infinite when nothing fits and the relaxation proves it. Prices are >= 0, in loss per unit of resource.

    Raises:
        InputError: the numbers are too large to be summed (E210).

    >>> p = Problem(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 2.0]]]), np.array([2.0]))
    >>> bound, prices = lagrangian_bound(p)
    >>> round(bound, 9), round(prices[0], 9)  # any price from 1 to 1.5 proves it; one more unit saves 1
    (2.0, 1.0)
    """
    accept(problem, "lagrangian")
    if impossible(problem):
        return math.inf, (0.0,) * len(problem.limit)
    dual = maximise(Reduced.of(problem), len(problem.limit), rounds)
    return dual.bound, dual.prices


def polish(reduced: Reduced, dual: Dual) -> Ints | None:
    """Return the best choice that the dual leads to: the best one seen and the repaired guess, both improved.

    Of many rows, only those move first whose second best cell costs hardly more than the best one.
    """
    found = [start for start in (dual.choice, dual.guess) if start is not None]
    better: list[Ints | None] = []
    for start in found:
        count = _ACTIVE
        while count < len(start):
            rows = nearest_rows(reduced, dual.weights, count)
            part = _improved(reduced.part(rows, start), start[rows], dual.weights)
            if part is not None:
                whole = start.copy()
                whole[rows] = part
                better.append(whole)
                break
            count *= 16
        else:
            better.append(_improved(reduced, start, dual.weights))
    return min((choice for choice in better if choice is not None), key=reduced.total, default=None)


def _improved(reduced: Reduced, start: Ints, weights: Floats) -> Ints | None:
    choice = repair(reduced, start, weights)
    return None if choice is None else exchange(reduced, top_up(reduced, choice), weights)


def maximise(reduced: Reduced, resources: int, rounds: int = 100) -> Dual:
    """Maximise the Lagrangian bound by cutting planes.

    Args:
        reduced: the problem.
        resources: how many resources the problem had before it was reduced.
        rounds: most cutting planes.
    """
    tables = Tables(reduced)
    ceiling = _ceiling(reduced)
    walk = ascend(tables, tables.rows, rounds, ceiling)
    least, guess = tables.cheapest(walk.best_weights)
    value = _certified(least, walk.best_weights * tables.limit)
    weights = walk.best_weights / tables.scale
    if not value > 0.0:
        # No price proves more than none at all does, and that without rounding.
        weights = np.zeros_like(weights)
        _, guess = tables.cheapest(weights)
    prices = [0.0] * resources
    lowest = _lowest(tables, weights * tables.scale, value) / tables.scale
    for place, r in enumerate(reduced.kept):
        with np.errstate(over="ignore"):
            price = np.ldexp(lowest[place], reduced.shift) / reduced.unit[place]
        prices[r] = float(min(price, np.finfo(np.float64).max))
    bound = math.inf if value > ceiling else reduced.loss(value)
    seen = [choice for choice in walk.near if len(choice) == tables.rows and reduced.fits(choice)]
    return Dual(bound, tuple(prices), value, weights, guess, seen[-1] if seen else None, len(walk.cuts))


def _lowest(tables: Tables, weights: Floats, value: float) -> Floats:
    """Return the lowest weights that prove the same bound, one resource after the other.

    Where a limit leaves no room, every weight from some value on proves it. The lowest one is what more room is worth;
    the others are arbitrary.
    """
    for r in range(len(weights)):
        if not weights[r] > 0 or not value > 0:
            continue
        high, low = float(weights[r]), 0.0
        few = tables.rows <= _CLOSELY
        for _ in range(200 if few else 60):
            middle = 0.5 * (low + high) if few or low else 0.5 * high
            if not low < middle < high:
                break
            tried = weights.copy()
            tried[r] = middle
            proven = _certified(tables.cheapest(tried)[0], tried * tables.limit)
            if proven >= value * (1 - _SAME):
                high, weights = middle, tried
            else:
                low = middle
                if not few and high == weights[r] and middle * 2 >= high:
                    break
            if high - low <= _SAME * high:
                break
    return weights


def _ceiling(reduced: Reduced) -> float:
    """Return what no choice exceeds."""
    worst = [0.0]
    for start in range(0, len(reduced.excess), _ROWS):
        rows = reduced.excess[start : start + _ROWS]
        worst.append(float(np.where(np.isfinite(rows), rows, 0.0).max(axis=1, initial=0.0).sum()))
    return math.fsum(worst) * (1 + _ROWS * _EPS)


def _certified(least: Floats, spent: Floats) -> float:
    """Return the bound, lowered by the most that rounding can have added.

    All terms of ``excess + weights @ cost`` are >= 0, so each of its R products and R sums, and the rounding of
    the excess, adds at most half an epsilon of the sum. At no weights at all the bound is 0 and exact.
    """
    gained, paid = math.fsum(least.tolist()), math.fsum(spent.tolist())
    margin = _EPS * (len(spent) + 4) * (gained + paid)
    return max(0.0, gained - paid - margin)
