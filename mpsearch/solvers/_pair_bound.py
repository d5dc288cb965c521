"""Lower bounds for rows and pairs of rows: the Lagrangian bound of the rows, once they carry what the pairs add."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers import _milp
from mpsearch.solvers._blocks import Blocks
from mpsearch.solvers._marks import reduce
from mpsearch.solvers._programmes import reduced_costs, survivors
from mpsearch.solvers._reduced import Bools, Floats, Reduced
from mpsearch.solvers._sharing import Shared, Sharing
from mpsearch.solvers.lagrangian import Dual, maximise

_SWEEPS = 3


@dataclass(frozen=True, eq=False)
class View:
    """The losses as they are shared, and the Lagrangian bound of the rows."""

    shared: Shared
    reduced: Reduced
    dual: Dual

    @property
    def bound(self) -> float:
        """Lower bound on the loss of every choice that fits."""
        return self.dual.bound - self.shared.slip

    def price(self) -> Floats:
        """(N, F) what cells cost at the prices of the bound."""
        there = np.empty(self.reduced.excess.shape)
        cost = np.tensordot(self.dual.weights, self.reduced.low.astype(np.float64), axes=1)
        there[self.reduced.order] = np.ldexp(cost, self.reduced.shift)
        return there

    def model(
        self, loss: Floats, blocks: Blocks, best: float, counts: Sequence[tuple[Bools, int]]
    ) -> tuple[_milp.Model, int]:
        """Return the programme, and the power of two that its objective, which is the loss, is multiplied by.

        Pairs of cells that no choice of excess ``best`` holds together are barred.

        Args:
            loss: (N, F) losses of the rows, as they were before they were shared.
            blocks: pairs of rows.
            best: excess of the best choice known, in the unit of the reduced problem; infinite without one.
            counts: cells (N, F), and what their number must be a multiple of.
        """
        reduced, weights = self.reduced, self.dual.weights
        keep = survivors(reduced, weights, self.dual.value, best)
        place = np.empty_like(reduced.order)
        place[reduced.order] = np.arange(len(place))
        first, second = place[blocks.first], place[blocks.second]
        value, size = blocks.value, float(np.abs(blocks.value).sum()) + len(place)
        if math.isfinite(best):
            risen = reduced_costs(reduced, weights, best)
            with np.errstate(over="ignore"):
                rest = np.ldexp(self.shared.rest, -reduced.shift)
            worth = self.dual.value + risen[first][:, :, None] + risen[second][:, None, :] + rest
            value = np.where(worth > best * (1 + 1e-12), np.inf, value)
            size = math.ldexp(best, reduced.shift)
        scale = 14 - int(np.frexp(size)[1])
        pairs = zip(first.tolist(), second.tolist(), np.ldexp(value, scale), strict=True)
        objective = np.ldexp(np.where(keep, loss[reduced.order], 0.0), scale)
        counts = tuple((cells[reduced.order], multiple) for cells, multiple in counts)
        return _milp.Model(objective, keep, reduced.low, reduced.slack, counts=counts, pairs=tuple(pairs)), scale


class Climb:
    """Shares the pairs at prices of the budgets, and bounds at what was shared, in turns.

    The prices that are best for what was shared lie between those it was shared at and better ones: the next step goes
    beyond them, twice as far after each success; after a failure it is taken back, and the next one is shorter. A step
    of plain length never lowers the bound.
    """

    def __init__(self, problem: Problem, blocks: Blocks, marks: list[Floats], deadline: float) -> None:
        self.problem, self.marks, self.deadline = problem, marks, deadline
        self.sharing = Sharing(problem.loss, blocks)
        self.price = self.target = np.zeros(problem.loss.shape)
        self.reach = 1.0

    def narrow(self, offered: Bools) -> None:
        """Go on with fewer cells."""
        self.sharing.narrow(offered)

    def run(self, turns: int, enough: Callable[[View], bool]) -> View:
        """Take some turns; stop early where a step of plain length gains nothing, or when it is enough."""
        best = self._view(self.price)
        for _ in range(turns):
            if math.isinf(best.dual.bound) or enough(best):
                break
            kept = self.sharing.left.copy(), self.sharing.right.copy()
            price = np.maximum(self.price + self.reach * (self.target - self.price), 0.0)
            view = self._view(price)
            if view.bound > best.bound:
                best, self.price, self.target, self.reach = view, price, view.price(), 2 * self.reach
                continue
            self.sharing.left, self.sharing.right = kept
            if self.reach == 1.0:
                break
            self.reach = max(1.0, self.reach / 8)
        return best

    def _view(self, price: Floats) -> View:
        self.sharing.improve(price, _SWEEPS, self.deadline)
        shared, blocks = self.sharing.shared(), self.sharing.blocks
        # Cells of rows in pairs are never dropped for one another.
        column = np.zeros(shared.loss.shape)
        column[np.union1d(blocks.first, blocks.second)] = np.arange(shared.loss.shape[1])
        reduced = reduce(replace(self.problem, loss=shared.loss, pairs=None), [column, *self.marks])
        return View(shared, reduced, maximise(reduced, len(self.problem.limit)))
