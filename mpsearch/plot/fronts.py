"""The front: what plans lose over what they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpsearch.plot.chart import Axis, Chart, Dots, Mark, Panel, Rule, scaled
from mpsearch.plot.text import named
from mpsearch.web.amounts import size, whole_bytes, with_spread

MIB = 2**20
#: Group -> (shape, size in points, name in the key), in the order of drawing.
STYLES: Mapping[str, tuple[str, float, str]] = {
    "random": ("dot", 3.0, "random plan"),
    "imported": ("square", 5.5, "imported"),
    "searched": ("triangle", 5.5, "searched"),
    "uniform": ("diamond", 6.0, "uniform"),
    "mixed": ("circle", 5.0, "mixed"),
    "chosen": ("star", 10.0, "chosen plan"),
}
_GREYED = ("mixed", "searched")


def front_chart(data: Mapping[str, Any], title: str = "") -> Chart:
    """Draw what `mpsearch.views.front_data.front_data` returned.

    Args:
        data: the plans.
        title: of the picture.
    """
    unit, scale = ("MiB", MIB) if data["unit"] == "bytes" else (data["unit"], 1)
    log, ends = scaled([point["loss"] for point in data["points"]])
    shown = [point for point in data["points"] if not log or point["loss"] > 0]
    below = [point for point in data["points"] if log and point["loss"] <= 0]
    bound = [(x / scale, y) for x, y in data["bound"] if not log or y > 0]
    places = [point["cost"] / scale for point in shown]
    _, across = scaled([*places, *(limit["limit"] / scale for limit in data["budgets"])], log=False)
    if across is not None:
        across = (max(across[0], 0.0), across[1])
    marks: list[Mark] = [Rule(limit["limit"] / scale, limit["text"]) for limit in data["budgets"]]
    kinds = {point["kind"] for point in shown}
    if bound:
        x, y = zip(*_stairs(bound), strict=True)
        name = "bound of predicted loss" + ("" if kinds == {"predicted"} else ", not of measured loss")
        marks.append(Dots(x, y, "muted", line=0.8, size=0 if len(bound) > 1 else 2, name=name))
    marks += _front_line(shown, scale)
    parts = [mark for group in STYLES for mark in _of_group(group, shown, scale, data)]
    marks += sorted(parts, key=lambda mark: isinstance(mark, Dots) and mark.role != "random")
    per_unit = 8 * scale / data["weights"] if data["weights"] and data["unit"] == "bytes" else 0.0
    what = "model size" if data["resource"] == "weights" else data["resource"]
    loss = "measured loss" if kinds == {"measured"} else "predicted loss" if kinds == {"predicted"} else "loss"
    return Chart(
        title or "Loss over size: lower and further left is better",
        (
            Panel(
                Axis(f"{what} ({unit})", ends=across, top=("bits per weight", per_unit) if per_unit else None),
                Axis(f"{loss} ({data['loss_unit']})", log, ends),
                tuple(marks),
            ),
        ),
        tuple(_notes(data, below, kinds)),
        height=4.4,
    )


def _stairs(bound: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line: each pair holds from the place of the one before to its own.

    >>> _stairs([(1.0, 3.0), (2.0, 2.0)])
    [(1.0, 3.0), (1.0, 2.0), (2.0, 2.0)]
    """
    corners = [bound[0]]
    for x, y in bound[1:]:
        corners += [(corners[-1][0], y), (x, y)]
    return corners


def _front_line(points: Sequence[Mapping[str, Any]], scale: float) -> list[Mark]:
    line = sorted((p["cost"] / scale, p["loss"]) for p in points if p["front"])
    if len(line) < 2:
        return []
    x, y = zip(*line, strict=True)
    return [Dots(x, y, "mixed", line=1.2, size=0, name="measured front")]


def _of_group(group: str, points: Sequence[Mapping[str, Any]], scale: float, data: Mapping[str, Any]) -> list[Mark]:
    """Marks of one group: beaten ones in grey, predicted ones hollow, the others with their standard errors."""
    shape, wide, name = STYLES[group]
    members = [point for point in points if point["group"] == group]
    measured = [point for point in members if point["kind"] == "measured"]
    grey = [point for point in measured if group in _GREYED and not point["front"]]
    full = [point for point in measured if group not in _GREYED or point["front"]]
    hollow = [p for p in members if p["kind"] == "predicted"]
    parts = (
        (grey, "random", f"{name}, beaten", False),
        (full, group, name, False),
        (hollow, group, f"{name}, only predicted", True),
    )
    return [
        Dots(
            tuple(p["cost"] / scale for p in part),
            tuple(p["loss"] for p in part),
            role,
            shape,
            called,
            y_error=() if unfilled or group == "random" else tuple(_error(p) for p in part),
            hollow=unfilled,
            size=wide if len(part) <= 300 else min(wide, 3.0),
            texts=tuple(_told(p, data) for p in part),
        )
        for part, role, called, unfilled in parts
        if part
    ]


def _error(point: Mapping[str, Any]) -> float:
    return math.nan if point["error"] is None else float(point["error"])


def _told(point: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[str, ...]:
    if data["unit"] == "bytes":
        lines = [point["label"], f"{size(point['cost'])} ({whole_bytes(point['cost'])})"]
        if data["weights"]:
            lines.append(f"{8 * point['cost'] / data['weights']:.4f} bits per weight")
    else:
        lines = [point["label"], f"{point['cost']:,.6g} {data['unit']}"]
    unit = data["loss_unit"]
    if point["kind"] == "measured":
        lines.append(f"measured loss {with_spread(point['loss'], point['error'])} {unit}")
    if point["predicted"] is not None:
        lines.append(f"predicted loss {with_spread(point['predicted'])} {unit}")
    return tuple(lines)


def _notes(data: Mapping[str, Any], below: Sequence[Mapping[str, Any]], kinds: set[str]) -> list[str]:
    notes = []
    if not data["points"]:
        notes.append("No plan has both a size and a loss yet.")
    elif "measured" not in kinds and kinds:
        notes.append("Nothing was measured yet: all losses are predicted.")
    elif len(kinds) > 1:
        notes.append("Hollow marks are predicted only. Bars are standard errors of what was measured.")
    if below:
        names = named([point["label"] for point in below])
        notes.append(f"Not on the logarithmic axis: loss of zero or less: {names}.")
    whys = dict.fromkeys(item["why"] for item in data["left_out"])
    for why in whys:
        notes.append(f"Left out, {why}: {named([item['label'] for item in data['left_out'] if item['why'] == why])}.")
    return notes
