"""What is drawn, in words that both drawing libraries understand: panels with axes and marks on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Beyond this ratio between the largest and the smallest positive value an axis is logarithmic.
LOG_RATIO = 10.0


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: what it shows, with its unit.
        log: whether it is logarithmic.
        ends: first and last value; None where the marks decide.
        names: of an axis of names: one per place, from 0 on; they are text only.
        top: a second scale on the other side: (title, how many of its units are one unit of this axis).
        down: whether place 0 is at the top.
    """

    title: str
    log: bool = False
    ends: tuple[float, float] | None = None
    names: tuple[str, ...] = ()
    top: tuple[str, float] | None = None
    down: bool = False


@dataclass(frozen=True)
class Dots:
    """Points, with a line through them if wanted.

    Attributes:
        x: of each.
        y: of each; NaN leaves a gap.
        role: of their colour (see `mpsearch.plot.theme.Theme.colour`).
        shape: ``circle``, ``square``, ``diamond``, ``triangle``, ``down``, ``cross``, ``star`` or ``dot``.
        name: in the key; empty for none.
        x_error: standard error of ``x``; empty when not drawn.
        y_error: standard error of ``y``.
        hollow: whether only their outline is drawn.
        line: width of the line through them, in points; 0 for none.
        dash: whether that line is dashed.
        size: in points.
        texts: what is told of each on hovering: lines.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    role: str
    shape: str = "circle"
    name: str = ""
    x_error: tuple[float, ...] = ()
    y_error: tuple[float, ...] = ()
    hollow: bool = False
    line: float = 0.0
    dash: bool = False
    size: float = 5.0
    texts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Bars:
    """Horizontal bars.

    Attributes:
        place: of each, on the vertical axis.
        start: where each begins.
        length: of each; negative ones go to the left.
        roles: of their colours.
        name: in the key; empty for none.
        labels: written at the end of each; empty for none.
        texts: what is told of each on hovering.
        width: how thick they are; 1 leaves no gap between places.
    """

    place: tuple[float, ...]
    start: tuple[float, ...]
    length: tuple[float, ...]
    roles: tuple[str, ...]
    name: str = ""
    labels: tuple[str, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    width: float = 0.72


@dataclass(frozen=True)
class Rule:
    """A dashed line right across the panel, such as a budget.

    Attributes:
        at: where.
        text: beside it.
        vertical: whether it stands on the horizontal axis.
    """

    at: float
    text: str
    vertical: bool = True


@dataclass(frozen=True)
class Cells:
    """Coloured cells.

    Attributes:
        cells: (row, first column, last column, role, digits, lines told on hovering) of each.
        rows: how many.
        columns: how many.
        light: roles whose digits are white.
        key: (role, name) of the colours.
    """

    cells: tuple[tuple[int, int, int, str, str, tuple[str, ...]], ...]
    rows: int
    columns: int
    light: frozenset[str] = frozenset()
    key: tuple[tuple[str, str], ...] = ()


Mark = Dots | Bars | Rule | Cells


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn on them, the lowest mark first."""

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: what it shows.
        panels: side by side; they share the vertical axis.
        notes: sentences below it: what is not drawn, and why.
        height: in inches, at a width of 7 inches.
        widths: of the panels, in parts; empty for equal ones.
    """

    title: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()
    height: float = 4.2
    widths: tuple[float, ...] = ()


def scaled(values: Sequence[float], *, log: bool | None = None) -> tuple[bool, tuple[float, float] | None]:
    """Choose the scale of an axis: logarithmic where positive values differ tenfold.

    Args:
        values: what stands on it; values that are not finite do not count.
        log: True to insist on a logarithmic scale where there is a positive value, False on a linear one.

    Returns:
        Whether it is logarithmic; its ends, with a margin.

    >>> scaled([1.0, 3.0])[0], scaled([0.0, 1.0, 100.0])[0], scaled([-1.0, 0.0], log=True)[0]
    (False, True, False)
    """
    finite = [value for value in values if math.isfinite(value)]
    above = [value for value in finite if value > 0]
    wanted = bool(above) and max(above) > LOG_RATIO * min(above) if log is None else log and bool(above)
    if wanted:
        low, high = math.log10(min(above)), math.log10(max(above))
        margin = 0.07 * (high - low) or 0.3
        return True, (10 ** (low - margin), 10 ** (high + margin))
    if not finite:
        return False, None
    low, high = min(finite), max(finite)
    margin = 0.07 * (high - low) or 0.07 * abs(high) or 1.0
    return False, (low - margin, high + margin)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between two ends.

    >>> ticks(0.3, 2.2)
    [0.5, 1.0, 1.5, 2.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]
