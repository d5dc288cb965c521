"""A plan together with what it was solved from, and which of its choices the errors of the scores leave open."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpsearch.plan import BitPlan
from mpsearch.problem import Problem, Solution
from mpsearch.robust import Doubt, doubts
from mpsearch.rules import Rules
from mpsearch.tables import Array, CostTable


@dataclass(frozen=True)
class Answer:
    """A plan and what it was solved from.

    Attributes:
        plan: the plan.
        problem: of the predicted losses; none when there was nothing to choose.
        solution: of the problem.
        spread: (N, F) standard errors of the losses.
        rules: that the choice keeps.
        costs: what every format costs, one table per resource.
    """

    plan: BitPlan
    problem: Problem | None = None
    solution: Solution | None = None
    spread: Array | None = None
    rules: Rules = field(default_factory=Rules)
    costs: tuple[CostTable, ...] = ()

    def doubts(self, by: float = 1.645) -> tuple[Doubt, ...]:
        """List the decisions whose format the errors of the scores leave open (see `mpsearch.doubts`).

        None for another goal than the least loss: its prices are not in units of loss.
        """
        if self.problem is None or self.solution is None or self.spread is None or "goal" in self.solution.stats:
            return ()
        return doubts(self.problem, self.solution, self.spread, rules=self.rules, by=by)
