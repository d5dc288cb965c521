"""A problem in the form the solvers work on: losses above each row's least, costs as whole numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._counting import Bools as Bools
from mpsearch.solvers._counting import Floats as Floats
from mpsearch.solvers._counting import Ints as Ints
from mpsearch.solvers._counting import blocks as blocks
from mpsearch.solvers._counting import counts, least_cells, stir
from mpsearch.solvers._counting import finest as finest

_EPS = float(np.finfo(np.float64).eps)

#: An answer counts as proven when its gap is no larger than this.
PROVEN = 1e-9


@dataclass(frozen=True, eq=False)
class Reduced:
    """The same choice in other numbers; rows stand in an order that depends on their content only.

    Dominated cells are gone (another cell is no worse in loss and in every cost; of equal cells the first stays),
    and so are budgets that no choice can break. Costs are counts of ``unit`` above the row's least, so that sums of
    them are exact. Where a cost is no whole count, ``use`` is rounded up (what fits in counts fits in truth) and
    ``low`` is rounded down (what does not fit in counts does not fit in truth).

    Attributes:
        order: (N,) row of the problem at each place.
        excess: (N, F) loss above the row's least, times ``2**-shift``: in [0, 1), infinite where not offered.
        shift: power of two that gives ``excess`` back its unit.
        floor: (N,) least loss of each row, in the problem's unit.
        use: (R', N, F) cost above the row's least in counts, rounded up.
        low: (R', N, F) the same, rounded down.
        slack: (R',) counts that may be used.
        kept: (R',) resource of the problem.
        unit: (R',) cost of one count.
    """

    order: Ints
    excess: Floats
    shift: int
    floor: Floats
    use: Ints
    low: Ints
    slack: Ints
    kept: tuple[int, ...]
    unit: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem) -> Reduced:
        """Reduce a problem that `impossible` has nothing to say about."""
        offered = problem.offered
        keep = undominated(problem.loss, [problem.cost[r] for r in _breakable(problem, offered)])
        kept = _breakable(problem, keep)
        floor, excess, shift = _excess(problem.loss, keep)
        seal = np.zeros(len(excess), dtype=np.uint64)
        stir(seal, excess)
        counted = [counts(problem.cost[r], keep, float(problem.limit[r])) for r in kept]
        for _, low, _, _ in counted:
            stir(seal, low)
        order = np.argsort(seal, kind="stable").astype(np.int64)
        excess = excess[order]
        tables = np.empty((len(kept), *excess.shape), dtype=np.int64)
        upper = tables if all(use is low for use, low, _, _ in counted) else np.empty_like(tables)
        for place, (use, low, _, _) in enumerate(counted):
            np.take(low, order, axis=0, out=tables[place])
            if upper is not tables:
                np.take(use, order, axis=0, out=upper[place])
        slack = np.array([room for _, _, room, _ in counted], dtype=np.int64)
        unit = tuple(size for _, _, _, size in counted)
        return cls(order, excess, shift, floor, upper, tables, slack, tuple(kept), unit)

    @property
    def whole(self) -> bool:
        """Whether every cost is a whole count, so that what fits in counts is all that fits in truth."""
        return self.use is self.low

    def part(self, rows: Ints, choice: Ints) -> Reduced:
        """Return the problem of some rows, while all others keep their choice.

        The floor is that of all rows; what `back` and `loss` say is of no use here.
        """
        use = self.use[:, rows]
        low = use if self.whole else self.low[:, rows]
        others = self.counts(choice) - use[:, np.arange(len(rows)), choice[rows]].sum(axis=1)
        return replace(
            self, order=self.order[rows], excess=self.excess[rows], use=use, low=low, slack=self.slack - others
        )

    def counts(self, choice: Ints) -> Ints:
        """(R',) counts that a choice uses, rounded up."""
        rows = np.arange(len(choice))
        return np.array([table[rows, choice].sum() for table in self.use], dtype=np.int64)

    def fits(self, choice: Ints) -> bool:
        """Say whether a choice keeps every budget."""
        return bool((self.counts(choice) <= self.slack).all())

    def total(self, choice: Ints) -> float:
        """Total excess of a choice."""
        return math.fsum(self.excess[np.arange(len(choice)), choice].tolist())

    def loss(self, excess: float) -> float:
        """Total loss, in the problem's unit, at a total excess; correctly rounded."""
        return math.fsum([*self.floor.tolist(), math.ldexp(excess, self.shift)])

    def back(self, choice: Ints) -> Ints:
        """Put a choice into the problem's order of rows."""
        there = np.empty(len(choice), dtype=np.int64)
        there[self.order] = choice
        return there

    def cells(self, keep: Bools) -> Bools:
        """Put a mask of cells into the problem's order of rows."""
        there = np.empty_like(keep)
        there[self.order] = keep
        return there


def refusal(problem: Problem, takes: Collection[str] = ()) -> str:
    """Say why a problem is more than a solver takes; empty when it is not.

    Args:
        problem: the problem.
        takes: what the solver takes beyond budgets: ``pairs``, ``aligned``.
    """
    if problem.pairs is not None and len(problem.pairs) and "pairs" not in takes:
        return "it has pair terms, and this solver adds up rows"
    if problem.aligned and "aligned" not in takes:
        return "it has counts that must be multiples"
    most = np.finfo(np.float64).max / (8 * max(len(problem.loss), 1))
    finite_limits = np.where(np.isfinite(problem.limit), problem.limit, 0.0)
    highest_loss = problem.loss.max(initial=0.0, where=problem.offered)
    for name, low, high in (
        ("losses", problem.loss.min(initial=0.0), highest_loss),
        ("costs", problem.cost.min(initial=0.0), problem.cost.max(initial=0.0)),
        ("limits", finite_limits.min(initial=0.0), finite_limits.max(initial=0.0)),
    ):
        if max(-low, high) > most:
            return f"the {name} are so large that their sums are no longer finite numbers"
    return ""


def accept(problem: Problem, solver: str, takes: Collection[str] = ()) -> None:
    """Refuse what `refusal` names.

    Raises:
        InputError: the problem has what the solver does not take, or its numbers are too large (E210).
    """
    reason = refusal(problem, takes)
    if reason:
        large = "finite" in reason
        advice = "give losses and costs in larger units" if large else "solvers that take it: mpsearch solvers"
        raise InputError("E210", f"solver '{solver}': {reason}", advice=advice)


def impossible(problem: Problem) -> str:
    """Say why no choice can fit, where that is seen at once; empty when it is not."""
    offered = problem.offered
    empty = np.flatnonzero(~offered.any(axis=1))
    if empty.size:
        return f"row '{problem.names[empty[0]]}' has no format"
    for name, table, limit in zip(problem.resources, problem.cost, problem.limit.tolist(), strict=True):
        cheapest = least_cells(table, offered)
        if _exceeds(cheapest, limit):
            total = math.fsum(cheapest.tolist())
            return f"{name}: the cheapest formats together cost {total!r}, the limit is {limit!r}"
    return ""


def answer(
    problem: Problem,
    choice: Ints,
    bound: float,
    prices: Sequence[float],
    solver: str,
    stats: Mapping[str, Any],
) -> Solution:
    """Make the answer; it is ``optimal`` when bound and loss are within `PROVEN` of each other."""
    loss = problem.total_loss(choice)
    proven = loss - bound <= PROVEN * abs(loss)
    return Solution.of(problem, choice, bound=bound, prices=prices, solver=solver, stats=stats, proven=proven)


def undominated(loss: Floats, cost: Sequence[Floats] | Floats) -> Bools:
    """(N, F) cells that no other cell of their row replaces at no more loss and no more of any cost.

    >>> undominated(np.array([[3.0, 1.0, 1.0, 2.0]]), np.array([[[1.0, 2.0, 2.0, 3.0]]])).tolist()
    [[True, True, False, False]]
    """
    keep = np.isfinite(loss)
    for rows in blocks(len(loss)):
        # One line per format: comparisons then run over all rows of the block at once.
        tables = [np.ascontiguousarray(table[rows].T) for table in (loss, *cost)]
        kept = np.ascontiguousarray(keep[rows].T)
        for g in range(1, len(kept)):
            for f in range(g):
                no_worse = np.logical_and.reduce([table[f] <= table[g] for table in tables])
                no_better = np.logical_and.reduce([table[f] >= table[g] for table in tables])
                kept[g] &= ~no_worse
                kept[f] &= no_worse | ~no_better
        keep[rows] = kept.T
    return keep


def _breakable(problem: Problem, keep: Bools) -> list[int]:
    """Return the resources whose limit the dearest cells in ``keep`` together exceed, in exact arithmetic."""
    limits = enumerate(problem.limit.tolist())
    return [r for r, limit in limits if limit < math.inf and _exceeds(-least_cells(-problem.cost[r], keep), limit)]


def _exceeds(values: Floats, limit: float) -> bool:
    """Say whether the exact sum of values is above the limit."""
    over = float(values.sum()) - limit
    doubt = _EPS * (len(values) + 2) * (float(np.abs(values).sum()) + abs(limit))
    # A sum that is rounded once has the sign of the exact one.
    return over > 0 if abs(over) > doubt else math.fsum([*values.tolist(), -limit]) > 0


def _excess(loss: Floats, keep: Bools) -> tuple[Floats, Floats, int]:
    """Return each row's least loss, the losses above it scaled into [0, 1), and the power of two of the scale."""
    floor, excess, most = least_cells(loss, keep), np.empty_like(loss), 0.0
    for rows in blocks(len(loss)):
        above = np.where(keep[rows], loss[rows], np.inf) - floor[rows, None]
        most = max(most, float(above.max(initial=0.0, where=keep[rows])))
        excess[rows] = above
    shift = int(np.frexp(most)[1])
    np.ldexp(excess, -shift, out=excess)
    # Adding zero turns -0.0, which has other bits, into 0.0.
    excess += 0.0
    return floor, excess, shift
