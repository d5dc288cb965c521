"""Figures of studies and plans: as data, to look into (Plotly), and for paper (matplotlib).

>>> import mpsearch.plot
>>> from mpsearch.testing.views import pretended
>>> figure = mpsearch.plot.predicted_vs_measured(pretended(20, 16, 4))
>>> sorted(figure.data)
['correlation', 'figure', 'left_out', 'points', 'unit']
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mpsearch.errors import InputError, did_you_mean
from mpsearch.plot.figure import Figure

if TYPE_CHECKING:
    from mpsearch.client.study import RemoteStudy
    from mpsearch.front import ParetoFront
    from mpsearch.plan import BitPlan
    from mpsearch.stored_study import StoredStudy
    from mpsearch.views.study_view import StudyView

    #: A study, live, stored or of a server, or a view of one.
    Source: TypeAlias = StoredStudy | RemoteStudy | StudyView
    #: A plan, the path of one, or a study, whose plan for its own budgets is meant.
    PlanSource: TypeAlias = BitPlan | str | Path | Source

__all__ = [
    "Figure",
    "budget_breakdown",
    "compare",
    "estimator_agreement",
    "front",
    "layer_curves",
    "plan_heatmap",
    "predicted_vs_measured",
    "sensitivity",
]


def front(study: Source | ParetoFront, resource: str = "weights") -> Figure:
    """Draw what every plan loses over what it takes: measured ones with standard errors, predicted ones hollow.

    Args:
        study: a study, a view, or a measured front.
        resource: which cost, such as ``weights`` or ``bops``.

    Raises:
        InputError: neither of these, or a resource without costs (E113).

    >>> from mpsearch.testing.views import pretended
    >>> front(pretended(20, 16, 4)).data["points"][0]["group"]
    'chosen'
    """
    from mpsearch.front import ParetoFront
    from mpsearch.plot.fronts import front_chart
    from mpsearch.plot.sources import points_of, view_of
    from mpsearch.views.front_data import front_data

    if isinstance(study, ParetoFront):
        points = points_of(study)
        budgets: tuple[Any, ...] = ()
        weights, units, name = 0, {}, ""
    else:
        view = view_of(study)
        points, budgets = view.points, view.budgets
        weights, name = view.weights if len(view.layers) else 0, view.study
        units = {table.resource: table.unit for table in view.costs}
    if resource != "weights" and resource not in points.cost:
        close = did_you_mean(resource, points.cost)
        raise InputError(
            "E113", f"the plans have no costs of '{resource}'{close}", advice=f"known: {', '.join(points.cost)}"
        )
    unit = "bytes" if resource == "weights" else units.get(resource, "")
    data = front_data(points, budgets, weights=weights, resource=resource, units=unit)
    return Figure({**data, "study": name}, front_chart(data, f"{name}: loss over size" if name else ""))


def plan_heatmap(plan: PlanSource) -> Figure:
    """Draw the bits of each layer: blocks by kinds of layers.

    Args:
        plan: a plan, the path of one, or a study.

    Raises:
        InputError: as `mpsearch.plot.sources.plan_of`.
    """
    from mpsearch.plot.maps import heatmap_chart
    from mpsearch.plot.sources import plan_of
    from mpsearch.views.plan_map import plan_map

    found = plan_of(plan)
    data = plan_map(found)
    name = found.model.get("name", "")
    return Figure(data, heatmap_chart(data, f"{name}: bits of each layer" if name else ""))


def layer_curves(study: Source, layers: Sequence[str] | str | None = None) -> Figure:
    """Draw the predicted loss of layers over their bits, with standard errors.

    Args:
        study: a study with scores, or its view.
        layers: names or patterns such as ``*.down_proj``; the six that lose most when left out.

    Raises:
        InputError: no scores (E143), or no such layer (E302).
    """
    from mpsearch.plot.layers import curves_chart
    from mpsearch.plot.sources import view_of
    from mpsearch.views.curves import curves, picked

    data = curves(view_of(study))
    chosen = picked(data, layers)
    shown = {**data, "decisions": [data["decisions"][i] for i in chosen]}
    return Figure({"figure": "layer_curves", **shown}, curves_chart(data, chosen))


def sensitivity(study: Source) -> Figure:
    """Draw the predicted loss of every decision in each format, in network order.

    Args:
        study: a study with scores, or its view.

    Raises:
        InputError: no scores (E143).
    """
    from mpsearch.plot.layers import sensitivity_chart
    from mpsearch.plot.sources import view_of
    from mpsearch.views.curves import curves

    data = curves(view_of(study))
    return Figure({"figure": "sensitivity", **data}, sensitivity_chart(data))


def predicted_vs_measured(study: Source) -> Figure:
    """Draw measured over predicted losses of the plans that have both.

    Args:
        study: a study, or its view.
    """
    from mpsearch.plot.losses import predicted_chart
    from mpsearch.plot.sources import view_of
    from mpsearch.views.predictions import predictions

    data = predictions(view_of(study))
    return Figure(data, predicted_chart(data))


def compare(a: PlanSource, b: PlanSource, study: Source | None = None) -> Figure:
    """Draw the way from the predicted loss of one plan to that of another, and the bytes of each change.

    Args:
        a: a plan, or the path of one.
        b: another one of the same model.
        study: whose scores say what each change does; without it only bytes are known.

    Raises:
        InputError: plans of different models (E302), or as `mpsearch.plot.sources.plan_of`.
    """
    from mpsearch.plot.amounts import compare_chart
    from mpsearch.plot.sources import plan_of, view_of
    from mpsearch.views.difference import difference

    found = difference(plan_of(a), plan_of(b), None if study is None else view_of(study))
    data = {"figure": "compare", **found.to_json()}
    return Figure(data, compare_chart(data))


def budget_breakdown(plan: PlanSource, resource: str = "weights", study: Source | None = None) -> Figure:
    """Draw where the bytes of a plan go, or another resource, by kind of layer.

    Args:
        plan: a plan, the path of one, or a study.
        resource: which cost; those beside weights need a study.
        study: whose cost tables price the plan.

    Raises:
        InputError: a resource without costs (E113), or as `mpsearch.plot.sources.plan_of`.
    """
    from mpsearch.plan import BitPlan
    from mpsearch.plot.amounts import breakdown_chart
    from mpsearch.plot.sources import alone, plan_of, view_of
    from mpsearch.views.breakdown import breakdown
    from mpsearch.views.plan_map import bits_of_kinds

    found = plan_of(plan)
    own = None if isinstance(plan, BitPlan | str | Path) else plan
    view = view_of(study if study is not None else own) if study is not None or own is not None else alone(found)
    parts = {item.resource: item for item in breakdown(view, found)}
    if resource not in parts:
        close = did_you_mean(resource, parts)
        advice = f"known: {', '.join(parts)}; other costs need study=…"
        raise InputError("E113", f"the plan has no costs of '{resource}'{close}", advice=advice)
    chosen = parts[resource]
    bits = bits_of_kinds(found) if resource == "weights" else {}
    data = {
        "figure": "budget_breakdown",
        **{name: value for name, value in chosen.to_json().items() if name != "kinds"},
        "parts": [{"name": x.name, "amount": x.amount, "bits": bits.get(x.name, {})} for x in chosen.kinds],
    }
    return Figure(data, breakdown_chart(data))


def estimator_agreement(study: Source) -> Figure:
    """Draw how far estimators agree with what was measured, and with each other.

    Args:
        study: a study, or its view.
    """
    from mpsearch.plot.losses import agreement_chart
    from mpsearch.plot.sources import view_of
    from mpsearch.views.agreement import agreement

    data = {"figure": "estimator_agreement", "pairs": [one.to_json() for one in agreement(view_of(study))]}
    return Figure(data, agreement_chart(data))
