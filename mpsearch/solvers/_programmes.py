"""Programmes until their answer holds in exact arithmetic; and which cells need not be in them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from mpsearch.problem import Problem, exact_sum
from mpsearch.solvers import _milp
from mpsearch.solvers._reduced import Bools, Floats, Ints, Reduced

_CUTS = 40


@dataclass(eq=False)
class Programmes:
    """Runs programmes on one backend, and on CBC where that fails; ``stats`` says how it went."""

    backend: str
    deadline: float
    stats: dict[str, Any] = field(default_factory=lambda: {"backend": "none", "programmes": 0, "cuts": 0, "cells": 0})

    def rounds(
        self, problem: Problem, reduced: Reduced, model: _milp.Model, *, known: bool
    ) -> Iterator[tuple[_milp.Outcome, bool]]:
        """Yield each outcome, and whether its choice breaks a budget in exact arithmetic; that is then cut off.

        Args:
            problem: the problem, whose budgets must be kept.
            reduced: the same, in whose order the rows of the model stand.
            model: the programme.
            known: a choice that fits is known already.
        """
        budgets = replace(problem, pairs=None, aligned=())
        self.stats["cells"] = int(model.offered.sum())
        while True:
            outcome = self._solve(model, known)
            self.stats["report"] = outcome.report
            slipped = outcome.choice is not None and not budgets.fits(reduced.back(outcome.choice))
            yield outcome, slipped
            if outcome.choice is None or not slipped or outcome.status != "optimal" or len(model.cuts) >= _CUTS:
                return
            self.stats["cuts"] += 1
            model = replace(model, cuts=(*model.cuts, cover(problem, reduced, outcome.choice)))

    def _solve(self, model: _milp.Model, known: bool) -> _milp.Outcome:
        """Solve with the backend asked for, or with CBC when that fails."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            return _milp.Outcome("stopped", None, -math.inf, "no time left")
        self.stats["programmes"] += 1
        reason = _milp.missing(self.backend)
        outcome = _milp.Outcome("failed", None, -math.inf, reason) if reason else _milp.solve(model, self.backend, left)
        if outcome.status == "infeasible" and known:
            outcome = replace(outcome, status="failed", report=f"{outcome.report}, although a choice is known")
        if outcome.status == "failed" and self.backend != "cbc":
            self.stats["fallback"] = outcome.report
            self.backend = "cbc"
            return self._solve(model, known)
        self.stats["backend"] = self.backend
        return outcome


def survivors(reduced: Reduced, weights: Floats, value: float, best: float) -> Bools:
    """(N, F) cells that a choice of no more excess than ``best`` may hold.

    A choice with the cell (i, f) has at least the excess ``value`` plus the reduced cost of the cell.

    Args:
        reduced: the problem.
        weights: (R',) prices of one count.
        value: what the Lagrangian bound at these prices is above the rows' least losses.
        best: excess of the best choice known; infinite without one.
    """
    keep = np.isfinite(reduced.excess)
    if math.isinf(best):
        return keep
    risen = reduced_costs(reduced, weights, best)
    keep &= value + risen <= best * (1 + 1e-12)
    return keep


def reduced_costs(reduced: Reduced, weights: Floats, best: float) -> Floats:
    """(N, F) by how much the bound rises at least when a row takes a cell; cells not offered count as ``2 best``."""
    keep = np.isfinite(reduced.excess)
    excess = np.where(keep, reduced.excess, 2 * best)
    value = excess + np.tensordot(weights, reduced.low.astype(np.float64), axes=1)
    least = np.where(keep, value, np.inf).min(axis=1, keepdims=True)
    # The margin is far above what rounding does to these few sums.
    risen: Floats = value - least - 1e-13 * value
    return risen


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
