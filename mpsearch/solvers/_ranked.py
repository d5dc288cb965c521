"""What the methods share that sort rows once and then change the format of the first ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._reduced import Floats, Ints, answer, impossible
from mpsearch.solvers.lagrangian import lagrangian_bound

#: Far above what rounding does to a sum of costs, in shares of the sum of their sizes.
_SLIP = 1e-9


@dataclass(frozen=True, eq=False)
class Ladder:
    """A choice, and moves of rows that are made in order, some at a time.

    Attributes:
        base: (N,) cells without a move.
        row: (M,) row of each move; each row is moved once at most.
        cell: (M,) cell that it takes.
        width: moves to a step.
    """

    base: Ints
    row: Ints
    cell: Ints
    width: int = 1

    def choice(self, steps: int) -> Ints:
        """(N,) cells after the first steps."""
        choice = self.base.copy()
        moves = slice(steps * self.width)
        choice[self.row[moves]] = self.cell[moves]
        return choice

    def totals(self, table: Floats) -> Floats:
        """Total of a table (N, F) after each number of steps, beginning with none; sums of floats."""
        gained = table[self.row, self.cell] - table[self.row, self.base[self.row]]
        start = math.fsum(table[np.arange(len(self.base)), self.base].tolist())
        return np.concatenate([[start], start + np.cumsum(gained.reshape(-1, self.width).sum(axis=1))])

    def first_that_fits(self, problem: Problem, preferred: Iterable[int]) -> Ints | None:
        """Return the first choice, by numbers of steps, that keeps every budget in exact arithmetic."""
        near = np.ones(len(self.row) // self.width + 1, dtype=np.bool_)
        for table, limit in zip(problem.cost, problem.limit.tolist(), strict=True):
            # Far from the limit a float sum decides; near it the exact sum does.
            slip = _SLIP * float(np.abs(table).sum())
            near &= self.totals(table) <= limit + slip
        for steps in preferred:
            if near[steps]:
                choice = self.choice(steps)
                if problem.fits(choice):
                    return choice
        return None


def concluded(problem: Problem, solver: str, find: Callable[[], Iterable[Ints | None]]) -> Solution:
    """Answer with the choice of least loss that a method finds, and the Lagrangian bound."""
    reason = impossible(problem)
    if reason:
        return Solution.without(problem, "infeasible", solver, reason=reason)
    bound, prices = lagrangian_bound(problem)
    if math.isinf(bound):
        return Solution.without(problem, "infeasible", solver, reason="the bound is above every loss")
    choices = find() if len(problem.loss) else [np.zeros(0, dtype=np.int64)]
    found = min((choice for choice in choices if choice is not None), key=problem.total_loss, default=None)
    if found is None:
        return Solution.without(problem, "unsolved", solver, lower_bound=bound)
    return answer(problem, found, bound, prices, solver, {})


def missing(problem: Problem, *wanted: str | int | None) -> str:
    """Say which of some formats, by name or column, a problem does not have; empty when it has all."""
    for each in wanted:
        if each is not None and _column(problem, each) is None:
            return f"it has no format {each!r}, but {', '.join(problem.formats)}"
    return ""


def check_formats(solver: str, **wanted: str | int | None) -> None:
    """Refuse what is neither the name nor the number of a column.

    Raises:
        InputError: a number below zero (E107).
    """
    for name, each in wanted.items():
        if isinstance(each, int) and each < 0:
            raise InputError("E107", f"solver '{solver}': {name} is {each}, expected a format or its column, 0 or more")


def among(problem: Problem, wanted: str | int | None, others: Iterable[int]) -> list[int]:
    """Columns that may stand for a format: the one that is wanted, or all others when it is left open."""
    found = None if wanted is None else _column(problem, wanted)
    return list(others) if found is None else [found]


def weighed(problem: Problem) -> Floats:
    """(N, F) costs of the cells in shares of each resource's largest cell, added up; infinite where not offered."""
    share = np.zeros(problem.loss.shape)
    for table in problem.cost:
        share += table / (float(np.abs(table).max(initial=0.0)) or 1.0)
    return np.where(problem.offered, share, np.inf)


def by_cost(share: Floats) -> list[int]:
    """Columns that some row is offered, by their mean cost over those rows, cheapest first."""
    mean = {}
    for f, column in enumerate(share.T):
        costs = column[np.isfinite(column)].tolist()
        if costs:
            mean[f] = math.fsum(costs) / len(costs)
    return sorted(mean, key=lambda f: (mean[f], f))


def sorted_rows(problem: Problem, rows: Ints, score: Floats) -> Ints:
    """Sort rows by score, the highest first; equal ones by what they hold, not by the order they came in."""
    content = [table for resource in problem.cost for table in resource[rows].T]
    return rows[np.lexsort([*content, *problem.loss[rows].T, -score])]


def two_formats(problem: Problem, small: int, large: int, share: Floats) -> tuple[Ints, Ints]:
    """Choice with ``small`` wherever it is offered, and the rows that may take ``large`` instead.

    A row that is offered one of both takes it; a row that is offered neither takes its cheapest cell.
    """
    offered = problem.offered
    cheapest = share.argmin(axis=1) if share.size else np.zeros(len(share), dtype=np.int64)
    base = np.where(offered[:, small], small, np.where(offered[:, large], large, cheapest)).astype(np.int64)
    free = offered[:, small] & offered[:, large] & (small != large)
    return base, np.flatnonzero(free).astype(np.int64)


def pairs(problem: Problem, small: str | int | None, large: str | int | None, share: Floats) -> list[tuple[int, int]]:
    """Pairs of formats to try: those asked for; else each with each dearer one, and each alone."""
    order = by_cost(share)
    place = {f: k for k, f in enumerate(order)}
    both = [(s, g) for s in among(problem, small, order) for g in among(problem, large, order)]
    if small is not None and large is not None:
        return both
    return [(s, g) for s, g in both if place.get(s, -1) <= place.get(g, -1)]


def _column(problem: Problem, wanted: str | int) -> int | None:
    if isinstance(wanted, str):
        return problem.formats.index(wanted) if wanted in problem.formats else None
    return wanted if wanted < len(problem.formats) else None
