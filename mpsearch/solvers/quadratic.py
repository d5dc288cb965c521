"""Losses of rows and of pairs of rows under budgets: exact by linearisation, or by local search with a bound."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers import _milp
from mpsearch.solvers._blocks import Blocks
from mpsearch.solvers._descent import Ground
from mpsearch.solvers._marks import counted, reduce, settle
from mpsearch.solvers._moves import repair
from mpsearch.solvers._order import arrange, power, scaled
from mpsearch.solvers._pair_bound import Climb, View
from mpsearch.solvers._programmes import Programmes, survivors
from mpsearch.solvers._reduced import PROVEN, Floats, Ints, accept, answer, impossible, refusal
from mpsearch.solvers.greedy import grow
from mpsearch.solvers.ilp import Ilp
from mpsearch.solvers.lagrangian import maximise, polish

#: What the backend's proof is trusted to, in shares of the loss above the rows' least losses.
_TRUST = 1e-11
#: Rounds of dropping cells, turns of the bound in each, and linearised starts.
_PASSES = 8
_TURNS = 40
_LINEAR = 3
#: A round that drops no cell and closes less than this share of the gap is the last.
_GAIN = 0.05
#: A programme of fewer terms is solved sooner than its bound is raised and its choices are searched.
_SMALL, _FEW = 1000, 6
_TAKES = ("pairs", "aligned")


@dataclass(frozen=True)
class Quadratic:
    """Rows and pairs: ``min sum loss[i, x_i] + sum value[(i, x_i), (j, x_j)]``, every budget and count kept.

    The same as ``min x^T C x / 2`` with ``C = diag(2 loss) + value``, without making C convex: with one cell per row, a
    shift of the diagonal adds a constant, and clipping negative eigenvalues (as published code does) changes the
    answer.

    What pairs add is moved into rows as far as the bound rises; the Lagrangian bound of the rows is then a bound for
    all, and drops the cells whose reduced cost exceeds the gap to the best choice known. That choice is the best of a
    local search by moves of one row and of two from several starts: the answers to the additive problems of the rows
    alone, of the rows with the mean of their pairs, of the rows with what was moved into them, and of those linearised
    at the best choice; in the end single moves are forced, made good by others, and descended from. If what is left
    has at most ``exact_terms`` terms, it is linearised and solved by HiGHS: ``y = x[i,f] x[j,g]`` with
    ``sum_g y = x[i,f]`` where a pair of rows has many terms, else by inequalities.

    The status is ``optimal`` when the gap is at most 1e-9 of the loss; the bound of the programme is lowered by the
    tolerance that its proof is trusted to (1e-11 of the loss above the rows' least losses). Otherwise the gap is that
    of the bound. Without pair terms the answer is that of `Ilp`. Prices are those of the bound. Unless the time runs
    out, the order of the rows and losses times a power of two do not change the plan. Losses in the unit of the table;
    lower is better.

    Cost: O(B F^2) for B pairs of rows per turn of the bound and O(B F^2 + R M^2) per move of two, M up to 600; the
    programme is exponential in the worst case. Measured on one core, 50 rows x 4 formats, 30 % of the pairs: proven in
    1 to 2 s where the correlations of pairs are about 0.1, in 8 to 12 s at 0.3, and not in a minute at 1, where the
    gap stays above 10 %. Without the programme: 300 rows x 8, 10 % of the pairs, in 23 s with a gap of 1e-4. Memory:
    some 8 copies of B tables of F^2 numbers.

    Sources: Deng et al. 2023, CLADO, arXiv 2307.05657, for the model; Adams and Sherali 1986, Management Science
    32(10), for the linearisation; Globerson and Jaakkola 2007, NIPS, for the bound.

    Attributes:
        exact_terms: most terms that are linearised; 0 for local search and its bound alone.
        time_limit: seconds, > 0.

    >>> from mpsearch.structure import PairTerms
    >>> pairs = PairTerms([0], [0], [1], [0], [-3.0])
    >>> loss, cost = np.array([[2.0, 0.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]])
    >>> s = Quadratic().solve(Problem(loss, cost, np.array([3.0]), pairs=pairs))
    >>> s.choice.tolist(), s.loss, s.status
    ([0, 0], 1.0, 'optimal')
    """

    exact_terms: int = 20_000
    time_limit: float = 60.0
    takes: ClassVar[str] = "any budgets, pair terms, counts that must be multiples"
    proves: ClassVar[str] = "the optimum of some 50 rows, else a gap"
    cost: ClassVar[str] = "seconds for thousands of terms, exponential in the worst case"

    def __post_init__(self) -> None:
        if isinstance(self.exact_terms, bool) or not self.exact_terms >= 0:
            raise InputError("E107", f"solver 'quadratic': exact_terms is {self.exact_terms}, expected 0 or more")
        if not self.time_limit > 0:
            raise InputError("E107", f"solver 'quadratic': time_limit is {self.time_limit}, expected seconds above 0")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        reason = refusal(problem, _TAKES)
        if not reason and problem.pairs is not None:
            most = np.finfo(np.float64).max / (8 * max(len(problem.pairs), 1))
            if np.abs(problem.pairs.value).max(initial=0.0) > most:
                return "the pair terms are so large that their sums are no longer finite numbers"
        return reason

    def solve(self, problem: Problem) -> Solution:
        """Return the optimum, or the best choice found, with its gap.

        Raises:
            InputError: the numbers are too large to be summed (E210).
        """
        accept(problem, "quadratic", _TAKES)
        reason = self.refuses(problem)
        if reason:
            raise InputError("E210", f"solver 'quadratic': {reason}", advice="give losses in larger units")
        deadline = time.monotonic() + self.time_limit
        reason = impossible(problem)
        if reason:
            return Solution.without(problem, "infeasible", "quadratic", reason=reason)
        if problem.pairs is None or not len(Blocks.of(problem.pairs, problem.offered).first):
            return replace(Ilp(self.time_limit).solve(replace(problem, pairs=None)), solver="quadratic")
        return _Search(problem, self.exact_terms, Programmes("scipy", deadline)).run()


class _Search:
    """What is known so far; rows in the order of their content, losses in shares of a power of two."""

    def __init__(self, problem: Problem, exact_terms: int, programmes: Programmes) -> None:
        assert problem.pairs is not None
        self.given, self.exact_terms, self.programmes = problem, exact_terms, programmes
        arranged, self.order = arrange(problem)
        assert arranged.pairs is not None
        self.power = max(power(arranged.loss), power(arranged.pairs.value))
        pairs = replace(arranged.pairs, value=np.ldexp(arranged.pairs.value, -self.power))
        self.problem = replace(arranged, loss=np.ldexp(arranged.loss, -self.power), pairs=pairs)
        self.counts = counted(self.problem)
        self.marks = [cells.astype(np.float64) for cells, _ in self.counts]
        self.choice: Ints | None = None
        self.loss, self.bound = math.inf, -math.inf
        self.prices: tuple[float, ...] = ()

    @property
    def stats(self) -> dict[str, Any]:
        """What is reported."""
        return self.programmes.stats

    def run(self) -> Solution:
        """Search, bound and drop cells, while that drops any; then solve what is left exactly."""
        assert self.problem.pairs is not None
        core = self.problem
        climb = Climb(core, Blocks.of(self.problem.pairs, core.offered), self.marks, self.programmes.deadline)
        for turn in range(_PASSES):
            before = self.bound
            view = climb.run(_FEW if self._small(climb.sharing.blocks) else _TURNS, self._enough)
            self._raise(view.bound)
            self.prices = self.prices or view.dual.prices
            if math.isinf(view.dual.bound) and self.choice is None:
                return self._infeasible("the bound is above every loss")
            if turn == 0:
                self._look(core, climb.sharing.blocks, view)
            if self._proven() or self._late() or math.isinf(view.dual.bound):
                break
            best = self._excess(view)
            keep = view.reduced.cells(survivors(view.reduced, view.dual.weights, view.dual.value, best))
            stuck = keep.sum() == core.offered.sum() and self.bound - before < _GAIN * (self.loss - self.bound)
            if turn == _PASSES - 1 or stuck or not keep.any(axis=1).all():
                break
            core = replace(core, loss=np.where(keep, core.loss, np.inf))
            climb.narrow(keep)
        blocks = climb.sharing.blocks
        self.stats["terms"] = int(np.count_nonzero(blocks.value))
        if not self._proven() and self.stats["terms"] <= self.exact_terms and self.exact_terms and not self._late():
            outcome = self._exact(blocks, view)
            if outcome.status == "infeasible" and self.choice is None:
                return self._infeasible(outcome.report)
        if self.choice is None:
            lowest = scaled(self.bound, self.power)
            return Solution.without(self.given, "unsolved", "quadratic", lower_bound=lowest, **self.stats)
        there = np.empty_like(self.choice)
        there[self.order] = self.choice
        prices = [scaled(price, self.power) for price in self.prices]
        return answer(self.given, there, scaled(self.bound, self.power), prices, "quadratic", self.stats)

    def _infeasible(self, reason: str) -> Solution:
        return Solution.without(self.given, "infeasible", "quadratic", **{**self.stats, "reason": reason})

    def _proven(self) -> bool:
        return self.choice is not None and self.loss - self.bound <= PROVEN * abs(self.loss)

    def _late(self) -> bool:
        return time.monotonic() > self.programmes.deadline

    def _small(self, blocks: Blocks) -> bool:
        return int(np.count_nonzero(blocks.value)) <= min(_SMALL, self.exact_terms)

    def _offer(self, choice: Ints) -> None:
        """Keep a choice when it fits and is better than the best one known."""
        loss = self.problem.total_loss(choice)
        if loss < self.loss and self.problem.fits(choice):
            self.choice, self.loss = choice, loss

    def _raise(self, bound: float) -> None:
        """Raise the bound; what is no longer in the core is no better than the best choice known."""
        self.bound = max(self.bound, min(self.loss, bound))

    def _excess(self, view: View) -> float:
        """Most excess, in the unit of the view, of choices no worse than the best one known; infinite without one."""
        if self.choice is None:
            return math.inf
        above = math.fsum([self.loss, view.shared.slip, *(-view.reduced.floor).tolist()])
        return max(0.0, scaled(above, -view.reduced.shift))

    def _enough(self, view: View) -> bool:
        """Whether the bound proves the best choice known."""
        return self._late() or (self.choice is not None and self.loss - view.bound <= PROVEN * abs(self.loss))

    def _look(self, core: Problem, blocks: Blocks, view: View) -> None:
        """Descend from the answers of additive problems."""
        offered = np.isfinite(view.reduced.excess)
        loss = np.where(view.reduced.cells(offered), core.loss, np.inf)
        use = np.empty_like(view.reduced.use)
        use[:, view.reduced.order] = view.reduced.use
        self.ground = Ground(loss, blocks, use, view.reduced.slack, tuple(self.counts))
        self.price = view.price()
        for table in (view.shared.loss, core.loss, core.loss + blocks.mean(core.offered)):
            self._start(core, table)
        for _ in range(_LINEAR):
            before = self.loss
            if self.choice is not None:
                self._start(core, core.loss + blocks.field(self.choice, len(core.loss)))
            if not self.loss < before or self._late():
                break
        if self.choice is not None and not self._small(blocks):
            self._offer(self.ground.force(self.choice, self.price, self.programmes.deadline))

    def _start(self, core: Problem, table: Floats) -> None:
        """Descend from the answers to the additive problem of a table."""
        reduced = reduce(replace(core, loss=table, pairs=None), self.marks)
        dual = maximise(reduced, len(core.limit))
        counts = [(cells[reduced.order], multiple) for cells, multiple in self.counts]
        for found in (grow(reduced, dual), polish(reduced, dual)):
            choice = None if found is None else settle(reduced, found, counts, dual.weights)
            if choice is not None:
                self._descend(reduced.back(choice))

    def _descend(self, choice: Ints) -> None:
        self._offer(choice)
        if not self._late():
            self._offer(self.ground.descend(choice, self.price, self.programmes.deadline))

    def _exact(self, blocks: Blocks, view: View) -> _milp.Outcome:
        """Solve the linearised programme over what is left; renew the best choice and the bound."""
        reduced = view.reduced
        model, scale = view.model(self.problem.loss, blocks, self._excess(view), self.counts)
        outcome = _milp.Outcome("stopped", None, -math.inf, "no time left")
        known = self.choice is not None
        for outcome, slipped in self.programmes.rounds(self.problem, reduced, model, known=known):
            if outcome.choice is None:
                break
            choice = repair(reduced, outcome.choice, view.dual.weights) if slipped else outcome.choice
            if choice is not None:
                self._descend(reduced.back(choice))
            if math.isfinite(outcome.bound):
                best = math.ldexp(self._excess(view), reduced.shift) if self.choice is not None else 0.0
                self._raise(math.ldexp(outcome.bound, -scale) - _TRUST * best - view.shared.slip)
            if self._proven():
                break
        return outcome
