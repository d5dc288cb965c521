"""Problems and solutions: arrays only, so that anybody's table can be solved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.budget import Budget
from mpsearch.structure import Alignment, PairTerms, check_structure
from mpsearch.tables import Array, CostTable, SensitivityTable

Outcome = Literal["optimal", "feasible", "infeasible", "unsolved"]


def exact_sum(values: Sequence[float]) -> Fraction:
    """Sum floats without rounding.

    `math.fsum` rounds the exact sum once; what it leaves over is summed again until nothing is left.

    >>> exact_sum([1e16, 1.0, 2.0**-60]) == 10**16 + 1 + Fraction(1, 2**60)
    True
    """
    parts: list[float] = []
    while True:
        part = math.fsum([*values, *(-p for p in parts)])
        if part == 0.0:
            return sum((Fraction(p) for p in parts), Fraction(0))
        parts.append(part)


def relative_gap(loss: float, bound: float) -> float:
    """How far a loss can be above the least one, as a share of it.

    >>> relative_gap(2.0, 1.0), relative_gap(0.0, 0.0), relative_gap(0.0, -1.0)
    (0.5, 0.0, inf)
    """
    if bound == loss:
        return 0.0
    return (loss - bound) / abs(loss) if loss else math.inf


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one format per row: least total loss, every total cost within its limit.

    Attributes:
        loss: (N, F) loss of each row in each format; NaN or +inf where a format is not offered.
        cost: (R, N, F) cost of R resources; only cells that are offered count.
        limit: (R,) the most each resource may total over the rows.
        names: names of the N rows; numbers when left out.
        formats: names of the F formats; numbers when left out.
        resources: names of the R resources; numbers when left out.
        pairs: loss that pairs of cells add; none when left out.
        aligned: counts that must be multiples.

    >>> p = Problem(np.array([[3.0, 1.0], [2.0, 0.5]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> p.fits(np.array([1, 0])), p.fits(np.array([1, 1]))
    (True, False)
    """

    loss: Array
    cost: Array
    limit: Array
    names: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    pairs: PairTerms | None = None
    aligned: tuple[Alignment, ...] = ()

    def __post_init__(self) -> None:
        loss: Array = np.array(self.loss, dtype=np.float64)
        cost: Array = np.array(self.cost, dtype=np.float64)
        limit: Array = np.atleast_1d(np.array(self.limit, dtype=np.float64))
        if loss.ndim != 2:
            raise ValueError(f"loss must be (rows, formats), got shape {loss.shape}")
        if cost.ndim == 2:
            cost = cost[None]
        if cost.shape != (len(limit), *loss.shape):
            raise ValueError(f"cost must be {(len(limit), *loss.shape)} (resources, rows, formats), got {cost.shape}")
        offered = np.isfinite(loss)
        if np.isneginf(loss).any():
            raise ValueError("loss holds -inf; a loss is a finite number, NaN or +inf where a format is not offered")
        # These are copies of the caller's arrays; a large table is not copied once more.
        loss[~offered] = np.inf
        cost[:, ~offered] = 0.0
        if not np.isfinite(cost).all():
            raise ValueError("a format that is offered has a cost that is not finite")
        if np.isnan(limit).any():
            raise ValueError("limit holds NaN")
        for name, array in (("loss", loss), ("cost", cost), ("limit", limit)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for name, count in zip(("names", "formats", "resources"), (*loss.shape, len(limit)), strict=True):
            if not getattr(self, name):
                object.__setattr__(self, name, tuple(str(i) for i in range(count)))
            elif len(getattr(self, name)) != count:
                raise ValueError(f"{name} must hold {count} names, got {len(getattr(self, name))}")
        check_structure(self.pairs, self.aligned, *loss.shape)

    def with_resource(self, name: str, cost: Array, limit: float) -> Problem:
        """The same problem with one more resource, (N, F) and its limit."""
        return replace(
            self,
            cost=np.concatenate([self.cost, np.where(self.offered, cost, 0.0)[None]]),
            limit=np.r_[self.limit, limit],
            resources=(*self.resources, name),
        )

    @classmethod
    def of(
        cls,
        scores: SensitivityTable,
        costs: Sequence[CostTable],
        budgets: Sequence[Budget],
        pins: Mapping[str, str] | None = None,
    ) -> Problem:
        """Put scores, costs and budgets into arrays.

        Args:
            scores: predicted loss of each decision in each format.
            costs: one table per resource that a budget names, with the same rows and formats.
            budgets: limits; what is not decided is taken off them.
            pins: decision name -> the only format it may take.

        Raises:
            ValueError: tables of different rows or formats, a budget without a table, a pin of an unknown row.
        """
        by_resource = {table.resource: table for table in costs}
        chosen = []
        for budget in budgets:
            if budget.priced_by not in by_resource:
                raise ValueError(f"no cost table for the budget '{budget}'")
            table = by_resource[budget.priced_by]
            if (table.layers, table.formats) != (scores.layers, scores.formats):
                raise ValueError(f"the cost table of {table.resource} has other rows or formats than the scores")
            chosen.append(table)
        loss = np.array(scores.value)
        for table in chosen:
            loss[np.isnan(table.value)] = np.nan
        for name, format_name in (pins or {}).items():
            row, column = scores.layers.index(name), scores.formats.index(format_name)
            kept = loss[row, column]
            loss[row] = np.nan
            loss[row, column] = kept
        return cls(
            loss,
            np.stack([table.value for table in chosen]) if chosen else np.zeros((0, *loss.shape)),
            np.array([budget.limit(table) - table.fixed for budget, table in zip(budgets, chosen, strict=True)]),
            scores.layers,
            scores.formats,
            tuple(budget.priced_by for budget in budgets),
        )

    @property
    def offered(self) -> NDArray[np.bool_]:
        """(N, F) true where a format may be chosen."""
        return np.isfinite(self.loss)

    def totals(self, choice: NDArray[np.int64]) -> tuple[Fraction, ...]:
        """Exact total cost of each resource: sums of the stored numbers without rounding."""
        rows = np.arange(len(choice))
        return tuple(exact_sum(table[rows, choice].tolist()) for table in self.cost)

    def fits(self, choice: NDArray[np.int64]) -> bool:
        """Say whether a choice is offered everywhere and keeps every budget and count, in exact arithmetic."""
        rows = np.arange(len(self.loss))
        choice = np.asarray(choice)
        if choice.shape != rows.shape or ((choice < 0) | (choice >= self.loss.shape[1])).any():
            return False
        if not np.isfinite(self.loss[rows, choice]).all():
            return False
        if not all(found.holds(choice) for found in self.aligned):
            return False
        # fsum rounds the exact sum once, so its sign is that of the exact difference.
        return all(
            limit == math.inf or (limit > -math.inf and math.fsum([*table[rows, choice].tolist(), -limit]) <= 0)
            for table, limit in zip(self.cost, self.limit.tolist(), strict=True)
        )

    def total_loss(self, choice: NDArray[np.int64]) -> float:
        """Total loss of a choice, pairs included, summed without rounding errors."""
        terms = self.loss[np.arange(len(choice)), choice].tolist()
        if self.pairs is not None:
            terms += self.pairs.chosen(np.asarray(choice)).tolist()
        return math.fsum(terms)

    def least(self) -> tuple[float, ...]:
        """Smallest total of each resource, each taken alone; infinite when a row has no format."""
        least = (
            np.where(self.offered, self.cost, np.inf).min(axis=2)
            if self.loss.shape[1]
            else np.zeros((len(self.cost), 0))
        )
        return tuple(math.fsum(row) for row in least)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver answers.

    Attributes:
        choice: (N,) column chosen for each row; empty when there is none.
        status: ``optimal`` (proven within ``gap``), ``feasible`` (keeps every budget, not proven best),
            ``infeasible`` (proven that nothing fits) or ``unsolved`` (nothing found, nothing proven).
        loss: total loss; infinite without a choice.
        cost: (R,) total costs of the rows.
        bound: no choice that fits has a smaller loss than this.
        gap: ``(loss - bound) / |loss|``, 0 when both are equal; infinite without a choice.
        prices: (R,) loss saved by one more unit of each resource, as the bound sees it.
        solver: name of the solver.
        stats: what the solver reports of itself.
    """

    choice: NDArray[np.int64]
    status: Outcome
    loss: float
    cost: tuple[float, ...]
    bound: float
    gap: float
    prices: tuple[float, ...]
    solver: str
    stats: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        problem: Problem,
        choice: NDArray[np.int64],
        *,
        bound: float,
        prices: Sequence[float],
        solver: str,
        stats: Mapping[str, Any] | None = None,
        proven: bool = False,
    ) -> Solution:
        """Make the answer from a choice that fits; loss, cost and gap are computed here.

        A bound above the loss can only be rounding: it is lowered to the loss.

        Raises:
            ValueError: the choice breaks a budget or takes a format that is not offered.
        """
        if not problem.fits(choice):
            raise ValueError(f"solver '{solver}' returned a choice that does not keep the budgets")
        loss = problem.total_loss(choice)
        bound = min(bound, loss)
        gap = relative_gap(loss, bound)
        return cls(
            np.array(choice, dtype=np.int64),
            "optimal" if proven else "feasible",
            loss,
            tuple(float(total) for total in problem.totals(choice)),
            bound,
            gap,
            tuple(float(price) for price in prices),
            solver,
            dict(stats or {}),
        )

    @classmethod
    def without(
        cls, problem: Problem, status: Literal["infeasible", "unsolved"], solver: str, **stats: Any
    ) -> Solution:
        """Make the answer that there is no choice."""
        nan = tuple(math.nan for _ in problem.limit)
        bound = math.inf if status == "infeasible" else -math.inf
        return cls(np.zeros(0, dtype=np.int64), status, math.inf, nan, bound, math.inf, nan, solver, dict(stats))
