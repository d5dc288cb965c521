"""The one door to the solvers: which of them takes a problem, other goals, rules, and why nothing fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch import registry, robust
from mpsearch.errors import InputError, did_you_mean
from mpsearch.goals import least_cost, least_worst
from mpsearch.pairs import PairTable
from mpsearch.problem import Problem, Solution
from mpsearch.rules import Rules
from mpsearch.structure import PairTerms
from mpsearch.tables import Array

#: From this many rows on, a gap of a millionth is as good as a proof and far quicker.
_MANY_ROWS = 20_000
_SMALL_GAP = 1e-6
#: Seconds that proving may take before the gap is reported instead.
_PATIENCE = 20.0


@dataclass(frozen=True)
class Chosen:
    """A solver for a problem.

    Attributes:
        name: of the solver.
        settings: of the solver.
        why: what about the problem asks for it.
    """

    name: str
    settings: Mapping[str, Any]
    why: str


def choose(problem: Problem) -> Chosen:
    """Pick a solver by what a problem holds and by its size.

    >>> choose(Problem(np.ones((3, 2)), np.ones((1, 3, 2)), np.array([3.0]))).name
    'mckp'
    """
    if problem.pairs is not None and len(problem.pairs):
        return Chosen("quadratic", {}, f"{len(problem.pairs):,} pairs of cells have losses of their own")
    if problem.aligned:
        return Chosen("ilp", {}, "counts must be multiples, which asks for whole numbers beside the cells")
    budgets = int(np.isfinite(problem.limit).sum())
    what = f"{len(problem.loss):,} rows, {budgets} budget{'' if budgets == 1 else 's'}"
    if len(problem.loss) >= _MANY_ROWS:
        return Chosen(
            "mckp", {"gap": _SMALL_GAP, "time_limit": _PATIENCE}, f"{what}: to a proven gap of {_SMALL_GAP:g}"
        )
    return Chosen("mckp", {"time_limit": _PATIENCE}, f"{what}: the exact optimum")


def solver_for(name: str, settings: Mapping[str, Any]) -> Callable[[Problem], Solution]:
    """Make a function that solves with a named solver, or, with ``auto``, with the one that each problem asks for.

    Raises:
        InputError: when called: the solver cannot take the problem (E210).
    """

    def solve(problem: Problem) -> Solution:
        chosen = choose(problem) if name == "auto" else Chosen(name, settings, "")
        solver = registry.make("solvers", chosen.name, **{**chosen.settings, **settings})
        if refusal := solver.refuses(problem):
            raise InputError(
                "E210", f"solver '{chosen.name}' cannot take this: {refusal}",
                advice="" if name == "auto" else "solver auto picks one that can; mpsearch solvers lists them",
            )  # fmt: skip
        solution: Solution = solver.solve(problem)
        return replace(solution, stats={**solution.stats, "why": chosen.why}) if chosen.why else solution

    return solve


def solve(
    loss: Any,
    cost: Any,
    limit: Any,
    solver: str = "auto",
    *,
    names: Sequence[str] = (),
    formats: Sequence[str] = (),
    resources: Sequence[str] = (),
    pairs: PairTable | PairTerms | None = None,
    rules: Rules | None = None,
    goal: str = "loss",
    most_loss: float = math.inf,
    spread: Any = None,
    cautious: float = 0.0,
    errors: str = "shared",
    **settings: Any,
) -> Solution:
    """Choose one format per row: least total loss within all limits. Anybody's table.

    Args:
        loss: (N, F) loss of each row in each format; NaN or inf where a format is not offered.
        cost: (R, N, F) cost of R resources, or (N, F) of one.
        limit: (R,) or one number: the most each resource may total.
        solver: ``auto`` picks one by size and structure and says why in ``stats["why"]``; or a name.
        names: of the rows, for rules and messages.
        formats: names of the columns.
        resources: names of the resources.
        pairs: loss that pairs of cells add, such as `mpsearch.interactions` gives.
        rules: pins, bars, floors, ties, counts, budgets of some rows (`mpsearch.Rules`).
        goal: ``loss``; ``worst`` for the choice whose worst row is best; or a resource: the least of it with a total
            loss of at most ``most_loss``.
        most_loss: of the goal that is a resource.
        spread: (N, F) standard errors of the losses.
        cautious: plan for losses this many standard errors above their values (`mpsearch.robust.cautious`).
        errors: whether the errors are ``shared`` or ``independent``.
        settings: of the solver.

    Returns:
        The solution; ``status`` says whether it is proven, ``gap`` how far from the bound it is, ``prices`` what one
        more unit of each resource would save.

    Raises:
        InputError: no such table (E212), rules that name what is not there (E213), or a solver that cannot take it
            (E210).

    >>> solve([[3.0, 1.0], [2.0, 0.5]], [[1, 2], [1, 2]], 3).choice.tolist()
    [1, 0]
    >>> solve([[3.0, 1.0], [2.0, 0.5]], [[1, 2], [1, 2]], 4, goal="0", most_loss=3.5).loss  # least cost
    3.0
    """
    try:
        problem = Problem(
            np.asarray(loss, dtype=float),
            np.asarray(cost, dtype=float),
            np.atleast_1d(np.asarray(limit, dtype=float)),
            tuple(map(str, names)),
            tuple(map(str, formats)),
            tuple(map(str, resources)),
            pairs=_terms(pairs),
        )
    except (ValueError, TypeError) as error:
        raise InputError("E212", f"solve: {error}") from error
    return solve_problem(
        problem,
        solver,
        settings,
        rules=rules,
        goal=goal,
        most_loss=most_loss,
        spread=None if spread is None else np.asarray(spread, dtype=float),
        by=cautious,
        errors=errors,
    )


def _terms(pairs: PairTable | PairTerms | None) -> PairTerms | None:
    if not isinstance(pairs, PairTable):
        return pairs
    if not np.isfinite(pairs.value).all():
        raise ValueError(f"{int((~np.isfinite(pairs.value)).sum())} pairs have no value")
    i, f, j, g = (getattr(pairs, name).astype(np.int64) for name in ("i", "f", "j", "g"))
    return PairTerms(i, f, j, g, pairs.value)


def solve_problem(
    problem: Problem,
    solver: str = "auto",
    settings: Mapping[str, Any] | None = None,
    *,
    rules: Rules | None = None,
    goal: str = "loss",
    most_loss: float = math.inf,
    spread: Array | None = None,
    by: float = 0.0,
    errors: str = "shared",
) -> Solution:
    """Solve under rules, for a goal, with an allowance for errors (see `mpsearch.solve`)."""
    if goal not in ("loss", "worst", *problem.resources):
        close = did_you_mean(str(goal), problem.resources)
        known = ", ".join(("loss", "worst", *problem.resources))
        raise InputError("E212", f"solve: no goal '{goal}'{close}", advice=f"there is {known}")
    if goal != "loss" and by:
        raise InputError("E212", "solve: cautious is for the goal 'loss'", advice="leave one of them out")
    if most_loss != math.inf and goal in ("loss", "worst"):
        goals = " or ".join(problem.resources) or "a resource, of which there is none"
        raise InputError(
            "E212", f"solve: most_loss is for the least cost, not for the goal '{goal}'", advice=f"goal: {goals}"
        )
    ruled = (rules or Rules()).apply(problem)
    solve = solver_for(solver, settings or {})
    if goal == "worst":
        worst = ruled.worst
        return ruled.back(ruled.solve(lambda asked: least_worst(asked, solve, worst)))
    if goal != "loss":
        if most_loss == math.inf:
            raise InputError("E212", f"solve: the least {goal} needs the most loss that may be", advice="most_loss=…")
        found = ruled.solve(lambda asked: least_cost(asked, goal, most_loss, solve))
    elif by:
        if spread is None:
            raise InputError("E212", "solve: cautious needs the standard errors of the losses", advice="spread=…")
        error = ruled.spread(spread, errors)
        found = ruled.solve(lambda asked: robust.cautious(asked, error, solve, by=by, errors=errors))
    else:
        return ruled.back(ruled.solve(solve))
    # Loss and bound are those of the cost, or of the cautious sum.
    return replace(ruled.back(found), loss=found.loss, bound=found.bound, gap=found.gap)


@dataclass(frozen=True)
class Shortage:
    """Why nothing fits.

    Attributes:
        alone: resource -> the least it can total when no other budget is kept.
        together: resource -> the least it can total when all others are kept; infinite when these alone break.
        pins: rule -> resource -> what it adds to the least.
    """

    alone: Mapping[str, float]
    together: Mapping[str, float]
    pins: Mapping[str, Mapping[str, float]]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What to tell a user."""
        lines = []
        for (name, alone), together in zip(self.alone.items(), self.together.values(), strict=True):
            if math.isinf(alone):
                return ("a row has no format",)
            beside = f", {_exact(together)} with the other budgets" if math.isfinite(together) else ""
            lines.append(f"{name} can be as small as {_exact(alone)} alone{beside}")
        for rule, extra in self.pins.items():
            costs = ", ".join(f"{cost:.6g} of {name}" for name, cost in extra.items())
            lines.append(f"{rule} adds {costs}")
        return tuple(lines)


def _exact(value: float) -> str:
    """A number as it must be given to be enough."""
    return f"{int(value)}" if value == int(value) else repr(value)


def shortage(problem: Problem, rules: Rules | None = None, solver: str = "auto") -> Shortage:
    """Find the smallest limits that can be kept, each alone and each beside the others, and what rules add to them.

    >>> problem = Problem(np.zeros((2, 2)), np.array([[[1.0, 3.0], [1.0, 3.0]]]), np.array([1.0]))
    >>> shortage(problem, Rules(pins={"1": "1"})).sentences
    ('0 can be as small as 4 alone, 4 with the other budgets', "the rule for '1' adds 2 of 0")
    """
    rules = rules or Rules()
    ruled = rules.apply(problem).problem
    solve = solver_for(solver, {})
    count = len(problem.limit)
    alone = dict(zip(problem.resources, ruled.least(), strict=False))
    together = {}
    for r in range(count):
        if math.isinf(problem.limit[r]):
            continue
        others = [k for k in range(len(ruled.limit)) if k != r]
        table = np.where(ruled.offered, ruled.cost[r], np.inf)
        swapped = replace(
            ruled, loss=table, cost=ruled.cost[others], limit=ruled.limit[others], pairs=None,
            resources=tuple(ruled.resources[k] for k in others),
        )  # fmt: skip
        together[problem.resources[r]] = solve(swapped).loss
    limited = {name: alone[name] for name in together}
    return Shortage(limited, together, _added(problem, rules, list(together)))


def _added(problem: Problem, rules: Rules, resources: list[str]) -> Mapping[str, Mapping[str, float]]:
    """What each pin, bar and floor adds to the least total of each resource."""
    found: dict[str, dict[str, float]] = {}
    free = dict(zip(problem.resources, problem.least(), strict=True))
    single = [(row, Rules(pins={row: pin})) for row, pin in rules.pins.items()]
    single += [(row, Rules(bars={row: bars})) for row, bars in rules.bars.items()]
    single += [(row, Rules(floors={row: floor})) for row, floor in rules.floors.items()]
    for row, rule in single:
        least = dict(zip(problem.resources, rule.apply(problem).problem.least(), strict=True))
        extra = {name: least[name] - free[name] for name in resources if least[name] > free[name]}
        if extra:
            found[f"the rule for '{row}'"] = extra
    return found
