"""Random plans that fill their budgets: the baseline every allocation must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.problem import Problem, Solution
from mpsearch.solvers._reduced import accept, refusal
from mpsearch.solvers.lagrangian import lagrangian_bound

#: Shares of a limit above this are all the same.
_LARGEST = 1e300


@dataclass(frozen=True)
class RandomFill:
    """Draws formats at random until nothing more fits.

    Starts from each row's cheapest offered format; then rows come up in random order, each drawing one of its
    formats at random and taking it if the budgets still hold; at last every row, in random order, takes the format
    of highest cost that fits. The loss plays no part. Several budgets: cheapest means least in sum of costs, each
    divided by its limit.

    Cost: ``rounds`` passes over the rows.

    Attributes:
        seed: seed of the draws.
        rounds: how often each row draws.

    >>> loss = np.zeros((2, 2)); cost = np.array([[[1.0, 2.0], [1.0, 2.0]]])
    >>> solution = RandomFill().solve(Problem(loss, cost, np.array([3.0])))
    >>> solution.cost
    (3.0,)
    """

    seed: int = 0
    rounds: int = 4
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "nothing: a baseline"
    cost: ClassVar[str] = "N F"

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the plan that was drawn.

        Raises:
            InputError: the problem has pairs or counts, or its numbers are too large to be summed (E210).
        """
        accept(problem, "random")
        offered = problem.offered
        if not offered.any(axis=1).all():
            return Solution.without(problem, "infeasible", "random")
        scale = np.where((problem.limit > 0) & np.isfinite(problem.limit), problem.limit, 1.0)
        with np.errstate(over="ignore"):
            shares = np.nan_to_num(problem.cost / scale[:, None, None], posinf=_LARGEST, neginf=-_LARGEST)
        weight = np.clip(shares, -_LARGEST, _LARGEST).sum(axis=0)
        choice = np.where(offered, weight, np.inf).argmin(axis=1).astype(np.int64)
        if not problem.fits(choice):
            proven = any(least > limit for least, limit in zip(problem.least(), problem.limit, strict=True))
            return Solution.without(problem, "infeasible" if proven else "unsolved", "random")
        generator = np.random.default_rng(self.seed)
        rows = np.arange(len(choice))
        # What rounding can have done to sums of the largest costs there are, many times over.
        size = np.abs(np.where(np.isfinite(problem.limit), problem.limit, 0.0)) + np.abs(problem.cost).sum(axis=(1, 2))
        slack = 1e-9 * size
        used = problem.cost[:, rows, choice].sum(axis=1)

        def try_to_take(row: int, column: int) -> bool:
            nonlocal used
            after = used + problem.cost[:, row, column] - problem.cost[:, row, choice[row]]
            if not bool((after <= problem.limit + slack).all()):
                return False
            before = choice[row]
            choice[row] = column
            # Float sums drift by roundings; close to a limit only the exact sum decides.
            if not bool((after <= problem.limit - slack).all()) and not problem.fits(choice):
                choice[row] = before
                return False
            used = after
            return True

        for _ in range(self.rounds):
            for row in generator.permutation(len(choice)):
                try_to_take(row, int(generator.choice(np.flatnonzero(offered[row]))))
        for row in generator.permutation(len(choice)):
            columns = np.flatnonzero(offered[row])
            for column in sorted(columns, key=lambda f: -weight[row, f]):
                if weight[row, column] <= weight[row, choice[row]] or try_to_take(row, int(column)):
                    break
        bound, prices = lagrangian_bound(problem)
        return Solution.of(problem, choice, bound=bound, prices=prices, solver="random")
