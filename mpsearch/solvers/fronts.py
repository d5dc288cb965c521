"""Fronts: all the totals worth having at once, and the answers to many budgets in one go."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution, exact_sum
from mpsearch.solvers._digits import Digits, amounts
from mpsearch.solvers._hull import Hull, dual_value, improve
from mpsearch.solvers._merge import MOST_POINTS, Merged, merge
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible
from mpsearch.solvers.lagrangian import maximise, polish


@dataclass(frozen=True, eq=False)
class Front:
    """A front of one resource: plans of rising cost and falling loss, each the one before with one row upgraded.

    Every plan is a prefix of the same list of upgrades: a smaller one is got from a larger one by leaving upgrades
    away. The loss of each is the least of all plans of its cost or less (it is on the lower convex hull); plans
    between two of them, off the hull, are not here.

    Attributes:
        cost: (P,) total cost, rising.
        loss: (P,) total loss, falling.
        row: (P - 1,) row that each upgrade moves.
        before: (P - 1,) column that it leaves.
        after: (P - 1,) column that it takes.
        start: (N,) columns of the cheapest plan.
    """

    cost: Floats
    loss: Floats
    row: Ints
    before: Ints
    after: Ints
    start: Ints

    def choice(self, point: int) -> Ints:
        """(N,) columns of a plan, by its place in the front."""
        choice = self.start.copy()
        for i, f in zip(self.row[:point].tolist(), self.after[:point].tolist(), strict=True):
            choice[i] = f
        return choice


@dataclass(frozen=True, eq=False)
class ExactFront:
    """All plans that no other beats in every cost and in loss, one of each total.

    Attributes:
        cost: (R, P) total costs, rising in the first resource.
        loss: (P,) total loss.
    """

    cost: Floats
    loss: Floats
    _merged: Merged
    _order: Ints

    def choice(self, point: int) -> Ints:
        """(N,) columns of a plan, by its place in the front."""
        there = np.empty(len(self._order), dtype=np.int64)
        there[self._order] = self._merged.choice(point)
        return there


def front(problem: Problem) -> Front:
    """Return the supported front of one resource, whatever its limit: the merge of the rows' lower convex hulls.

    All upgrades of all rows are sorted by loss saved per cost; each prefix of them is a plan, N F plans at most. Exact
    for what it holds, and nested by construction. Cost O(N F log(N F)).

    Sources: Sinha and Zoltners 1979, Operations Research 27(3); nested plans after BitStack, 2024, arXiv 2410.23918.

    Raises:
        InputError: not one resource, a row without a format, pairs, counts, or numbers too large (E210).

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 2, 4], [1, 2, 4]]]), np.array([9.0]))
    >>> f = front(p)
    >>> f.cost.tolist(), f.loss.tolist(), f.row.tolist(), f.choice(2).tolist()
    ([2.0, 3.0, 6.0, 8.0], [7.0, 4.0, 1.0, 0.0], [0, 1, 0], [1, 2])
    """
    reduced = _unlimited(problem, 1)
    hull = Hull.of(reduced.excess, _table(reduced))
    row = reduced.order[hull.row]
    start, last = reduced.back(hull.path[:, 0]), reduced.back(hull.path[:, -1])
    # Each sum begins at its small end, so that small totals are not what large ones leave over.
    cost = _running(problem.cost[0], start, row, hull.before, hull.after)
    loss = _running(problem.loss, last, row[::-1], hull.after[::-1], hull.before[::-1])[::-1]
    return Front(cost, loss, row, hull.before, hull.after, start)


def _running(table: Floats, choice: Ints, row: Ints, before: Ints, after: Ints) -> Floats:
    """Totals of a choice and after each of some moves, summed in the longest floats there are."""
    steps = table[row, after].astype(np.longdouble) - table[row, before]
    first = table[np.arange(len(choice)), choice].astype(np.longdouble).sum(keepdims=True)
    totals: Floats = np.cumsum(np.concatenate([first, steps])).astype(np.float64)
    return totals


def exact_front(problem: Problem, points: int = MOST_POINTS) -> ExactFront:
    """Return the whole front of one or two resources, whatever their limits, off the hull too; for small problems.

    Costs that differ by less than 2**-100 of the largest one may count as equal.

    Raises:
        InputError: more than two resources, a row without a format, pairs, counts, numbers too large, or more than
            ``points`` totals to compare (E210).

    >>> p = Problem(np.array([[4.0, 3.0, 0.0]]), np.array([[[1, 2, 3]]]), np.array([0.0]))
    >>> exact_front(p).loss.tolist(), front(p).loss.tolist()
    ([4.0, 3.0, 0.0], [4.0, 0.0])
    """
    reduced = _unlimited(problem, 2)
    digits = Digits.of(problem, reduced)
    merged = merge(reduced.excess, digits, lambda i, spent, excess: np.ones(len(excess), dtype=np.bool_), points)
    if merged is None:
        raise InputError(
            "E210",
            f"front: more than {points} totals would be compared",
            advice="take mpsearch.solvers.fronts.front, which keeps to the hull, or solve_many",
        )
    cost = np.repeat(np.array(problem.least())[:, None], len(merged.excess), axis=1)
    for place, r in enumerate(reduced.kept):
        cost[r] += amounts(merged.spent[:, place], reduced.unit[place])
    loss = np.array([reduced.loss(excess) for excess in merged.excess.tolist()])
    return ExactFront(cost, loss, merged, reduced.order)


def solve_many(problem: Problem, limits: Floats) -> tuple[Solution, ...]:
    """Solve one table under many budgets; the problem's own limits play no part.

    The table is reduced once. With one budget, each answer starts where the walk along the merged hulls ends, and rows
    are moved alone or in pairs until none that fits saves anything; the bound is the Lagrangian one at the worth of
    the step that did not fit. With several budgets, each has its own dual problem. In the end a budget takes over the
    answer of another one that fits it and is better, so that more budget is never worse.

    Cost: with one budget O(N F log(N F)) once and some O(N F) passes for each limit: 0.2 s for 200 limits on 300 rows
    of 10 formats. With several, that of solver `lagrangian` for each.

    Args:
        problem: the table.
        limits: (K, R) limits of the R resources; (K,) will do for one resource.

    Returns:
        K solutions in the order of the limits; the status is ``optimal`` where bound and loss are within 1e-9.

    Raises:
        InputError: limits of another shape, pairs, counts, or numbers too large (E210).

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 2, 4], [1, 2, 4]]]), np.array([9.0]))
    >>> [(s.status, s.loss) for s in solve_many(p, np.array([1.0, 3.0, 6.0, 9.0]))]
    [('infeasible', inf), ('optimal', 4.0), ('optimal', 1.0), ('optimal', 0.0)]
    """
    limits = np.array(limits, dtype=np.float64)
    limits = limits[:, None] if limits.ndim == 1 else limits
    if limits.ndim != 2 or limits.shape[1] != len(problem.cost):
        raise InputError("E210", f"front: limits of shape {limits.shape}, expected (K, {len(problem.cost)})")
    finite = np.where(np.isfinite(limits), np.abs(limits), 0.0).max(axis=0, initial=0.0)
    accept(dataclasses.replace(problem, limit=finite), "pareto")
    asked = [dataclasses.replace(problem, limit=limit) for limit in limits]
    reasons = [impossible(each) for each in asked]
    able = np.array([not reason for reason in reasons], dtype=np.bool_)
    if not able.any():
        return tuple(_without(each, reason) for each, reason in zip(asked, reasons, strict=True))
    many = _Many(problem, limits[able])
    answers = iter(many.answers())
    return tuple(
        _without(each, reason) if reason else _solution(each, many.reduced, next(answers))
        for each, reason in zip(asked, reasons, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Answer:
    """A choice in the order of the reduced rows, or None; its bound and prices in the problem's unit."""

    choice: Ints | None
    bound: float
    prices: tuple[float, ...]


class _Many:
    """One reduced table under many limits, each of which the cheapest cells keep."""

    def __init__(self, problem: Problem, limits: Floats) -> None:
        self.resources = len(problem.cost)
        self.reduced = Reduced.of(dataclasses.replace(problem, limit=limits.min(axis=0)))
        cheapest = np.where(problem.offered, problem.cost, np.inf).min(axis=2, initial=np.inf)
        self.slack = np.zeros((len(limits), len(self.reduced.kept)), dtype=np.int64)
        for place, r in enumerate(self.reduced.kept):
            least, unit = exact_sum(cheapest[r].tolist()), Fraction(self.reduced.unit[place])
            most = int(self.reduced.use[place].max(axis=1).sum())
            for k, limit in enumerate(limits[:, r].tolist()):
                room = most if limit == math.inf else math.floor((Fraction(limit) - least) / unit)
                self.slack[k, place] = min(room, most)

    def answers(self) -> list[_Answer]:
        """One answer for each limit."""
        one = len(self.reduced.kept) == 1
        found = self._along_the_hulls() if one else [self._alone(slack) for slack in self.slack]
        return self._shared(found)

    def _along_the_hulls(self) -> list[_Answer]:
        excess, use, low = self.reduced.excess, self.reduced.use[0], self.reduced.low[0]
        hull = Hull.of(excess, use)
        found = []
        for slack in self.slack[:, 0].tolist():
            price = hull.price(slack)
            choice = improve(excess, use, hull.choice(hull.fitting(slack)), slack, price)
            bound = self.reduced.loss(dual_value(excess, low, slack, price))
            prices = [0.0] * self.resources
            with np.errstate(over="ignore"):
                dear = float(np.ldexp(price, self.reduced.shift) / self.reduced.unit[0])
            prices[self.reduced.kept[0]] = min(dear, float(np.finfo(np.float64).max))
            found.append(_Answer(choice, bound, tuple(prices)))
        return found

    def _alone(self, slack: Ints) -> _Answer:
        reduced = dataclasses.replace(self.reduced, slack=slack)
        dual = maximise(reduced, self.resources)
        return _Answer(None if math.isinf(dual.bound) else polish(reduced, dual), dual.bound, dual.prices)

    def _shared(self, found: list[_Answer]) -> list[_Answer]:
        """Give each limit the best choice of all that fit it."""
        known = [each.choice for each in found if each.choice is not None]
        if not known:
            return found
        total = np.array([self.reduced.total(choice) for choice in known])
        need = np.array([self.reduced.counts(choice) for choice in known]).reshape(len(known), -1)
        shared = []
        for each, slack in zip(found, self.slack, strict=True):
            fits = np.where((need <= slack).all(axis=1), total, np.inf)
            best = int(fits.argmin())
            own = math.inf if each.choice is None else self.reduced.total(each.choice)
            shared.append(dataclasses.replace(each, choice=known[best]) if fits[best] < own else each)
        return shared


def _without(problem: Problem, reason: str) -> Solution:
    return Solution.without(problem, "infeasible", "pareto", reason=reason)


def _solution(problem: Problem, reduced: Reduced, found: _Answer) -> Solution:
    if found.choice is not None:
        return answer(problem, reduced.back(found.choice), found.bound, found.prices, "pareto", {})
    if math.isinf(found.bound):
        return _without(problem, "the bound is above every loss")
    return Solution.without(problem, "unsolved", "pareto", lower_bound=found.bound)


def _unlimited(problem: Problem, most: int) -> Reduced:
    """Reduce a problem with limits so small that every resource with a choice in it is kept."""
    accept(problem, "front")
    empty = np.flatnonzero(~problem.offered.any(axis=1))
    resources = len(problem.cost)
    if empty.size or not 1 <= resources <= most:
        found = f"row '{problem.names[empty[0]]}' has no format" if empty.size else f"there are {resources} resources"
        raise InputError("E210", f"front: {found}, expected {'one' if most == 1 else 'one or two'} and no such row")
    cheapest = np.where(problem.offered, problem.cost, np.inf).min(axis=2, initial=np.inf).tolist()
    return Reduced.of(dataclasses.replace(problem, limit=np.array([_no_less(exact_sum(row)) for row in cheapest])))


def _no_less(exact: Fraction) -> float:
    """Return the least float that is not below a number."""
    near = float(exact)
    return near if Fraction(near) >= exact else math.nextafter(near, math.inf)


def _table(reduced: Reduced) -> Ints:
    """(N, F) counts of the only resource; zeros when no limit can break it."""
    return reduced.use[0] if len(reduced.use) else np.zeros(reduced.excess.shape, dtype=np.int64)
