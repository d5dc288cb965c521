"""All rows sorted together by what the larger of two formats saves: the allocation of MixLLM."""

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
from mpsearch.solvers._reduced import Ints, accept, refusal


@dataclass(frozen=True)
class TopK:
    """The first share of all rows, sorted by ``loss[small] - loss[large]``, takes the large format.

    The rows of all layers (output channels, in the paper) are sorted together, not layer by layer. Left open, the
    share is the largest that fits. Given, it is ``percent`` of the rows, rounded down, as in the paper; or, counted by
    cost, as many first rows as take at most ``percent`` of what the large format would cost everywhere (first
    resource): the same only where all rows are equally long. A row that is offered one of both formats takes it; one
    that is offered neither takes its cheapest cell.

    A baseline: best for two formats and rows of equal cost, else blind to cost. Nothing is proven but the Lagrangian
    bound that comes with it; with ``unsolved`` another plan may still fit. Losses in the unit of the table; lower is
    better.

    Cost: O(N log N + R N) for each pair of formats, beside the bound. Memory: a few copies of the cells.

    Sources: MixLLM 2024, arXiv 2412.14590 (microsoft/MixLLM, mixllm/quantization/searcher.py).

    Attributes:
        small: name or column of the small format; left out, the one that gives the least total loss.
        large: the same for the large format.
        percent: share of the large format, from 0 to 100; left out, the largest that fits.
        counts: ``rows`` or ``cost``: what ``percent`` is a share of.

    >>> loss = np.array([[4.0, 1.0], [9.0, 8.0], [2.0, 0.0]])
    >>> p = Problem(loss, np.tile([1.0, 2.0], (1, 3, 1)), np.array([5.0]))
    >>> TopK().solve(p).choice.tolist(), TopK(percent=34).solve(p).choice.tolist()
    ([1, 0, 1], [1, 0, 0])
    """

    small: str | int | None = None
    large: str | int | None = None
    percent: float | None = None
    counts: Literal["rows", "cost"] = "rows"
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "a gap; a rule of a paper"
    cost: ClassVar[str] = "N log N for each pair of formats"

    def __post_init__(self) -> None:
        check_formats("top_k", small=self.small, large=self.large)
        if self.percent is not None and not 0 <= self.percent <= 100:
            raise InputError("E107", f"solver 'top_k': percent is {self.percent}, expected 0 to 100")
        if self.counts not in ("rows", "cost"):
            raise InputError("E107", f"solver 'top_k': counts is '{self.counts}'", advice="there is rows, cost")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        reason = refusal(problem) or missing(problem, self.small, self.large)
        if not reason and self.counts == "cost" and self.percent is not None and not len(problem.cost):
            reason = "it has no resource of which a share could be taken"
        return reason

    def solve(self, problem: Problem) -> Solution:
        """Return the best choice of two formats that fits, with the Lagrangian bound.

        Raises:
            InputError: the problem has pairs or counts, or not the formats asked for (E210).
        """
        accept(problem, "top_k")
        insist("top_k", self.refuses(problem))
        return concluded(problem, "top_k", lambda: self._choices(problem))

    def _choices(self, problem: Problem) -> Iterator[Ints | None]:
        share = weighed(problem)
        found = pairs(problem, self.small, self.large, share)
        if self.percent is not None:
            # A share of one format is no share.
            found = [(small, large) for small, large in found if small != large] or found
        for small, large in found:
            base, free = two_formats(problem, small, large, share)
            order = sorted_rows(problem, free, problem.loss[free, small] - problem.loss[free, large])
            ladder = Ladder(base, order, np.full(len(order), large))
            most = len(order) if self.percent is None else self._share(problem, order, large)
            yield ladder.first_that_fits(problem, range(most, -1, -1) if self.percent is None else [most])

    def _share(self, problem: Problem, order: Ints, large: int) -> int:
        """Return how many of the sorted rows ``percent`` stands for."""
        percent = self.percent or 0.0
        if self.counts == "rows":
            return int(len(order) * percent // 100)
        cost = np.cumsum(problem.cost[0][order, large])
        # The cost of the first rows need not rise, where some cost less than nothing.
        within = np.flatnonzero(cost <= (cost[-1] if len(cost) else 0.0) * percent / 100)
        return int(within[-1]) + 1 if within.size else 0
