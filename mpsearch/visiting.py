"""Plans from elsewhere, measured beside a study's own: another tool's, another study's, or one made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mpsearch.errors import InputError
from mpsearch.front import Measurement
from mpsearch.layer import Layers
from mpsearch.notices import failure_notices
from mpsearch.plan import BitPlan
from mpsearch.planning import Labelled

if TYPE_CHECKING:
    from mpsearch.studying import Study

#: A study's own plans come first in every list.
_AFTER = 1_000_000


def measure_plans(study: Study, plans: Mapping[str, BitPlan]) -> dict[str, Measurement]:
    """Measure plans on a study's validation text and keep them with it, so that they stand on its front.

    They are priced as the study prices its own. Ties of the study do not bind them.

    Args:
        study: the study.
        plans: label -> plan, for the model of the study.

    Returns:
        Label -> measurement, of all that could be measured; the study's notices say why others could not.

    Raises:
        InputError: a plan for another model, or for other layers of it (E302).
    """
    with study.session() as session:
        planner = session.planner
        apart = Layers(tuple(replace(x, tie="") for x in planner.layers), planner.layers.excluded, planner.layers.unit)
        pricer = replace(planner, layers=apart)
        taken = [Labelled(label, pricer.priced(_fitted(study, plan, apart))) for label, plan in plans.items()]
        first = _AFTER + len(study.store.links(study.name, "plan"))
        for position, item in enumerate(taken, first):
            study.store.put("plan", item.plan.key, item.plan.to_json())
            study.store.link(study.name, "plan", item.plan.key, label=item.label, position=position)
        measured = session.measure(taken)
        study.notices += failure_notices(session.failed)
        found = {}
        for position, item in enumerate(taken, first):
            if item.plan.key in measured:
                study.store.link(study.name, "measurement", session.measurement_key(item.plan), item.label, position)
                found[item.label] = replace(measured[item.plan.key], label=item.label, cost=item.plan.cost)
    return found


def _fitted(study: Study, plan: BitPlan, layers: Layers) -> BitPlan:
    """The plan over the study's layers; those that only it decides stay as they are where they are 16 bits."""
    digest = plan.model.get("digest")
    if digest != study.identity["model"]:
        raise InputError(
            "E302",
            f"the plan is for model {str(digest)[:8]}…, study '{study.name}' is of {study.identity['model'][:8]}…",
        )
    names = {layer.name for layer in layers}
    missing = sorted(names - set(plan.formats)) or sorted(
        name for name, fmt in plan.formats.items() if name not in names and str(fmt) not in ("kv-bf16", "kv-fp16")
    )
    if missing:
        raise InputError(
            "E302",
            f"the plan and study '{study.name}' decide different layers, first '{missing[0]}'",
            advice="make the plan for the layers that `mpsearch layers MODEL` lists",
        )
    return BitPlan(layers, {name: plan.formats[name] for name in names}, plan.model, source=plan.source)
