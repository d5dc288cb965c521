"""The exact optimum for one or two budgets, by merging the Pareto sets of the rows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._certify import certified, insist, lowered, too_many
from mpsearch.solvers._digits import Digits
from mpsearch.solvers._merge import MOST_POINTS, Keep, merge
from mpsearch.solvers._reduced import Bools, Floats, Ints, Reduced, accept, answer, impossible, refusal
from mpsearch.solvers.lagrangian import Dual, maximise, polish


@dataclass(frozen=True)
class Pareto:
    """Merge of Pareto sets: rows are added up one by one, and totals that others beat are dropped.

    A total of the first rows is beaten when another one has no more of every cost and no more loss. With a budget, a
    total is dropped too when even the Lagrangian bound on the rows to come leaves it above the best choice known, or
    over a budget. What is left holds an optimum. Costs are compared exactly, as whole numbers of two digits (about 100
    bits); where even those must be rounded, the merge with costs rounded down gives the bound, and one with costs
    rounded up a choice that fits.

    The status is ``optimal`` when loss and bound are within 1e-9 of each other. When more than ``points`` totals
    would be compared, the answer is the best choice known with the Lagrangian bound, ``feasible``, and ``stats`` says
    so. Losses in the unit of the table; lower is better.

    Cost: O(N F P) for P totals left, which is exponential at worst. With one budget some thousands are left of 1,000
    rows of 8 formats (0.2 s); with two, 40 rows take 0.3 s, and 60 may have too many. Memory: 16 bytes for each total
    left of each row.

    Sources: Nemhauser and Ullmann 1969, Management Science 15(9), for the merge; Marsten and Morin 1978, Mathematical
    Programming 14, for dropping by bounds.

    Attributes:
        points: most totals that are compared, at least 1.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 3, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = Pareto().solve(p)
    >>> s.choice.tolist(), s.loss, s.status
    ([2, 1], 2.0, 'optimal')
    """

    points: int = MOST_POINTS
    takes: ClassVar[str] = "one or two budgets, few rows"
    proves: ClassVar[str] = "the optimum while the front fits in memory, else a gap"
    cost: ClassVar[str] = "size of the front x F, for each row"

    def __post_init__(self) -> None:
        if self.points < 1:
            raise InputError("E107", f"solver 'pareto': points is {self.points}, expected a whole number above 0")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem) or too_many(problem, 2) or _too_long(problem, self.points)

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or the best choice known when there are too many totals.

        Raises:
            InputError: more than two budgets, or more cells than totals that may be compared (E210).
        """
        accept(problem, "pareto")
        insist("pareto", self.refuses(problem))
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "pareto", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit))
        if math.isinf(dual.bound):
            return Solution.without(problem, "infeasible", "pareto", reason="the bound is above every loss")
        return self._search(problem, reduced, dual)

    def _search(self, problem: Problem, reduced: Reduced, dual: Dual) -> Solution:
        start = polish(reduced, dual)
        there = None if start is None else reduced.back(start)
        reduced = _undecided_last(reduced, dual.weights)
        known = [] if there is None else [there[reduced.order]]
        best = min(map(reduced.total, known), default=math.inf)
        digits = Digits.of(problem, reduced)
        found = merge(reduced.excess, digits, _promising(reduced, digits, dual.weights, best), self.points)
        bound, stats = 0.0, {"points": 0}
        if found is not None:
            if not found.excess.size:
                return Solution.without(problem, "infeasible", "pareto", reason="no total keeps both budgets")
            place = int(found.excess.argmin())
            bound = lowered(float(found.excess[place]), len(reduced.excess))
            stats = {"points": len(found.excess)}
            known.append(found.choice(place))
            if not problem.fits(reduced.back(known[-1])):
                known[-1:] = self._rounded_up(reduced, dual.weights, best)
        more = {"stopped": f"more than {self.points} totals"} if found is None else {}
        if not known:
            return Solution.without(problem, "unsolved", "pareto", lower_bound=dual.bound, **stats, **more)
        choice = min(known, key=reduced.total)
        proven = max(dual.bound, certified(problem, reduced, choice, max(bound, dual.value)))
        return answer(problem, reduced.back(choice), proven, dual.prices, "pareto", {**stats, **more})

    def _rounded_up(self, reduced: Reduced, weights: Floats, best: float) -> list[Ints]:
        digits = Digits.rounded_up(reduced)
        found = merge(reduced.excess, digits, _promising(reduced, digits, weights, best), self.points)
        return [] if found is None or not found.excess.size else [found.choice(int(found.excess.argmin()))]


def _too_long(problem: Problem, points: int) -> str:
    cells = int(problem.offered.sum())
    return f"its {cells} cells are more than the {points} totals that may be compared" if cells > points else ""


def _undecided_last(reduced: Reduced, weights: Floats) -> Reduced:
    """Put the rows first whose second best cell is far worse than the best one: they add no totals."""
    priced = _priced(reduced, weights)
    if priced.shape[1] < 2:
        return reduced
    least = np.partition(priced, 1, axis=1)
    order = np.argsort(-(least[:, 1] - least[:, 0]), kind="stable")
    use = reduced.use[:, order]
    low = use if reduced.use is reduced.low else reduced.low[:, order]
    return dataclasses.replace(reduced, order=reduced.order[order], excess=reduced.excess[order], use=use, low=low)


def _promising(reduced: Reduced, digits: Digits, weights: Floats, best: float) -> Keep:
    """Keep totals that fit and that the bound on the rows to come does not put above ``best``."""
    least = _priced(reduced, weights).min(axis=1, initial=np.inf)
    ahead = np.concatenate([np.cumsum(least[::-1])[::-1][1:], np.zeros(1)])
    allowed = float(weights @ reduced.slack.astype(np.float64))
    # Far above what rounding does to these sums.
    margin = 1e-12 * (float(least.sum()) + allowed + (best if math.isfinite(best) else 0.0))

    def keep(i: int, spent: Ints, excess: Floats) -> Bools:
        reach = excess + weights @ spent[0].astype(np.float64) + (ahead[i] - allowed)
        found: Bools = digits.fits(spent) & (reach <= best + margin)
        return found

    return keep


def _priced(reduced: Reduced, weights: Floats) -> Floats:
    priced: Floats = reduced.excess + np.tensordot(weights, reduced.low.astype(np.float64), axes=1)
    return priced
