"""``mpsearch compare``: two plans of one model side by side."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Json, Storage
from mpsearch.spread import plus_minus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpsearch.cli.looks import Pen
    from mpsearch.views.difference import Difference, Side

#: Rows that a terminal is given.
_MOST = 40


def compare(
    first: Annotated[str, typer.Argument(help="Plan file, study (its chosen plan), STUDY:LABEL, or key.")],
    second: Annotated[str, typer.Argument(help="Another plan of the same model.")],
    study: Annotated[str, typer.Option(help="Whose scores to use, for plan files.")] = "",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Compare two plans: totals, the layers that differ by effect, and the way from one loss to the other.

    mpsearch compare tiny-llama 'tiny-llama:uniform int4-g64'

    mpsearch compare ours.json theirs.json
    """
    from mpsearch.cli.looks import Pen
    from mpsearch.cli.pick import Picker
    from mpsearch.views.difference import difference

    picker = Picker(storage, study)
    try:
        one, other = picker.pick(first), picker.pick(second)
    finally:
        picker.close()
    found = difference(one.plan, other.plan, one.view or other.view)
    if as_json:
        body = {**found.to_json(), "names": [one.title, other.title]}
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    pen = Pen.of_output()
    for line in _lines(found, pen, one.title, other.title):
        sys.stdout.write(f"{pen.text(line)}\n")


def _lines(found: Difference, pen: Pen, first: str, second: str) -> Iterator[str]:
    yield from pen.table([_HEAD, _side(first, found.first), _side(second, found.second), _total(found)], "<>>>>")
    yield f"losses in {found.unit}; the same in {found.same} of {found.layers} layers"
    if not found.changes:
        return
    yield ""
    yield from _changes(found, pen)
    if found.waterfall:
        yield ""
        yield from _waterfall(found, pen)


_HEAD = ["plan", "bytes", "bits/weight", "loss predicted", "loss measured"]


def _side(name: str, side: Side) -> list[str]:
    measured = "" if side.measured is None else f"{side.measured:.4g}"
    measured += plus_minus(side.error)
    predicted = "" if side.predicted is None else f"{side.predicted:.4g}"
    return [name, f"{side.bytes:,}", f"{side.bits:.4f}", predicted, measured]


def _total(found: Difference) -> list[str]:
    a, b = found.first, found.second
    predicted = "" if a.predicted is None or b.predicted is None else f"{b.predicted - a.predicted:+.4g}"
    measured = "" if found.measured is None else f"{found.measured[0]:+.4g}{plus_minus(found.measured[1])}"
    return ["second less first", f"{b.bytes - a.bytes:+,}", f"{b.bits - a.bits:+.4f}", predicted, measured]


def _changes(found: Difference, pen: Pen) -> Iterator[str]:
    shown = found.changes[:_MOST] if pen.width and len(found.changes) > _MOST else found.changes
    rows = [["decision", "first", "second", "loss predicted", "bytes"]]
    for change in shown:
        error = plus_minus(change.error, 1) if change.error else ""
        loss = "not scored" if change.loss is None else f"{change.loss:+.3g}{error}"
        rows.append([change.decision, change.before, f"→ {change.after}", loss, f"{change.bytes:+,}"])
    yield from pen.table(rows, "<<<>>")
    if len(shown) < len(found.changes):
        yield f"and {len(found.changes) - len(shown)} more of less effect; --json has all"


def _waterfall(found: Difference, pen: Pen) -> Iterator[str]:
    """The loss after each change: down to the left, up to the right."""
    bars = found.waterfall
    ends = [bars[0].start, *(bar.end for bar in bars)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    width = 24
    rows = [["from the first to the second", "loss predicted", ""], ["first", f"{bars[0].start:.5g}", ""]]
    for bar in bars:
        left = round((min(bar.start, bar.end) - low) / span * width)
        length = max(1, round(abs(bar.end - bar.start) / span * width))
        sign = ("▓" if bar.end > bar.start else "░") if pen.unicode else ("+" if bar.end > bar.start else "-")
        rows.append([bar.label, f"{bar.end:.5g}", " " * min(left, width - 1) + sign * length])
    yield from pen.table(rows, "<><")
