"""What a study leaves behind: the report and the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mpsearch import registry
from mpsearch.errors import MpsearchError
from mpsearch.files import inside, write_file
from mpsearch.machine import fingerprint
from mpsearch.studying import Study
from mpsearch.tables import SensitivityTable
from mpsearch.verdict import verdict


def output_folder(study: Study) -> Path:
    """Folder of a study's outputs: its name below ``out``, with what is no plain character replaced."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in study.name).strip(".") or "study"
    return inside(Path(study.spec.out), plain)


def write_outputs(study: Study, folder: Path | None = None) -> tuple[Path, Path]:
    """Write ``report.html`` and ``plan.json`` of a study that has run.

    Args:
        study: the study.
        folder: where; `output_folder` when left out.

    Returns:
        Paths of the report and of the plan.
    """
    target = folder or output_folder(study)
    plans = study.plans
    chosen, measurements = plans[0], study.measurements
    weights = next(table for table in study.costs if table.resource == "weights")
    try:
        scores = study.scores
    except MpsearchError:
        # A budget above the model needs no scores.
        empty = np.zeros((0, 0))
        scores = SensitivityTable((), (), empty, empty, "nats/token")
    data = registry.load("reports", "data")(
        study=study.name,
        model={**chosen.plan.model, "weights": study.survey.layers.weights, "layers": len(study.survey.layers)},
        verdict=verdict(chosen, measurements, study.costs),
        budgets=[(str(b), b.limit(weights)) for b in study.budgets if b.resource == "weights"],
        measurements=measurements,
        plans={item.plan.assignment: replace(item.plan) for item in reversed(plans)},
        scores=scores,
        chosen=chosen.plan,
        notices=[str(notice) for notice in study.notices],
        provenance={"study": study.spec.question(), "fingerprint": fingerprint(), "identity": dict(study.identity)},
    )
    report, plan = target / "report.html", target / "plan.json"
    write_file(report, registry.load("reports", "html")(data))
    chosen.plan.save(plan)
    return report, plan
