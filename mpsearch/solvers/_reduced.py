"""A problem in the form the solvers work on: losses above each row's least, costs as whole numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution, exact_sum

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

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
        keep = undominated(problem.loss, problem.cost[_breakable(problem, problem.offered)])
        kept = _breakable(problem, keep)
        cost = problem.cost[kept]
        floor = np.where(keep, problem.loss, np.inf).min(axis=1, initial=np.inf)
        excess = np.where(keep, problem.loss - floor[:, None], np.inf)
        shift = int(np.frexp(excess.max(initial=0.0, where=keep))[1])
        # Adding zero turns -0.0, which has other bits, into 0.0.
        excess = np.ldexp(excess, -shift) + 0.0
        use, low = np.zeros((2, *cost.shape), dtype=np.int64)
        slack = np.zeros(len(kept), dtype=np.int64)
        unit = []
        for place, r in enumerate(kept):
            use[place], low[place], slack[place], size = _counts(cost[place], keep, float(problem.limit[r]))
            unit.append(size)
        order = _by_content(excess, low)
        return cls(order, excess[order], shift, floor, use[:, order], low[:, order], slack, tuple(kept), tuple(unit))

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
    rows = max(len(problem.loss), 1)
    finite_limits = np.where(np.isfinite(problem.limit), problem.limit, 0.0)
    for name, values in (
        ("losses", np.where(problem.offered, problem.loss, 0.0)),
        ("costs", problem.cost),
        ("limits", finite_limits),
    ):
        if np.abs(values).max(initial=0.0) > np.finfo(np.float64).max / (8 * rows):
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
    empty = np.flatnonzero(~problem.offered.any(axis=1))
    if empty.size:
        return f"row '{problem.names[empty[0]]}' has no format"
    cheapest = np.where(problem.offered, problem.cost, np.inf).min(axis=2, initial=np.inf)
    for name, costs, limit in zip(problem.resources, cheapest.tolist(), problem.limit.tolist(), strict=True):
        # The sum is rounded once, which never changes its sign: this is exact.
        if math.fsum([*costs, -limit]) > 0:
            return f"{name}: the cheapest formats together cost {math.fsum(costs)!r}, the limit is {limit!r}"
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


def undominated(loss: Floats, cost: Floats) -> Bools:
    """(N, F) cells that no other cell of their row replaces at no more loss and no more of any cost.

    >>> undominated(np.array([[3.0, 1.0, 1.0, 2.0]]), np.array([[[1.0, 2.0, 2.0, 3.0]]])).tolist()
    [[True, True, False, False]]
    """
    keep = np.isfinite(loss)
    tables = [loss, *cost]
    for f in range(loss.shape[1]):
        here = slice(f, f + 1)
        before, after = slice(0, f), slice(f + 1, None)
        beaten = np.logical_and.reduce([t[:, before] <= t[:, here] for t in tables]).any(axis=1)
        no_worse = np.logical_and.reduce([t[:, after] <= t[:, here] for t in tables])
        better = np.logical_or.reduce([t[:, after] < t[:, here] for t in tables])
        keep[:, f] &= ~(beaten | (no_worse & better).any(axis=1))
    return keep


def finest(values: Floats) -> int:
    """Return the largest k such that every value is a whole multiple of ``2**k``; 0 when all are zero.

    >>> finest(np.array([0.0, 12.0, 2.5])), finest(np.array([4096.0]))
    (-1, 12)
    """
    mantissa, exponent = np.frexp(values[values != 0])
    if not exponent.size:
        return 0
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    zeros = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return int((exponent.astype(np.int64) - 53 + zeros).min())


def _breakable(problem: Problem, keep: Bools) -> list[int]:
    """Return the resources whose limit the dearest cells in ``keep`` together exceed, in exact arithmetic."""
    dearest = np.where(keep, problem.cost, -np.inf).max(axis=2, initial=-np.inf).tolist()
    limits = enumerate(problem.limit.tolist())
    return [r for r, limit in limits if limit < math.inf and math.fsum([*dearest[r], -limit]) > 0]


def _counts(cost: Floats, keep: Bools, limit: float) -> tuple[Ints, Ints, int, float]:
    """Return use (rounded up), use (rounded down), slack and the size of one count, for one resource."""
    least = np.where(keep, cost, np.inf).min(axis=1)
    cost = np.where(keep, cost, least[:, None])
    high, rest = _difference(cost, least[:, None])
    # A sum of N counts must stay below 2**63, and a count must be exact as a float.
    bits = min(52, 62 - len(cost).bit_length())
    scale = max(finest(cost), int(np.frexp(high.max())[1]) - bits)
    scaled = np.ldexp(high, -scale)
    whole = np.floor(scaled)
    whole -= (whole == scaled) & (rest < 0)
    rounded = (np.ldexp(whole, scale) != high) | (rest != 0)
    low = whole.astype(np.int64)
    use = low + rounded
    room = math.floor(exact_sum([limit, *(-least).tolist()]) / Fraction(2) ** scale)
    step = 1 if rounded.any() else int(np.gcd.reduce(low, axis=None)) or 1
    return use // step, low // step, room // step, math.ldexp(step, scale)


def _difference(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    """Return the rounded difference and what the rounding left over (Knuth's two-sum)."""
    high = left - right
    virtual = high - left
    return high, (left - (high - virtual)) - (right + virtual)


def _by_content(excess: Floats, use: Ints) -> Ints:
    """Order rows by a hash of their numbers, so that an answer does not depend on the order they came in."""
    seal = np.zeros(len(excess), dtype=np.uint64)
    for table in (excess, *use):
        for column in table.T:
            seal = (seal ^ np.ascontiguousarray(column).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            seal ^= seal >> np.uint64(29)
    return np.argsort(seal, kind="stable").astype(np.int64)
