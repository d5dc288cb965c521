"""What stands on a picture of loss over size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpsearch.views.points import Points

#: Numbers of plain data; what is not known is None.
Plain = dict[str, Any]


def front_data(
    points: Points,
    budgets: Sequence[tuple[str, str, float]] = (),
    *,
    weights: int = 0,
    resource: str = "weights",
    units: str = "bytes",
) -> Plain:
    """Return each plan with its cost, its loss and whether that was measured; lower loss is better.

    Args:
        points: the plans.
        budgets: (text, resource, limit) of each; those of other resources are left out.
        weights: number of weights of the model, for bits per weight; 0 where unknown.
        resource: which cost.
        units: of that cost.

    Returns:
        ``points``: list of mappings with ``label``, ``key``, ``group``, ``cost``, ``loss``, ``error`` (standard error;
        of a prediction its upper limit), ``kind`` (``measured`` or ``predicted``), ``predicted``, ``front``. ``bound``:
        [cost, least predicted loss] pairs that fall, of plans solved for this resource alone: one holds from the cost
        of the pair before to its own. ``left_out``: mappings with ``label`` and ``why``.

    >>> from mpsearch.testing.views import pretended
    >>> data = front_data(pretended(20, 16, 4).points)
    >>> data["points"][0]["group"], len(data["points"]) + len(data["left_out"])
    ('chosen', 20)
    """
    cost = points.cost.get(resource, np.full(len(points), np.nan)).tolist()
    on_front = points.front(resource).tolist()
    shown, left_out = [], []
    for i, label in enumerate(points.labels):
        measured, predicted = float(points.loss[i]), float(points.predicted[i])
        seen = not math.isnan(measured)
        loss = measured if seen else predicted
        if not math.isfinite(cost[i]) or not math.isfinite(loss):
            left_out.append({"label": label, "why": _why(cost[i], loss, resource, seen)})
            continue
        shown.append(
            {
                "label": label,
                "key": points.keys[i],
                "group": points.groups[i],
                "cost": cost[i],
                "loss": loss,
                "error": known(points.spread[i] if seen else points.doubt[i]),
                "kind": "measured" if seen else "predicted",
                "predicted": known(predicted),
                "front": bool(on_front[i]),
            }
        )
    return {
        "figure": "front",
        "resource": resource,
        "unit": units,
        "loss_unit": points.unit,
        "weights": weights,
        "points": shown,
        "bound": _bound(points, cost, resource),
        "budgets": [
            {"text": text, "limit": limit} for text, of, limit in budgets if of == resource and math.isfinite(limit)
        ],
        "left_out": left_out,
    }


def _bound(points: Points, cost: Sequence[float], resource: str) -> list[list[float]]:
    alone = points.alone(resource)
    pairs = sorted(
        (size, float(least))
        for size, least, own in zip(cost, points.bound, alone, strict=True)
        if own and math.isfinite(size) and math.isfinite(least)
    )
    found: list[list[float]] = []
    for size, least in pairs:
        # What is proven of a smaller budget is no less: one that is solved less far tells less.
        least = min(least, found[-1][1]) if found else least
        if found and found[-1][0] == size:
            found[-1][1] = least
        else:
            found.append([size, least])
    return found


def _why(cost: float, loss: float, resource: str, measured: bool) -> str:
    if not math.isfinite(cost):
        return f"its {resource} are not known"
    if math.isnan(loss):
        return "no loss of it is known"
    return f"its {'measured' if measured else 'predicted'} loss is infinite"


def known(value: float | None) -> float | None:
    """Return a number, or None for one that is not known.

    >>> known(math.nan), known(np.float64(2))
    (None, 2.0)
    """
    return None if value is None or not math.isfinite(value) else float(value)
