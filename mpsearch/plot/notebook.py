"""What notebooks show of studies, plans and fronts: static HTML without scripts, in which names are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpsearch.cost_text import UNITS
from mpsearch.errors import MpsearchError
from mpsearch.plot.text import plain, thinned
from mpsearch.plot.theme import BITS, step_of
from mpsearch.web.amounts import size, with_spread
from mpsearch.web.markup import Html, join, tag

if TYPE_CHECKING:
    from mpsearch.front import ParetoFront
    from mpsearch.plan import BitPlan
    from mpsearch.stored_study import StoredStudy

#: Rows of a table; of longer ones every second, fifth, … is shown.
_ROWS = 60
_CELL = "text-align:center;padding:2px 8px;"
_NAME = "text-align:left;padding:2px 8px;"
_NUMBER = "text-align:right;padding:2px 8px;"


def study_html(study: StoredStudy) -> Html:
    """Show the verdict and the front; of a study that has not come so far, what is there.

    Args:
        study: the study.
    """
    from mpsearch.plot import front
    from mpsearch.plot.sources import view_of

    head = tag("h4", f"Study {plain(study.name, 80)}")
    try:
        view = view_of(study)
    except MpsearchError as error:
        said = "It has not run yet: run() starts it" if error.code == "E141" else error.message
        return join([head, tag("p", plain(f"{said}.", 400))])
    lines = [plain(line, 400) for line in view.verdict] or [f"It is {view.state}, and has no plan yet."]
    first, *others = lines
    verdict = [tag("p", tag("strong", first)), *(tag("p", line) for line in others)]
    return join([head, *verdict, *([front(view).picture_html()] if len(view.points) else [])])


def plan_html(plan: BitPlan) -> Html:
    """Show the bits of each layer as a table: blocks by kinds of layers.

    Args:
        plan: the plan.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> from mpsearch.plan import BitPlan
    >>> plan = BitPlan(Layers((Layer("<b>", "linear", (8, 64)),)), {"<b>": Format.parse("int4-g64")})
    >>> "<b>" in plan_html(plan), "&lt;b&gt;" in plan_html(plan)
    (False, True)
    """
    from mpsearch.plot.maps import heatmap_chart
    from mpsearch.views.plan_map import plan_map

    data = plan_map(plan)
    cells = {(cell["row"], cell["column"]): cell for cell in data["cells"]}
    wide = max(len(data["columns"]), 1)
    body = []
    shown = thinned(len(data["rows"]), _ROWS)
    for row in shown:
        alone = cells.get((row, -1))
        across: list[Html] = [_cell(alone, wide)] if alone else []
        across += [] if alone else [_cell(cells.get((row, column)), 1) for column in range(wide)]
        body.append(tag("tr", tag("th", plain(data["rows"][row]), style=_NAME, scope="row"), *across))
    names = (tag("th", plain(name, 24), style=_CELL, scope="col") for name in data["columns"])
    head = tag("tr", tag("th", "block", style=_NAME, scope="col"), *names)
    notes = list(heatmap_chart(data).notes)
    if shown.step > 1:
        notes.append(f"One of {shown.step} rows is shown.")
    title = plain(plan.model.get("name", ""), 80)
    above = tag("h4", f"Plan for {title}" if title else "Plan")
    return join([above, tag("table", tag("thead", head), tag("tbody", *body)), *(tag("p", note) for note in notes)])


def front_html(front: ParetoFront) -> Html:
    """Show the plans of a front as a table, and its picture.

    Args:
        front: the front.
    """
    if not len(front):
        return tag("p", "The front is empty: nothing was measured.")
    numbers = thinned(len(front), _ROWS)
    rows = [_row(("plan", front.resource, "measured loss"), "th")]
    for i in numbers:
        run = front[i]
        cost = run.cost[front.resource]
        amount = size(cost) if front.resource == "weights" else _amount(cost, front.resource)
        rows.append(_row((plain(run.label), amount, f"{with_spread(run.loss, run.spread)} {run.unit}"), "td"))
    more = [] if numbers.step == 1 else [tag("p", f"One of {numbers.step} plans is shown.")]
    return join([tag("table", *rows), *more, front.plot().picture_html()])


def _amount(cost: float, resource: str) -> str:
    unit, scale = UNITS.get(resource.split(" ")[0], ("", 1))
    return f"{cost / float(scale):,.6g} {unit}".rstrip()


def _row(values: Sequence[str], kind: str) -> Html:
    name, *numbers = values
    return tag("tr", tag(kind, name, style=_NAME), *(tag(kind, value, style=_NUMBER) for value in numbers))


def _cell(cell: dict[str, Any] | None, span: int) -> Html:
    if cell is None:
        return tag("td")
    ground, digits = BITS[step_of(cell["median"])]
    formats = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in cell["formats"].items())
    names = cell["layers"]
    told = names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
    style = f"{_CELL}background:{ground};color:{digits}"
    return tag(
        "td", cell["bits"], style=style, title=plain(f"{told}: {formats}", 200), colspan=span if span > 1 else None
    )
