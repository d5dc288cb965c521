"""Checking budgets before any work is done: what is the least that any plan needs?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from mpsearch.budget import TIMED, Budget
from mpsearch.decimals import decimal_text
from mpsearch.errors import InfeasibleError
from mpsearch.tables import Array, CostTable

#: Pins that are named one by one.
_DEAREST = 3


def allowed(costs: Sequence[CostTable], pins: Mapping[str, str], menu: Sequence[str]) -> Array:
    """Return (L, F): 0 where a format may be chosen, NaN where it is refused, barred by a pin or not in the menu."""
    first = costs[0]
    mask = np.zeros(first.value.shape)
    for table in costs:
        mask[np.isnan(table.value)] = np.nan
    for i, name in enumerate(first.layers):
        for j, fmt in enumerate(first.formats):
            if fmt != pins[name] if name in pins else fmt not in menu:
                mask[i, j] = np.nan
    return mask


def check_budgets(budgets: Sequence[Budget], costs: Sequence[CostTable], mask: Array, pins: Mapping[str, str]) -> None:
    """Refuse a budget below the cheapest plan that is allowed.

    Raises:
        InfeasibleError: E201, with the smallest limits that can be met and what the pins cost; of all budgets that
            cannot be met.
    """
    errors = list(_impossible(budgets, costs, mask, pins))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = ("\n" + " " * 11).join(error.message for error in errors)
        raise InfeasibleError(
            "E201",
            f"{len(errors)} budgets cannot be met, each by itself",
            because=lines,
            advice="loosen them, or offer smaller formats",
        )


def _impossible(
    budgets: Sequence[Budget], costs: Sequence[CostTable], mask: Array, pins: Mapping[str, str]
) -> Iterator[InfeasibleError]:
    for budget in budgets:
        table = next(t for t in costs if t.resource == budget.priced_by)
        cheapest = np.where(np.isnan(mask), np.inf, table.value).min(axis=1)
        least = math.fsum(cheapest) + table.fixed
        if least <= budget.limit(table):
            continue
        smallest = in_unit(least, budget, table)
        pinned = [i for i, name in enumerate(table.layers) if name in pins]
        free = np.nanmin(table.value, axis=1)
        extra = math.fsum(cheapest[i] - free[i] for i in pinned)
        why = _pins_cost(pinned, cheapest - free, budget, table) if extra else ""
        yield InfeasibleError(
            "E201",
            f"budget '{budget}' cannot be met: the {_best(budget)} allowed plan needs {smallest}",
            because=why or f"what is not decided takes {in_unit(table.fixed, budget, table)} of it"
            if table.fixed
            else why,
            advice=f"budget: {' '.join([budget.resource, '<=', smallest, budget.condition]).rstrip()}, "
            "or offer smaller formats",
        )


def _best(budget: Budget) -> str:
    return "fastest" if budget.resource in TIMED else "cheapest"


def _pins_cost(pinned: Sequence[int], extra: Array, budget: Budget, table: CostTable) -> str:
    """What the pins add together, and the dearest ones alone."""
    total = in_unit(math.fsum(extra[pinned].tolist()), budget, table)
    dearest = sorted((i for i in pinned if extra[i] > 0), key=lambda i: -float(extra[i]))[:_DEAREST]
    each = ", ".join(f"'{table.layers[i]}' {in_unit(float(extra[i]), budget, table)}" for i in dearest)
    return f"{len(pinned)} pinned decisions cost {total} more than their cheapest format: {each}" + (
        " …" if len(dearest) < sum(extra[i] > 0 for i in pinned) else ""
    )


def in_unit(cost: float, budget: Budget, table: CostTable) -> str:
    """Write a cost in a budget's unit, rounded up so that it is enough."""
    exact = Fraction(cost) * Fraction(table.source.get("margin", 1.0) if table.unit == "s" else 1.0)
    if budget.unit == "%":
        amount = exact * 100 / Fraction(table.reference)
    elif budget.unit == "bits":
        amount = exact * 8 / table.weights
    else:
        amount = exact / budget.scale
    rounded = Fraction(math.ceil(amount * 10_000), 10_000)
    return f"{decimal_text(rounded)} {budget.unit}"
