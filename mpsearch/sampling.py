"""Scoring a model for given budgets, with batches spent only where the doubt could still change the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpsearch.adaptive import Adaptive, Sampled, Scorer
from mpsearch.budget import parse_budgets
from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layers
from mpsearch.planning import Planner
from mpsearch.ports import Batches, Estimator, Model
from mpsearch.scoring import mark_unreached
from mpsearch.spec import StudySpec
from mpsearch.tables import SensitivityTable


def score_within(
    estimator: Estimator,
    model: Model,
    batches: Batches,
    layers: Layers,
    formats: Sequence[Format],
    budgets: Sequence[str],
    how: Adaptive,
) -> Sampled:
    """Score what plans within some budgets depend on (see `Adaptive`); the table has the rows of ``formats``.

    Raises:
        InputError: an estimator whose scores of a decision depend on which others are scored with it, or that looks at
            no data (E506); as `Adaptive.sample`. InfeasibleError: budgets that no plan keeps (E201, E203).
    """
    wanted = parse_budgets(budgets)
    menu = {kind: tuple(str(fmt) for fmt in formats if (fmt.family == "kv") == (kind == "kv")) for kind in ("kv", "")}
    spec = StudySpec(model="given", calibration="given", formats=menu[""], kv=menu["kv"], budgets=tuple(budgets))
    planner = Planner(spec, layers, {}, wanted)
    planner.check(wanted)
    if "data" not in getattr(estimator, "needs", ("data",)):
        raise InputError("E506", "the estimator looks at no data, so there is nothing to sample: leave the budgets out")
    # The same lists each time, so that what is remembered of a batch is found again.
    single = [[batch] for batch in batches]
    rows = {decision.name: decision for decision in layers.decisions}

    def score(names: Sequence[str], batch: int) -> SensitivityTable:
        chosen = [layer for name in names for layer in rows[name].layers]
        found = estimator.score(model, single[batch], chosen, planner.formats)
        return mark_unreached(found, chosen, planner.formats, estimator)

    if batches:
        _check_alone(score, list(rows))
    found = how.sample(score, lambda table: planner.problem(table, wanted), list(rows), len(batches))
    columns = [planner.formats.index(fmt) for fmt in formats]
    return replace(found, table=found.table.take(columns=columns), choice=np.argsort(columns)[found.choice])


def _check_alone(score: Scorer, names: Sequence[str]) -> None:
    """Refuse an estimator that scores a decision differently beside others than alone."""
    if len(names) < 2:
        return
    beside, alone = score(names[:2], 0).take([0]), score(names[:1], 0)
    if beside.status != alone.status or not np.allclose(beside.value, alone.value, rtol=1e-4, atol=0, equal_nan=True):
        raise InputError(
            "E506",
            f"the estimator scores '{names[0]}' differently beside other decisions than alone",
            because="decisions that are clear would be left out of what the others are scored with",
            advice="leave the budgets out",
        )
