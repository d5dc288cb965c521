"""The table of measured plans, and what each gains over the uniform ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpsearch.front import Measurement
from mpsearch.verdict import best_uniform
from mpsearch.web.amounts import number, size, with_spread
from mpsearch.web.markup import Html, join, tag
from mpsearch.web.report_data import ReportData, group_of
from mpsearch.web.table import Column, Row, data_table

#: A gain below this many of its standard errors is within noise; the same as in the verdict's sentences.
NOISE = 1.96


def plan_table(view: ReportData, members: Sequence[Measurement], name: str) -> Html:
    """Write some of a study's measurements as a table, smallest first.

    Args:
        view: the study; its uniform plans are what every gain refers to.
        members: the measurements to list.
        name: id of the table.
    """
    columns = (
        Column("plan", numeric=False),
        Column("bits per weight", "exact"),
        Column("bytes", "exact"),
        Column("loss ± standard error", f"measured, {view.unit}"),
        Column("gain against uniform", f"measured, {view.unit}"),
    )
    ordered = sorted(members, key=lambda m: (m.cost["weights"], m.loss, m.plan))
    return data_table(name, columns, (_row(view, m) for m in ordered))


def _row(view: ReportData, measurement: Measurement) -> Row:
    count = measurement.cost["weights"]
    bits = view.bits(measurement)
    chosen = view.is_chosen(measurement)
    cells = (
        join([measurement.label, tag("span", "chosen", class_="tag") if chosen else ""]),
        number(bits, f"{bits:.3f}"),
        join([number(count, f"{int(count):,}"), tag("small", size(count))]),
        number(measurement.loss, with_spread(measurement.loss, measurement.spread)),
        _gain(view, measurement),
    )
    return Row(cells, chosen)


def _gain(view: ReportData, measurement: Measurement) -> Html:
    """Say how much less a plan loses than the best uniform plan that is no larger, and how sure that is."""
    if group_of(measurement) == "uniform":
        return Html("")
    uniform = best_uniform(view.measurements, measurement.cost["weights"])
    if uniform is None:
        return tag("small", "no uniform plan this small")
    if uniform.plan == measurement.plan:
        return tag("small", "the same plan as ", uniform.label)
    gain = uniform.loss - measurement.loss
    spread = math.hypot(uniform.spread, measurement.spread)
    share = "against "
    if uniform.loss > 0:
        share = f"{100 * abs(gain) / uniform.loss:.0f} % {'less' if gain >= 0 else 'more'} than "
    doubt = ", within noise" if abs(gain) < NOISE * spread else ""
    return join([number(gain, with_spread(gain, spread)), tag("small", share, uniform.label, doubt)])
