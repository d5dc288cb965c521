"""The report's charts as Plotly figures: plain values, colours by the name of a style variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpsearch.front import Measurement, ParetoFront
from mpsearch.web.amounts import MIB, size, whole_bytes, with_spread
from mpsearch.web.markup import chart_text
from mpsearch.web.report_data import ReportData, group_of

Figure = dict[str, Any]

#: Beyond this ratio between the largest and the smallest loss an axis is logarithmic.
LOG_RATIO = 10.0
_MARKS = (("random", "faint", "circle"), ("mixed", "mixed", "circle"), ("uniform", "uniform", "diamond"))


def front_figure(view: ReportData) -> Figure:
    """Draw measured loss over exact size: front, uniform, random and dominated plans, budgets.

    The figure's ``twin`` is the factor between the lower axis (MiB) and the upper one (bits per weight).
    """
    groups: dict[str, list[Measurement]] = {"mixed": [], "uniform": [], "random": []}
    for measurement in view.measurements:
        groups[group_of(measurement)].append(measurement)
    front = ParetoFront.of(groups["mixed"])
    chosen = view.chosen_measurement
    traces = [
        _points(view, groups["random"], "random", {"color": "var(--faint)", "size": 5}),
        _points(
            view, front.dominated, "mixed, dominated", {"color": "var(--faint)", "size": 8, "symbol": "circle-open"}
        ),
        _points(view, front.points, "mixed", {"color": "var(--mixed)", "size": 9}, line=True),
        _points(view, groups["uniform"], "uniform", {"color": "var(--uniform)", "size": 11, "symbol": "diamond"}),
        _ring(view, [chosen] if chosen else []),
    ]
    factor = 8 * MIB / view.weights
    low, high = _range([*(m.cost["weights"] / MIB for m in view.measurements), *(b / MIB for _, b in view.budgets)])
    traces = [trace for trace in traces if trace["x"]]
    # Plotly draws an axis only when something hangs on it.
    traces.append({"x": [low * factor], "y": [None], "xaxis": "x2", "showlegend": False, "hoverinfo": "skip"})
    layout = _layout("model size (MiB, exact)", f"measured loss ({chart_text(view.unit)}), lower is better")
    layout["yaxis"] |= _scale([m.loss for m in view.measurements])
    layout["xaxis"] |= {"range": [low, high]}
    layout["xaxis2"] = _axis("bits per weight (exact)") | {
        "overlaying": "x", "side": "top", "range": [low * factor, high * factor], "showgrid": False, "ticks": "outside",
        "tickmode": "auto",
    }  # fmt: skip
    layout["shapes"] = [_vertical(limit / MIB) for _, limit in view.budgets]
    layout["annotations"] = [_budget_text(text, limit / MIB) for text, limit in view.budgets]
    return {"data": traces, "layout": layout, "twin": factor}


def prediction_figure(view: ReportData) -> Figure | None:
    """Draw measured over predicted loss with the line where both are equal; ``None`` without a prediction."""
    pairs = predicted_pairs(view)
    if not pairs:
        return None
    traces = []
    for name, colour, symbol in _MARKS:
        members = [(loss, m) for loss, m in pairs if group_of(m) == name]
        trace = _points(view, [m for _, m in members], name, {"color": f"var(--{colour})", "size": 9, "symbol": symbol})
        trace["x"] = [loss for loss, _ in members]
        trace["error_x"] = trace["error_y"] | {"array": [view.plans[m.plan].predicted.spread for _, m in members]}
        traces.append(trace)
    values = [value for loss, m in pairs for value in (loss, m.loss)]
    scale = _scale(values)
    ends = [min(v for v in values if v > 0 or scale["type"] == "linear"), max(values)]
    same = {"x": ends, "y": ends, "mode": "lines", "name": "equal", "hoverinfo": "skip"}
    traces = [trace for trace in traces if trace["x"]]
    traces.insert(0, same | {"line": {"color": "var(--muted)", "dash": "dash", "width": 1}})
    layout = _layout(
        f"predicted loss ({chart_text(view.scores.unit)})", f"measured loss ({chart_text(view.unit)}), lower is better"
    )
    layout["xaxis"] |= {"range": _range(values)} | scale
    layout["yaxis"] |= {"range": _range(values)} | scale
    layout["margin"] |= {"t": 24}
    return {"data": traces, "layout": layout}


def predicted_pairs(view: ReportData) -> list[tuple[float, Measurement]]:
    """List (predicted loss, measurement) of the plans that have both."""
    found = []
    for measurement in view.measurements:
        plan = view.plans.get(measurement.plan)
        if plan is not None and plan.loss is not None:
            found.append((plan.loss, measurement))
    return found


def rank_correlation(pairs: Sequence[tuple[float, Measurement]]) -> float | None:
    """Spearman's rank correlation of predicted and measured loss, in [-1, 1]; ``None`` where it is not defined.

    Equal values share their mean rank.
    """
    ranks = [_ranks([loss for loss, _ in pairs]), _ranks([m.loss for _, m in pairs])]
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def off_the_scale(losses: Sequence[float]) -> bool:
    """Say whether some of the losses cannot stand on the axis that the others need."""
    return _scale(losses)["type"] == "log" and min(losses) <= 0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _points(
    view: ReportData, points: Sequence[Measurement], name: str, marker: dict[str, Any], line: bool = False
) -> dict[str, Any]:
    return {
        "x": [m.cost["weights"] / MIB for m in points],
        "y": [m.loss for m in points],
        "error_y": {
            "type": "data", "array": [m.spread for m in points], "color": marker["color"], "thickness": 1, "width": 3,
        },
        "mode": "lines+markers" if line else "markers",
        "name": name,
        "marker": marker,
        "line": {"color": marker["color"], "width": 2},
        "hovertext": [_hover(view, m) for m in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip


def _ring(view: ReportData, points: Sequence[Measurement]) -> dict[str, Any]:
    marker = {"color": "var(--text)", "size": 19, "symbol": "circle-open", "line": {"color": "var(--text)", "width": 2}}
    trace = _points(view, points, "chosen plan", marker)
    return trace | {"error_y": {"visible": False}, "hoverinfo": "skip", "hovertemplate": None}


def _hover(view: ReportData, measurement: Measurement) -> str:
    plan = view.plans.get(measurement.plan)
    count = measurement.cost["weights"]
    lines = [
        f"<b>{chart_text(measurement.label)}</b>",
        f"{size(count)} ({whole_bytes(count)}), exact",
        f"{view.bits(measurement):.4f} bits per weight, exact",
        f"loss {with_spread(measurement.loss, measurement.spread)} {chart_text(measurement.unit)}, measured",
    ]
    if plan is not None and plan.loss is not None:
        lines.append(
            f"loss {with_spread(plan.loss, plan.predicted.spread)} {chart_text(plan.predicted.unit)}, predicted"
        )
    return "<br>".join(lines)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.06 * high or 1.0
    return low - margin, high + margin


def _scale(losses: Sequence[float]) -> dict[str, Any]:
    above = [loss for loss in losses if loss > 0]
    if not above or max(above) <= LOG_RATIO * min(above):
        return {"type": "linear"}
    low, high = _range([float(np.log10(loss)) for loss in above])
    return {"type": "log", "range": [low, high], "dtick": 1 if high - low > 2 else "D2", "tickformat": "~g"}


def _axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 12, "color": "var(--muted)"}, "standoff": 8},
        "gridcolor": "var(--line)", "linecolor": "var(--line)", "tickcolor": "var(--line)", "zeroline": False,
        "tickfont": {"size": 11, "color": "var(--muted)"}, "automargin": True,
    }  # fmt: skip


def _layout(x: str, y: str) -> dict[str, Any]:
    return {
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--text)"},
        "margin": {"l": 8, "r": 12, "t": 56, "b": 8},
        "xaxis": _axis(x),
        "yaxis": _axis(y),
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--panel)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--text)"},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--faint)", "activecolor": "var(--text)"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.18, "yanchor": "top"},
    }


def _vertical(x: float) -> dict[str, Any]:
    line = {"color": "var(--muted)", "width": 1.5, "dash": "dash"}
    return {"type": "line", "layer": "below", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _budget_text(text: str, x: float) -> dict[str, Any]:
    return {
        "x": x, "y": 0.01, "yref": "paper", "xanchor": "right", "yanchor": "bottom", "textangle": -90,
        "showarrow": False, "text": chart_text(text), "font": {"size": 11, "color": "var(--muted)"},
    }  # fmt: skip
