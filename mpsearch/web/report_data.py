"""What a report shows: plain values of one study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mpsearch.front import Measurement
from mpsearch.plan import BitPlan
from mpsearch.tables import SensitivityTable

Group = Literal["mixed", "uniform", "random"]


@dataclass(frozen=True)
class ReportData:
    """Everything one report says.

    Attributes:
        study: name of the study.
        model: name -> value of what is said of the model.
        verdict: the answer in sentences; the first one is the headline.
        budgets: each budget as its text and its limit in bytes.
        measurements: plans that ran; labels are ``mixed``, ``uniform <format>`` or ``random``.
        plans: what measurements call a plan -> the plan.
        scores: predicted loss of each decision in each format.
        chosen: the plan of the chosen budget.
        notices: things worth knowing about the run.
        provenance: name -> value: versions, seed, machine, data; values may be mappings or lists.
    """

    study: str
    model: Mapping[str, Any]
    verdict: Sequence[str]
    budgets: Sequence[tuple[str, int]]
    measurements: Sequence[Measurement]
    plans: Mapping[str, BitPlan]
    scores: SensitivityTable
    chosen: BitPlan
    notices: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights of the whole model; bits per weight refer to it."""
        return self.chosen.layers.weights

    @property
    def unit(self) -> str:
        """Unit of the measured losses."""
        return self.measurements[0].unit if self.measurements else self.scores.unit

    def bits(self, measurement: Measurement) -> float:
        """Stored bits per weight of a measured plan."""
        return 8 * measurement.cost["weights"] / self.weights

    def is_chosen(self, measurement: Measurement) -> bool:
        """Say whether a measurement is of the chosen plan: the same formats, however they were found."""
        if measurement.plan in (self.chosen.assignment, self.chosen.key):
            return True
        plan = self.plans.get(measurement.plan)
        return plan is not None and plan.assignment == self.chosen.assignment

    @property
    def chosen_measurement(self) -> Measurement | None:
        """What was measured of the chosen plan; ``None`` when it did not run."""
        return next((m for m in self.measurements if self.is_chosen(m)), None)


def group_of(measurement: Measurement) -> Group:
    """Say what a measured plan is to its study, from its label.

    >>> group_of(Measurement("k", "uniform int4-g64", 1.0, 0.1, "nats/token", {"weights": 8}))
    'uniform'
    """
    first = measurement.label.split(maxsplit=1)[0] if measurement.label.strip() else ""
    return "mixed" if first == "mixed" else "uniform" if first == "uniform" else "random"
