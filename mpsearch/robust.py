"""Plans that allow for the errors of the scores, and which errors could still change a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution, relative_gap
from mpsearch.rules import Rules
from mpsearch.structure import PairTerms
from mpsearch.tables import Array

Solve = Callable[[Problem], Solution]
#: The independent case stops when nothing below this share of the loss can be left to find.
_CLOSE = 1e-9
_MOST_SOLVES = 200


def cautious(problem: Problem, spread: Array, solve: Solve, *, by: float, errors: str = "shared") -> Solution:
    """Solve for the least loss that is exceeded only if the scores are off by more than ``by`` standard errors.

    ``shared``: the worst case of ``sum loss + by * spread``, when every error goes the same way (a box). One solve.
    ``independent``: the quantile of a sum of independent normal errors, ``sum loss + by * sqrt(sum spread^2)``. Its
    least value over all choices lies on a corner of the convex hull of (sum of losses, sum of variances), because the
    root is concave; the corners are found by solving ``loss + w * spread^2`` for chosen ``w``, and a piece between two
    corners is left out when even its outer corner is no better. About 10 solves.

    Args:
        problem: the problem; its losses are the expected ones.
        spread: (N, F) standard errors of the losses; NaN counts as 0 where a loss is offered.
        solve: solves a problem.
        by: how many standard errors: 1.645 for 95 %, one-sided.
        errors: ``shared`` or ``independent``.

    Returns:
        Solution whose ``loss`` and ``bound`` are of the cautious sum; ``stats`` holds the ``expected`` loss.

    Raises:
        InputError: spreads of another shape or below 0, or ``by`` that is no positive number (E212).

    >>> from mpsearch.registry import make
    >>> problem = Problem(np.array([[2.0, 1.0], [2.0, 1.1]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> spread = np.array([[0.0, 0.0], [0.5, 0.0]])  # the second row may be far worse when it is cheap
    >>> solve = make("solvers", "ilp").solve
    >>> solve(problem).choice.tolist(), cautious(problem, spread, solve, by=1.645).choice.tolist()
    ([1, 0], [0, 1])
    """
    spread = _checked(problem, spread)
    if not (math.isfinite(by) and by >= 0):
        raise InputError("E212", f"solve: cautious is {by!r}", advice="give a number of standard errors, such as 1.645")
    if errors == "shared":
        return _expected(problem, solve(replace(problem, loss=problem.loss + by * spread)))
    if problem.pairs is not None and len(problem.pairs):
        raise InputError("E212", "solve: independent errors are for losses that add up, and there are pairs")
    if errors != "independent":
        raise InputError("E212", f"solve: errors is '{errors}'", advice="give shared or independent")
    return _Corners(problem, spread, solve, by).best()


def _beside(pairs: PairTerms, choice: NDArray[np.int64], shape: tuple[int, ...]) -> Array:
    """(N, F) what the pairs add to each cell with all other rows as they are chosen."""
    found: Array = np.zeros(shape)
    there = choice[pairs.j] == pairs.g
    np.add.at(found, (pairs.i[there], pairs.f[there]), pairs.value[there])
    there = choice[pairs.i] == pairs.f
    np.add.at(found, (pairs.j[there], pairs.g[there]), pairs.value[there])
    return found


def _checked(problem: Problem, spread: Array) -> Array:
    try:
        spread = np.array(spread, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError("E212", f"solve: spread is no table of numbers: {error}") from error
    if spread.shape != problem.loss.shape:
        raise InputError("E212", f"solve: spread has shape {spread.shape}, the losses {problem.loss.shape}")
    found: Array = np.where(problem.offered & np.isfinite(spread), spread, 0.0)
    if (found < 0).any():
        raise InputError("E212", "solve: spread holds numbers below 0", advice="give standard errors")
    return found


def _expected(problem: Problem, solution: Solution) -> Solution:
    if solution.status in ("infeasible", "unsolved"):
        return solution
    return replace(solution, stats={**solution.stats, "expected": problem.total_loss(solution.choice)})


class _Corners:
    """The corners of the hull of (sum of losses, sum of variances) that can hold the least quantile."""

    def __init__(self, problem: Problem, spread: Array, solve: Solve, by: float) -> None:
        self.problem, self.by, self.solve = problem, by, solve
        self.variance: Array = np.square(spread)
        self.solves = 0
        self.best_value = math.inf
        self.found: Solution | None = None

    def best(self) -> Solution:
        first = self._corner(1.0, 0.0)
        if first.status in ("infeasible", "unsolved"):
            return first
        last = self._corner(0.0, 1.0)
        # Each piece: two corners, and the least that the solver proved of the sums behind them.
        pieces = [(self._sums(first), self._sums(last))]
        bound = math.inf
        proven = first.status == last.status == "optimal"
        while pieces:
            (m0, v0), (m1, v1) = pieces.pop()
            outer = self._quantile(m0, v1)
            near = self.best_value - _CLOSE * abs(self.best_value)
            if outer >= near or self.solves >= _MOST_SOLVES or v0 <= v1:
                bound = min(bound, outer)
                continue
            between = self._corner(v0 - v1, m1 - m0)
            proven &= between.status == "optimal"
            m, v = self._sums(between)
            inwards = (v0 - v1) * (m0 - m) + (m1 - m0) * (v0 - v)
            if inwards <= _CLOSE * (v0 - v1) * (m1 - m0):
                # No corner lies beyond the line between the two: their own quantiles are the least here.
                bound = min(bound, self._quantile(m0, v0), self._quantile(m1, v1))
            else:
                pieces += [((m0, v0), (m, v)), ((m, v), (m1, v1))]
        assert self.found is not None
        bound = min(bound, self.best_value) if proven else -math.inf
        gap = relative_gap(self.best_value, bound)
        return replace(
            self.found,
            loss=self.best_value,
            bound=bound,
            gap=gap,
            prices=self._prices(),
            status="optimal" if proven and gap <= _CLOSE else "feasible",
            stats={**self.found.stats, "expected": self._sums(self.found)[0], "solves": self.solves},
        )

    def _prices(self) -> tuple[float, ...]:
        """Prices in the unit of the losses: those of the quantile's slope at the best choice."""
        assert self.found is not None
        variance = self._sums(self.found)[1]
        if not variance:
            return tuple(math.nan for _ in self.problem.limit)
        return self._corner(1.0, self.by / (2 * math.sqrt(variance))).prices

    def _corner(self, on_loss: float, on_variance: float) -> Solution:
        self.solves += 1
        scale = on_loss or 1.0
        mixed = on_loss / scale * np.where(self.problem.offered, self.problem.loss, 0.0)
        mixed = mixed + on_variance / scale * self.variance
        solution = self.solve(replace(self.problem, loss=np.where(self.problem.offered, mixed, np.inf)))
        if solution.status not in ("infeasible", "unsolved"):
            value = self._quantile(*self._sums(solution))
            if value < self.best_value:
                self.best_value, self.found = value, solution
        return solution

    def _sums(self, solution: Solution) -> tuple[float, float]:
        rows = np.arange(len(solution.choice))
        return self.problem.total_loss(solution.choice), math.fsum(self.variance[rows, solution.choice].tolist())

    def _quantile(self, mean: float, variance: float) -> float:
        return mean + self.by * math.sqrt(variance)


@dataclass(frozen=True)
class Doubt:
    """A row whose choice the errors of the scores leave open.

    Attributes:
        row: its name.
        chosen: the format that the plan gives it.
        other: the format that could as well be better.
        lead: how much better the chosen one is, in the unit of the losses, with what both cost at the plan's prices.
        error: standard error of the lead.
        chance: probability that ``other`` is better, for a normal error.
        worth: loss that knowing the two scores exactly would save on average.
        samples: how many times as many samples would put the lead at ``by`` standard errors; infinite for no lead.
    """

    row: str
    chosen: str
    other: str
    lead: float
    error: float
    chance: float
    worth: float
    samples: float


def doubts(
    problem: Problem, solution: Solution, spread: Array, *, rules: Rules | None = None, by: float = 1.645
) -> tuple[Doubt, ...]:
    """List the rows whose choice is within noise, the one that is most worth measuring better first.

    A row's alternatives are compared at the plan's prices: ``loss + prices @ cost``, which is what a move changes when
    the budgets are used up elsewhere. First order: moves of several rows at once are not looked at. Errors of two
    cells count as independent, which for scores from the same data overstates the error of their difference.

    Args:
        problem: the problem that was solved.
        solution: its solution.
        spread: (N, F) standard errors.
        rules: what was solved with: what they forbid is no alternative, and tied rows are one.
        by: an alternative is listed when the lead is less than this many standard errors.

    >>> from mpsearch.registry import make
    >>> problem = Problem(np.array([[2.0, 1.0], [2.0, 1.1]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> found = doubts(problem, make("solvers", "ilp").solve(problem), np.full((2, 2), 0.1))
    >>> [(d.row, d.chosen, d.other) for d in found]
    [('1', '0', '1'), ('0', '1', '0')]
    """
    spread = _checked(problem, spread)
    if solution.status in ("infeasible", "unsolved") or not len(solution.choice):
        return ()
    if rules is not None:
        ruled = rules.apply(problem)
        extra = solution.stats.get("rules", {})
        more = [float(extra.get(name, 0.0)) for name in ruled.problem.resources[len(problem.limit) :]]
        first = np.unique(ruled.group, return_index=True)[1]
        solution = replace(solution, choice=solution.choice[first], prices=(*solution.prices, *more))
        problem, spread = ruled.problem, ruled.spread(spread, "shared")
    rows = np.arange(len(solution.choice))
    prices = np.nan_to_num(np.array(solution.prices))
    worth: Array = problem.loss + (np.tensordot(prices, problem.cost, axes=1) if len(prices) else 0.0)
    if problem.pairs is not None:
        worth = worth + _beside(problem.pairs, solution.choice, worth.shape)
    lead = worth - worth[rows, solution.choice][:, None]
    error = np.sqrt(np.square(spread) + np.square(spread[rows, solution.choice])[:, None])
    open_to: NDArray[np.bool_] = problem.offered & (error > 0)
    open_to[rows, solution.choice] = False
    ratio = np.where(open_to, np.maximum(lead, 0.0), np.inf) / np.where(open_to, error, 1.0)
    nearest = ratio.argmin(axis=1)
    found = []
    for i in np.flatnonzero(ratio[rows, nearest] < by).tolist():
        j = int(nearest[i])
        ahead, noise, distance = max(0.0, float(lead[i, j])), float(error[i, j]), float(ratio[i, j])
        chance = math.erfc(distance / math.sqrt(2)) / 2
        density = math.exp(-distance * distance / 2) / math.sqrt(2 * math.pi)
        found.append(
            Doubt(
                problem.names[i],
                problem.formats[int(solution.choice[i])],
                problem.formats[j],
                ahead,
                noise,
                chance,
                max(0.0, noise * density - ahead * chance),
                (by / distance) ** 2 if distance else math.inf,
            )
        )
    return tuple(sorted(found, key=lambda doubt: -doubt.worth))
