"""Plans that a chosen one is compared with: uniform ones, other sizes, random ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from mpsearch import registry
from mpsearch.budget import Budget, conditions
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.format import Format
from mpsearch.hardware.calls import refuses
from mpsearch.plan import BitPlan
from mpsearch.planning import Labelled, Planner
from mpsearch.problem import Problem
from mpsearch.rules import Rules
from mpsearch.tables import SensitivityTable


def uniform(planner: Planner) -> Iterator[Labelled]:
    """One plan per format of the menu that fits some layer; pins hold in it as in every plan.

    A decision that cannot take the format gets the weights' format alone, or else the next larger one that it can.
    KV caches all get the format of most bits with which the budgets of kv are kept. A plan that breaks a budget of
    anything but weights, or a rule, is no rival, and is left out.
    """
    by_size = sorted((fmt for fmt in planner.menu if fmt.family != "kv"), key=lambda fmt: fmt.bits)
    caches = _uniform_cache(planner)
    for fmt in planner.menu:
        if fmt in planner.misfits or fmt.family == "kv" or {fmt} & {*planner.companions, *planner.without_kernel}:
            continue
        larger = [f for f in by_size if f.bits >= fmt.bits] + [f for f in reversed(by_size) if f.bits < fmt.bits]
        plan = BitPlan.uniform(
            planner.layers, fmt, [fmt.weight, *larger, *caches], planner.model, refuses=planner.refuses
        )
        pinned = {
            layer.name: Format.parse(planner.pins[row.name])
            for row in planner.layers.decisions
            if row.name in planner.pins
            for layer in row.layers
        }
        kernels = _with_kernels(planner, plan, [fmt.weight, *larger])
        priced = planner.priced(replace(plan, formats={**plan.formats, **kernels, **pinned}))
        others = [b for b in planner.asked if b.resource != "weights"]
        if _keeps(planner, priced, others) and _keeps_rules(planner, priced):
            yield Labelled(" ".join(map(str, ["uniform", fmt, *caches])), priced)


def _with_kernels(planner: Planner, plan: BitPlan, others: Sequence[Format]) -> dict[str, Format]:
    """Another format for each decision that the engine has no kernel for in the plan's."""
    if planner.profile is None:
        return {}
    engine = planner.profile.made
    found: dict[str, Format] = {}
    for row in planner.layers.decisions:
        wanted = (plan.formats[row.layers[0].name], *others)
        takes = (fmt for fmt in wanted if not any(refuses(layer, fmt, engine) for layer in row.layers))
        fmt = next(takes, None)
        if fmt is not None:
            found |= {layer.name: fmt for layer in row.layers}
    return found


def sweep(planner: Planner, scores: SensitivityTable, budgets: Sequence[Budget], points: int) -> Iterator[Labelled]:
    """Plans for budgets of weights at even distances, strictly between the least and the most possible."""
    weights = planner.costs[0]
    others = [b for b in budgets if b.resource != "weights"]
    table = weights.value + planner.mask
    least = math.fsum(np.nanmin(table, axis=1)) + weights.fixed
    most = math.fsum(np.nanmax(table, axis=1)) + weights.fixed
    for k in range(points):
        limit = int(least + (most - least) * (k + 1) / (points + 1))
        try:
            yield Labelled("mixed", planner.mixed(scores, [Budget("weights", Fraction(limit), "B"), *others]))
        except InfeasibleError:
            continue  # another budget leaves no plan this small; the front starts further on


def random(planner: Planner, scores: SensitivityTable, budgets: Sequence[Budget], count: int) -> Iterator[Labelled]:
    """Random plans that fill the budgets, for comparison."""
    ruled = planner.rules.apply(planner.problem(scores, budgets))
    for k in range(count):
        solver = registry.make("solvers", "random", seed=planner.spec.seed + k)
        if reason := solver.refuses(ruled.problem):
            raise InputError("E210", f"no random plans can be drawn: {reason}", advice="random = 0")
        solution = solver.solve(ruled.problem)
        if solution.status == "feasible":
            plan = planner.from_choice(solution.choice[ruled.group], {"random": planner.spec.seed + k})
            yield Labelled(f"random {k}", planner.predict(scores, plan))


def _keeps(planner: Planner, plan: BitPlan, budgets: Sequence[Budget]) -> bool:
    tables = {table.resource: table for table in planner.costs}
    # A plan without a price has no kernel for some layer.
    return all(plan.cost.get(b.priced_by, math.inf) <= b.limit(tables[b.priced_by]) for b in budgets)


def _keeps_rules(planner: Planner, plan: BitPlan) -> bool:
    """Whether a plan is one that the rules allow, whatever it costs."""
    if planner.rules == Rules():
        return True
    columns = {fmt: j for j, fmt in enumerate(planner.formats)}
    choice = [columns.get(plan.formats[row.layers[0].name], -1) for row in planner.layers.decisions]
    free = np.where(np.isnan(planner.costs[0].value), np.nan, 0.0)
    names = tuple(row.name for row in planner.layers.decisions)
    problem = Problem(
        free,
        np.array([table.value for table in planner.costs]),
        np.full(len(planner.costs), np.inf),
        names,
        tuple(map(str, planner.formats)),
        tuple(table.resource for table in planner.costs),
    )
    return -1 not in choice and planner.rules.apply(problem).whole.fits(np.array(choice))


def _uniform_cache(planner: Planner) -> tuple[Format, ...]:
    """The format that all KV caches get in a uniform plan; none when they are not decided."""
    caches = [layer for layer in planner.layers if layer.kind == "kv_cache"]
    if not caches:
        return ()
    offered = [Format.parse(text) for text in planner.spec.kv]
    offered = [fmt for fmt in offered if not any(fmt.refuses(layer) for layer in caches)]
    offered.sort(key=lambda fmt: fmt.effective_bits(caches[0]), reverse=True)
    budgets = [b for b in planner.asked if b.resource == "kv"]
    for fmt in offered:
        tables = [registry.make("targets", "kv", **conditions(b.condition)).cost(caches, [fmt]) for b in budgets]
        if all(table.value.sum() <= b.limit(table) for b, table in zip(budgets, tables, strict=True)):
            return (fmt,)
    return tuple(offered[-1:])
