"""The report of a study: one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from mpsearch.web.amounts import number, size, whole_bytes, with_spread
from mpsearch.web.figures import (
    Figure,
    front_figure,
    off_the_scale,
    predicted_pairs,
    prediction_figure,
    rank_correlation,
)
from mpsearch.web.heat_map import heat_map
from mpsearch.web.layer_table import exactly, layer_table
from mpsearch.web.markup import Html, data_script, join, tag
from mpsearch.web.plan_table import NOISE, plan_table
from mpsearch.web.report_data import ReportData, group_of

# A number and its percent sign stay on one line.
_PERCENT = "\N{NO-BREAK SPACE}%"


def report_html(view: ReportData) -> str:
    """Write a study's report as one HTML page.

    The page loads nothing: style, scripts and data are inside, and its content security policy forbids
    every connection and every script but its own two. All text of the study is escaped.

    Args:
        view: what to show.

    Returns:
        The text of the file, about 5 MB, nearly all of it the drawing library.

    Raises:
        ValueError: a measured number is NaN or infinite.
    """
    scripts = [Html(get_plotlyjs()), Html(_asset("report.js"))]
    parts = (_verdict, _front, _map, _plans, _predictions, _notices, _facts)
    body = tag(
        "body",
        tag("main", tag("h1", "mpsearch study ", view.study), *(part(view) for part in parts)),
        tag("div", id="tip", role="tooltip", hidden="hidden"),
        *(tag("script", script) for script in scripts),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", view.study, " - mpsearch"),
        tag("style", Html(_asset("report.css"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (files("mpsearch.web") / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Allow these scripts by their digest, styles, and images made on the page; nothing else."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # The drawing library writes its own style rules, and saves a chart through an image.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _section(title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children)


def _note(*children: object) -> Html:
    return tag("p", *children, class_="note")


def _chart(name: str, figure: Figure, caption: str, shape: str = "chart") -> Html:
    without = tag("noscript", "This chart needs JavaScript. The tables hold the same numbers.")
    return tag(
        "figure",
        tag("div", without, id=name, class_=shape),
        data_script(figure, data_chart=name),
        tag("figcaption", caption),
    )


def _tile(name: str, value: object, detail: object) -> Html:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", detail)))


def _verdict(view: ReportData) -> Html:
    plan, measured = view.chosen, view.chosen_measurement
    share = plan.stored_bytes / (2 * plan.layers.weights)
    bits = number(plan.bits, f"{plan.bits:.3f}")
    tiles = [
        _tile(
            "Size, exact",
            number(plan.stored_bytes, size(plan.stored_bytes)),
            f"{whole_bytes(plan.stored_bytes)} of the whole model",
        ),
        _tile("Bits per weight, exact", bits, f"{100 * share:.1f}{_PERCENT} of 16-bit weights"),
    ]
    if measured is not None:
        loss = number(measured.loss, with_spread(measured.loss, measured.spread))
        tiles.append(_tile("Loss, measured", loss, f"{measured.unit}, ± one standard error"))
    if plan.loss is not None:
        loss = number(plan.loss, with_spread(plan.loss, plan.predicted.spread))
        gap = "" if plan.predicted.gap is None else f", gap to the bound {100 * plan.predicted.gap:.2g}{_PERCENT}"
        tiles.append(_tile("Loss, predicted", loss, f"{plan.predicted.unit}{gap}"))
    lines = tag("div", *(tag("p", line) for line in view.verdict), class_="verdict")
    return tag("div", lines, tag("dl", *tiles, class_="tiles"), id="verdict")


def _front(view: ReportData) -> Html:
    title = "Size and loss"
    if not view.measurements:
        return _section(title, _note("No plan was measured yet."))
    caption = (
        "Loss is measured, with one standard error. Size is exact. Dashed lines are budgets. "
        "The ring is the chosen plan."
    )
    if off_the_scale([m.loss for m in view.measurements]):
        hidden = [m.label for m in view.measurements if m.loss <= 0]
        caption += f" Not on this axis, with a loss of 0 or less: {', '.join(dict.fromkeys(hidden))}."
    return _section(title, _chart("front", front_figure(view), caption))


def _map(view: ReportData) -> Html:
    maker = view.scores.source.get("estimator")
    by = f" by {maker}" if isinstance(maker, str) else ""
    exact = exactly(view.chosen)
    every = tag("summary", f"All {len(view.chosen.layers)} layers as a table")
    return _section(
        "The chosen plan",
        _note(f"Bits of each layer. Point at a cell or tap it for format, bytes ({exact}) and loss (predicted{by})."),
        heat_map(view.chosen, view.scores),
        tag("details", every, layer_table(view.chosen, view.scores)),
    )


def _plans(view: ReportData) -> Html:
    if not view.measurements:
        return Html("")
    random = [m for m in view.measurements if group_of(m) == "random"]
    others = [m for m in view.measurements if group_of(m) != "random"]
    parts = [plan_table(view, others, "plans")] if others else []
    if random:
        summary = tag("summary", f"{len(random)} random and other plans")
        parts.append(tag("details", summary, plan_table(view, random, "random-plans")))
    note = (
        "Gain is the loss of the best uniform plan of at most the same bytes, less the plan's own. "
        "Its ± joins both standard errors as if they were independent; "
        f"a gain below {NOISE} times that is within noise."
    )
    return _section("Measured plans", _note(note), *parts)


def _predictions(view: ReportData) -> Html:
    figure = prediction_figure(view)
    if figure is None:
        return Html("")
    pairs = predicted_pairs(view)
    correlation = rank_correlation(pairs)
    count = "1 plan" if len(pairs) == 1 else f"{len(pairs)} plans"
    caption = f"{count} with a predicted and a measured loss, each with one standard error."
    if correlation is not None:
        caption += f" Rank correlation (Spearman) {correlation:.3f}."
    values = [value for loss, m in pairs for value in (loss, m.loss)]
    if off_the_scale(values):
        caption += " Plans with a loss of 0 or less are not on these axes."
    return _section("Predicted against measured", _chart("predictions", figure, caption, "chart square"))


def _notices(view: ReportData) -> Html:
    if not view.notices:
        return Html("")
    return _section("Notices", tag("ul", *(tag("li", notice) for notice in view.notices), class_="notices"))


def _facts(view: ReportData) -> Html:
    machines = dict.fromkeys(m.machine for m in view.measurements if m.machine)
    measured = {"losses measured on": ", ".join(machines)} if machines else {}
    parts = []
    for title, values in (("Model", view.model), ("Provenance", {**measured, **view.provenance})):
        if not values:
            continue
        facts = (join([tag("dt", name), tag("dd", text)]) for name, text in _flat(values))
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
