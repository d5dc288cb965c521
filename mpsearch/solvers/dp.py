"""Exact dynamic programming over one budget in whole units of cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._certify import certified, insist, lowered, too_many
from mpsearch.solvers._moves import exchange, top_up
from mpsearch.solvers._reduced import Floats, Ints, Reduced, accept, answer, impossible, refusal
from mpsearch.solvers.lagrangian import Dual, maximise

#: Entries of the table of choices, of one or two bytes each; a larger one is refused.
MOST_ENTRIES = 2**29


@dataclass(frozen=True)
class DynamicProgramme:
    """Dynamic programme: ``D[i, t] = min_f D[i-1, t - cost[i,f]] + loss[i,f]`` over whole units ``t`` of one budget.

    Costs are counted above each row's cheapest cell, in units of their greatest common divisor. When the budget holds
    at most ``buckets`` of them, the answer is the optimum, and is proven. When it holds more, units are made larger.
    With costs rounded down, a first programme gives a bound, and the optimum with its proof if its choice happens to
    fit; with costs rounded up, a second one gives a choice that fits in truth, which then grows into what rounding
    had taken. As the cheapest cells count nothing and a budget that all the dearest ones keep is no budget, both
    ends are always found, which costs rounded to the nearest unit do not grant.

    The status is ``optimal`` when loss and bound are within 1e-9 of each other; else the bound is the larger one of
    the first programme's and the Lagrangian one. Losses in the unit of the table; lower is better.

    Cost: O(N F T) for T units, vectorised over T: 0.5 s for 1,000 rows of 8 formats and 10,000 units. Memory: one byte
    for each row and unit (two beyond 127 formats); more than 2**29 of them are refused. Rounding takes up to a unit
    per row, so a budget of far more units than rows is solved well, and one of many rows better by `Mckp`.

    Sources: Dudzinski and Walukiewicz 1987, European Journal of Operational Research 28(1), for the recursion; Frantar
    and Alistarh 2022, SPDY, ICML (IST-DASLab/spdy), for its use on layers, with 10,000 buckets.

    Attributes:
        buckets: most units that the budget is cut into, at least 1.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 3, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = DynamicProgramme().solve(p)
    >>> s.choice.tolist(), s.loss, s.status, s.stats["units"]
    ([2, 1], 2.0, 'optimal', 4)
    """

    buckets: int = 10_000
    takes: ClassVar[str] = "one budget"
    proves: ClassVar[str] = "the optimum for costs in whole counts that fit, else a gap"
    cost: ClassVar[str] = "N F x buckets"

    def __post_init__(self) -> None:
        if not self.buckets >= 1:
            raise InputError("E107", f"solver 'dp': buckets is {self.buckets}, expected a whole number above 0")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        reason = refusal(problem) or too_many(problem, 1)
        if not reason and len(problem.loss) * (self.buckets + 1) > MOST_ENTRIES:
            reason = f"its {len(problem.loss)} rows times {self.buckets + 1} units are more than {MOST_ENTRIES} entries"
        return reason

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or a choice that is best after rounding, with its gap.

        Raises:
            InputError: there is more than one budget, or the table of choices would be too large (E210).
        """
        accept(problem, "dp")
        insist("dp", self.refuses(problem))
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "dp", reason=reason)
        reduced = Reduced.of(problem)
        return self._answer(problem, reduced, maximise(reduced, len(problem.limit)))

    def _answer(self, problem: Problem, reduced: Reduced, dual: Dual) -> Solution:
        slack = int(reduced.slack[0]) if len(reduced.slack) else 0
        low = reduced.low[0] if len(reduced.slack) else np.zeros(reduced.excess.shape, dtype=np.int64)
        step = max(1, -(-slack // self.buckets))
        choice, total = cheapest(reduced.excess, low // step, slack // step)
        bound, found = lowered(total, len(low)), choice
        if not problem.fits(reduced.back(choice)):
            choice, _ = cheapest(reduced.excess, -(-reduced.use[0] // step), slack // step)
            found = exchange(reduced, top_up(reduced, choice), dual.weights)
        proven = max(certified(problem, reduced, found, bound), dual.bound)
        stats = {"units": slack // step, "unit": math.prod((step, *reduced.unit))}
        return answer(problem, reduced.back(found), proven, dual.prices, "dp", stats)


def cheapest(excess: Floats, use: Ints, slack: int) -> tuple[Ints, float]:
    """Return the choice of least total excess among those that use at most ``slack``, and that total.

    Args:
        excess: (N, F), infinite where not offered.
        use: (N, F) whole units, 0 in at least one offered cell of each row.
        slack: units that may be used.
    """
    rows, formats = excess.shape
    taken = np.empty((rows, slack + 1), dtype=np.int8 if formats <= 127 else np.int16)
    total = np.zeros(slack + 1)
    offered = np.isfinite(excess) & (use <= slack)
    for i in range(rows):
        before, total = total, np.full(slack + 1, np.inf)
        for f in np.flatnonzero(offered[i]).tolist():
            units = int(use[i, f])
            there = before[: slack + 1 - units] + excess[i, f]
            better = there < total[units:]
            np.copyto(total[units:], there, where=better)
            np.copyto(taken[i, units:], f, where=better)
    choice = np.empty(rows, dtype=np.int64)
    left = slack
    for i in range(rows - 1, -1, -1):
        choice[i] = taken[i, left]
        left -= int(use[i, choice[i]])
    return choice, float(total[slack])
