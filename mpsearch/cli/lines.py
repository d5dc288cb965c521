"""Lines that say what a budget is worth and which choices the errors of the scores leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mpsearch.budget import TIMED
from mpsearch.cli.show import safe
from mpsearch.hardware.latency import predicted
from mpsearch.plan import BitPlan
from mpsearch.robust import Doubt
from mpsearch.tables import CostTable

_LISTED = 5
_UNITS = {
    "weights": ("MiB", 2**20), "kv": ("MiB", 2**20), "memory": ("MiB", 2**20), "traffic": ("MiB", 2**20),
    "bops": ("GBOP", 10**9), "ttft": ("ms", 1e-3), "tpot": ("ms", 1e-3), "latency": ("ms", 1e-3),
    "energy": ("mJ", 1e-3),
}  # fmt: skip


def price_lines(plan: BitPlan) -> Iterator[str]:
    """What one more unit of each budget would save."""
    for entry in plan.source.get("prices", ()):
        resource = str(entry["budget"]).split(" ")[0]
        unit, size = _UNITS.get(resource, ("unit", 1))
        if entry["price"] > 0:
            saved = f"{entry['price'] * size:.3g} {plan.predicted.unit}"
            yield f"price       one more {unit} of {resource} would save {saved}"


def cost_lines(plan: BitPlan, costs: Sequence[CostTable]) -> Iterator[str]:
    """What a plan takes of each resource that a budget names beside weights, and where the figure is from."""
    columns = {name: j for j, name in enumerate(costs[0].formats)} if costs else {}
    choice = [columns.get(str(plan.formats[row.layers[0].name]), -1) for row in plan.layers.decisions]
    for table in costs:
        resource = table.resource.split(" ")[0]
        if resource not in _UNITS or resource in ("weights", "bops") or -1 in choice:
            continue
        unit, size = _UNITS[resource]
        error = ""
        if resource in TIMED:
            seconds, spread = predicted(table, choice)
            error = f" ± {spread / size:.2g}" if spread else ""
            amount = seconds / size
        else:
            amount = plan.cost.get(table.resource, math.nan) / size
        yield f"{resource:<11} {amount:,.4g}{error} {unit} {table.resource.partition(' ')[2]}: {_origin(table)}"


def _origin(table: CostTable) -> str:
    """Where the figures of a table are from, with the parts that differ."""
    if table.resource.startswith("memory"):
        parts = (("left as it is", "kept"), ("caches not decided", "caches"), ("activations", "activations"))
        items = [f"{name} {table.source[key] / 2**20:.4g} MiB" for name, key in parts if table.source.get(key)]
        return f"weights and caches exact, activations {table.source['activations are']} ({', '.join(items)})"
    runs = [entry["correction"]["runs"] for entry in table.source.get("passes", ())]
    if not runs:
        return table.kind
    if not all(runs):
        return f"{table.kind} kernels added up, without attention, norms and calls"
    off = [entry["correction"]["residual"] for entry in table.source["passes"] if entry["correction"]["residual"]]
    share = f", off by {100 * max(off):.1f} % there" if off else ""
    return f"{table.kind} kernels, corrected by {min(runs)} runs of the whole model{share}"


def doubt_lines(doubts: Sequence[Doubt], count: int) -> Iterator[str]:
    """How many choices are within noise, and the first few, most worth measuring better first."""
    if not doubts:
        return
    yield f"in doubt    {len(doubts)} of {count} choices are within noise; worth measuring better first:"
    for doubt in doubts[:_LISTED]:
        more = "" if math.isinf(doubt.samples) else f", clear with {doubt.samples:.3g} x the samples"
        lead = f"leads {safe(doubt.other)} by {doubt.lead:.3g} ± {doubt.error:.2g}"
        yield f"            {safe(doubt.row)}: {safe(doubt.chosen)} {lead}{more}"
