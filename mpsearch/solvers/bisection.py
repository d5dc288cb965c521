"""The cheapest plan that keeps a measured loss, with few measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.solvers import _search
from mpsearch.solvers._reduced import Ints
from mpsearch.solvers.fronts import solve_many
from mpsearch.trials import Seen, Trial


@dataclass(frozen=True)
class Bisection:
    """Bisect the solved plans, from cheap to dear in one resource, for the first that loses at most ``target``.

    The problem is solved for ``points`` limits of the resource, between its least and its budget, under all other
    budgets. Dearer plans are predicted to lose less. If they also measure so, the cheapest one that keeps the target is
    found; measured losses that are not in order cannot be told from it, and then a cheaper plan may keep it too.
    Every plan is measured on all batches, which confirms the answer. The target is kept where the measured loss is at
    most the target; `report` says whether that is beyond, or within, the standard error. Losses in nats per token.

    Cost: ``2 + log2(points)`` measurements at most and one solve for each point. Memory: O(points N).

    Sources: Augmenting Hessians with Inter-Layer Dependencies 2023 (arXiv 2306.04879), for bisection within an accuracy
    target, there over an order of layers.

    Attributes:
        target: most measured loss.
        resource: what is saved; the first one when empty.
        points: limits that are solved for.
        evaluations: most measurements.

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([4.0]))
    >>> search = Bisection(target=4.5)
    >>> [first] = search.ask(p, ())
    >>> [second] = search.ask(p, [Seen(first, 2.0)])
    >>> seen = [Seen(first, 2.0), Seen(second, 4.0)]
    >>> first.choice, second.choice, search.best(p, seen).trial.choice
    ((1, 1), (1, 0), (1, 0))
    """

    target: float | None = None
    resource: str = ""
    points: int = 64
    evaluations: int = 20
    judged_on: ClassVar[str] = "validation"
    takes: ClassVar[str] = "any budgets, and a target for the loss"
    proves: ClassVar[str] = "the target kept or not, within the standard error"
    cost: ClassVar[str] = "about log2(plans) measurements"

    def __post_init__(self) -> None:
        target = self.target
        if target is None or isinstance(target, bool) or not 0 <= target < math.inf:
            raise InputError(
                "E107", f"searcher 'bisection': target is {target}", advice="give the most loss to keep: target=0.05"
            )
        _search.check("bisection", points=(self.points, 1), evaluations=(self.evaluations, 1))

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        if self.resource and self.resource not in problem.resources:
            return f"it has no resource '{self.resource}', only {', '.join(problem.resources) or 'none'}"
        if not problem.resources:
            return "it has no resource to save"
        return _search.refuses(problem)

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name the next plan to measure; none when the cheapest one that keeps the target is found, or none does."""
        if len(seen) >= self.evaluations:
            return ()
        plans = self._plans(problem)
        losses = {item.trial: item.loss for item in seen}
        # Everything below `low` is known, or believed, to break the target, and `high` keeps it.
        low, high = 0, len(plans) - 1
        if not plans:
            return ()
        if _search.trial(plans[high]) not in losses:
            return (_search.trial(plans[high]),)
        if losses[_search.trial(plans[high])] > (self.target or 0.0):
            return ()
        while low < high:
            middle = (low + high) // 2
            trial = _search.trial(plans[middle])
            if trial not in losses:
                return (trial,)
            if losses[trial] <= (self.target or 0.0):
                high = middle
            else:
                low = middle + 1
        return ()

    def best(self, problem: Problem, seen: Sequence[Seen]) -> Seen | None:
        """Return the cheapest plan that keeps the target; the one of least loss when none does."""
        kept = [item for item in seen if not item.trial.batches and item.loss <= (self.target or 0.0)]
        place = self._place(problem)
        costs = {item.trial: problem.totals(np.array(item.trial.choice))[place] for item in kept}
        return min(kept, key=lambda item: (costs[item.trial], item.loss), default=_search.leader(seen))

    def report(self, problem: Problem, seen: Sequence[Seen]) -> str:
        """Say whether the target is kept, and how surely."""
        found, target = self.best(problem, seen), self.target or 0.0
        if found is None:
            return "no plan could be measured"
        name = problem.resources[self._place(problem)]
        cost = float(problem.totals(np.array(found.trial.choice))[self._place(problem)])
        measured = f"{found.loss:.4g} ± {found.spread:.2g} at {name} {cost:g}"
        if found.loss > target:
            near = ", though within its standard error" if found.loss - found.spread <= target else ""
            return f"the target {target:g} is not kept within the budgets{near}: at best {measured}"
        sure = "beyond" if found.loss + found.spread <= target else "within"
        return f"the target {target:g} is kept {sure} the standard error: {measured}"

    def _place(self, problem: Problem) -> int:
        return problem.resources.index(self.resource) if self.resource else 0

    def _plans(self, problem: Problem) -> list[Ints]:
        """Solved plans from cheap to dear, each predicted to lose less than the one before."""
        place = self._place(problem)
        table = np.where(problem.offered, problem.cost[place], np.nan)
        if not len(table) or not problem.offered.any(axis=1).all():
            return []
        least, most = np.nanmin(table, axis=1).sum(), np.nanmax(table, axis=1).sum()
        top = min(float(problem.limit[place]), most)
        limits = np.tile(problem.limit, (self.points, 1))
        limits[:, place] = least + (top - least) * np.arange(1, self.points + 1) / self.points
        # The last one is the budget itself, not what rounding makes of it.
        limits[-1, place] = problem.limit[place]
        found = [s.choice for s in solve_many(problem, limits) if s.status in ("optimal", "feasible")]
        priced = sorted(found, key=lambda x: (problem.totals(x)[place], problem.total_loss(x)))
        plans: list[Ints] = []
        for choice in priced:
            if not plans or problem.total_loss(choice) < problem.total_loss(plans[-1]):
                plans.append(choice)
        return plans
