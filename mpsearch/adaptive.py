"""Scoring that spends batches only where the doubt could still change the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch import registry
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.problem import Problem, Solution
from mpsearch.tables import Array, SensitivityTable, Status

#: (names of decisions, number of the batch) -> their rows, scored on that batch alone.
Scorer = Callable[[Sequence[str], int], SensitivityTable]
#: Scores -> the problem that the plan solves.
Builder = Callable[[SensitivityTable], Problem]
Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """What was known after one round of scoring.

    Attributes:
        cells: cells scored so far, one per decision, format on offer and batch.
        loss: predicted loss of the plan of the mean scores.
        regret: expected regret of that plan, in the unit of the scores.
        error: its standard error over the draws.
        within: what the regret stays within in ``confidence`` of the draws.
        doubtful: decisions whose format changes in at least ``share`` of the draws.
    """

    cells: int
    loss: float
    regret: float
    error: float
    within: float
    doubtful: int


@dataclass(frozen=True, eq=False)
class Sampled:
    """Scores that were sampled until the plan was clear.

    Attributes:
        table: the scores; their ``source`` holds `report` under ``adaptive``.
        choice: (L,) column of each decision in the plan of these scores.
        change: (L,) share of the draws in which another format is better.
        batches: (L,) batches that each decision was scored on.
        rounds: what was known after each round.
        full: cells that all batches would have taken.
        stopped: ``tolerance``, ``no doubt`` (no single decision is in doubt) or ``batches`` (none is left for those
            that are).
    """

    table: SensitivityTable
    choice: Choice
    change: Array
    batches: tuple[int, ...]
    rounds: tuple[Round, ...]
    full: int
    stopped: str

    @property
    def cells(self) -> int:
        """Cells that were scored."""
        return self.rounds[-1].cells

    @property
    def report(self) -> dict[str, Any]:
        """What was spent, and what it brought, as plain values."""
        return {
            "rounds": [asdict(found) for found in self.rounds],
            "batches": dict(zip(self.table.layers, self.batches, strict=True)),
            "change": dict(zip(self.table.layers, self.change.tolist(), strict=True)),
            "cells": self.cells,
            "full": self.full,
            "stopped": self.stopped,
        }


@dataclass(frozen=True)
class Adaptive:
    """Scores every decision on a few batches, then on further ones only those whose format is in doubt.

    After each round ``draws`` tables are drawn from Normal(value, spread), cell by cell, and solved. The expected
    regret of the plan of the mean scores is the mean over the draws of loss(plan) - least loss of any plan: what
    knowing the scores exactly would still save. Sampling stops when both it and the regret that ``confidence`` of the
    draws stay within are at most ``tolerance`` of the plan's predicted loss, or at most ``absolute``; when no decision
    takes another format in ``share`` of the draws; or when those that do have had all batches. Otherwise each of them
    is scored on its next batch. The draws use the same random numbers in every round, so that rounds differ by what
    was learned only.

    Bias: each decision's value is the mean over its own batches, and stopping looks at it: decisions that look clear
    by chance keep the error that made them look so, which the spread, widened for few batches, allows for. Cells of one
    batch err together, and drawing them apart makes the regret rather too large. With a solver that is not exact
    the least loss, and so the regret, is as good as its plans.
    Cost: ``draws`` + 1 solutions per round beside the scoring. Memory: ``draws`` tables.

    Sources: Chick and Inoue 2001, Operations Research 49(5) (expected opportunity cost as a stopping rule); Chen et al.
    2014, NIPS (exploring only what the combinatorial optimum depends on).

    Attributes:
        tolerance: expected regret, as a share of the predicted loss, at which to stop.
        absolute: expected regret, in the unit of the scores, at which to stop.
        confidence: share of the draws whose regret must be that small as well; 0 looks at the expected regret only.
        share: of the draws in which a decision must change to be in doubt.
        first: batches that every decision is scored on, at least 2.
        draws: tables drawn per round.
        seed: of the draws.
        solver: name of the solver of the draws.
        settings: its settings, as (name, value).
    """

    tolerance: float = 0.02
    absolute: float = 0.0
    confidence: float = 0.9
    share: float = 0.05
    first: int = 3
    draws: int = 64
    seed: int = 0
    solver: str = "greedy"
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, most in (("tolerance", math.inf), ("absolute", math.inf), ("share", 1.0), ("confidence", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                upto = "" if math.isinf(most) else f" to {most:g}"
                raise InputError("E113", f"sampling: {name} is {value!r}; give a number from 0{upto}")
        for name, least in (("first", 2), ("draws", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError("E113", f"sampling: {name} is {value!r}; give a whole number from {least}")

    def sample(self, score: Scorer, build: Builder, layers: Sequence[str], batches: int) -> Sampled:
        """Score until the plan is clear.

        Args:
            score: scores some decisions on one batch; its answers must not depend on which others are asked for.
            build: makes the problem from the scores, with the tables' own rows and formats.
            layers: names of the decisions, in the order of the problem's rows.
            batches: how many batches there are.

        Raises:
            InputError: fewer batches than ``first`` (E504), a solver that cannot take the problem or finds nothing
                (E210); InfeasibleError: no plan keeps the budgets (E203).
        """
        if batches < self.first:
            raise InputError(
                "E504",
                f"sampling starts with {self.first} batches, and there are {batches}",
                advice="give more or smaller batches, or leave the budgets out",
            )
        kept = _Kept(tuple(layers), score)
        for _ in range(self.first):
            kept.add(range(len(kept.layers)))
        rounds: list[Round] = []
        while True:
            table = kept.table()
            plan, change, found = self._look(table, build, kept.cells)
            rounds.append(found)
            doubtful = [row for row, x in enumerate(change.tolist()) if x > 0 and x >= self.share]
            due = [row for row in doubtful if kept.count[row] < batches]
            if max(found.regret, found.within) <= max(self.tolerance * abs(found.loss), self.absolute):
                stopped = "tolerance"
            elif not due:
                stopped = "batches" if doubtful or min(kept.count) == batches else "no doubt"
            else:
                kept.add(due)
                continue
            full = kept.offered * batches
            sampled = Sampled(table, plan, change, tuple(kept.count), tuple(rounds), full, stopped)
            source = {**table.source, "adaptive": sampled.report}
            return replace(sampled, table=replace(table, source=source))

    def _look(self, table: SensitivityTable, build: Builder, cells: int) -> tuple[Choice, Array, Round]:
        """The plan of some scores, the share of draws in which each decision changes, and what is known."""
        problem = build(table)
        plan = self._solve(problem).choice
        offered = problem.offered
        rows = np.arange(len(plan))
        spread = np.where(offered & np.isfinite(table.spread), table.spread, 0.0)
        noise = np.random.default_rng(self.seed)
        regrets = []
        change = np.zeros(len(plan))
        for _ in range(self.draws):
            drawn = np.where(offered, problem.loss + spread * noise.standard_normal(spread.shape), np.inf)
            there = replace(problem, loss=drawn)
            best = self._solve(there).choice
            saved = math.fsum((drawn[rows, plan] - drawn[rows, best]).tolist())
            # A solver that is not exact may miss the plan itself, which is then the best one known.
            if saved > 0:
                change += best != plan
            regrets.append(max(0.0, saved))
        mean = math.fsum(regrets) / len(regrets)
        error = float(np.std(regrets, ddof=1)) / math.sqrt(len(regrets))
        change /= self.draws
        within = sorted(regrets)[max(0, math.ceil(self.confidence * self.draws) - 1)]
        doubtful = int(((change > 0) & (change >= self.share)).sum())
        return plan, change, Round(cells, problem.total_loss(plan), mean, error, within, doubtful)

    def _solve(self, problem: Problem) -> Solution:
        solver = registry.make("solvers", self.solver, **dict(self.settings))
        refusal = solver.refuses(problem)
        if refusal:
            raise InputError("E210", f"solver '{self.solver}' cannot take this: {refusal}")
        solution: Solution = solver.solve(problem)
        if solution.status == "infeasible":
            raise InfeasibleError("E203", "no plan keeps the budgets together", advice="loosen one of them")
        if solution.status == "unsolved":
            raise InputError("E210", f"solver '{self.solver}' found no plan", advice="use solver 'ilp'")
        return solution


class _Kept:
    """The scores of each decision on its own batches."""

    def __init__(self, layers: tuple[str, ...], score: Scorer) -> None:
        self.layers = layers
        self.count = [0] * len(layers)
        self.cells = 0
        self._score = score
        self._parts: list[list[SensitivityTable]] = [[] for _ in layers]

    @property
    def offered(self) -> int:
        """Cells that one batch of all decisions takes."""
        return sum(_offered(parts[0]) for parts in self._parts)

    def add(self, rows: Sequence[int]) -> None:
        """Score each of some decisions on its next batch; those that are at the same one, together."""
        by_batch: dict[int, list[int]] = {}
        for row in rows:
            by_batch.setdefault(self.count[row], []).append(row)
        for batch, there in sorted(by_batch.items()):
            asked = [self.layers[row] for row in there]
            found = self._score(asked, batch)
            if found.layers != tuple(asked):
                raise ValueError(f"asked for the rows {asked}, got {list(found.layers)}")
            for k, row in enumerate(there):
                self._parts[row].append(found.take([k]))
                self.count[row] += 1
            self.cells += _offered(found)

    def table(self) -> SensitivityTable:
        """The mean over each decision's own batches; ``samples`` is the least of any decision."""
        means = [SensitivityTable.mean(parts) for parts in self._parts]
        first = means[0]
        status: tuple[tuple[Status, ...], ...] = tuple(mean.status[0] for mean in means)
        pooled = {name: found for mean in means for name, found in mean.source.get("pooled", {}).items()}
        source: Mapping[str, Any] = {**first.source, **({"pooled": pooled} if pooled else {})}
        return SensitivityTable(
            self.layers,
            first.formats,
            np.concatenate([mean.value for mean in means]),
            np.concatenate([mean.spread for mean in means]),
            first.unit,
            status,
            min(mean.samples for mean in means),
            source,
        )


def _offered(table: SensitivityTable) -> int:
    """Cells of a table that take work: those that are on offer."""
    return sum(status != "not_offered" for row in table.status for status in row)
