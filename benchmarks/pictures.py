"""Draw the pictures of the documentation from a study: one of each figure, light and dark.

    python -m benchmarks.pictures results.db demo [--out docs/pictures]

Equal results give equal files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mpsearch import plot, registry
from mpsearch.plot.figure import Figure
from mpsearch.spec import StudySpec
from mpsearch.stored_study import StoredStudy
from mpsearch.views.study_view import StudyView


def figures(view: StudyView) -> dict[str, Figure]:
    """One of each; the comparison is of the chosen plan with the study's smallest."""
    sizes = view.points.cost["weights"]
    smallest = min(range(len(view.points)), key=lambda i: (float(sizes[i]), i))
    return {
        "front": plot.front(view),
        "plan_heatmap": plot.plan_heatmap(view),
        "layer_curves": plot.layer_curves(view),
        "sensitivity": plot.sensitivity(view),
        "predicted_vs_measured": plot.predicted_vs_measured(view),
        "compare": plot.compare(view.plan(0), view.plan(smallest), view),
        "budget_breakdown": plot.budget_breakdown(view),
        "estimator_agreement": plot.estimator_agreement(view),
    }


def draw(view: StudyView, out: Path, dpi: int = 130) -> list[Path]:
    return [
        figure.save(out / f"{name}{suffix}.png", theme, dpi=dpi)
        for name, figure in figures(view).items()
        for theme, suffix in (("light", ""), ("dark", "-dark"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("database", type=Path)
    parser.add_argument("study")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    asked = parser.parse_args()
    url = f"sqlite:///{asked.database.resolve()}"
    store = registry.make("stores", "sql", url=url)
    study = StoredStudy(StudySpec.from_question(store.study(asked.study).spec, url), store)
    for path in draw(study.view, asked.out):
        print(f"{path.stat().st_size:>8,}  {path.name}")


if __name__ == "__main__":
    main()
