"""What can be drawn: studies of any kind, views and plans, as one of the latter two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpsearch import registry
from mpsearch.client.study import RemoteStudy
from mpsearch.errors import InputError
from mpsearch.front import ParetoFront
from mpsearch.layer import Layers
from mpsearch.plan import BitPlan
from mpsearch.stored_study import StoredStudy
from mpsearch.tasks import Survey
from mpsearch.verdict import verdict
from mpsearch.views.points import PlanRow, Points
from mpsearch.views.study_view import Limit, StudyView, or_none


def view_of(source: Any) -> StudyView:
    """Read what is drawn of a study.

    Args:
        source: a study, one of a server (`mpsearch.connect`), or a view.

    Raises:
        InputError: none of these (E113).
        StorageError: no such study (E141).
    """
    if isinstance(source, StudyView):
        return source
    if isinstance(source, StoredStudy):
        return StudyView.of(source)
    if isinstance(source, RemoteStudy):
        return _of_server(source)
    raise InputError("E113", f"got a {type(source).__name__}", advice="give a study, such as mp.study(…), or its view")


def plan_of(source: Any) -> BitPlan:
    """Read a plan.

    Args:
        source: a plan, the path of one, or a study or view, whose plan for its own budgets is meant.

    Raises:
        InputError: none of these (E113), a file that is no plan (E101, E304), or a study without a plan (E143).
    """
    if isinstance(source, BitPlan):
        return source
    if isinstance(source, str | Path):
        return BitPlan.load(source)
    view = view_of(source)
    if not len(view.points):
        raise InputError("E143", f"study '{view.study}' has no plan", advice="run it first")
    return view.plan(0)


def alone(plan: BitPlan) -> StudyView:
    """Return a view in which there is one plan and nothing else.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer
    >>> len(alone(BitPlan(Layers((Layer("fc", "linear", (8, 64)),)), {"fc": Format.parse("int4-g64")})).points)
    1
    """
    points = Points.of([PlanRow.of("plan", plan.to_json())], [])
    return StudyView("", "", plan.layers, points, model=plan.model)


def points_of(front: ParetoFront) -> Points:
    """Return the measurements of a front as points; nothing is known of their plans but what they cost."""
    runs = [*front.points, *front.dominated]
    rows = [PlanRow(m.plan, m.plan, m.label, (), {"cost": dict(m.cost)}) for m in runs]
    points = Points.of(rows, runs, searchers=registry.names("searchers"))
    # Only a study knows which of its plans is the chosen one.
    groups = tuple("mixed" if group == "chosen" else group for group in points.groups)
    return replace(points, groups=groups)


def _of_server(study: RemoteStudy) -> StudyView:
    survey = or_none(lambda: study.survey)
    scores = or_none(lambda: study.scores)
    plans, costs, measured = study.plans, tuple(study.costs), tuple(study.measurements)
    tables = {table.resource: table for table in costs}
    limits = tuple(
        Limit(str(b), b.priced_by, b.limit(tables[b.priced_by]) if b.priced_by in tables else float("nan"))
        for b in study.budgets
    )
    found: Survey | None = survey
    points = Points.of(
        [PlanRow.of(item.label, item.plan.to_json()) for item in plans],
        measured,
        formats=scores.formats if scores is not None else (),
        searchers=registry.names("searchers"),
        unit=scores.unit if scores is not None else "nats/token",
    )
    return StudyView(
        study.name,
        study.status.state,
        found.layers if found is not None else Layers(()),
        points,
        measured,
        scores,
        costs,
        limits,
        dict(plans[0].plan.model) if plans else {},
        tuple(verdict(plans[0], measured, costs)) if plans else (),
    )
