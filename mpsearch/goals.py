"""Other goals than the least total loss: the least cost within a loss, and the least worst row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.tables import Array

Solve = Callable[[Problem], Solution]


def least_cost(problem: Problem, resource: str, most_loss: float, solve: Solve) -> Solution:
    """Solve for the least total of a resource with a total loss of at most ``most_loss``; other budgets hold as well.

    The same problem with two tables in each other's place, so every solver and every proof serves both directions.

    Args:
        problem: the problem; the limit of ``resource`` holds as well, and may be infinite.
        resource: what to spend least of.
        most_loss: the most loss.
        solve: solves a problem.

    Returns:
        Solution whose ``loss``, ``bound`` and ``gap`` are of the resource, whose ``cost`` and ``prices`` are of the
        resources as they were, and whose ``stats`` hold the total loss (``loss``) and ``price of loss``: how much of
        the resource one more unit of loss would save.

    Raises:
        InputError: an unknown resource, pair terms, or a loss that is no number (E212).

    >>> from mpsearch.registry import make
    >>> problem = Problem(np.array([[3.0, 1.0], [2.0, 0.5]]), np.array([[[1.0, 2.0], [1.0, 3.0]]]), np.array([np.inf]))
    >>> found = least_cost(problem, "0", 3.0, make("solvers", "ilp").solve)
    >>> found.choice.tolist(), found.loss, found.stats["loss"]
    ([1, 0], 3.0, 3.0)
    """
    if resource not in problem.resources:
        raise InputError("E212", f"solve: no resource '{resource}'", advice=f"there is {', '.join(problem.resources)}")
    if problem.pairs is not None and len(problem.pairs):
        raise InputError("E212", "solve: the least cost within a loss is for losses that add up, and there are pairs")
    if math.isnan(most_loss):
        raise InputError("E212", "solve: most_loss is not a number")
    r = problem.resources.index(resource)
    swapped = replace(
        problem.with_resource("loss", problem.loss, most_loss),
        loss=np.where(problem.offered, problem.cost[r], np.inf),
    )
    found = solve(swapped)
    stats = {**found.stats, "goal": resource, "loss": found.cost[-1], "price of loss": found.prices[-1]}
    return replace(found, cost=found.cost[:-1], prices=found.prices[:-1], stats=stats)


def least_worst(problem: Problem, solve: Solve, worst: Array | None = None) -> Solution:
    """Solve for the choice whose worst row is best, and among these for the least total loss.

    Bisection over the losses that occur: with cells above a threshold barred, is there a choice at all? The last
    solve, at the least threshold that has one, is of the whole problem. Cost: log2(cells) solves without losses.

    Args:
        problem: the problem.
        worst: (N, F) what a row counts as when the worst one is looked for; its loss when left out.
        solve: solves a problem; it must prove infeasibility where it finds nothing.

    Returns:
        Solution of the total loss under the threshold; ``stats`` hold the loss of the worst row (``worst``).

    Raises:
        InputError: the solver can neither find a choice nor prove that there is none (E210), or pair terms (E212).

    >>> from mpsearch.registry import make
    >>> problem = Problem(np.array([[5.0, 0.0], [3.0, 2.9]]), np.array([[[0.0, 2.0], [0.0, 2.0]]]), np.array([2.0]))
    >>> found = least_worst(problem, make("solvers", "ilp").solve)
    >>> found.choice.tolist(), found.stats["worst"]
    ([1, 0], 3.0)
    """
    if problem.pairs is not None and len(problem.pairs):
        raise InputError("E212", "solve: the least worst row is for losses of single rows, and there are pairs")
    worst = problem.loss if worst is None else worst
    levels = np.unique(worst[problem.offered])
    nothing = np.where(problem.offered, 0.0, np.inf)

    def possible(level: float) -> bool:
        found = solve(replace(problem, loss=np.where(worst <= level, nothing, np.inf)))
        if found.status == "unsolved":
            raise InputError("E210", f"solver '{found.solver}' neither found a choice nor proved that there is none")
        return found.status != "infeasible"

    # No choice is better than the best cell of the worst row.
    low = int(np.searchsorted(levels, worst.min(axis=1, initial=np.inf).max(initial=-np.inf)))
    high = len(levels) - 1
    if low > high or not possible(float(levels[high])):
        return solve(problem)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(float(levels[middle])) else (middle + 1, high)
    found = solve(replace(problem, loss=np.where(worst <= levels[high], problem.loss, np.inf)))
    reached = float(worst[np.arange(len(found.choice)), found.choice].max(initial=-math.inf))
    return replace(found, stats={**found.stats, "goal": "worst", "worst": reached})
