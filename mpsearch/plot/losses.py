"""Predicted against measured losses, and how far estimators agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpsearch.plot.chart import Axis, Bars, Chart, Dots, Mark, Panel, Rule, scaled
from mpsearch.plot.fronts import STYLES
from mpsearch.plot.text import named
from mpsearch.web.amounts import with_spread


def predicted_chart(data: Mapping[str, Any]) -> Chart:
    """Draw what `mpsearch.views.predictions.predictions` returned, with the line where both losses are equal.

    Args:
        data: the plans.
    """
    log, ends = scaled([point[side] for point in data["points"] for side in ("predicted", "measured")])
    shown = [p for p in data["points"] if not log or min(p["predicted"], p["measured"]) > 0]
    marks: list[Mark] = []
    if ends is not None:
        marks.append(Dots(ends, ends, "muted", line=0.9, dash=True, size=0, name="measured as predicted"))
    for group, (shape, wide, name) in STYLES.items():
        part = [point for point in shown if point["group"] == group]
        if part:
            marks.append(
                Dots(
                    tuple(p["predicted"] for p in part),
                    tuple(p["measured"] for p in part),
                    group,
                    shape,
                    name,
                    y_error=tuple(math.nan if p["error"] is None else p["error"] for p in part),
                    size=max(wide - 1, 3.5),
                    texts=tuple(_told(p, data["unit"]) for p in part),
                )
            )
    unit = data["unit"]
    axes = Axis(f"predicted loss ({unit})", log, ends), Axis(f"measured loss ({unit})", log, ends)
    return Chart("Measured over predicted loss", (Panel(*axes, tuple(marks)),), tuple(_notes(data, shown)), height=4.8)


def _told(point: Mapping[str, Any], unit: str) -> tuple[str, ...]:
    return (
        point["label"],
        f"predicted loss {with_spread(point['predicted'], point['doubt'])} {unit}",
        f"measured loss {with_spread(point['measured'], point['error'])} {unit}",
    )


def _notes(data: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    if not data["points"]:
        return ["No plan was both predicted and measured."]
    notes = []
    found = data["correlation"]
    if found is not None:
        notes.append(
            f"Rank correlation (Spearman) {found['value']:.3f}, 95 % interval {found['low']:.3f} to "
            f"{found['high']:.3f}, over {found['count']} plans. Bars are standard errors."
        )
    missing = [point["label"] for point in data["points"] if point not in shown]
    if missing:
        notes.append(f"Not on the logarithmic axes: a loss of zero or less: {named(missing)}.")
    if data["left_out"]:
        notes.append(f"Left out, measured as infinite: {named(data['left_out'])}.")
    return notes


def agreement_chart(data: Mapping[str, Any]) -> Chart:
    """Draw the rank correlation of each pair with its interval.

    Args:
        data: ``pairs``: what `mpsearch.views.agreement.Agreement.to_json` returned, of each.
    """
    pairs = data["pairs"]
    names = tuple(f"{pair['first']} – {pair['second']}" for pair in pairs)
    rows = tuple(map(float, range(len(pairs))))
    marks: list[Mark] = []
    for measured, role, shape in ((True, "mixed", "circle"), (False, "uniform", "diamond")):
        part = [i for i, pair in enumerate(pairs) if (pair["second"] == "measured") == measured]
        if not part:
            continue
        low = tuple(pairs[i]["low"] for i in part)
        marks += [
            Bars(tuple(rows[i] for i in part), low, tuple(pairs[i]["high"] - pairs[i]["low"] for i in part),
                 ("line",) * len(part), width=0.3),
            Dots(
                tuple(pairs[i]["value"] for i in part), tuple(rows[i] for i in part), role, shape,
                "prediction with measured loss of plans" if measured else "scores of two estimators", size=7,
                texts=tuple(_pair(pairs[i]) for i in part),
            ),
        ]  # fmt: skip
    lowest = min([0.0, *(pair["low"] for pair in pairs)])
    marks.insert(0, Rule(0.0, ""))
    notes = ["Bars are 95 % intervals. 1 is the same order, 0 none, −1 the opposite."]
    if not pairs:
        notes = ["Nothing to compare: fewer than four plans were measured, and one estimator scored."]
    panel = Panel(
        Axis("rank correlation (Spearman)", ends=(lowest - 0.05, 1.05)),
        Axis("", names=names or ("",), down=True),
        tuple(marks),
    )
    return Chart("How far estimators agree", (panel,), tuple(notes), height=min(1.9 + 0.32 * len(pairs), 9.0))


def _pair(pair: Mapping[str, Any]) -> tuple[str, ...]:
    over = "plans" if pair["second"] == "measured" else "scores"
    return (
        f"{pair['first']} – {pair['second']}",
        f"{pair['value']:.3f} ({pair['low']:.3f} to {pair['high']:.3f}) over {pair['count']} {over}",
    )
