"""What an estimator would change about a plan, on its own scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from mpsearch.plan import BitPlan
from mpsearch.tables import SensitivityTable
from mpsearch.views.agreement import estimator
from mpsearch.views.steps import SIGNIFICANT, Ladder, Steps

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView

Says = Literal["more bits", "fewer bits", "the same"]


class Judge:
    """What an estimator would do with each decision of a plan.

    Its scores may be in any unit: a byte is worth what parts the steps up that the plan did not take from those down
    that it did not take either, by the loss that they would bring.

    Attributes:
        name: of the estimator.
    """

    def __init__(self, view: StudyView, table: SensitivityTable, plan: BitPlan) -> None:
        self.name = estimator(table)
        ladder = Ladder.of(view, (plan,), table)
        choice = ladder.choice(plan)
        self.up, self.down = ladder.steps(choice, "up"), ladder.steps(choice, "down")
        self.price = _price(self.up, self.down)

    def says(self, i: int) -> Says:
        """More or fewer bits, where that is clear of the noise."""
        for steps, word in ((self.up, "more bits"), (self.down, "fewer bits")):
            ahead = steps.gain[i] - self.price * steps.bytes[i]
            if ahead > SIGNIFICANT * steps.error[i]:
                return "more bits" if word == "more bits" else "fewer bits"
        return "the same"


def _price(up: Steps, down: Steps) -> float:
    """Loss per byte at which steps beyond it, up and down together, would bring least; NaN where there is no step.

    What they would bring is a sum of convex, piecewise linear functions of the price: it is least where the bytes of
    the steps up that are worth more come to those of the steps down that are worth less.
    """
    sizes = [np.where(steps.there & np.isfinite(steps.gain), np.abs(steps.bytes), 0.0) for steps in (up, down)]
    rates = [steps.gain / steps.bytes for steps in (up, down)]
    known = [size > 0 for size in sizes]
    edges = np.unique(np.concatenate([rate[there] for rate, there in zip(rates, known, strict=True)]))
    if not len(edges):
        return math.nan

    def slope(price: float) -> float:
        more = sizes[0][known[0] & (rates[0] > price)].sum()
        less = sizes[1][known[1] & (rates[1] < price)].sum()
        return float(less - more)

    middles = (edges[1:] + edges[:-1]) / 2
    # Between two edges the slope is constant; where it is none, all prices there are as good.
    flat = [float(middle) for middle in middles if slope(middle) == 0]
    if flat:
        return max(flat[0], 0.0)
    turned = next((j for j, middle in enumerate(middles) if slope(middle) > 0), len(edges) - 1)
    return max(float(edges[turned]), 0.0)
