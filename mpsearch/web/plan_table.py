"""The table of plans that are worth a look, and what each gains over the uniform ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mpsearch.front import Measurement
from mpsearch.verdict import difference_error
from mpsearch.views.steps import SIGNIFICANT
from mpsearch.views.study_view import StudyView
from mpsearch.web.amounts import number, size, with_spread
from mpsearch.web.markup import Html, join, tag
from mpsearch.web.table import Column, Row, data_table

#: Most plans that the table lists.
MOST = 60


def listed(view: StudyView) -> list[int]:
    """Numbers of the plans of the table, smallest first: the chosen one, the front, uniform and imported ones."""
    points = view.points
    cost = points.cost.get("weights", np.full(len(points), np.nan))
    known = np.isfinite(points.loss) | np.isfinite(points.predicted)
    front = points.front() if points.measured.any() else points.front(predicted=True)
    ranked = sorted(
        (i for i in range(len(points)) if known[i] and np.isfinite(cost[i])),
        key=lambda i: (not _kept(points.groups[i]), not front[i], i),
    )
    wanted = [i for i in ranked if front[i] or _kept(points.groups[i])]
    return sorted(wanted[:MOST], key=lambda i: (cost[i], points.loss[i], points.keys[i]))


def _kept(group: str) -> bool:
    return group in ("chosen", "uniform", "imported")


def plan_table(view: StudyView, numbers: Sequence[int], name: str) -> Html:
    """Write plans of a study as a table.

    Args:
        view: the study; its uniform plans are what every gain refers to.
        numbers: of the plans, in order.
        name: id of the table.
    """
    unit = view.points.unit
    columns = (
        Column("plan", numeric=False),
        Column("bits per weight", "exact"),
        Column("bytes", "exact"),
        Column("loss ± standard error", f"measured, {unit}"),
        Column("loss", f"predicted, {unit}"),
        Column("gain against uniform", f"measured, {unit}"),
    )
    rival, runs = view.points.rival, {m.plan: m for m in reversed(view.measured)}
    return data_table(name, columns, (_row(view, i, rival[i], runs) for i in numbers))


def _row(view: StudyView, i: int, best: int | None, runs_of: Mapping[str, Measurement]) -> Row:
    points = view.points
    count, loss, predicted = float(points.cost["weights"][i]), float(points.loss[i]), float(points.predicted[i])
    bits = 8 * count / view.weights if view.weights else math.nan
    chosen = points.groups[i] == "chosen"
    cells = (
        join([tag("bdi", points.labels[i] or "a plan"), tag("span", "chosen", class_="tag") if chosen else ""]),
        number(bits, f"{bits:.3f}") if math.isfinite(bits) else "unknown",
        join([number(count, f"{int(count):,}"), tag("small", size(count))]),
        number(loss, with_spread(loss, float(points.spread[i]))) if math.isfinite(loss) else _told(loss),
        number(predicted, with_spread(predicted)) if math.isfinite(predicted) else "not predicted",
        _gain(view, i, best, runs_of),
    )
    return Row(cells, chosen, i)


def _told(loss: float) -> str:
    return "not measured" if math.isnan(loss) else "not finite"


def _gain(view: StudyView, i: int, best: int | None, runs_of: Mapping[str, Measurement]) -> Html:
    """Say how much less a plan loses than the best uniform plan that is no larger, and how sure that is."""
    points = view.points
    loss = points.loss
    if points.groups[i] == "uniform" or not math.isfinite(loss[i]):
        return Html("")
    if best is None:
        return tag("small", "no uniform plan this small")
    gain = float(loss[best] - loss[i])
    runs = [runs_of.get(points.keys[j]) for j in (i, best)]
    spread = math.hypot(points.spread[best], points.spread[i])
    if runs[0] is not None and runs[1] is not None:
        spread = difference_error(runs[0], runs[1])
    share = "against "
    if loss[best] > 0:
        share = f"{100 * abs(gain) / loss[best]:.0f} % {'less' if gain >= 0 else 'more'} than "
    doubt = ", within noise" if abs(gain) < SIGNIFICANT * spread else ""
    return join([number(gain, with_spread(gain, spread)), tag("small", share, tag("bdi", points.labels[best]), doubt)])
