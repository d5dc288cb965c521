"""Two ways to write a plan as parameters that a sampler can draw, and to read the parameters off any plan."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers import _search
from mpsearch.solvers._reduced import Floats, Ints
from mpsearch.solvers._switches import Levels
from mpsearch.solvers.lagrangian import lagrangian_bound

#: Natural logarithm of the largest multiplier.
WIDEST = 2.0
#: Blocks beyond this many are put together, neighbours first.
_BLOCKS = 16

Values = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Plans:
    """One whole number for each row that has a choice: its level, from cheap to dear.

    Drawn levels are brought within the budgets by the predicted losses.
    """

    problem: Problem
    spends: bool = True

    def limits(self) -> dict[str, tuple[int, int]]:
        """Name of a parameter -> its least and largest value."""
        columns = Levels(self.problem).columns
        return {f"row {i}": (0, len(found) - 1) for i, found in enumerate(columns) if len(found) > 1}

    def read(self, choice: Ints) -> dict[str, float]:
        """Return the parameters of a plan."""
        levels = Levels(self.problem)
        return {name: levels.place(choice, int(name.removeprefix("row "))) for name in self.limits()}

    def plan(self, values: Values) -> Ints | None:
        """Return the plan of some parameters."""
        columns = Levels(self.problem).columns
        choice = np.array([found[int(values.get(f"row {i}", 0))] for i, found in enumerate(columns)], dtype=np.int64)
        loss = np.where(self.problem.offered, self.problem.loss, 0.0)
        return (_search.settle if self.spends else _search.lower)(self.problem, choice, loss)


@dataclass(frozen=True, eq=False)
class Weights:
    """The logarithms of what the predicted losses are multiplied by, one per block and one per type of row.

    A plan is the solution of the problem with the multiplied losses (SPDY's coefficients, shared by rows of one block
    or type): ``log m[i] = u[block(i)] + v[type(i)]``. Read off a plan, the multiplier of a row is the one nearest to 1
    at which the row would choose as it did at the prices of the solved problem, and ``u`` and ``v`` are their least
    squares, drawn towards 0. So the solved plan reads as zeros, and any plan can be told.

    Without ``spends``, one more parameter is the share of the budgets that may be spent.
    """

    problem: Problem
    spends: bool = True

    def limits(self) -> dict[str, tuple[float, float]]:
        """Name of a parameter -> its least and largest value."""
        found = dict.fromkeys(self._names(), (-WIDEST, WIDEST))
        return found if self.spends else {**found, "spent": (0.0, 1.0)}

    def read(self, choice: Ints) -> dict[str, float]:
        """Return the parameters of a plan."""
        names, design = self._names(), self._design()
        wanted = self._multipliers(choice)
        ridge = design.T @ design + 0.1 * np.eye(len(names))
        found = np.clip(np.linalg.solve(ridge, design.T @ wanted), -WIDEST, WIDEST)
        values = {name: float(value) for name, value in zip(names, found, strict=True)}
        return values if self.spends else {**values, "spent": self._spent(choice)}

    def plan(self, values: Values) -> Ints | None:
        """Return the plan of some parameters."""
        names, design = self._names(), self._design()
        factor = np.exp(design @ np.array([values[name] for name in names]))
        least = np.array(self.problem.least())
        share = 1.0 if self.spends else values["spent"]
        limit = np.where(np.isfinite(self.problem.limit), least + share * (self.problem.limit - least), np.inf)
        narrowed = dataclasses.replace(self.problem, limit=np.minimum(limit, self.problem.limit))
        return _search.solved_quickly(
            narrowed, np.where(self.problem.offered, self.problem.loss, 0.0) * factor[:, None]
        )

    def _spent(self, choice: Ints) -> float:
        least, limit = np.array(self.problem.least()), self.problem.limit
        total = np.array([float(x) for x in self.problem.totals(choice)])
        able = np.isfinite(limit) & (limit > least)
        return float(np.clip(((total - least)[able] / (limit - least)[able]).max(initial=0.0), 0.0, 1.0))

    def _names(self) -> list[str]:
        blocks, types = self._parts()
        return [*(f"block {x}" for x in dict.fromkeys(blocks)), *(f"type {x}" for x in dict.fromkeys(types))]

    def _design(self) -> Floats:
        blocks, types = self._parts()
        place = {name: k for k, name in enumerate(self._names())}
        design = np.zeros((len(blocks), len(place)))
        for i, (block, kind) in enumerate(zip(blocks, types, strict=True)):
            design[i, place[f"block {block}"]] = design[i, place[f"type {kind}"]] = 1.0
        return design

    def _parts(self) -> tuple[list[int], list[str]]:
        """Block and type of each row, by the first number in its name and what is left of the name without numbers."""
        numbers = [re.search(r"\d+", name) for name in self.problem.names]
        found = [int(number[0]) if number else -1 for number in numbers]
        order = {number: k for k, number in enumerate(sorted(set(found)))}
        size = math.ceil(len(order) / _BLOCKS) or 1
        types = [re.sub(r"\d+", "*", name) for name in self.problem.names]
        if len(set(types)) > 2 * _BLOCKS:
            types = ["" for _ in types]
        return [order[number] // size for number in found], types

    def _multipliers(self, choice: Ints) -> Floats:
        """(N,) logarithm nearest to 0 of the multipliers at which each row chooses as it did."""
        _, prices = lagrangian_bound(self.problem)
        rows = np.arange(len(choice))
        priced = np.tensordot(np.array(prices), self.problem.cost, axes=1)
        worse = np.where(self.problem.offered, self.problem.loss - self.problem.loss[rows, choice][:, None], np.nan)
        dearer = priced - priced[rows, choice][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            edge = -dearer / worse
        low = np.where(worse > 0, edge, 0.0).max(axis=1, initial=0.0)
        high = np.where(worse < 0, edge, np.inf).min(axis=1, initial=np.inf)
        least, most = math.exp(-WIDEST), math.exp(WIDEST)
        near: Floats = np.log(np.clip(np.clip(np.minimum(np.maximum(1.0, low), high), least, most), least, most))
        return near
