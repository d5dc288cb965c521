"""Scores of a study for the terminal: each decision's loss with its error, and how it falls from format to format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.cli.looks import wrapped
from mpsearch.errors import InputError, did_you_mean
from mpsearch.views.steps import Ladder

if TYPE_CHECKING:
    from mpsearch.cli.looks import Pen
    from mpsearch.views.study_view import StudyView

#: Rows that a terminal is given; a pipe gets all.
_MOST = 60
_STEPS, _PLAIN = "▁▂▃▄▅▆▇█", "01234567"


def scores_json(view: StudyView) -> dict[str, Any]:
    """Scores as stored: one entry for each decision.

    Raises:
        InputError: the study has no scores (E143).
    """
    table = _table(view)
    rows = []
    for i, decision in enumerate(view.layers.decisions):
        cells = zip(table.formats, table.value[i].tolist(), table.spread[i].tolist(), table.status[i], strict=True)
        rows.append(
            {
                "decision": decision.name,
                "layers": [layer.name for layer in decision.layers],
                "scores": {
                    name: {"loss": _finite(loss), "error": _finite(error), "status": status}
                    for name, loss, error, status in cells
                },
            }
        )
    estimator = str(table.source.get("estimator", ""))
    return {"study": view.study, "estimator": estimator, "unit": table.unit, "rows": rows}


def score_lines(view: StudyView, pen: Pen, at: str = "") -> Iterator[str]:
    """A line for each decision, the one that loses most first.

    Args:
        view: of the study.
        pen: of the output.
        at: format whose losses are listed; the one that the chosen plan gives most decisions when empty.

    Raises:
        InputError: the study has no scores (E143), or none in that format (E109).
    """
    table = _table(view)
    if at and at not in table.formats:
        raise InputError(
            "E109", f"there are no scores in '{at}'{did_you_mean(at, table.formats)}",
            advice=f"there are scores in {', '.join(table.formats)}",
        )  # fmt: skip
    ladder = Ladder.of(view)
    shown = at or _usual(view, table.formats)
    column = ladder.formats.index(shown)
    by_bits = [name for name in ladder.formats if name in table.formats]
    places = [ladder.formats.index(name) for name in by_bits]
    loss, error = ladder.loss[:, column], ladder.error[:, column]
    order = sorted(range(len(loss)), key=lambda i: (not math.isfinite(loss[i]), -np.nan_to_num(loss[i]), i))
    estimator = str(table.source.get("estimator", "")) or "an estimator"
    yield from wrapped(f"Predicted loss of each decision alone in {shown}, by {estimator}, in {table.unit}.", pen)
    yield from wrapped(f"Bars and curves are logarithmic; the curve goes over {', '.join(by_bits)}.", pen)
    known = loss[np.isfinite(loss) & (loss > 0)]
    low, high = (math.log10(known.min()) - 0.3, math.log10(known.max())) if len(known) else (0.0, 1.0)
    top = _MOST if pen.width and len(order) > _MOST else len(order)
    rows = [["decision", "loss", "error", "", "curve"]]
    range_ = _range(ladder.loss[:, places])
    for i in order[:top]:
        share = (math.log10(loss[i]) - low) / max(high - low, 1e-9) if loss[i] > 0 else 0.0
        rows.append(
            [
                ladder.names[i],
                f"{loss[i]:.4g}" if math.isfinite(loss[i]) else _why(table.status[i][table.formats.index(shown)]),
                f"± {error[i]:.2g}" if math.isfinite(error[i]) else "",
                pen.bar(share, 14),
                _curve(ladder.loss[i, places], range_, pen),
            ]
        )
    yield from pen.table(rows, "<><<<")
    if top < len(order):
        rest = math.fsum(np.nan_to_num(loss[order[top:]]).tolist())
        yield f"and {len(order) - top} more, {rest:.4g} {table.unit} together; a pipe or --json has all"


def _table(view: StudyView) -> Any:
    if view.scores is None:
        raise InputError(
            "E143", f"study '{view.study}' has no scores: it is {view.state}", advice="let it run on: mpsearch resume"
        )
    return view.scores


def _usual(view: StudyView, formats: Sequence[str]) -> str:
    """The format that the chosen plan gives most decisions, of those that were scored."""
    if not len(view.points):
        return formats[0]
    choice = view.points.choice[view.chosen]
    counts = Counter(view.points.formats[choice[i]] for i in view.leads)
    return max((name for name in formats), key=lambda name: (counts[name], -formats.index(name)))


def _range(loss: np.ndarray[Any, Any]) -> tuple[float, float]:
    known = loss[np.isfinite(loss) & (loss > 0)]
    return (math.log10(known.min()), math.log10(known.max())) if len(known) else (0.0, 1.0)


def _curve(loss: np.ndarray[Any, Any], ends: tuple[float, float], pen: Pen) -> str:
    signs = _STEPS if pen.unicode else _PLAIN
    low, high = ends
    found = ""
    for value in loss.tolist():
        if not math.isfinite(value):
            found += "?"
        elif value <= 0:
            found += signs[0]
        else:
            found += signs[round((math.log10(value) - low) / max(high - low, 1e-9) * 7)]
    return found


def _why(status: str) -> str:
    return status.replace("_", " ")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
