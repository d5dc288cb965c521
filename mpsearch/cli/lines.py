"""Lines that say what a budget is worth and which choices the errors of the scores leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mpsearch.cli.show import safe
from mpsearch.cost_text import UNITS, itemised
from mpsearch.plan import BitPlan
from mpsearch.robust import Doubt
from mpsearch.tables import CostTable

_LISTED = 5


def price_lines(plan: BitPlan) -> Iterator[str]:
    """The price of each budget that binds: the slope at the plan, which holds for small changes."""
    for entry in plan.source.get("prices", ()):
        resource = str(entry["budget"]).split(" ")[0]
        unit, size = UNITS.get(resource, ("unit", 1))
        # Prices of the relaxed problem can be a rounding error above none.
        if entry["price"] * size > 1e-9 * abs(plan.predicted.loss or 0.0):
            saved = f"{entry['price'] * size:.3g} {plan.predicted.unit}"
            yield f"price       {saved} per {unit} of {resource}, for small changes"


def cost_lines(plan: BitPlan, costs: Sequence[CostTable]) -> Iterator[str]:
    """What a plan takes of each resource beside weights, and where the figure is from."""
    for item in itemised(plan, costs):
        name, _, condition = item.resource.partition(" ")
        yield f"{name:<11} {replace(item, resource=condition)}"


def doubt_lines(doubts: Sequence[Doubt], count: int) -> Iterator[str]:
    """How many choices are within noise, and the first few, most worth measuring better first."""
    if not doubts:
        return
    yield f"in doubt    {len(doubts)} of {count} choices are within noise; worth measuring better first:"
    for doubt in doubts[:_LISTED]:
        more = "" if math.isinf(doubt.samples) else f", clear with {doubt.samples:.3g} x the samples"
        lead = f"leads {safe(doubt.other)} by {doubt.lead:.3g} ± {doubt.error:.2g}"
        yield f"            {safe(doubt.row)}: {safe(doubt.chosen)} {lead}{more}"
