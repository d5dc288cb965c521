"""What each layer loses in each format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpsearch.plot.chart import Axis, Chart, Dots, Mark, Panel, scaled
from mpsearch.plot.text import named, stemless
from mpsearch.web.amounts import whole_bytes, with_spread

_SHAPES = ("circle", "square", "triangle", "diamond", "down", "star", "cross")
_ROLES = ("mixed", "uniform", "searched", "imported", "chosen", "random")
#: More curves than this are grey.
MOST = len(_ROLES)


def curves_chart(data: Mapping[str, Any], chosen: Sequence[int]) -> Chart:
    """Draw loss over stored bits per weight, one curve for each decision that was picked.

    Args:
        data: what `mpsearch.views.curves.curves` returned.
        chosen: numbers of the decisions; only the first few have colours.
    """
    decisions = [data["decisions"][i] for i in chosen]
    log, ends = scaled([p["loss"] for d in decisions for p in d["points"] if p["loss"] is not None])
    called = stemless([decision["name"] for decision in decisions])
    marks: list[Mark] = []
    for number, decision in reversed(list(enumerate(decisions))):
        points = [p for p in decision["points"] if p["loss"] is not None and p["bytes"] is not None]
        points = sorted((p for p in points if not log or p["loss"] > 0), key=lambda p: p["bytes"])
        if not points:
            continue
        coloured = number < MOST
        marks.append(
            Dots(
                tuple(_place(p, decision) for p in points),
                tuple(p["loss"] for p in points),
                _ROLES[number] if coloured else "random",
                _SHAPES[number] if coloured else "dot",
                called[number] if coloured else f"{len(decisions) - MOST} more",
                y_error=tuple(_error(p) for p in points) if coloured else (),
                line=1.2 if coloured else 0.6,
                dash=coloured and number % 2 == 1,
                size=4.5 if coloured else 2,
                texts=tuple(_told(decision["name"], p, data["unit"]) for p in points),
            )
        )
    cached = any(not d["weights"] for d in decisions)
    x = "bytes" if cached else "stored bits per weight of the layer"
    wide = scaled([v for mark in marks if isinstance(mark, Dots) for v in mark.x], log=False)[1]
    title = f"Predicted loss of single layers by format{_by(data)}"
    panel = Panel(Axis(x, ends=wide), Axis(f"predicted loss ({data['unit']})", log, ends), tuple(marks))
    return Chart(title, (panel,), tuple(_notes(decisions, log)), height=4.2)


def sensitivity_chart(data: Mapping[str, Any]) -> Chart:
    """Draw the loss of every decision in network order, one line for each format.

    Args:
        data: as for `curves_chart`.
    """
    decisions = data["decisions"]
    log, ends = scaled([p["loss"] for d in decisions for p in d["points"] if p["loss"] is not None])
    marks: list[Mark] = []
    count = len(data["formats"])
    for j, name in enumerate(data["formats"]):
        losses = [d["points"][j]["loss"] for d in decisions]
        y = tuple(math.nan if v is None or (log and v <= 0) else v for v in losses)
        if all(map(math.isnan, y)):
            continue
        marks.append(
            Dots(
                tuple(map(float, range(len(decisions)))),
                y,
                f"ramp:{j / max(count - 1, 1):.3f}",
                _SHAPES[j % len(_SHAPES)],
                name,
                y_error=tuple(_error(d["points"][j]) for d in decisions) if len(decisions) <= 150 else (),
                # Lines between so many would hide each other.
                line=0.9 if len(decisions) <= 150 else 0.0,
                size=4.0 if len(decisions) <= 150 else 2.5,
                texts=tuple(_told(d["name"], d["points"][j], data["unit"]) for d in decisions),
            )
        )
    names = tuple(stemless([d["name"] for d in decisions]))
    panel = Panel(
        Axis("decision, in network order", names=names),
        Axis(f"predicted loss ({data['unit']})", log, ends),
        tuple(marks),
    )
    return Chart(f"Predicted loss of each layer by format{_by(data)}", (panel,), tuple(_notes(decisions, log)), 5.0)


def _by(data: Mapping[str, Any]) -> str:
    return f", by {data['estimator']}" if data["estimator"] else ""


def _place(point: Mapping[str, Any], decision: Mapping[str, Any]) -> float:
    return float(8 * point["bytes"] / decision["weights"]) if decision["weights"] else float(point["bytes"])


def _error(point: Mapping[str, Any]) -> float:
    return math.nan if point["error"] is None else float(point["error"])


def _told(name: str, point: Mapping[str, Any], unit: str) -> tuple[str, ...]:
    if point["loss"] is None:
        return (name, point["format"], point["status"].replace("_", " "))
    lines = [name, point["format"], f"predicted loss {with_spread(point['loss'], point['error'])} {unit}"]
    if point["bytes"] is not None:
        lines.append(whole_bytes(point["bytes"]))
    if point["settled"]:
        lines.append("estimated below zero: its standard error counts")
    return tuple(lines)


def _notes(decisions: Sequence[Mapping[str, Any]], log: bool) -> list[str]:
    notes = ["Bars are standard errors."]
    settled = [d["name"] for d in decisions if any(p["settled"] for p in d["points"])]
    if settled:
        notes.append(f"Estimated below zero in some format, where the standard error counts: {named(settled)}.")
    if log and (zero := [d["name"] for d in decisions if any(p["loss"] == 0 for p in d["points"])]):
        notes.append(f"Not on the logarithmic axis: loss of zero in some format: {named(zero)}.")
    for status in ("non_finite", "not_observed"):
        names = [d["name"] for d in decisions if any(p["status"] == status for p in d["points"])]
        if names:
            notes.append(f"No score in some format ({status.replace('_', ' ')}): {named(names)}.")
    return notes
