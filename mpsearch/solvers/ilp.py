"""The exact optimum as an integer linear programme, with a proof or an honest gap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution, exact_sum
from mpsearch.solvers import _milp
from mpsearch.solvers._moves import repair, top_up
from mpsearch.solvers._reduced import (
    PROVEN,
    Bools,
    Ints,
    Reduced,
    accept,
    answer,
    finest,
    impossible,
    refusal,
)
from mpsearch.solvers.bound import Dual, maximise, polish
from mpsearch.solvers.greedy import grow

#: What the backends' proofs are trusted to, in shares of the loss above the rows' least losses.
_TRUST = 1e-12
#: A programme with more cells than this is not built; the answer is then the best choice known, with its gap.
_MOST_CELLS = 200_000
_PASSES = 6
_CUTS = 40


@dataclass(frozen=True)
class Ilp:
    """Integer linear programme: ``min sum loss[i,f] x[i,f]``, one cell per row, ``sum cost[r,i,f] x[i,f] <= limit[r]``.

    The cells that no optimum can hold are dropped first: dominated ones, and those whose reduced cost at the prices
    of the Lagrangian bound exceeds the gap to the best choice known. The rest goes to HiGHS, or to CBC, through PuLP:
    losses scaled by a power of two, costs as whole numbers, gaps 0, one thread, a fixed seed. A choice that uses the
    solver's tolerance to break a budget is cut off by a cover inequality and the programme is solved again; every
    budget is checked in exact arithmetic.

    The status is ``optimal`` when the gap is at most 1e-9 of the loss, and the bound is lowered by the tolerance that
    the backend's proof is trusted to (1e-12 of the loss above the rows' least losses). After a time-out the best
    choice known is returned, with the better of the backend's and the Lagrangian bound. Losses in the unit of the
    table; lower is better. The same problem gives the same choice, unless the time runs out.

    Cost: that of `Greedy` and `Bound`, then exponential in the worst case. Measured on one core, with 8 formats and two
    tight budgets: 0.1 s for 25 rows, 0.5 s for 300, 1 s for 1,000. Memory: about 2 kB for each cell that is left.

    Sources: Sinha and Zoltners 1979, Operations Research 27(3), for the model and the reduction; Balas 1975,
    Math. Programming 8, for covers; Yao et al. 2021, HAWQ-V3, ICML, for its use on bit widths.

    Attributes:
        time_limit: seconds, > 0.
        backend: ``highs`` or ``cbc``. When HiGHS cannot be used or fails, CBC is, and ``stats`` says why.

    >>> p = Problem(np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]]), np.array([[[1, 3, 4], [1, 2, 4]]]), np.array([6.0]))
    >>> s = Ilp().solve(p)
    >>> s.choice.tolist(), s.loss, s.status
    ([2, 1], 2.0, 'optimal')
    """

    time_limit: float = 60.0
    backend: str = "highs"

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise InputError("E107", f"solver 'ilp': time_limit is {self.time_limit}, expected seconds above 0")
        if self.backend not in ("highs", "cbc"):
            raise InputError("E107", f"solver 'ilp': no backend '{self.backend}'", advice="there is highs, cbc")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        return refusal(problem)

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or the best choice found in time.

        Raises:
            InputError: the numbers are too large to be summed (E210).
        """
        accept(problem, "ilp")
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "ilp", reason=reason)
        return _Search(problem, self.backend, time.monotonic() + self.time_limit).run()


@dataclass(eq=False)
class _Search:
    """What is known so far: the best choice, the bound, and how they were found."""

    problem: Problem
    backend: str
    deadline: float
    choice: Ints | None = None
    loss: float = math.inf
    bound: float = -math.inf
    prices: tuple[float, ...] = ()
    stats: dict[str, Any] = field(default_factory=lambda: {"backend": "none", "programmes": 0, "cuts": 0, "cells": 0})

    def run(self) -> Solution:
        """Bound, reduce and solve, until the best choice is proven or nothing changes."""
        core = self.problem
        for _ in range(_PASSES):
            reduced = Reduced.of(core)
            dual = maximise(reduced, len(core.limit))
            self.prices = self.prices or dual.prices
            if math.isinf(dual.bound) and self.choice is None:
                return self._infeasible("the bound is above every loss")
            for found in (grow(reduced, dual), polish(reduced, dual)):
                self._offer(reduced, found)
            self._raise(reduced, core, dual.value)
            if self._proven():
                break
            keep = self._survivors(reduced, dual)
            before = self.loss
            # Numbers too far apart to share a scale: start again with those that still matter.
            if self.choice is None or reduced.excess[keep].max(initial=0.0) > 2.0**-20:
                outcome = self._programme(core, reduced, dual, keep)
                self.stats["report"] = outcome.report
                if outcome.status == "infeasible" and self.choice is None:
                    return self._infeasible(outcome.report)
                if outcome.status != "optimal" or self._proven() or self.loss == before:
                    break
            core = replace(core, loss=np.where(reduced.cells(keep), core.loss, np.inf))
        if self.choice is None:
            return Solution.without(self.problem, "unsolved", "ilp", lower_bound=self.bound, **self.stats)
        return answer(self.problem, self.choice, self.bound, self.prices, "ilp", self.stats)

    def _infeasible(self, reason: str) -> Solution:
        return Solution.without(self.problem, "infeasible", "ilp", **{**self.stats, "reason": reason})

    def _proven(self) -> bool:
        return self.choice is not None and self.loss - self.bound <= PROVEN * abs(self.loss)

    def _offer(self, reduced: Reduced, choice: Ints | None) -> None:
        """Keep a choice when it fits and is better than the best one known."""
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

    def _survivors(self, reduced: Reduced, dual: Dual) -> Bools:
        """(N, F) cells that a choice no worse than the best one known may hold.

        A choice with the cell (i, f) has at least the excess ``dual.value`` plus the reduced cost of the cell.
        """
        keep = np.isfinite(reduced.excess)
        best = self._excess(reduced)
        if math.isinf(best):
            return keep
        excess = np.where(keep, reduced.excess, 2 * best)
        value = excess + np.tensordot(dual.weights, reduced.low.astype(np.float64), axes=1)
        least = np.where(keep, value, np.inf).min(axis=1, keepdims=True)
        # The margins are far above what rounding does to these few sums.
        worth = dual.value + (value - least) - 1e-13 * value
        keep &= worth <= best * (1 + 1e-12)
        return keep

    def _programme(self, core: Problem, reduced: Reduced, dual: Dual, keep: Bools) -> _milp.Outcome:
        """Solve the programme over the cells in ``keep``; renew the best choice and the bound."""
        self.stats["cells"] = int(keep.sum())
        if keep.sum() > _MOST_CELLS:
            return _milp.Outcome("failed", None, -math.inf, "too many cells")
        best = self._excess(reduced)
        scale = 14 - int(np.frexp(best if math.isfinite(best) else 1.0)[1])
        model = _milp.Model(np.ldexp(np.where(keep, reduced.excess, 0.0), scale), keep, reduced.low, reduced.slack)
        while True:
            outcome = self._solve(model)
            if outcome.choice is None:
                return outcome
            slipped = not self.problem.fits(reduced.back(outcome.choice))
            choice = repair(reduced, outcome.choice, dual.weights) if slipped else outcome.choice
            self._offer(reduced, None if choice is None else top_up(reduced, choice))
            if math.isfinite(outcome.bound):
                best = self._excess(reduced)
                excess = math.ldexp(outcome.bound, -scale)
                margin = _TRUST * max(excess, best if math.isfinite(best) else 0.0)
                self._raise(reduced, core, max(0.0, excess - margin))
            if not slipped or outcome.status != "optimal" or self._proven() or len(model.cuts) >= _CUTS:
                return outcome
            self.stats["cuts"] += 1
            model = replace(model, cuts=(*model.cuts, cover(self.problem, reduced, outcome.choice)))

    def _solve(self, model: _milp.Model) -> _milp.Outcome:
        """Solve with the backend asked for, or with CBC when that fails."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            return _milp.Outcome("stopped", None, -math.inf, "no time left")
        self.stats["programmes"] += 1
        reason = _milp.missing(self.backend)
        outcome = _milp.Outcome("failed", None, -math.inf, reason) if reason else _milp.solve(model, self.backend, left)
        if outcome.status == "infeasible" and self.choice is not None:
            outcome = replace(outcome, status="failed", report=f"{outcome.report}, although a choice is known")
        if outcome.status == "failed" and self.backend != "cbc":
            self.stats["fallback"] = outcome.report
            self.backend = "cbc"
            return self._solve(model)
        self.stats["backend"] = self.backend
        return outcome


def cover(problem: Problem, reduced: Reduced, choice: Ints) -> tuple[Bools, int]:
    """Return the cells of which not all rows of a cover may choose one, and the most that may.

    ``choice`` breaks a budget in exact arithmetic. The rows whose costs above the least already break it are a cover;
    choosing as much or more in every one of them breaks the budget too.

    >>> p = Problem(np.zeros((3, 2)) - [0, 1], np.array([[[0, 5], [0, 1], [0, 4]]]), np.array([8.0]))
    >>> cells, most = cover(p, Reduced.of(p), np.array([1, 1, 1]))
    >>> int(cells.sum()), most
    (2, 1)
    """
    rows = np.arange(len(choice))
    offered = np.isfinite(reduced.excess)
    for r in reduced.kept:
        cost = problem.cost[r][reduced.order]
        chosen = cost[rows, choice]
        limit = float(problem.limit[r])
        if exact_sum([*chosen.tolist(), -limit]) <= 0:
            continue
        least = np.where(offered, cost, np.inf).min(axis=1)
        above = [Fraction(a) - Fraction(b) for a, b in zip(chosen.tolist(), least.tolist(), strict=True)]
        over = sum(above, Fraction(0)) + exact_sum([*least.tolist(), -limit])
        members = np.ones(len(choice), dtype=np.bool_)
        for i in sorted(rows.tolist(), key=above.__getitem__):
            if above[i] >= over:
                break
            over -= above[i]
            members[i] = False
        return offered & members[:, None] & (cost >= chosen[:, None]), int(members.sum()) - 1
    raise ValueError("the choice keeps every budget; there is nothing to cut off")
