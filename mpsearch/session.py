"""Scoring and measuring while a study's workers run: what is known is looked up, the rest computed and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpsearch import registry
from mpsearch.driving import Driver
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.machine import fingerprint
from mpsearch.plan import BitPlan
from mpsearch.planning import Labelled, Planner
from mpsearch.scoring import Scoring
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Failed, Job, MeasureTask, Survey

if TYPE_CHECKING:
    from mpsearch.studying import Study

EVALUATOR = "kl"


@dataclass
class Session:
    """A study at work.

    Attributes:
        study: the study.
        planner: makes its plans.
        survey: what was found in model and text.
        driver: has the work done.
        outcome: state of the study when the session ends well.
        failed: the plans of the last `measure` that could not be measured.
    """

    study: Study
    planner: Planner
    survey: Survey
    driver: Driver
    outcome: str = "complete"
    failed: list[Failed] = field(default_factory=list)

    def score(self, estimator: str, limit: float = math.inf) -> tuple[SensitivityTable, float]:
        """Score with an estimator: the study's own with its settings, any other with its default ones.

        Args:
            estimator: its name.
            limit: seconds on one core (see `Scoring.table`).

        Returns:
            The table, and how many seconds it took or would take on one core.
        """
        spec, study = self.study.spec, self.study
        settings = dict(spec.estimator_settings) if estimator == spec.estimator else {}
        if "seed" in registry.settings("estimators", estimator):
            settings.setdefault("seed", spec.seed)
        inner = getattr(registry.make("estimators", estimator, **settings), "estimators", ())
        members = {name: registry.load("estimators", name).version for name in inner}
        scope = content_key(
            {
                "model": study.identity["model"],
                "calibration": study.identity["calibration"],
                "cut": [spec.tokens, spec.length, spec.batch_size],
                "estimator": [estimator, settings, registry.load("estimators", estimator).version],
                "layers": self.survey.layers.key,
                "formats": [fmt.key for fmt in self.planner.formats],
                "fingerprint": fingerprint(),
                **({"members": members} if members else {}),
            }
        )
        scoring = Scoring(
            scope,
            estimator,
            tuple(sorted(settings.items())),
            self.survey.layers,
            self.planner.formats,
            self.survey.batches,
        )
        phase = "score" if estimator == spec.estimator else estimator
        scores = scoring.table(
            study.store,
            lambda jobs: study.compute(self.driver, jobs),
            lambda done, total: study.report(phase, done, total),
            limit,
        )
        return scores, scoring.seconds(study.store, scores.source["batches"])

    def measure(
        self, plans: Sequence[Labelled], batches: int = 0, phase: str = "measure", *, calibration: bool = False
    ) -> dict[str, Measurement]:
        """Measure plans that were not measured before.

        Args:
            plans: the plans.
            batches: how many of the batches to measure on, from the first; 0 for all.
            phase: what to report progress as; nothing is reported when empty.
            calibration: measure on the calibration batches instead of the validation batches.

        Returns:
            Key of the plan -> measurement, of all that could be measured; `failed` says why others could not.
        """
        store, jobs, self.failed = self.study.store, dict[str, Job](), []
        keys = [self.measurement_key(item.plan, batches, calibration=calibration) for item in plans]
        known = store.get_many("measurement", keys)
        for key, item in zip(keys, plans, strict=True):
            if key not in known and key not in jobs:
                task = MeasureTask(EVALUATOR, item.plan.to_json(), batches=batches, calibration=calibration)
                jobs[key] = Job(task, key)
        if phase:
            self.study.report(phase, 0, len(jobs))
        without: dict[int, Failed] = {}
        for done, (i, failed) in enumerate(self.study.compute(self.driver, list(jobs.values())), start=1):
            if phase:
                self.study.report(phase, done, len(jobs))
            if failed is not None:
                without[i] = failed
        # In the order of the plans, whichever ended first.
        self.failed = [without[i] for i in sorted(without)]
        known = store.get_many("measurement", keys)
        return {
            item.plan.key: Measurement.from_json({**known[key], "label": item.label})
            for key, item in zip(keys, plans, strict=True)
            if key in known
        }

    def measurement_key(self, plan: BitPlan, batches: int = 0, *, calibration: bool = False) -> str:
        """Content key of a plan's measurement in this study, on the first batches or on all."""
        spec, identity = self.study.spec, self.study.identity
        text = identity["calibration" if calibration else "validation"]
        cut = [spec.tokens if calibration else spec.validation_tokens, spec.length, spec.batch_size]
        evaluator = [EVALUATOR, registry.load("evaluators", EVALUATOR).version]
        parts = [plan.assignment, text, cut, evaluator, fingerprint()]
        parts += sorted({fmt.key for fmt in plan.formats.values()} - {str(fmt) for fmt in plan.formats.values()})
        if any(fmt.calibrated for fmt in plan.formats.values()):
            parts.append([identity["calibration"], spec.tokens])
        if batches:
            parts.append(["batches", batches])
        return content_key(parts)
