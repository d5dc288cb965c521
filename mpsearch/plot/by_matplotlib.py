"""Charts as matplotlib figures, for paper: nothing global is read or left changed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError
from mpsearch.plot.chart import Axis, Bars, Cells, Chart, Dots, Mark, Panel, Rule, ticks
from mpsearch.plot.text import for_matplotlib, thinned
from mpsearch.plot.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_SHAPES = {
    "circle": "o", "square": "s", "diamond": "D", "triangle": "^", "down": "v", "cross": "x", "star": "*", "dot": "o",
}  # fmt: skip
_FONT = "DejaVu Sans"
#: Settings that only saving reads: text stays text, and equal figures give equal files.
SAVING: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mpsearch", "pdf.fonttype": 42, "text.usetex": False, "path.sketch": None,
    "axes.unicode_minus": True,
}  # fmt: skip
#: Characters of a name on an axis.
_CUT = 24
#: More marks than this are drawn as pixels in a vector file.
_MANY = 2000


def draw(chart: Chart, theme: Theme, width: float = 7.0) -> Figure:
    """Draw a chart with matplotlib.

    Args:
        chart: what to draw.
        theme: its colours.
        width: of the figure, in inches: 3.5 fits one column of a paper and 7 two.

    Raises:
        InputError: matplotlib is not installed (E118), or a width that is none (E113).
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("E118", "pictures for paper need matplotlib", advice="pip install 'mpsearch[plot]'") from None
    if isinstance(width, bool) or not isinstance(width, int | float) or not 2 <= width <= 40:
        raise InputError("E113", f"width: got {str(width)[:40]!r}", advice="give inches from 2 to 40, such as 3.5 or 7")
    with matplotlib.rc_context():
        # What a user has set for figures of their own is no part of this one.
        matplotlib.rcdefaults()
        size = (width, _height(chart, width))
        figure = Figure(figsize=size, layout="constrained", facecolor=theme.ground)
        FigureCanvasAgg(figure)
        small = width < 5
        _fill(figure, chart, theme, 7.0 if small else 8.5, small)
        # Lays out once, while the defaults hold.
        figure.draw_without_rendering()
    return figure


def _height(chart: Chart, width: float) -> float:
    small = width < 5
    height = chart.height * (0.72 if small else 1) + 0.15 * len(_lines(chart, small))
    for axis in (panel.x for panel in chart.panels):
        shown = thinned(len(axis.names), _room(small))
        if _turned(axis, small):
            height += 0.055 * max(len(for_matplotlib(axis.names[i], _CUT)) for i in shown)
    return min(max(height, 2.4), 4 * width)


def _room(small: bool) -> int:
    """Names that a horizontal axis has room for."""
    return 8 if small else 16


def _turned(axis: Axis, small: bool) -> bool:
    """Whether the names below an axis are too long to stand side by side."""
    shown = thinned(len(axis.names), _room(small))
    return any(min(len(axis.names[i]), _CUT) * len(shown) > (36 if small else 72) for i in shown)


def _fill(figure: Figure, chart: Chart, theme: Theme, points: float, small: bool) -> None:
    lines = _lines(chart, small)
    room = (0.12 + len(lines) * 1.4 * (points - 1) / 72) if lines else 0.0
    whole = figure.get_figheight()
    # The layout gives keys a place, and other text none.
    upper: Any = figure
    lower: Any = None
    if lines:
        upper, lower = figure.subfigures(2, 1, height_ratios=[whole - room, room], squeeze=False)[:, 0]
    for part in (upper, lower):
        if part is not None:
            part.set_facecolor(theme.ground)
    widths = chart.widths or (1.0,) * len(chart.panels)
    made = upper.subplots(1, len(chart.panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for number, (axes, panel) in enumerate(zip(made, chart.panels, strict=True)):
        axes.set_facecolor(theme.ground)
        for mark in panel.marks:
            _mark(axes, mark, theme, points)
        share = widths[number] / sum(widths)
        _set_axis(axes, panel, theme, points, small, max(round((5 if small else 9) * share), 2), first=number == 0)
    words = for_matplotlib(chart.title, 46 if small else 84)
    title = upper.suptitle(words, x=0.012, ha="left", fontsize=points + 2, color=theme.text)
    title.set_fontfamily(_FONT)
    _key(upper, chart, theme, points, small)
    if lower is not None:
        lower.text(
            0.012, 0.98, "\n".join(lines), ha="left", va="top", fontsize=points - 1, color=theme.muted,
            fontfamily=_FONT, linespacing=1.25,
        )  # fmt: skip


def _lines(chart: Chart, small: bool) -> list[str]:
    """Notes, broken into lines."""
    broken = (textwrap.wrap(note, 62 if small else 112, max_lines=4, placeholder=" …") for note in chart.notes)
    return [for_matplotlib(line, 160) for lines in broken for line in lines]


def _mark(axes: Axes, mark: Mark, theme: Theme, points: float) -> None:
    if isinstance(mark, Dots):
        _dots(axes, mark, theme, 1.0 if points > 7 else 0.75)
    elif isinstance(mark, Bars):
        colours = [theme.colour(role) for role in mark.roles]
        bars = axes.barh(mark.place, mark.length, left=mark.start, height=mark.width, color=colours, linewidth=0)
        if mark.labels:
            labels = [for_matplotlib(label) for label in mark.labels]
            axes.bar_label(bars, labels, padding=2, fontsize=points - 1, color=theme.muted, fontfamily=_FONT)
    elif isinstance(mark, Cells):
        _cells(axes, mark, theme, points)
    else:
        _rule(axes, mark, theme, points)


def _dots(axes: Axes, mark: Dots, theme: Theme, scale: float) -> None:
    colour = theme.colour(mark.role)
    style: dict[str, Any] = {
        "marker": _SHAPES[mark.shape] if mark.size else "", "markersize": mark.size * scale, "color": colour,
        "markerfacecolor": "none" if mark.hollow else colour, "markeredgewidth": 1.0 if mark.hollow else 0.4,
        "markeredgecolor": colour if mark.hollow or mark.shape == "cross" else theme.ground,
        "linestyle": ("--" if mark.dash else "-") if mark.line else "none", "linewidth": mark.line,
        "rasterized": len(mark.x) > _MANY,
    }  # fmt: skip
    if mark.x_error or mark.y_error:
        errors: dict[str, Any] = {"xerr": _errors(mark.x_error), "yerr": _errors(mark.y_error)}
        axes.errorbar(mark.x, mark.y, **errors, **style, ecolor=colour, elinewidth=0.7, capsize=1.5, capthick=0.7)
    else:
        axes.plot(mark.x, mark.y, **style)


def _errors(errors: Sequence[float]) -> list[float] | None:
    return [error if math.isfinite(error) else 0.0 for error in errors] if errors else None


def _cells(axes: Axes, mark: Cells, theme: Theme, points: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    gap = 0.04
    boxes = [
        Rectangle((first - 0.5 + gap, row - 0.5 + gap), last - first + 1 - 2 * gap, 1 - 2 * gap)
        for row, first, last, *_ in mark.cells
    ]
    colours = [theme.colour(role) for _, _, _, role, *_ in mark.cells]
    axes.add_collection(PatchCollection(boxes, facecolors=colours, linewidths=0, rasterized=len(boxes) > _MANY))
    if mark.rows <= 64 and len(mark.cells) <= 1000:
        for row, first, last, role, digits, _ in mark.cells:
            colour = "#ffffff" if role in mark.light else "#07192f"
            axes.text(
                (first + last) / 2, row, for_matplotlib(digits), ha="center", va="center", color=colour,
                fontsize=points - 1, fontfamily=_FONT,
            )  # fmt: skip


def _rule(axes: Axes, rule: Rule, theme: Theme, points: float) -> None:
    style: dict[str, Any] = {"color": theme.muted, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 0.5}
    words: dict[str, Any] = {"fontsize": points - 1.5, "color": theme.muted, "fontfamily": _FONT}
    text = for_matplotlib(rule.text)
    if rule.vertical:
        axes.axvline(rule.at, **style)
        across = axes.get_xaxis_transform()
        axes.text(rule.at, 0.02, text, transform=across, rotation=90, ha="right", va="bottom", **words)
    else:
        axes.axhline(rule.at, **style)
        axes.text(0.985, rule.at, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", **words)


def _set_axis(axes: Axes, panel: Panel, theme: Theme, points: float, small: bool, most: int, *, first: bool) -> None:
    axes.set_xlabel(for_matplotlib(panel.x.title, 80), fontsize=points, color=theme.text, fontfamily=_FONT)
    if first:
        axes.set_ylabel(for_matplotlib(panel.y.title, 80), fontsize=points, color=theme.text, fontfamily=_FONT)
    axes.tick_params(which="both", colors=theme.muted, labelsize=points - 1, labelfontfamily=_FONT, width=0.6, length=3)
    for spine in axes.spines.values():
        spine.set_color(theme.muted)
        spine.set_linewidth(0.6)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)
    _scale(axes, "x", panel.x, theme, most, _room(small))
    _scale(axes, "y", panel.y, theme, 6, 22 if small else 60)
    if panel.x.top:
        title, factor = panel.x.top
        top = axes.secondary_xaxis("top", functions=(partial(_times, factor), partial(_times, 1 / factor)))
        top.set_xlabel(for_matplotlib(title, 80), fontsize=points, color=theme.text, fontfamily=_FONT)
        top.tick_params(colors=theme.muted, labelsize=points - 1, labelfontfamily=_FONT, width=0.6, length=3)
        top.spines["top"].set_color(theme.muted)
        top.spines["top"].set_linewidth(0.6)


def _times(factor: float, value: Any) -> Any:
    return value * factor


def _scale(axes: Axes, which: str, axis: Axis, theme: Theme, most: int, names: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    side = axes.xaxis if which == "x" else axes.yaxis
    limits = axes.set_xlim if which == "x" else axes.set_ylim
    if axis.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log", nonpositive="clip")
    if axis.names:
        shown = thinned(len(axis.names), names)
        side.set_major_locator(FixedLocator(list(shown)))
        long = which == "x" and _turned(axis, names == _room(True))
        labels = [for_matplotlib(axis.names[i], _CUT) for i in shown]
        if which == "x":
            axes.set_xticklabels(labels, rotation=60 if long else 0, ha="right" if long else "center")
        else:
            axes.set_yticklabels(labels)
        ends = (-0.5, len(axis.names) - 0.5)
        limits(*(reversed(ends) if axis.down else ends))
        side.set_tick_params(length=0)
        return
    if axis.ends:
        limits(*axis.ends)
    if axis.log and axis.ends:
        side.set_major_locator(FixedLocator(log_ticks(*axis.ends)))
        side.set_minor_formatter(NullFormatter())
    elif axis.ends:
        side.set_major_locator(FixedLocator(ticks(*axis.ends, most=most)))
    # Not matplotlib's own, which writes formulas.
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
    axes.grid(True, axis=which, color=theme.line, linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: powers of ten, with 2 and 5 between them where there is room.

    >>> log_ticks(0.015, 0.6), log_ticks(1e-6, 1)[:3]
    ([0.02, 0.05, 0.1, 0.2, 0.5], [1e-06, 1e-05, 0.0001])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    units = (1, 2, 5) if math.log10(high / low) <= 2.5 else (1,)
    every = max(1, (last - first) // 8)
    found = [float(f"{unit}e{power}") for power in range(first, last + 1, every) for unit in units]
    return [value for value in found if low <= value <= high]


def _key(figure: Figure | SubFigure, chart: Chart, theme: Theme, points: float, small: bool) -> None:
    """One key for all panels below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: dict[str, Any] = {}
    for mark in (mark for panel in chart.panels for mark in panel.marks):
        if isinstance(mark, Dots) and mark.name:
            colour = theme.colour(mark.role)
            shape = _SHAPES[mark.shape] if mark.size else ""
            entries.setdefault(
                mark.name,
                Line2D(
                    [], [], color=colour, marker=shape, markersize=max(min(mark.size, 9), 4) if mark.size else 0,
                    linestyle=("--" if mark.dash else "-") if mark.line else "none", linewidth=mark.line,
                    markerfacecolor="none" if mark.hollow else colour,
                    markeredgecolor=colour if mark.hollow or mark.shape == "cross" else theme.ground,
                ),
            )  # fmt: skip
        elif isinstance(mark, Bars) and mark.name:
            entries.setdefault(mark.name, Patch(color=theme.colour(mark.roles[0])) if mark.roles else None)
        elif isinstance(mark, Cells):
            entries |= {name: Patch(color=theme.colour(role)) for role, name in mark.key}
    entries = {name: handle for name, handle in entries.items() if handle is not None}
    if not entries:
        return
    long = max(map(len, entries))
    columns = min(
        len(entries), (4 if long < 6 else 2 if long < 26 else 1) if small else 9 if long < 6 else 4 if long < 26 else 3
    )
    found = figure.legend(
        list(entries.values()), [for_matplotlib(name) for name in entries], loc="outside lower left", ncols=columns,
        frameon=False, prop={"family": _FONT, "size": points - 0.5}, labelcolor=theme.text, handlelength=1.6,
    )  # fmt: skip
    found.set_in_layout(True)
