"""The multiple-choice knapsack, exactly: a bound, and every set of rows that may deviate from it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers._core import halves, sets
from mpsearch.solvers._nearest import Nearest, nearest, rises
from mpsearch.solvers._pairing import Joined, join
from mpsearch.solvers._reduced import (
    PROVEN,
    Ints,
    Reduced,
    accept,
    answer,
    blocks,
    finest,
    impossible,
    refusal,
)
from mpsearch.solvers.lagrangian import Dual, maximise, polish

#: Deviations that sets are formed of: at first, at most, and by what they grow.
_FIRST, _MOST, _GROWTH = 12, 2048, 1.5
#: A choice is also looked for by moves of single rows before sets of more deviations than this are formed.
_WITHOUT = 70
#: What the sets leave open goes to an integer programme when it has no more cells than this.
_PROGRAMME = 20_000


@dataclass(frozen=True)
class Mckp:
    """Multiple-choice knapsack: ``min sum loss[i,x_i]`` under ``sum cost[r,i,x_i] <= limit[r]``, by an expanding core.

    At the best prices p of the Lagrangian bound L, each row has a cell of least ``loss + p cost``, and every other cell
    a rise d above it. The loss of a choice is exactly ``L + sum of the rises + p (limit - cost)``: only sets of cells
    with small rises can be optimal. For a growing G, all sets of cells of other rows that rise G together are formed,
    by halves: those of one half of the rows are sorted by what they cost, and each of the other half finds its partners
    in a narrow window. Once the best choice found is no more than G above L, it is optimal; before that, L + G is the
    bound. Sets of equal cost are thinned out to the best one. What this leaves open (few rows with steps as large as
    the budget) goes to `Ilp`, without the cells that rise more than the best choice is above L.

    The status is ``optimal`` when the gap is at most 1e-9 of the loss. The more rows there are, the closer the optimum
    is to L, so problems get easier per row as they grow; any number of budgets is taken, and one or two are quickest.
    Losses in the unit of the table; lower is better. The same problem gives the same choice in any order of rows
    and for losses times any power of two, unless the time runs out.

    Cost: that of the bound (some passes over the cells) and at most some seconds for the sets. Memory: about twice the
    cells' own, and at most 200 MB for the sets.

    Sources: Sinha and Zoltners 1979, Operations Research 27(3), for the reduction; Pisinger 1995, European J. of
    Operational Research 83(2), for the expanding core; Horowitz and Sahni 1974, J. ACM 21(2), for the halves.

    Attributes:
        time_limit: seconds, > 0.
        gap: gap at which a choice is good enough, >= 0; at 0 the optimum is proven.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 3, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = Mckp().solve(p)
    >>> s.choice.tolist(), s.loss, s.status
    ([2, 1], 2.0, 'optimal')
    """

    time_limit: float = 60.0
    gap: float = 0.0
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "the optimum, or a gap"
    cost: ClassVar[str] = "milliseconds for 1,000 rows, seconds for a million"

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise InputError("E107", f"solver 'mckp': time_limit is {self.time_limit}, expected seconds above 0")
        if not 0 <= self.gap < math.inf:
            raise InputError("E107", f"solver 'mckp': gap is {self.gap}, expected a share of the loss, 0 or more")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or the best choice found in time.

        Raises:
            InputError: the problem has what this solver does not take (E210).
        """
        deadline = time.monotonic() + self.time_limit
        accept(problem, "mckp")
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "mckp", reason=reason)
        reduced = Reduced.of(problem)
        dual = maximise(reduced, len(problem.limit))
        if math.isinf(dual.bound):
            return Solution.without(problem, "infeasible", "mckp", reason="the bound is above every loss")
        return _Search(problem, reduced, dual, max(self.gap, PROVEN), deadline).run()


@dataclass(eq=False)
class _Search:
    """What is known so far: the best choice, and how far above the bound of the prices every choice is.

    Totals and bounds are in the unit of ``Reduced.excess``.
    """

    problem: Problem
    reduced: Reduced
    dual: Dual
    gap: float
    deadline: float
    choice: Ints | None = None
    loss: float = math.inf
    total: float = math.inf
    bound: float = 0.0
    proven: float = -math.inf
    infeasible: bool = False
    exact: bool = False
    polished: bool = False
    stats: dict[str, Any] = field(default_factory=lambda: {"deviations": 0, "sets": 0, "programme": "not needed"})

    def run(self) -> Solution:
        """Expand the core until the best choice is proven; leave what is open to the integer programme."""
        self.stats["rounds"] = self.dual.rounds
        self.bound = self.dual.value
        if self.dual.choice is not None:
            self._offer(self.dual.choice)
        if not self._enough():
            self._expand()
        if not self.polished and not self._enough() and not self.infeasible and time.monotonic() < self.deadline:
            self._offer(polish(self.reduced, self.dual))
        if not self._enough() and not self.infeasible:
            self._programme()
        if self.infeasible:
            return Solution.without(self.problem, "infeasible", "mckp", reason="no set of cells fits", **self.stats)
        bound = max(self.proven, self.reduced.loss(self.bound))
        if self.choice is None:
            return Solution.without(self.problem, "unsolved", "mckp", lower_bound=bound, **self.stats)
        there = self.reduced.back(self.choice)
        if self.exact or self._settled():
            bound = self.loss
        return answer(self.problem, there, bound, self.dual.prices, "mckp", self.stats)

    def _offer(self, choice: Ints | None) -> None:
        """Keep a choice when it fits and is better than the best one known."""
        if choice is None:
            return
        there = self.reduced.back(choice)
        loss = self.problem.total_loss(there)
        if loss < self.loss and (self.reduced.fits(choice) or self.problem.fits(there)):
            self.choice, self.loss, self.total = choice, loss, self.reduced.total(choice)

    def _enough(self) -> bool:
        """Whether the gap is closed."""
        if self.choice is None:
            return False
        left = math.ldexp(self.total - self.bound, self.reduced.shift)
        return left <= self.gap * abs(self.loss) or self.exact or self._settled()

    def _settled(self) -> bool:
        """Whether the bound leaves no room for a better choice: losses are multiples of a power of two."""
        if not self.total - self.bound < 2.0**-20:
            return False
        step = math.ldexp(1.0, min(self.grain - self.reduced.shift, 0))
        return self.total - self.bound < step and step > PROVEN * self.total

    @cached_property
    def grain(self) -> int:
        """Largest k such that all losses are whole multiples of ``2**k``."""
        parts = (self.problem.loss[rows] for rows in blocks(len(self.problem.loss)))
        return min((finest(np.where(np.isfinite(part), part, 0.0)) for part in parts), default=0)

    def _expand(self) -> None:
        """Form sets of ever more deviations until the best choice is good enough or they are too many."""
        near, room = self._near()
        count = _FIRST
        while time.monotonic() < self.deadline:
            known = len(near.rise)
            inside = int(np.searchsorted(near.rise, near.rise[min(count, known - 1)], side="right")) if known else 0
            if inside > _WITHOUT and not self.polished:
                # Where many moves are alike, sets of them are many and moves of single rows find what they would.
                self.polished = True
                self._offer(polish(self.reduced, self.dual))
                if self._enough():
                    return
                near, room = self._near()
                continue
            beyond = math.inf if near.complete else float(near.rise[-1])
            limit = float(near.rise[inside]) if inside < known else beyond
            found = self._sets(near, room, inside, limit)
            if found is None:
                return
            self._take(near, found)
            self._raise(near, found, limit)
            if self._enough() or self.infeasible or inside == known:
                return
            count = int(count * _GROWTH)

    def _near(self) -> tuple[Nearest, Ints]:
        """Return the deviations, and the counts that the choice without any leaves."""
        most = (self.total - self.dual.value) * (1 + 1e-9)
        near = nearest(self.reduced, self.dual.weights, self.choice, _MOST, most)
        places = np.arange(len(near.base))
        spent = np.array([table[places, near.base].sum() for table in self.reduced.low], dtype=np.int64)
        return near, self.reduced.slack - spent

    def _sets(self, near: Nearest, room: Ints, inside: int, limit: float) -> Joined | None:
        """Form the sets of the first deviations that rise ``limit`` at most; None when they are too many."""
        above = self.total - self.dual.value + 2 * near.error
        one, two = (
            sets(near, groups, min(limit, above), self.reduced.whole, self.deadline) for groups in halves(near, inside)
        )
        if one is None or two is None:
            return None
        self.stats["deviations"], self.stats["sets"] = inside, max(self.stats["sets"], len(one.rise), len(two.rise))
        for most in (min(above, 4 * limit), min(above, limit)):
            slip = 2 * near.error if self.reduced.whole else math.inf
            found = join(one, two, room, self.dual.weights, most, slip, self.deadline)
            if found is not None:
                return found
        return None

    def _take(self, near: Nearest, found: Joined) -> None:
        """Offer the choices that were found, the best one first; equally good ones are told apart exactly."""
        tried: list[tuple[float, Ints]] = []
        for cost, members in zip(found.cost, found.members, strict=True):
            if tried and cost > tried[0][0] + 2 * near.error:
                break
            row, cell = near.row[members], near.cell[members]
            choice = near.base.copy()
            choice[row] = cell
            if not self.reduced.whole and not self.problem.fits(self.reduced.back(choice)):
                continue
            tried.append((cost, choice))
            self._offer(choice)

    def _raise(self, near: Nearest, found: Joined, limit: float) -> None:
        """Raise the bound to what all sets up to a limit prove."""
        if not found.full and not self.reduced.whole:
            limit = min(limit, found.cost[-1])
        self.exact |= found.full and found.sharp and self.total - self.dual.value < limit - 2 * near.error
        if math.isinf(limit) and not math.isfinite(self.total):
            self.infeasible = True
            return
        proven = min(limit, self.total - self.dual.value) - near.error
        self.bound = max(self.bound, self.dual.value + proven)

    def _programme(self) -> None:
        """Solve the integer programme of the cells that a choice no worse than the best one known may hold."""
        most = self.total - self.dual.value
        keep = np.empty(self.reduced.excess.shape, dtype=np.bool_)
        for rows, rise, value in rises(self.reduced, self.dual.weights):
            keep[rows] = np.isfinite(rise) & (rise <= most * (1 + 1e-9) + 1e-13 * value)
        left = self.deadline - time.monotonic()
        open_cells = int(keep[keep.sum(axis=1) > 1].sum())
        if open_cells > _PROGRAMME or left <= 0:
            self.stats["programme"] = "no time left" if left <= 0 else f"too large, {open_cells} cells"
            return
        core = replace(self.problem, loss=np.where(self.reduced.cells(keep), self.problem.loss, np.inf))
        # Few problems come this far, and scipy takes longer to load than they take to solve.
        from mpsearch.solvers.ilp import Ilp

        solution = Ilp(time_limit=left).solve(core)
        self.stats["programme"] = solution.stats.get("report", solution.status)
        if solution.status == "infeasible" and self.choice is None:
            self.infeasible = True
        elif solution.status in ("optimal", "feasible"):
            # Choices with other cells are no better than the best one that was known.
            self.proven = min(solution.bound, self.reduced.loss(self.total))
            self._offer(solution.choice[self.reduced.order])
