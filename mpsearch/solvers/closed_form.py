"""Bits by reverse water-filling, as a formula instead of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._certify import insist, too_many
from mpsearch.solvers._moves import repair, top_up
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible, refusal
from mpsearch.solvers._water import WaterFill, fill, integer_repair, water_fill
from mpsearch.solvers.lagrangian import maximise

__all__ = ["ClosedForm", "WaterFill", "integer_repair", "water_fill"]


@dataclass(frozen=True)
class ClosedForm:
    """Reverse water-filling: ``loss = c 2^(-b cost)`` for each row, and the costs at which all rows gain the same.

    Each row's law is a straight line through the base-2 logarithms of its losses, by least squares over the cells that
    no other one replaces; ``b cost / decay`` are its bits. `water_fill` gives the real costs, each row takes the
    offered cell nearest to its own, rows over the budget move back where that costs least, and what is left is spent
    where it saves most. A loss of zero or less, which has no logarithm, counts as the least positive loss of its row
    divided by ``2^decay``; a row without a positive loss starts at its cheapest cell.

    Exact is only the inner part: the real costs are optimal for the fitted laws, and `integer_repair` is optimal for
    whole bits of equal weight. Over a menu of cells the answer is as good as the laws, and off by the rounding to
    cells; ``optimal`` is said only where the Lagrangian bound proves it. Losses in the unit of the table; lower is
    better.

    Cost: O(N F + N log N), beside the bound. Memory: a few copies of the cells.

    Sources: BAQ 2025, arXiv 2506.05664 (CSU-ModelCompression/BAQ, whose clamp breaks the budget: here it is kept).

    Attributes:
        decay: halvings of the loss that count as one bit, > 0; 2 for a squared error.

    >>> c, bits = np.array([[16.0], [4.0], [1.0]]), np.arange(4.0)
    >>> p = Problem(c * 4.0**-bits, np.tile(bits, (1, 3, 1)), np.array([6.0]))
    >>> s = ClosedForm().solve(p)
    >>> s.choice.tolist(), s.loss, s.status
    ([3, 2, 1], 0.75, 'optimal')
    """

    decay: float = 2.0
    takes: ClassVar[str] = "one budget"
    proves: ClassVar[str] = "a gap; exact where losses follow the law"
    cost: ClassVar[str] = "N log N"

    def __post_init__(self) -> None:
        if not 0 < self.decay < np.inf:
            raise InputError("E107", f"solver 'closed_form': decay is {self.decay}, expected a number above 0")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem) or too_many(problem, 1)

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded water-filling, with the Lagrangian bound.

        Raises:
            InputError: there is more than one budget (E210).
        """
        accept(problem, "closed_form")
        insist("closed_form", self.refuses(problem))
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "closed_form", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit))
        if not len(reduced.slack):
            choice = reduced.excess.argmin(axis=1) if reduced.excess.size else np.zeros(0, dtype=np.int64)
            return answer(problem, reduced.back(choice), dual.bound, dual.prices, "closed_form", {})
        with np.errstate(over="ignore"):
            # The scale is that of cells that fit; one that does not may pass what numbers hold.
            loss = np.minimum(np.ldexp(problem.loss[reduced.order], -reduced.shift), np.finfo(np.float64).max)
        filled, choice = self._filled(reduced, loss)
        found = repair(reduced, choice, dual.weights)
        stats = {"level": filled.level, "stationarity": filled.stationarity}
        if found is None:
            return Solution.without(problem, "unsolved", "closed_form", lower_bound=dual.bound, **stats)
        choice = reduced.back(top_up(reduced, found))
        return answer(problem, choice, dual.bound, dual.prices, "closed_form", stats)

    def _filled(self, reduced: Reduced, loss: Floats) -> tuple[WaterFill, Ints]:
        """Return the real amounts, and the offered cell nearest to each row's."""
        use = reduced.use[0].astype(np.float64)
        offered = np.isfinite(reduced.excess)
        most = np.where(offered, use, 0.0).max(axis=1)
        height, rate = _laws(loss, use, offered, self.decay)
        # A row of rate b has decay / b units to a bit, and its loss is spread over as many.
        units = self.decay / rate
        filled = fill(
            height - np.log2(units), units, np.zeros(len(use)), most / units, float(reduced.slack[0]), self.decay
        )
        away = np.where(offered, np.abs(use - (filled.bits * units)[:, None]), np.inf)
        return filled, away.argmin(axis=1)


def _laws(loss: Floats, use: Floats, offered: np.typing.NDArray[np.bool_], decay: float) -> tuple[Floats, Floats]:
    """Fit ``log2(loss) = height - rate * use`` to each row; -inf and 1 where there is nothing to fit."""
    positive = offered & (loss > 0)
    least = np.where(positive, loss, np.inf).min(axis=1)
    fitted = positive.any(axis=1) & (offered.sum(axis=1) > 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(positive, np.log2(loss), np.log2(least)[:, None] - decay)
    count = np.maximum(offered.sum(axis=1), 1)
    logs = np.where(offered & fitted[:, None], logs, 0.0)
    there = np.where(offered, use, 0.0)
    middle, mean = there.sum(axis=1) / count, logs.sum(axis=1) / count
    away = np.where(offered, use - middle[:, None], 0.0)
    spread = (away**2).sum(axis=1)
    fitted &= spread > 0
    rate = -(away * logs).sum(axis=1) / np.where(fitted, spread, 1.0)
    fitted &= rate > 0
    height = np.where(fitted, mean + rate * middle, -np.inf)
    return height, np.where(fitted, rate, 1.0)
