"""Which estimator to trust on a model: all of them against the same measured plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mpsearch import registry, rivals
from mpsearch.budget import Budget
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.planning import Labelled
from mpsearch.scoring import blind_to
from mpsearch.session import Session
from mpsearch.standings import Drawn, Predictions, Tournament, judge
from mpsearch.studying import Study
from mpsearch.tables import SensitivityTable

#: Fewer plans tell nothing of a rank correlation.
_FEWEST = 10


def hold(
    study: Study, estimators: Sequence[str] = (), *, plans: int = 100, sizes: int = 5, limit: float = 30.0
) -> Tournament:
    """Let estimators predict the losses of random plans, and choose plans of their own; measure both.

    Everything is kept in the study's store, so that a second call computes only what is missing. The plans are no part
    of the study's front.

    Args:
        study: says the model, the texts, the menu, pins and the budgets of anything but weights.
        estimators: names; all when left out, with their default settings.
        plans: how many random plans, in equal parts of each size.
        sizes: at how many sizes, evenly between the smallest and the largest plan.
        limit: seconds on one core that an estimator should take. One that scores batch by batch and would need longer,
            by the time of its first batch, scores fewer batches; the first one runs to its end.

    Raises:
        InputError: too few plans for a correlation (E113), or as `Study.run`.
    """
    if sizes < 1 or plans < max(_FEWEST, 4 * sizes):
        raise InputError(
            "E113", f"{plans} plans of {sizes} sizes", advice=f"give at least {_FEWEST} plans, and 4 of each size"
        )
    if not limit > 0:
        raise InputError("E113", f"limit is {limit} s", advice="give a positive number of seconds")
    names = list(estimators) or list(registry.names("estimators"))
    for name in names:
        registry.make("estimators", name)
    with study.session() as session:
        drawn = list(_draw(session, study.budgets, plans // sizes, sizes))
        if not drawn:
            raise InputError("E113", "no plan of any size keeps the other budgets", advice="loosen them")
        measured = session.measure([item for size in drawn for item in size.plans])
        found = [_enter(session, name, drawn, limit) for name in names]
        chosen = session.measure([item for _, items in found for item in items.values()])
        rivals = _rivals(session, found)
    outcome = judge(found, drawn, measured | chosen, rivals)
    body = outcome.to_json()
    seconds = {entry["estimator"]: entry.pop("seconds") for entry in body["entries"]}
    # Who is quickest may change from run to run.
    volatile = {"seconds": seconds, "recommended": body.pop("recommended"), "beaten": body.pop("beaten")}
    study.store.put("tournament", content_key(body), body, volatile)
    study.store.link(study.name, "tournament", content_key(body))
    return outcome


def _draw(session: Session, budgets: Sequence[Budget], each: int, sizes: int) -> Iterator[Drawn]:
    planner = session.planner
    weights = planner.costs[0]
    others = [b for b in budgets if b.resource != "weights"]
    offered = weights.value + planner.mask
    least = math.fsum(np.nanmin(offered, axis=1)) + weights.fixed
    most = math.fsum(np.nanmax(offered, axis=1)) + weights.fixed
    blank = SensitivityTable(
        weights.layers, weights.formats, np.where(np.isnan(offered), np.nan, 0.0), np.full(offered.shape, np.nan), ""
    )
    for k in range(sizes):
        limit = int(least + (most - least) * (k + 1) / (sizes + 1))
        wanted = (Budget("weights", Fraction(limit), "B"), *others)
        # Small menus leave few different plans, and the same one twice says nothing new.
        distinct: dict[str, Labelled] = {}
        for item in rivals.random(planner, blank, wanted, 4 * each):
            distinct.setdefault(item.plan.assignment, item)
            if len(distinct) == each:
                break
        if distinct:
            yield Drawn(limit, wanted, tuple(distinct.values()))


def _rivals(session: Session, found: Sequence[tuple[Predictions, Mapping[int, Labelled]]]) -> dict[int, float]:
    """Least loss of any plan that an estimator ever chose for this study at each size, this time or before."""
    study = session.study
    for _, chosen in found:
        for size, item in chosen.items():
            rival: dict[str, Any] = {"limit": size, "measurement": session.measurement_key(item.plan)}
            study.store.put("rival", content_key(rival), rival)
            study.store.link(study.name, "rival", content_key(rival))
    links = study.store.links(study.name, "rival")
    rivals = study.store.get_many("rival", [link.key for link in links]).values()
    runs = study.store.get_many("measurement", [str(rival["measurement"]) for rival in rivals])
    least: dict[int, float] = {}
    for rival in rivals:
        run = runs.get(str(rival["measurement"]))
        if run is not None:
            limit = rival["limit"]
            least[limit] = min(least.get(limit, math.inf), Measurement.from_json({**run, "label": ""}).loss)
    return least


def _enter(
    session: Session, name: str, drawn: Sequence[Drawn], limit: float
) -> tuple[Predictions, dict[int, Labelled]]:
    """Score with one estimator; predict the random plans and choose one plan of each size."""
    planner = session.planner
    blind = blind_to(name, planner.formats)
    if blind is not None:
        return Predictions(name, why_not=f"it does not see {blind[0]}, so it cannot score '{blind[1]}'"), {}
    try:
        scores, seconds = session.score(name, limit)
    except InputError as error:
        # One that cannot score this model does not keep the others from it.
        return Predictions(name, why_not=f"{error.code}: {error.message}"), {}
    predicted: dict[int, list[float]] = {}
    chosen: dict[int, Labelled] = {}
    why_not = ""
    for size in drawn:
        losses = [planner.predict(scores, item.plan).predicted.loss for item in size.plans]
        predicted[size.limit] = [math.nan if loss is None else loss for loss in losses]
        try:
            chosen[size.limit] = Labelled(f"{name} {size.limit}", planner.mixed(scores, size.budgets))
        except InfeasibleError:
            why_not = "formats without scores leave no plan of some sizes"
        except InputError as error:
            if error.code != "E211":
                raise
            why_not = error.message
    if scores.source["batches"] < session.survey.batches and not why_not:
        why_not = f"{scores.source['batches']} of {session.survey.batches} batches: all would take too long"
    return Predictions(name, scores.unit, predicted, seconds, why_not), chosen
