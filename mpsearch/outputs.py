"""What a study leaves behind: the report and the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpsearch import registry
from mpsearch.files import inside, write_file
from mpsearch.machine import fingerprint
from mpsearch.studying import Study
from mpsearch.views.study_view import StudyView


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
    view = StudyView.of(study)
    view = replace(
        view,
        notices=tuple(str(notice) for notice in study.notices) or view.notices,
        provenance={**view.provenance, "fingerprint": fingerprint(), "identity": dict(study.identity)},
    )
    report, plan = target / "report.html", target / "plan.json"
    write_file(report, registry.load("reports", "html")(view))
    study.plans[0].plan.save(plan)
    return report, plan
