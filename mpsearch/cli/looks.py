"""Pictures made of characters: a front over size, a plan as a grid of bits, bars; in ASCII where Unicode cannot be."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpsearch.cli.show import safe

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView
    from mpsearch.views.worth import Worth

#: Columns of what is written to a terminal; a pipe gets names in full.
NARROW = 80
_MIB = 2**20
_MOST_ROWS = 40
#: Most bits of a shade of blue, light to dark, and its number among the 256 colours.
_SHADES = ((2, 195), (3, 153), (4, 117), (5, 75), (6, 39), (8, 25), (16, 18), (64, 17))
_CELL = re.compile(r"(?<=  )(?P<low>\d+)(?:-\d+)?(?=  |$)")
_STEM = re.compile(r".{2,}?\.(?=\d+\.)")
_GROUPS = ("chosen", "front", "uniform", "imported", "other", "predicted")
_UNICODE = {"chosen": "★", "front": "●", "uniform": "◆", "imported": "▲", "other": "·", "predicted": "○"}
_ASCII = {"chosen": "@", "front": "o", "uniform": "#", "imported": "^", "other": ".", "predicted": "?"}
_WORDS = {
    "chosen": "chosen", "front": "on the front", "uniform": "uniform", "imported": "imported", "other": "others",
    "predicted": "predicted only",
}  # fmt: skip


@dataclass(frozen=True)
class Pen:
    """What an output can show.

    Attributes:
        width: columns to keep to; 0 for a pipe, where names are written in full.
        unicode: whether it can show more than ASCII.
        colour: whether grids of bits are coloured.
    """

    width: int = NARROW
    unicode: bool = True
    colour: bool = False

    @classmethod
    def of_output(cls) -> Pen:
        """The pen of the standard output."""
        encoding = sys.stdout.encoding or "ascii"
        try:
            "★●◆▲·○█▌│└─…→±►".encode(encoding)
        except (UnicodeEncodeError, LookupError):
            can = False
        else:
            can = True
        there = sys.stdout.isatty()
        width = max(40, shutil.get_terminal_size((NARROW, 24)).columns) if there else 0
        return cls(width, can, there and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb")

    def text(self, line: str) -> str:
        r"""A line with nothing in it that the output cannot show, or that would steer a terminal.

        >>> Pen(unicode=False).text("a → b ± 0.1 \x1b[31m")
        'a -> b +- 0.1 ?[31m'
        """
        line = safe(line)
        if self.unicode:
            return line
        for sign, plain in (("→", "->"), ("±", "+-"), ("►", ">"), ("…", "..."), ("−", "-"), ("·", "-")):
            line = line.replace(sign, plain)
        return line.encode("ascii", "replace").decode("ascii")

    def painted(self, line: str) -> str:
        r"""A row of a grid with the shade of its bits behind each number; the row itself where there is no colour.

        >>> Pen().painted("0  4  8"), Pen(colour=True).painted("0  4").count("\x1b[")
        ('0  4  8', 2)
        """
        if not self.colour:
            return line

        def shade(found: re.Match[str]) -> str:
            bits = int(found["low"])
            back = next((code for most, code in _SHADES if bits <= most), _SHADES[-1][1])
            return f"\x1b[48;5;{back};38;5;{16 if bits < 7 else 231}m{found[0]}\x1b[0m"

        return _CELL.sub(shade, line)

    def short(self, name: str, width: int) -> str:
        """A name of at most ``width`` columns, the middle left out; in full for a pipe.

        >>> Pen().short("model.layers.3.self_attn.q_proj", 20), Pen(0).short("model.layers.3", 5)
        ('model.lay…ttn.q_proj', 'model.layers.3')
        """
        name = self.text(name)
        dots = "…" if self.unicode else "~"
        if not self.width or len(name) <= width:
            return name
        head = (width - 1) // 2
        return f"{name[:head]}{dots}{name[len(name) - (width - 1 - head) :]}"

    def bar(self, share: float, width: int = 12) -> str:
        """A bar of a share of ``width`` columns; what is there at all is seen.

        >>> Pen().bar(0.5, 4), Pen().bar(0.3, 4), Pen(unicode=False).bar(0.5, 4)
        ('██', '█▎', '##')
        """
        if not math.isfinite(share) or share <= 0:
            return ""
        eighths = max(1, round(min(share, 1.0) * width * 8))
        if not self.unicode:
            return "#" * max(1, round(eighths / 8))
        return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]

    def table(self, rows: Sequence[Sequence[str]], align: str, name: int = 0) -> list[str]:
        """Lines of a table whose first row is the head; only the column of names is ever shortened.

        Args:
            rows: of cells.
            align: ``<`` or ``>`` for each column.
            name: number of the column of names.
        """
        texts = [[self.text(cell) for cell in row] for row in rows]
        widths = [max(len(row[j]) for row in texts) for j in range(len(align))]
        over = sum(widths) + 2 * (len(widths) - 1) - self.width
        if self.width and over > 0:
            wanted = max(12, widths[name] - over)
            for row, told in zip(texts[1:], _without_stem([row[name] for row in texts[1:]], self), strict=True):
                row[name] = told
            widths[name] = min(wanted, max(len(row[name]) for row in texts))
        lines = []
        for row in texts:
            cells = [self.short(cell, widths[j]) if j == name else cell for j, cell in enumerate(row)]
            lines.append("  ".join(f"{cell:{align[j]}{widths[j]}}" for j, cell in enumerate(cells)).rstrip())
        return lines


def _without_stem(names: Sequence[str], pen: Pen) -> list[str]:
    """Names without what most of those with a number have before it, such as ``model.layers.``.

    >>> _without_stem(["model.embed", "model.layers.0.up", "model.layers.1.up"], Pen())
    ['model.embed', '…0.up', '…1.up']
    """
    stems = Counter(match[0] for name in names if (match := _STEM.match(name)))
    stem = stems.most_common(1)[0][0] if stems else ""
    dots = "…" if pen.unicode else "~"
    return [f"{dots}{name[len(stem) :]}" if stem and name.startswith(stem) else name for name in names]


def front_plot(view: StudyView, pen: Pen, height: int = 14) -> list[str]:
    """Loss (log) over size, one sign for each plan; uniform plans and the chosen one stand out.

    Args:
        view: of the study.
        pen: of the output.
        height: rows of the picture.
    """
    points, signs = view.points, _UNICODE if pen.unicode else _ASCII
    size = points.cost.get("weights", np.full(len(points), np.nan)) / _MIB
    loss = np.where(points.measured, points.loss, points.predicted)
    there = np.flatnonzero(np.isfinite(size) & np.isfinite(loss) & (loss > 0))
    left = len(points) - len(there)
    if not len(there):
        return ["There is no plan whose loss can be drawn."] if len(points) else []
    kinds = _kinds(view)
    width = min(pen.width or NARROW, 100) - 12
    column = _scaled(size[there], width)
    row = height - 1 - _scaled(np.log10(loss[there]), height)
    cells: dict[tuple[int, int], int] = {}
    for i, x, y in zip(there.tolist(), column.tolist(), row.tolist(), strict=True):
        cells[y, x] = min(cells.get((y, x), len(_GROUPS)), _GROUPS.index(kinds[i]))
    side, corner, floor = ("│", "└", "─") if pen.unicode else ("|", "+", "-")
    low, high = float(loss[there].min()), float(loss[there].max())
    half = height // 2
    middle = high * (low / high) ** (half / (height - 1))
    labels = {0: high, half: middle, height - 1: low} if high > low else {half: low}
    unit = points.unit
    lines = [f"{'measured' if points.measured[there].all() else 'measured or predicted'} loss, {unit} (log)"]
    for y in range(height):
        label = f"{labels[y]:.3g}" if y in labels else ""
        marks = "".join(signs[_GROUPS[cells[y, x]]] if (y, x) in cells else " " for x in range(width))
        lines.append(f"{label:>9} {side}{marks}".rstrip())
    lines.append(f"{'':>9} {corner}{floor * width}")
    lines.append(_axis(view, size[there], width))
    seen = dict.fromkeys(sorted(cells.values()))
    lines.append(f"{'':>10} {'  '.join(f'{signs[_GROUPS[k]]} {_WORDS[_GROUPS[k]]}' for k in seen)}")
    if left:
        lines.append(
            f"{'':>10} not drawn: {left} of {len(points)} plans, whose size or loss is not known or not above 0"
        )
    return lines


def _kinds(view: StudyView) -> list[str]:
    points, front = view.points, view.points.front()
    found: list[str] = []
    for i, group in enumerate(points.groups):
        if group in ("chosen", "uniform", "imported"):
            found.append(group)
        elif not points.measured[i]:
            found.append("predicted")
        else:
            found.append("front" if front[i] else "other")
    return found


def _scaled(values: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.full(len(values), steps // 2)
    return np.rint((values - low) / (high - low) * (steps - 1)).astype(np.int64)


def _axis(view: StudyView, sizes: NDArray[np.float64], width: int) -> str:
    low, high = float(sizes.min()), float(sizes.max())

    def told(size: float) -> str:
        bits = f" ({8 * size * _MIB / view.weights:.3g} bits)" if view.weights else ""
        return f"{size:,.4g} MiB{bits}"

    if high <= low:
        return f"{'':>11}{told(low):^{width}}".rstrip()
    return f"{'':>11}{told(low)}{told(high):>{max(len(told(high)) + 2, width - len(told(low)))}}"


def grid_lines(view: StudyView, choice: Sequence[int], pen: Pen) -> list[str]:
    """A plan as a grid of bits: blocks down, kinds of layers across; runs of equal blocks are one row.

    Args:
        view: of the study.
        choice: number of each layer's format in ``view.points.formats``.
        pen: of the output.
    """
    grid = view.grid
    bits = [view.bits[j] for j in choice]
    count = len(grid.columns)
    rows: list[tuple[str, list[str]]] = []
    alone: list[str] = []
    for r, name in enumerate(grid.row_names):
        if (r, -1) in grid.cells:
            alone.append(f"{name} {_cell([bits[i] for i in grid.cells[r, -1]])}")
        cells = [_cell([bits[i] for i in grid.cells.get((r, c), ())]) for c in range(count)]
        if any(cells):
            rows.append((name, cells))
    lines = _alone(alone, pen)
    folded = _folded(rows)
    if not folded:
        return lines
    heads, legend = _heads(grid.column_names, folded, pen)
    table = [["block", *heads], *[[name, *cells] for name, cells in folded]]
    body = pen.table(table, "<" + ">" * count)
    return [*body, *legend, *lines]


def _cell(bits: Sequence[int]) -> str:
    """Bits of the layers of a cell.

    >>> _cell([4]), _cell([4, 8, 2]), _cell([])
    ('4', '2-8', '')
    """
    if not bits:
        return ""
    low, high = min(bits), max(bits)
    return str(low) if low == high else f"{low}-{high}"


def _folded(rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Runs of rows that say the same as one row; more rows than a screen holds by ranges of bits."""
    found: list[tuple[str, str, list[str]]] = []
    for name, cells in rows:
        if found and found[-1][2] == cells:
            found[-1] = (found[-1][0], name, cells)
        else:
            found.append((name, name, cells))
    if len(found) > _MOST_ROWS:
        each = math.ceil(len(found) / _MOST_ROWS)
        parts = [found[i : i + each] for i in range(0, len(found), each)]
        found = [(part[0][0], part[-1][1], _merged([cells for *_, cells in part])) for part in parts]
    return [(first if first == last else f"{first}..{last}", cells) for first, last, cells in found]


def _merged(rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        _cell([int(bits) for cell in column for bits in cell.split("-") if bits]) for column in zip(*rows, strict=True)
    ]


def _heads(names: Sequence[str], rows: Sequence[tuple[str, list[str]]], pen: Pen) -> tuple[list[str], list[str]]:
    """Heads of the columns; letters, and what they stand for, where names leave no room."""
    label = max(len("block"), *(len(name) for name, _ in rows))
    cells = [max(len(row[j]) for _, row in rows) for j in range(len(names))]
    needed = label + sum(2 + max(len(name), width) for name, width in zip(names, cells, strict=True))
    if not pen.width or needed <= pen.width:
        return list(names), []
    letters = [chr(ord("a") + j) if j < 26 else f"c{j}" for j in range(len(names))]
    return letters, _wrapped([f"{letter} = {name}" for letter, name in zip(letters, names, strict=True)], pen)


def _alone(texts: Sequence[str], pen: Pen) -> list[str]:
    if len(texts) <= _MOST_ROWS or not pen.width:
        return _wrapped(texts, pen)
    return [*_wrapped(texts[:_MOST_ROWS], pen), f"and {len(texts) - _MOST_ROWS} more layers"]


def _wrapped(texts: Sequence[str], pen: Pen) -> list[str]:
    """Texts side by side, as many as a line holds."""
    lines: list[str] = []
    for text in texts:
        shown = pen.text(text)
        if lines and len(lines[-1]) + 2 + len(shown) <= (pen.width or NARROW):
            lines[-1] += f"  {shown}"
        else:
            lines.append(shown)
    return lines


def worth_lines(worth: Worth, pen: Pen) -> list[str]:
    """Whether mixing is worth it, what limits it and what to try next."""
    lines: list[str] = []
    for sentence in worth.sentences:
        lines += wrapped(sentence, pen)
    gain = worth.gain
    if gain is not None and gain.low is not None and gain.high is not None and worth.outcome != "uniform":
        share = ""
        if gain.share_low is not None and gain.share_high is not None:
            share = f", {100 * gain.share_low:.3g} to {100 * gain.share_high:.3g} % of the uniform plan's loss"
        told = f"gain     {gain.value:.4g} {worth.unit} (95 %: {gain.low:.4g} to {gain.high:.4g}{share})"
        lines += wrapped(told, pen, 9)
    for item in worth.limits:
        lines += wrapped(f"limit    {item.sentence}", pen, 9)
    for one in worth.next:
        lines += [*wrapped(f"next     {one.why}:", pen, 9), f"         {pen.text(one.line)}"]
    return lines


def wrapped(text: str, pen: Pen, hanging: int = 2) -> list[str]:
    """A sentence in lines that the output holds; the second and further ones are set in."""
    text = pen.text(text)
    if not pen.width or not text:
        return [text]
    spaces = " " * hanging
    return textwrap.wrap(text, pen.width, subsequent_indent=spaces, break_on_hyphens=False, replace_whitespace=False)
