"""Charts as Plotly figures, to look into: hovering tells what each mark is."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpsearch.plot.chart import Axis, Bars, Cells, Chart, Dots, Mark, Panel, Rule, ticks
from mpsearch.plot.text import for_plotly, parted, thinned
from mpsearch.plot.theme import Theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SHAPES = {
    "circle": "circle", "square": "square", "diamond": "diamond", "triangle": "triangle-up",
    "down": "triangle-down", "cross": "x-thin", "star": "star", "dot": "circle",
}  # fmt: skip
#: Pixels of one point.
_PIXELS = 96 / 72
#: Characters of a name on an axis.
_CUT = 22
#: Names that one axis has room for.
_NAMES = 60
_FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def draw(chart: Chart, theme: Theme, *, words: bool = True) -> go.Figure:
    """Draw a chart with Plotly; it fills the width of its place.

    Args:
        chart: what to draw.
        theme: its colours.
        words: whether title and notes stand in the figure; it cannot break them to the width of its place.
    """
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(chart, theme, words))
    seen: set[str] = set()
    for number, panel in enumerate(chart.panels, 1):
        suffix = "" if number == 1 else str(number)
        where = {"xaxis": f"x{suffix}", "yaxis": "y"}
        for mark in panel.marks:
            for trace in _traces(mark, panel, theme):
                name = trace.get("name", "")
                trace["showlegend"] = bool(name) and name not in seen
                seen.add(name)
                figure.add_trace(trace | where)
            if isinstance(mark, Rule):
                _add_rule(figure, mark, panel, theme, where)
        if panel.x.top:
            _add_top(figure, panel.x, theme)
    return figure


def _layout(chart: Chart, theme: Theme, words: bool) -> dict[str, Any]:
    axes: dict[str, Any] = {"yaxis": _axis(chart.panels[0].y, theme)}
    for number, (panel, domain) in enumerate(zip(chart.panels, _domains(chart), strict=True), 1):
        axes[f"xaxis{number if number > 1 else ''}"] = _axis(panel.x, theme) | {"domain": domain} | _turned(panel.x)
    lines = (
        [for_plotly(line, 160) for note in chart.notes for line in textwrap.wrap(note, 110, max_lines=4)]
        if words
        else []
    )
    above = (40 + 16 * len(lines) if words else 8) + (44 if any(panel.x.top for panel in chart.panels) else 16)
    small = f'<span style="font-size:11px;color:{theme.muted}">{"<br>".join(lines)}</span>'
    title = {
        "text": f"{for_plotly(chart.title, 120)}<br>{small}" if lines else for_plotly(chart.title, 120),
        "x": 0.01, "xanchor": "left", "y": 1, "yanchor": "top", "yref": "container", "pad": {"t": 12},
        "font": {"size": 16},
    }  # fmt: skip
    return {
        "template": {"layout": {"colorway": list(theme.groups.values())}},
        "title": title if words else None,
        "autosize": True,
        "height": round(96 * chart.height) + above + 70,
        "paper_bgcolor": theme.ground,
        "plot_bgcolor": theme.ground,
        "font": {"family": _FONT, "size": 12, "color": theme.text},
        "margin": {"l": 64, "r": 20, "t": above, "b": 96},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": theme.ground, "bordercolor": theme.muted, "font": {"color": theme.text}, "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.muted, "activecolor": theme.text},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.01, "yref": "container", "yanchor": "bottom"},
        "barmode": "overlay",
        **axes,
    }  # fmt: skip


def _domains(chart: Chart) -> list[list[float]]:
    widths = chart.widths or (1.0,) * len(chart.panels)
    gap = 0.06
    free = (1 - gap * (len(widths) - 1)) / sum(widths)
    found, left = [], 0.0
    for width in widths:
        found.append([left, min(left + width * free, 1.0)])
        left += width * free + gap
    return found


def _axis(axis: Axis, theme: Theme) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": {"text": for_plotly(axis.title, 120), "font": {"size": 12, "color": theme.muted}, "standoff": 8},
        "type": "log" if axis.log else "linear",
        "gridcolor": theme.line, "linecolor": theme.muted, "tickcolor": theme.muted, "zerolinecolor": theme.muted,
        "zeroline": not axis.names and not axis.log, "tickfont": {"size": 11, "color": theme.muted},
        "automargin": True, "ticks": "outside", "showline": True,
    }  # fmt: skip
    if axis.names:
        shown = thinned(len(axis.names), _NAMES)
        found |= {
            "tickmode": "array", "tickvals": list(shown), "ticktext": [for_plotly(axis.names[i], _CUT) for i in shown],
            "showgrid": False, "ticks": "", "range": [-0.5, len(axis.names) - 0.5],
        }  # fmt: skip
        if axis.down:
            found["range"].reverse()
    elif axis.log:
        found |= {"tickformat": "~g", "exponentformat": "none", "zeroline": False}
        if axis.ends:
            low, high = map(math.log10, axis.ends)
            found |= {"range": [low, high], "dtick": 1 if high - low > 2 else "D2"}
    elif axis.ends:
        found["range"] = list(axis.ends)
    return found


def _turned(axis: Axis) -> dict[str, Any]:
    """The angle of names that cannot stand side by side; what Plotly finds itself is wrong in a narrow place."""
    shown = thinned(len(axis.names), _NAMES)
    return {"tickangle": -50} if any(min(len(axis.names[i]), _CUT) * len(shown) > 72 for i in shown) else {}


def _traces(mark: Mark, panel: Panel, theme: Theme) -> Iterator[dict[str, Any]]:
    if isinstance(mark, Dots):
        yield _dots(mark, panel, theme)
    elif isinstance(mark, Bars):
        yield _bars(mark, theme)
    elif isinstance(mark, Cells):
        yield from _cells(mark, theme)


def _hover(texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    if not texts:
        return {"hoverinfo": "skip"}
    return {"hovertext": [parted(lines) for lines in texts], "hovertemplate": "%{hovertext}<extra></extra>"}


def _dots(mark: Dots, panel: Panel, theme: Theme) -> dict[str, Any]:
    colour = theme.colour(mark.role)
    shape = _SHAPES[mark.shape]
    thin = shape.endswith("-thin")
    marker: dict[str, Any] = {
        "symbol": f"{shape}-open" if mark.hollow or thin else shape, "size": mark.size * _PIXELS, "color": colour,
        "line": {"width": 1.6, "color": colour} if mark.hollow or thin else {"width": 0.8, "color": theme.ground},
    }  # fmt: skip
    found = {
        "type": "scattergl" if len(mark.x) > 2000 else "scatter",
        "x": list(map(_number, mark.x)), "y": list(map(_number, mark.y)), "name": for_plotly(mark.name),
        "mode": ("lines+markers" if mark.size else "lines") if mark.line else "markers", "marker": marker,
        "line": {"color": colour, "width": mark.line * _PIXELS, "dash": "dash" if mark.dash else "solid"},
        **_hover(mark.texts),
    }  # fmt: skip
    for side, errors, values, axis in (
        ("error_x", mark.x_error, mark.x, panel.x),
        ("error_y", mark.y_error, mark.y, panel.y),
    ):
        if errors:
            found[side] = _error(errors, values, axis, colour)
    return found


def _error(errors: Sequence[float], values: Sequence[float], axis: Axis, colour: str) -> dict[str, Any]:
    """Error bars that end at the edge where they would leave a logarithmic axis."""
    least = axis.ends[0] if axis.log and axis.ends else -math.inf
    known = [error if math.isfinite(error) else 0.0 for error in errors]
    minus = [min(error, max(value - least, 0.0)) for error, value in zip(known, values, strict=True)]
    return {
        "type": "data", "symmetric": False, "array": known,
        "arrayminus": [x if math.isfinite(x) else 0.0 for x in minus],
        "color": colour, "thickness": 1, "width": 2,
    }  # fmt: skip


def _bars(mark: Bars, theme: Theme) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "y": list(mark.place), "x": list(mark.length), "base": list(mark.start),
        "name": for_plotly(mark.name),
        "marker": {"color": [theme.colour(role) for role in mark.roles], "line": {"width": 0}},
        "text": [for_plotly(label) for label in mark.labels] or None,
        "textposition": "outside" if mark.labels else "none",
        "cliponaxis": False, "width": mark.width, **_hover(mark.texts),
    }  # fmt: skip


def _cells(mark: Cells, theme: Theme) -> Iterator[dict[str, Any]]:
    roles = list(dict.fromkeys([*(role for role, _ in mark.key), *(cell[3] for cell in mark.cells)]))
    if not roles:
        return
    z: list[list[int | None]] = [[None] * mark.columns for _ in range(mark.rows)]
    text = [[""] * mark.columns for _ in range(mark.rows)]
    hover = [[""] * mark.columns for _ in range(mark.rows)]
    for row, first, last, role, digits, lines in mark.cells:
        for column in range(first, last + 1):
            z[row][column], hover[row][column] = roles.index(role), parted(lines)
        text[row][(first + last) // 2] = for_plotly(digits)
    steps = [(k / len(roles), theme.colour(role)) for i, role in enumerate(roles) for k in (i, i + 1)]
    yield {
        "type": "heatmap", "z": z, "zmin": -0.5, "zmax": len(roles) - 0.5, "colorscale": steps, "showscale": False,
        "text": text, "texttemplate": "%{text}" if mark.rows * mark.columns <= 2000 else None, "xgap": 2, "ygap": 2,
        "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>", "hoverongaps": False,
    }  # fmt: skip
    for role, name in mark.key:
        yield {
            "type": "scatter", "x": [None], "y": [None], "mode": "markers", "name": for_plotly(name),
            "marker": {"symbol": "square", "size": 12, "color": theme.colour(role)}, "hoverinfo": "skip",
        }  # fmt: skip


def _add_rule(figure: go.Figure, rule: Rule, panel: Panel, theme: Theme, where: dict[str, str]) -> None:
    along, across = ("x", "y") if rule.vertical else ("y", "x")
    own, other = where[f"{along}axis"], where[f"{across}axis"]
    line = {"color": theme.muted, "width": 1.3, "dash": "dash"}
    figure.add_shape(
        {
            "type": "line", "layer": "below", "line": line,
            f"{along}0": rule.at, f"{along}1": rule.at, f"{along}ref": own,
            f"{across}0": 0, f"{across}1": 1, f"{across}ref": f"{other} domain",
        }
    )  # fmt: skip
    axis = panel.x if rule.vertical else panel.y
    figure.add_annotation(
        {
            along: math.log10(rule.at) if axis.log else rule.at, f"{along}ref": own,
            across: 0.01 if rule.vertical else 0.99, f"{across}ref": f"{other} domain",
            "text": for_plotly(rule.text), "showarrow": False, "font": {"size": 10, "color": theme.muted},
            "textangle": -90 if rule.vertical else 0, "xanchor": "right", "yanchor": "bottom",
        }
    )  # fmt: skip


def _add_top(figure: go.Figure, axis: Axis, theme: Theme) -> None:
    """A second scale that goes with the first when it is zoomed: its ticks stand at places of the first."""
    if axis.top is None or axis.ends is None:
        return
    title, factor = axis.top
    round_ones = ticks(axis.ends[0] * factor, axis.ends[1] * factor, 10)
    figure.add_trace(
        {"type": "scatter", "x": [None], "y": [None], "xaxis": "x9", "showlegend": False, "hoverinfo": "skip"}
    )
    figure.layout.xaxis9 = _axis(Axis(title), theme) | {
        "overlaying": "x", "matches": "x", "side": "top", "tickmode": "array", "showgrid": False, "zeroline": False,
        "tickvals": [value / factor for value in round_ones], "ticktext": [f"{value:g}" for value in round_ones],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
