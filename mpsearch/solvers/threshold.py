"""Two formats, the larger one for the most sensitive rows: a baseline of several papers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._certify import insist
from mpsearch.solvers._ranked import (
    Ladder,
    check_formats,
    concluded,
    missing,
    pairs,
    sorted_rows,
    two_formats,
    weighed,
)
from mpsearch.solvers._reduced import Floats, Ints, accept, refusal


@dataclass(frozen=True)
class Threshold:
    """The ``k`` most sensitive rows take a large format, the others a small one; ``k`` is the largest that fits.

    Rows are sorted by ``loss[small]`` (``worst``) or by ``(loss[small] - loss[large]) / (cost[large] - cost[small])``
    (``ratio``; several costs in shares of their largest cell). Every k is tried, from all rows down, and the budgets
    are checked in exact arithmetic. A row that is offered one of both formats takes it; one that is offered neither
    takes its cheapest cell.

    A baseline: it knows two formats only, and ``worst`` ignores what a row costs. Nothing is proven but the Lagrangian
    bound that comes with it; with ``unsolved`` a plan of more formats may still fit. Losses in the unit of the table;
    lower is better.

    Cost: O(N log N + R N) for each pair of formats, beside the bound. Memory: a few copies of the cells.

    Sources: LUQ 2025, arXiv 2509.23729; Layer-Wise Quantization (Dumitru et al.) 2024, arXiv 2406.17415; both rank
    layers by a score of their own, for which any table of losses may stand.

    Attributes:
        small: name or column of the small format; left out, the one that gives the least total loss.
        large: the same for the large format.
        by: ``worst`` or ``ratio``.

    >>> loss = np.array([[4.0, 1.0], [9.0, 2.0], [1.0, 0.0]])
    >>> p = Problem(loss, np.tile([1.0, 2.0], (1, 3, 1)), np.array([4.0]))
    >>> Threshold().solve(p).choice.tolist()
    [0, 1, 0]
    """

    small: str | int | None = None
    large: str | int | None = None
    by: Literal["worst", "ratio"] = "worst"
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "a gap; a rule of papers"
    cost: ClassVar[str] = "N log N for each pair of formats"

    def __post_init__(self) -> None:
        check_formats("threshold", small=self.small, large=self.large)
        if self.by not in ("worst", "ratio"):
            raise InputError("E107", f"solver 'threshold': by is '{self.by}'", advice="there is worst, ratio")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem) or missing(problem, self.small, self.large)

    def solve(self, problem: Problem) -> Solution:
        """Return the best choice of two formats that fits, with the Lagrangian bound.

        Raises:
            InputError: the problem has pairs or counts, or not the formats asked for (E210).
        """
        accept(problem, "threshold")
        insist("threshold", self.refuses(problem))
        return concluded(problem, "threshold", lambda: self._choices(problem))

    def _choices(self, problem: Problem) -> Iterator[Ints | None]:
        share = weighed(problem)
        for small, large in pairs(problem, self.small, self.large, share):
            base, free = two_formats(problem, small, large, share)
            order = sorted_rows(problem, free, self._score(problem, free, small, large, share))
            ladder = Ladder(base, order, np.full(len(order), large))
            yield ladder.first_that_fits(problem, range(len(order), -1, -1))

    def _score(self, problem: Problem, rows: Ints, small: int, large: int, share: Floats) -> Floats:
        worst: Floats = problem.loss[rows, small]
        if self.by == "worst":
            return worst
        saved, added = worst - problem.loss[rows, large], share[rows, large] - share[rows, small]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            # What costs nothing more comes first when it saves, and last when it does not.
            score: Floats = np.where(added > 0, saved / added, np.where(saved > 0, np.inf, -np.inf))
        return score
