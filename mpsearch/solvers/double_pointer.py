"""As many rows go one format up as go one down: the double pointer of SliM-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.problem import Problem, Solution
from mpsearch.solvers._certify import insist
from mpsearch.solvers._ranked import Ladder, among, by_cost, check_formats, concluded, missing, sorted_rows, weighed
from mpsearch.solvers._reduced import Floats, Ints, accept, refusal


@dataclass(frozen=True)
class DoublePointer:
    """The ``k`` most salient rows go from a base format to a higher one, the ``k`` least salient ones to a lower one.

    Rows (groups, in the paper) are sorted by ``loss[low] - loss[high]``, what they have at stake. One pointer comes
    from each end of the order; every number of pairs is weighed by its total loss, and the best that keeps all budgets
    in exact arithmetic is taken. The mean of bits stays that of the base where steps are of equal size. A row that is
    not offered all three formats takes the offered one nearest to the base in order of cost, and is no part of a pair.

    A baseline: it knows three neighbouring formats only, and spends nothing above the base. Nothing is proven but the
    Lagrangian bound that comes with it; with ``unsolved`` another plan may still fit. Losses in the unit of the table;
    lower is better.

    Cost: O(N log N + R N) for each base, beside the bound. Memory: a few copies of the cells.

    Sources: SliM-LLM 2024, arXiv 2405.14917 (Aaronhuang-778/SliM-LLM).

    Attributes:
        base: name or column of the base format; left out, the one that gives the least total loss.
        low: the lower format; left out, the next cheaper one in order of mean cost.
        high: the higher format; left out, the next dearer one.

    >>> loss = np.array([[9.0, 4.0, 1.0], [3.0, 1.0, 0.5], [1.0, 0.5, 0.2]])
    >>> p = Problem(loss, np.tile([2.0, 3.0, 4.0], (1, 3, 1)), np.array([9.0]))
    >>> s = DoublePointer().solve(p)
    >>> s.choice.tolist(), s.cost
    ([2, 1, 0], (9.0,))
    """

    base: str | int | None = None
    low: str | int | None = None
    high: str | int | None = None
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "a gap; a rule of a paper"
    cost: ClassVar[str] = "N log N for each three formats"

    def __post_init__(self) -> None:
        check_formats("double_pointer", base=self.base, low=self.low, high=self.high)

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem) or missing(problem, self.base, self.low, self.high)

    def solve(self, problem: Problem) -> Solution:
        """Return the best number of pairs that fits, with the Lagrangian bound.

        Raises:
            InputError: the problem has pairs or counts, or not the formats asked for (E210).
        """
        accept(problem, "double_pointer")
        insist("double_pointer", self.refuses(problem))
        return concluded(problem, "double_pointer", lambda: self._choices(problem))

    def _choices(self, problem: Problem) -> Iterator[Ints | None]:
        order = by_cost(weighed(problem))
        for base in among(problem, self.base, order):
            if base not in order:
                continue
            place = order.index(base)
            low = among(problem, self.low, order[max(place - 1, 0) : place] or [base])[0]
            high = among(problem, self.high, order[place + 1 : place + 2] or [base])[0]
            ladder = _ladder(problem, order, base, low, high)
            total = ladder.totals(np.where(problem.offered, problem.loss, 0.0))
            yield ladder.first_that_fits(problem, np.argsort(total, kind="stable").tolist())


def _ladder(problem: Problem, order: list[int], base: int, low: int, high: int) -> Ladder:
    """Pairs of moves, from both ends of the rows sorted by salience."""
    offered = problem.offered
    free = np.flatnonzero(offered[:, [low, base, high]].all(axis=1)).astype(np.int64)
    if low == base or high == base:
        free = free[:0]
    ranked = sorted_rows(problem, free, problem.loss[free, low] - problem.loss[free, high])
    half = len(ranked) // 2
    row = np.stack([ranked[:half], ranked[::-1][:half]], axis=1).ravel()
    return Ladder(_nearest(problem, order, base), row, np.tile([high, low], half), 2)


def _nearest(problem: Problem, order: list[int], base: int) -> Ints:
    """(N,) the offered column nearest to the base in order of cost; of two equally near ones the cheaper."""
    place = np.full(problem.loss.shape[1], len(order))
    place[order] = np.arange(len(order))
    away: Floats = np.abs(place - order.index(base)) + 0.25 * (place > order.index(base))
    found: Ints = np.where(problem.offered, away, np.inf).argmin(axis=1)
    return found
