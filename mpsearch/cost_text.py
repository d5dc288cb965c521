"""What a plan takes of each resource, in words: how much, and whether that is exact, measured or modelled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpsearch.budget import TIMED
from mpsearch.hardware.latency import predicted
from mpsearch.plan import BitPlan
from mpsearch.tables import CostTable

#: Resource -> the unit that people read it in, and how much of the table's own unit that is.
UNITS = {
    "weights": ("MiB", 2**20), "kv": ("MiB", 2**20), "memory": ("MiB", 2**20), "traffic": ("MiB", 2**20),
    "bops": ("GBOP", 10**9), "ttft": ("ms", 1e-3), "tpot": ("ms", 1e-3), "latency": ("ms", 1e-3),
    "energy": ("mJ", 1e-3),
}  # fmt: skip


@dataclass(frozen=True)
class Itemised:
    """What a plan takes of one resource.

    Attributes:
        resource: with its condition, such as ``tpot at context 512``.
        amount: in ``unit``.
        spread: standard error in ``unit``; 0 for exact and modelled figures. Of memory: how far below it a run was.
        unit: such as ``ms``.
        origin: where the figure is from, in words.
    """

    resource: str
    amount: float
    spread: float
    unit: str
    origin: str

    def __str__(self) -> str:
        error = f" ± {self.spread:.2g}" if self.spread else ""
        return f"{self.resource}: {self.amount:,.4g}{error} {self.unit}, {self.origin}"


def itemised(plan: BitPlan, costs: Sequence[CostTable]) -> Iterator[Itemised]:
    """Itemise what a plan takes of every resource that a budget can name beside weights and BOPs."""
    choice = plan.choice(costs[0].formats if costs else ())
    for table in costs:
        name = table.resource.split(" ")[0]
        if name in ("weights", "bops") or name not in UNITS or -1 in choice:
            continue
        unit, size = UNITS[name]
        amount, spread = plan.cost.get(table.resource, math.nan), 0.0
        if name in TIMED:
            amount, spread = predicted(table, choice)
        where = origin(table)
        if name == "memory":
            spread = float(table.source["spread"])
            where += f"; what is decided {(amount - table.fixed) / size:,.4g} {unit}"
        yield Itemised(table.resource, amount / size, spread / size, unit, where)


def origin(table: CostTable) -> str:
    """Where the figures of a table are from, with the parts that differ."""
    if table.resource.startswith("memory"):
        parts = (("left as it is", "kept"), ("caches not decided", "caches"), ("activations", "activations"))
        items = [f"{name} {table.source[key] / 2**20:.4g} MiB" for name, key in parts if table.source.get(key)]
        beside = " in decode steps" if table.source["activations are"] == "measured" else ""
        return f"weights and caches exact, activations {table.source['activations are']}{beside} ({', '.join(items)})"
    passes = [entry["correction"] for entry in table.source.get("passes", ())]
    if not passes:
        return table.kind
    if table.kind == "modelled":
        return "modelled, not measured"
    guess = f" ({', '.join(table.source['modelled'])} modelled)" if table.source.get("modelled") else ""
    if not all(correction["runs"] for correction in passes):
        return f"{table.kind} kernels{guess} added up, without attention, norms and calls"
    off = max((correction["residual"] or 0.0 for correction in passes), default=0.0)
    share = f", off by {100 * off:.1f} % there" if off else ""
    margin = 100 * (table.source.get("margin", 1.0) - 1)
    runs = min(correction["runs"] for correction in passes)
    kept = f"; budgets are kept with a margin of {margin:.1f} %" if margin >= 0.05 else ""
    kept = kept if runs > 2 else ", too few for a margin"
    return f"{table.kind} kernels{guess}, corrected by {runs} runs of the whole model{share}{kept}"
