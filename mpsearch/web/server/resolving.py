"""Solving again while somebody moves a slider: the tables of a study, kept ready, under pins and bars of a moment."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.budget import Budget, parse_budgets
from mpsearch.cost_text import UNITS
from mpsearch.decimals import decimal_text
from mpsearch.errors import InfeasibleError, InputError, MpsearchError
from mpsearch.feasible import check_budgets
from mpsearch.layer import Layers
from mpsearch.planning import Planner, usable
from mpsearch.problem import Problem, Solution
from mpsearch.rules import Rules
from mpsearch.solving import solve_problem
from mpsearch.stored_study import StoredStudy
from mpsearch.tables import Array, CostTable, SensitivityTable
from mpsearch.views.study_view import StudyView
from mpsearch.web.server.wishes import Wish

#: Seconds that proving a choice best may take; the gap is stated where that is not enough.
_SECONDS = 0.03
#: The same, where somebody waits for a proof, or nothing was found.
_PATIENCE = 2.0
#: Plans without wishes that are kept, to say what wishes cost.
_FREE = 64
#: Tables that are kept beside the study's own, such as those of another context.
_FURTHER = 8


@dataclass
class Warm:
    """The tables of one study, parsed once; several threads may ask it.

    Attributes:
        layers: of the model.
        scores: predicted losses, none below zero.
        loss: (L, F) losses of what may be chosen; NaN elsewhere.
        costs: what each format costs, one table per resource of the study.
        base: the rules of the study.
        own: decision name -> format, of the study's own pins.
        planner: prices further resources; None where there is no study behind the tables.
    """

    layers: Layers
    scores: SensitivityTable
    loss: Array
    costs: tuple[CostTable, ...]
    base: Rules = field(default_factory=Rules)
    own: Mapping[str, str] = field(default_factory=dict)
    planner: Planner | None = None
    _free: OrderedDict[tuple[str, ...], Solution] = field(default_factory=OrderedDict)
    _further: OrderedDict[str, CostTable] = field(default_factory=OrderedDict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of_study(cls, study: StoredStudy, view: StudyView) -> Warm:
        """Read the tables of a stored study as `StoredStudy.answer` does.

        Scores and layers are the view's, so that both are of one moment.

        Raises:
            InputError: it has no scores yet (E143).
        """
        survey, scores = study.survey, view.scores if view.scores is not None else study.scores
        planner = Planner(
            study.spec, survey.layers, view.model, (), study.protected, survey.caches, study.profile, study._energy()
        )
        problem = planner.problem(scores, ())
        loss = np.where(problem.offered, problem.loss, np.nan)
        settled = planner.settled(scores)
        return cls(survey.layers, settled, loss, planner.costs, planner.rules, planner.pins, planner)

    @classmethod
    def of_view(cls, view: StudyView) -> Warm:
        """Take the tables of a view, for which no study is stored.

        Raises:
            InputError: it has no scores (E143).
        """
        if view.scores is None:
            raise InputError("E143", f"study '{view.study}' has no scores yet", advice="wait until it has")
        settled = usable(view.scores)
        return cls(view.layers, settled, settled.value, view.costs)

    @cached_property
    def row_of(self) -> NDArray[np.int64]:
        """(L,) number of the decision of each layer."""
        place = {layer.name: i for i, row in enumerate(self.layers.decisions) for layer in row.layers}
        return np.array([place[layer.name] for layer in self.layers], dtype=np.int64)

    def tables(self, budgets: Sequence[Budget]) -> list[CostTable]:
        """The table of each budget.

        Raises:
            InputError: the study has no prices in such a resource (E420).
        """
        known = {table.resource: table for table in self.costs}
        for budget in budgets:
            if budget.priced_by not in known and (table := self._priced(budget)) is not None:
                known[budget.priced_by] = table
        if missing := [budget for budget in budgets if budget.priced_by not in known]:
            have = ", ".join(table.resource for table in self.costs)
            raise InputError("E420", f"budget '{missing[0]}': this study has no such costs", advice=f"there is {have}")
        return [known[budget.priced_by] for budget in budgets]

    def _priced(self, budget: Budget) -> CostTable | None:
        """The table of a resource or context that the study itself does not name; the last few are kept."""
        with self._lock:
            found = self._further.get(budget.priced_by)
            if found is None and self.planner is not None:
                wider = replace(self.planner, budgets=(*self.planner.budgets, budget))
                found = next((table for table in wider.costs if table.resource == budget.priced_by), None)
                if found is None:
                    wider.check([budget])
            if found is not None:
                self._further[budget.priced_by] = found
                self._further.move_to_end(budget.priced_by)
                while len(self._further) > _FURTHER:
                    self._further.popitem(last=False)
            return found

    def problem(self, budgets: Sequence[Budget]) -> Problem:
        """The problem of these budgets, without wishes."""
        tables = self.tables(budgets)
        loss = self.loss
        for table in tables:
            loss = np.where(np.isnan(table.value), np.nan, loss)
        cost = np.stack([table.value for table in tables]) if tables else np.zeros((0, *loss.shape))
        limits = [budget.limit(table) - table.fixed for budget, table in zip(budgets, tables, strict=True)]
        names = tuple(budget.priced_by for budget in budgets)
        return Problem(loss, cost, np.array(limits), self.scores.layers, self.scores.formats, names)

    def free(self, problem: Problem, budgets: Sequence[Budget], seconds: float) -> Solution:
        """The plan of these budgets without wishes; remembered, until there is more time to prove it."""
        key = tuple(map(str, budgets))
        with self._lock:
            found = self._free.get(key)
        if found is None or (seconds > _SECONDS and found.status != "optimal"):
            found = _quick(problem, self.base, seconds)
            with self._lock:
                self._free[key] = found
                self._free.move_to_end(key)
                while len(self._free) > _FREE:
                    self._free.popitem(last=False)
        return found


def resolve(warm: Warm, texts: Sequence[str], wish: Wish, *, patient: bool = False) -> dict[str, Any]:
    """Solve for budgets and a wish, on tables that are ready.

    A wish or a budget that nothing keeps is an answer too: ``found`` is false then, ``error`` says why, and ``least``
    the least that each budget could be by itself: its ``text``, its ``amount`` in the unit of the table, rounded up,
    and whether what was asked is ``short`` of it. What a wish costs is proven to lie from ``without.low`` to
    ``without.high``.

    Args:
        warm: the tables.
        texts: budgets.
        wish: pins, bars and floors.
        patient: take up to 2 s for a proof, not 30 ms.

    Raises:
        InputError: not a budget (E111, E112), a pattern that matches nothing (E120), a format that was not scored
            or that the study's own pins refuse (E213), nothing found in time (E210), or a resource without prices
            (E420).
    """
    seconds = _PATIENCE if patient else _SECONDS
    budgets = parse_budgets(texts)
    problem = warm.problem(budgets)
    tables = warm.tables(budgets)
    rules = wish.rules(warm.layers, problem, warm.base, warm.own)
    limits = [
        {"text": str(budget), "resource": budget.priced_by, "limit": budget.limit(table), "margin": _margin(table)}
        for budget, table in zip(budgets, tables, strict=True)
    ]
    ruled = rules.apply(problem)
    mask = np.where(np.isfinite(ruled.whole.loss), 0.0, np.nan)
    try:
        check_budgets(budgets, tables, mask, {**wish.pinned(warm.layers), **warm.own})
        found = _quick(problem, rules, seconds)
        if found.status == "unsolved":
            found = _quick(problem, rules, _PATIENCE)
        if found.status == "unsolved":
            raise InputError("E210", f"no plan was found in {_PATIENCE:g} s", advice="mpsearch solve takes its time")
        if found.status == "infeasible":
            raise InfeasibleError(
                "E203",
                f"budgets {' and '.join(map(str, budgets))} cannot be kept together",
                advice="loosen one of them",
            )
    except InfeasibleError as error:
        least = [_least(budget, table, mask) for budget, table in zip(budgets, tables, strict=True)]
        return {"found": False, "budgets": limits, "error": _told(error), "least": least}
    answer = _answer(warm, found, tables)
    if wish:
        answer |= _price_of(found, warm.free(problem, budgets, seconds))
    return {"found": True, "budgets": limits, **answer, "prices": _prices(warm, budgets, tables, found)}


def _price_of(found: Solution, free: Solution) -> dict[str, Any]:
    """What a wish costs: the difference of two plans, and what the bounds of both leave open.

    Its own plan keeps the budgets without the wish as well, so the best without loses no more than it.
    """
    if free.status in ("infeasible", "unsolved"):
        return {"without": None, "wish": None}
    loss = min(free.loss, found.loss)
    low, high = max(0.0, found.bound - loss), max(0.0, found.loss - free.bound)
    without = {"loss": loss, "bound": _plain(free.bound), "low": _plain(min(low, high)), "high": _plain(high)}
    return {"without": without, "wish": found.loss - loss}


def _margin(table: CostTable) -> float:
    """Budgets of time are kept with a margin: so much more of the budget is one more of the cost."""
    return float(table.source.get("margin", 1.0)) if table.unit == "s" else 1.0


def _least(budget: Budget, table: CostTable, mask: Array) -> dict[str, Any] | None:
    """The smallest budget that some allowed plan keeps, as text and number; rounded up, so that it does."""
    least = math.fsum(np.where(np.isnan(mask), np.inf, table.value).min(axis=1)) + table.fixed
    if not math.isfinite(least):
        return None
    unit, step = {"s": ("ms", Fraction(1, 10**9)), "J": ("mJ", Fraction(1, 10**9))}.get(table.unit, ("B", Fraction(1)))
    unit = "BOPs" if budget.resource == "bops" else unit
    exact = math.ceil(Fraction(least) * Fraction(_margin(table)) / step) * step
    shown = decimal_text(exact * (1000 if unit in ("ms", "mJ") else 1))
    text = f"{budget.resource} <= {shown} {unit} {budget.condition}".rstrip()
    return {"text": text, "amount": _plain(float(exact)), "short": budget.limit(table) < least}


def _quick(problem: Problem, rules: Rules, seconds: float) -> Solution:
    return solve_problem(problem, "auto", {"time_limit": seconds}, rules=rules)


def _answer(warm: Warm, found: Solution, tables: Sequence[CostTable]) -> dict[str, Any]:
    rows = np.arange(len(found.choice))
    spread = warm.scores.spread[rows, found.choice]
    cost = {
        table.resource: _plain(math.fsum(table.value[rows, found.choice].tolist()) + table.fixed)
        for table in {table.resource: table for table in (*warm.costs, *tables)}.values()
    }
    formats = [warm.scores.formats[j] for j in found.choice.tolist()]
    return {
        "formats": [formats[row] for row in warm.row_of.tolist()],
        "loss": math.fsum(warm.scores.value[rows, found.choice].tolist()),
        "spread": math.fsum(spread.tolist()) if np.isfinite(spread).all() else None,
        "bound": _plain(found.bound),
        "gap": _plain(found.gap),
        "proven": found.status == "optimal",
        "solver": found.solver,
        "cost": cost,
    }


def _prices(
    warm: Warm, budgets: Sequence[Budget], tables: Sequence[CostTable], found: Solution
) -> list[dict[str, Any]]:
    """The price of each budget per MiB, millisecond or other unit: the slope at the plan, for small changes."""
    prices = []
    for budget, table, price in zip(budgets, tables, found.prices, strict=True):
        unit, size = UNITS[budget.resource]
        worth = price * float(size) / _margin(table) if math.isfinite(price) else None
        prices.append({"budget": str(budget), "price": worth, "unit": f"{warm.scores.unit} per {unit}"})
    return prices


def _told(error: MpsearchError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "because": error.because, "advice": error.advice}


def _plain(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)
