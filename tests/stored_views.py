"""A made-up study written into a database, so that commands can be tried without running one."""

from __future__ import annotations

from pathlib import Path

from mpsearch import registry
from mpsearch.keys import content_key
from mpsearch.spec import StudySpec
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Survey
from mpsearch.views.study_view import StudyView


def store_view(
    view: StudyView, path: Path, name: str, *, measured: bool = True, others: tuple[SensitivityTable, ...] = ()
) -> str:
    """Write a view as the study that it could have been read from; returns the address of the database."""
    url = f"sqlite:///{path}"
    spec = StudySpec(
        name=name,
        model="/models/made-up",
        calibration="stdlib:calibration",
        budgets=("weights <= 4 bits",),
        formats=view.points.formats,
        estimator="fisher",
    )
    with registry.make("stores", "sql", url=url) as store:
        store.create_study(name, spec.question())
        survey = Survey(view.layers, 1, "MadeUp")
        put = [("survey", "survey", survey.to_json(), "", 0)]
        put += [("origin", "origin", {"model": "d" * 64}, "", 0)]
        put += [("cost", table.key, table.to_json(), "", i) for i, table in enumerate(view.costs)]
        if view.scores is not None:
            put.append(("scores", f"scores of {name}", view.scores.to_json(), "", 0))
        for i in range(len(view.points)):
            plan = view.plan(i)
            put.append(("plan", plan.key, plan.to_json(), view.points.labels[i], i))
        if measured:
            for i, run in enumerate(view.measured):
                body = {**run.to_json(), "plan": view.plan(view.points.keys.index(run.plan)).assignment}
                put.append(("measurement", content_key(body), body, run.label, i))
        for kind, key, body, label, position in put:
            store.put(kind, key, body)
            store.link(name, kind, key, label, position)
        for table in others:
            store.put("scores", content_key(table.to_json()), table.to_json())
            store.link(name, "scores", content_key(table.to_json()), "other", -2)
        store.set_state(name, "complete")
    return url
