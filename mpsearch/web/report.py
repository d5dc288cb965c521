"""The report of a study: one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from mpsearch.spread import at_most
from mpsearch.views.steps import SIGNIFICANT
from mpsearch.views.study_view import StudyView
from mpsearch.web.amounts import number, size, whole_bytes, with_spread
from mpsearch.web.layer_table import layer_table
from mpsearch.web.markup import Html, join, tag
from mpsearch.web.plan_table import listed, plan_table
from mpsearch.web.report_data import compact, plans_of, squeezed, without_folders

#: The drawing scripts in the order in which they are read; the page of the server reads all but the last one.
SCRIPTS = (
    "base", "data", "axes", "front", "map", "card", "compare", "predicted", "breakdown", "sensitivity", "verdict",
    "report",
)  # fmt: skip
# A number and its percent sign stay on one line.
_PERCENT = "\N{NO-BREAK SPACE}%"
_HELP = (
    "Point at a plan and the map follows. A click pins it as A, a click with Shift as B, and the two are compared. "
    "Drag over the plot to zoom in, double-click to see all again; on the keyboard arrows, Enter, + and 0 do the same. "
    "The address holds what is shown."
)


def report_html(view: StudyView) -> str:
    """Write a study's report as one HTML page.

    The page loads nothing: style, script and data are inside, and its content security policy forbids every
    connection, every script and every style but its own. All text of the study is escaped. Without scripts its tables
    are read.

    Args:
        view: what to show; whatever there is of the study so far.

    Returns:
        The text of the file: about 0.1 MB, and for 10,000 plans of 300 layers less than 2 MB.

    >>> from mpsearch.testing.views import pretended
    >>> report_html(pretended(20, 16, 4))[:15]
    '<!doctype html>'
    """
    view = without_folders(view)
    script, style = Html(_script()), Html(asset("style.css"))
    body = tag(
        "body",
        tag("header", tag("h1", "mpsearch study ", tag("bdi", view.study)), _state(view)),
        tag("main", *(part(view) for part in (_verdict, _drawings, _tables, _notices, _facts))),
        *_data(view),
        tag("script", script),
        class_="report",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script, style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", view.study, " - mpsearch"),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


@cache
def asset(name: str) -> str:
    """Return the text of a script or style of the package."""
    return (files("mpsearch.web") / "assets" / name).read_text(encoding="utf-8")


def _script() -> str:
    return "\n".join(asset(f"{name}.js") for name in SCRIPTS)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(script: str, style: str) -> str:
    """Allow this script and this style by their digests, and nothing else."""
    own = f"script-src {_digest(script)}; style-src {_digest(style)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _data(view: StudyView) -> Iterator[Html]:
    if len(view.points):
        yield tag("script", squeezed(compact(view)), type="text/plain", id="study-data")
        yield tag("script", plans_of(view), type="text/plain", id="study-plans")


def _section(title: str, *children: object, name: str | None = None) -> Html:
    return tag("section", tag("h2", title), *children, id=name)


def _note(*children: object, **attributes: object) -> Html:
    return tag("p", *children, class_="note", **attributes)


def _state(view: StudyView) -> Html:
    return tag("p", f"State: {view.state}.", class_="note") if view.state != "complete" else Html("")


def _tile(name: str, value: object, detail: object) -> Html:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", detail)))


def _verdict(view: StudyView) -> Html:
    worth = view.worth
    lines = [*worth.sentences, *(limit.sentence for limit in worth.limits)] or ["There is no verdict yet."]
    said = (tag("p", line) for line in dict.fromkeys(lines))
    steps = [tag("li", step.why, Html(": "), tag("code", step.line)) for step in worth.next]
    further = tag("div", tag("h2", "What to try next"), tag("ul", *steps, class_="next")) if steps else ""
    tiles = tag("dl", *_tiles(view), class_="tiles") if len(view.points) else ""
    return tag("div", tag("div", *said, class_="verdict"), tiles, further, id="verdict")


def _tiles(view: StudyView) -> Iterator[Html]:
    points = view.points
    i = view.chosen
    if "weights" in points.cost and math.isfinite(points.cost["weights"][i]):
        count = float(points.cost["weights"][i])
        yield _tile("Size, exact", number(count, size(count)), f"{whole_bytes(count)} of the whole model")
        if view.weights:
            bits = 8 * count / view.weights
            share = f"{100 * count / (2 * view.weights):.1f}{_PERCENT} of 16-bit weights"
            yield _tile("Bits per weight, exact", number(bits, f"{bits:.3f}"), share)
    loss, predicted, bound = (float(x[i]) for x in (points.loss, points.predicted, points.bound))
    if math.isfinite(loss):
        told = number(loss, with_spread(loss, float(points.spread[i])))
        yield _tile("Loss, measured", told, f"{points.unit}, ± one standard error")
    if math.isfinite(predicted):
        gap = ""
        if math.isfinite(bound) and predicted > 0:
            gap = f", gap to the bound {100 * (predicted - bound) / predicted:.2g}{_PERCENT}"
        told = number(predicted, f"{with_spread(predicted)}{at_most(float(points.doubt[i]))}")
        yield _tile("Loss, predicted", told, f"{points.unit}{gap}")


def _drawings(view: StudyView) -> Html:
    """Make the places that the script draws in."""
    if not len(view.points):
        return _section("Size and loss", _note("There is no plan yet, so there is nothing to draw."))
    buttons = tag(
        "p",
        tag("button", "Compare A with the best uniform plan of its size", type="button", id="uniform"),
        tag("button", "Keep A as B too", type="button", id="keep"),
        tag("button", "Swap A and B", type="button", id="swap"),
        tag("button", "Unpin B", type="button", id="unpin"),
        class_="controls",
    )
    seen = tag(
        "div", tag("p", id="shown", class_="shown"), tag("p", id="modes", class_="controls"), tag("div", id="map")
    )
    plot = tag("div", tag("p", id="switches", class_="controls"), tag("div", id="front"))
    pair = tag("div", plot, seen, class_="pair")
    drawn = (
        tag("p", id="broken", class_="note", hidden="hidden"),
        _section("Size and loss, and the bits of each layer", _note(_HELP), pair, tag("div", id="card")),
        _section(
            "Compare two plans",
            tag("ul", id="pins"),
            buttons,
            _note("No plan is pinned as B: click one with Shift held, or press a button.", id="compare-none"),
            tag("div", id="compare"),
        ),
        _section("Predicted against measured", tag("div", id="predicted")),
        _section("Where plan A spends", tag("div", id="breakdown")),
        _section("Sensitivity", tag("div", id="sensitivity")),
    )
    without = tag("noscript", _note("The drawings need JavaScript. The tables below hold the numbers."))
    return join([without, tag("div", *drawn, class_="drawings")])


def _tables(view: StudyView) -> Html:
    numbers = listed(view)
    if not numbers:
        return Html("")
    note = (
        "Gain is the measured loss of the best uniform plan of at most the same bytes (1 % more counts as the same), "
        "less the plan's own. Its ± is paired by sequence where both plans ran on the same data, and otherwise joins "
        f"both standard errors as if they were independent; a gain below {SIGNIFICANT} times that is within noise."
    )
    some = "" if len(numbers) == len(view.points) else f" {len(numbers)} of {len(view.points)} plans are listed."
    every = tag("summary", f"All {len(view.layers)} layers of the chosen plan as a table")
    return _section(
        "Plans as a table",
        _note(note, some),
        plan_table(view, numbers, "plans"),
        tag("details", every, layer_table(view, view.chosen)) if len(view.layers) else "",
    )


def _notices(view: StudyView) -> Html:
    if not view.notices:
        return Html("")
    return _section("Notices", tag("ul", *(tag("li", notice) for notice in view.notices), class_="notices"))


def _facts(view: StudyView) -> Html:
    machines = dict.fromkeys(m.machine for m in view.measured if m.machine)
    measured = {"losses measured on": ", ".join(machines)} if machines else {}
    model = {**view.model, "weights": view.weights, "layers": len(view.layers)}
    parts = []
    for title, values in (("Model", model), ("Provenance", {**measured, **view.provenance})):
        if not values:
            continue
        facts = (join([tag("dt", tag("bdi", name)), tag("dd", tag("bdi", text))]) for name, text in _flat(values))
        parts.append(_section(title, tag("dl", *facts, class_="facts")))
    return join(parts)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Name every value by the way that leads to it."""
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path} / ")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
            yield from _flat({str(i): item for i, item in enumerate(value)}, f"{path} / ")
        elif isinstance(value, list | tuple):
            yield path, ", ".join(str(item) for item in value)
        else:
            yield path, str(value)
