"""A plan layer by layer, with the loss that was predicted of each decision."""

from __future__ import annotations

import math

from mpsearch.planning import usable
from mpsearch.views.study_view import StudyView
from mpsearch.web.amounts import number, with_spread
from mpsearch.web.markup import Html, tag
from mpsearch.web.table import Column, Row, data_table


def layer_table(view: StudyView, i: int, name: str = "layers") -> Html:
    """List every layer of a plan: format, stored bits and bytes, predicted loss of its decision.

    Args:
        view: the study.
        i: number of the plan.
        name: id of the table.
    """
    exact = f"exact, {counted}" if (counted := view.plan(i).counted_in) else "exact"
    columns = (
        Column("layer", numeric=False),
        Column("format", numeric=False),
        Column("bits per weight", exact),
        Column("bytes", exact),
        Column("loss ± standard error", f"predicted, {view.points.unit}"),
    )
    scores = None if view.scores is None else usable(view.scores)
    column = {} if scores is None else {fmt: j for j, fmt in enumerate(scores.formats)}
    tied = {row.name for row in view.layers.decisions if len(row.layers) > 1}
    rows = []
    for layer, row, j, sizes in zip(view.layers, view.rows, view.points.choice[i].tolist(), view.sizes, strict=True):
        fmt = view.points.formats[j]
        loss = spread = math.nan
        if scores is not None and fmt in column:
            loss, spread = float(scores.value[row, column[fmt]]), float(scores.spread[row, column[fmt]])
        told: object = number(loss, with_spread(loss, spread)) if math.isfinite(loss) else "not scored"
        if layer.tie in tied:
            told = Html(f"{told}{tag('small', 'of all layers tied as ', tag('bdi', layer.tie))}")
        rows.append(Row((tag("bdi", layer.name), fmt, *_sizes(float(sizes[j]), layer.weights), told)))
    return data_table(name, columns, rows)


def _sizes(count: float, weights: int) -> tuple[object, object]:
    if not math.isfinite(count):
        return "unknown", "unknown"
    bits = 8 * count / weights if weights else math.nan
    return number(bits, f"{bits:.3f}") if weights else "", number(int(count), f"{int(count):,}")
