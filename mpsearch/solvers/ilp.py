"""The exact optimum as an integer linear programme, with a proof or an honest gap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError, did_you_mean
from mpsearch.problem import Problem, Solution
from mpsearch.solvers import _milp
from mpsearch.solvers._marks import counted, reduce, settle
from mpsearch.solvers._moves import repair, top_up
from mpsearch.solvers._order import arrange
from mpsearch.solvers._programmes import Programmes, survivors
from mpsearch.solvers._reduced import PROVEN, Bools, Ints, Reduced, accept, answer, finest, impossible, refusal
from mpsearch.solvers.greedy import grow
from mpsearch.solvers.lagrangian import Dual, maximise, polish

#: What the backends' proofs are trusted to, in shares of the loss above the rows' least losses.
TRUST = 1e-12
#: A programme with more cells than this is not built; the answer is then the best choice known, with its gap.
_MOST_CELLS = 200_000
_PASSES = 6


@dataclass(frozen=True)
class Ilp:
    """Integer linear programme: ``min sum loss[i,f] x[i,f]``, one cell per row, ``sum cost[r,i,f] x[i,f] <= limit[r]``.

    Counts that must be multiples (`mpsearch.structure.Alignment`) are ``sum x[i,f] = k z`` with a whole number z.

    The cells that no optimum can hold are dropped first: dominated ones, where a count does not tell them from the
    cell that dominates them, and those whose reduced cost at the prices of the Lagrangian bound exceeds the gap to the
    best choice known. The rest goes to HiGHS or CBC through PuLP, or to the HiGHS of SciPy without PuLP: losses
    scaled by a power of two, costs as whole numbers, gaps 0, one thread, a fixed seed. A choice that uses the solver's
    tolerance to break a budget is cut off by a cover inequality and the programme is solved again; every budget is
    checked in exact arithmetic.

    The status is ``optimal`` when the gap is at most 1e-9 of the loss, and the bound is lowered by the tolerance that
    the backend's proof is trusted to (1e-12 of the loss above the rows' least losses). After a time-out the best
    choice known is returned, with the better of the backend's and the Lagrangian bound. Prices are those of the
    Lagrangian bound, which knows nothing of counts. Losses in the unit of the table; lower is better.

    Rows are solved in the order of their content, and of their names where that is the same. Unless the time runs out,
    rows in another order and losses times a power of two give the same choice for each row, also where several choices
    are best; which of these it is, is the backend's.

    Cost: that of `Greedy` and `Lagrangian`, then exponential in the worst case. Measured on one core, with 8 formats
    and two tight budgets: 0.1 s for 25 rows, 0.5 s for 300, 1 s for 1,000. Memory: about 2 kB for each cell that is
    left.

    Sources: Sinha and Zoltners 1979, Operations Research 27(3), for the model and the reduction; Balas 1975,
    Math. Programming 8, for covers; Yao et al. 2021, HAWQ-V3, ICML, for its use on bit widths.

    Attributes:
        time_limit: seconds, > 0.
        backend: ``highs``, ``cbc`` or ``scipy``. When HiGHS cannot be used or fails, CBC is, and ``stats`` says why.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 3, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = Ilp().solve(p)
    >>> s.choice.tolist(), s.loss, s.status
    ([2, 1], 2.0, 'optimal')
    """

    time_limit: float = 60.0
    backend: str = "highs"
    takes: ClassVar[str] = "any budgets, counts that must be multiples"
    proves: ClassVar[str] = "the optimum, or a gap"
    cost: ClassVar[str] = "a second for 1,000 rows, exponential in the worst case"

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise InputError("E107", f"solver 'ilp': time_limit is {self.time_limit}, expected seconds above 0")
        known = _milp.BACKENDS
        if self.backend not in known:
            raise InputError(
                "E107",
                f"solver 'ilp': no backend '{self.backend}'{did_you_mean(str(self.backend), known)}",
                advice=f"there is {', '.join(known)}",
            )

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem, ("aligned",))

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or the best choice found in time.

        Raises:
            InputError: the problem has pair terms, or its numbers are too large to be summed (E210).
        """
        accept(problem, "ilp", ("aligned",))
        deadline = time.monotonic() + self.time_limit
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "ilp", reason=reason)
        return _Search(problem, Programmes(self.backend, deadline)).run()


class _Search:
    """What is known so far: the best choice and the bound, in the order of the rows' content."""

    def __init__(self, problem: Problem, programmes: Programmes) -> None:
        self.given, self.programmes = problem, programmes
        self.problem, self.order = arrange(problem)
        self.counts = counted(self.problem)
        self.choice: Ints | None = None
        self.loss, self.bound = math.inf, -math.inf
        self.prices: tuple[float, ...] = ()

    @property
    def stats(self) -> dict[str, Any]:
        """What is reported."""
        return self.programmes.stats

    def run(self) -> Solution:
        """Bound, reduce and solve, until the best choice is proven or nothing changes."""
        core = self.problem
        for _ in range(_PASSES):
            reduced = reduce(core, [cells.astype(np.float64) for cells, _ in self.counts])
            dual = maximise(reduced, len(core.limit))
            self.prices = self.prices or dual.prices
            if math.isinf(dual.bound) and self.choice is None:
                return self._infeasible("the bound is above every loss")
            for found in (grow(reduced, dual), polish(reduced, dual)):
                self._offer(reduced, found, dual)
            self._raise(reduced, core, dual.value)
            if self._proven():
                break
            keep = survivors(reduced, dual.weights, dual.value, self._excess(reduced))
            before = self.loss
            # Numbers too far apart to share a scale: start again with those that still matter.
            if self.choice is None or reduced.excess[keep].max(initial=0.0) > 2.0**-20:
                outcome = self._programme(core, reduced, dual, keep)
                if outcome.status == "infeasible" and self.choice is None:
                    return self._infeasible(outcome.report)
                if outcome.status != "optimal" or self._proven() or self.loss == before:
                    break
            core = replace(core, loss=np.where(reduced.cells(keep), core.loss, np.inf))
        if self.choice is None:
            return Solution.without(self.given, "unsolved", "ilp", lower_bound=self.bound, **self.stats)
        there = np.empty_like(self.choice)
        there[self.order] = self.choice
        return answer(self.given, there, self.bound, self.prices, "ilp", self.stats)

    def _infeasible(self, reason: str) -> Solution:
        return Solution.without(self.given, "infeasible", "ilp", **{**self.stats, "reason": reason})

    def _proven(self) -> bool:
        return self.choice is not None and self.loss - self.bound <= PROVEN * abs(self.loss)

    def _offer(self, reduced: Reduced, choice: Ints | None, dual: Dual) -> None:
        """Keep a choice when it fits, if need be once its counts are settled, and is better than the best one known."""
        if choice is None:
            return
        counts = [(cells[reduced.order], multiple) for cells, multiple in self.counts]
        choice = settle(reduced, choice, counts, dual.weights)
        if choice is None:
            return
        there = reduced.back(choice)
        loss = self.problem.total_loss(there)
        if loss < self.loss and self.problem.fits(there):
            self.choice, self.loss = there, loss

    def _excess(self, reduced: Reduced) -> float:
        """Total excess of the best choice known; infinite without one."""
        return math.inf if self.choice is None else reduced.total(self.choice[reduced.order])

    def _raise(self, reduced: Reduced, core: Problem, excess: float) -> None:
        """Raise the bound to a total excess; what lies outside the core is worse than the best choice known.

        Losses are multiples of a power of two: when less than one of them fits between the bound and the best choice
        known, that choice is an optimum.
        """
        best = self._excess(reduced)
        step = math.ldexp(1.0, min(finest(core.loss[core.offered]) - reduced.shift, 0))
        if best - excess < step and step > PROVEN * best:
            self.bound = self.loss
        else:
            self.bound = max(self.bound, min(self.loss, reduced.loss(excess)))

    def _programme(self, core: Problem, reduced: Reduced, dual: Dual, keep: Bools) -> _milp.Outcome:
        """Solve the programme over the cells in ``keep``; renew the best choice and the bound."""
        outcome = _milp.Outcome("failed", None, -math.inf, "too many cells")
        if keep.sum() > _MOST_CELLS:
            self.stats.update(cells=int(keep.sum()), report=outcome.report)
            return outcome
        best = self._excess(reduced)
        scale = 14 - int(np.frexp(best if math.isfinite(best) else 1.0)[1])
        counts = tuple((cells[reduced.order], multiple) for cells, multiple in self.counts)
        objective = np.ldexp(np.where(keep, reduced.excess, 0.0), scale)
        model = _milp.Model(objective, keep, reduced.low, reduced.slack, counts=counts)
        for outcome, slipped in self.programmes.rounds(self.problem, reduced, model, known=self.choice is not None):
            if outcome.choice is None:
                break
            choice = repair(reduced, outcome.choice, dual.weights) if slipped else outcome.choice
            self._offer(reduced, choice, dual)
            self._offer(reduced, None if choice is None else top_up(reduced, choice), dual)
            if math.isfinite(outcome.bound):
                best = self._excess(reduced)
                excess = math.ldexp(outcome.bound, -scale)
                margin = TRUST * max(excess, best if math.isfinite(best) else 0.0)
                self._raise(reduced, core, max(0.0, excess - margin))
            if self._proven():
                break
        return outcome
