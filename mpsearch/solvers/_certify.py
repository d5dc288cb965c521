"""What exact methods share: how many budgets they take, and the bound that their sums of floats prove."""

from __future__ import annotations

import math

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.solvers._reduced import PROVEN, Ints, Reduced, finest

_EPS = float(np.finfo(np.float64).eps)
_LEAST = float(np.finfo(np.float64).smallest_subnormal)


def too_many(problem: Problem, most: int) -> str:
    """Say that a problem has more budgets than a method takes; empty when it has not. Endless ones do not count."""
    budgets = int((problem.limit < math.inf).sum())
    return f"it has {budgets} budgets, and this solver takes {most}" if budgets > most else ""


def lowered(excess: float, rows: int) -> float:
    """Lower a sum of ``rows`` excesses by the most that rounding can have added to it.

    Every term is >= 0, so each of the ``rows`` sums adds at most half an epsilon of the total, and so does the rounding
    of the terms; a term below the range of floats adds at most the least of them.
    """
    return max(0.0, excess * (1.0 - (rows + 4) * _EPS) - rows * _LEAST)


def certified(problem: Problem, reduced: Reduced, choice: Ints, excess: float) -> float:
    """Return the bound on the loss when no choice that fits has less than a total ``excess``.

    Losses are multiples of a power of two: when less than one of them lies between that and ``choice``, it is an
    optimum, and the bound is its own loss.
    """
    best = reduced.total(choice)
    step = math.ldexp(1.0, min(finest(problem.loss[problem.offered]) - reduced.shift, 0))
    if best - excess < step and step > PROVEN * best:
        return problem.total_loss(reduced.back(choice))
    return reduced.loss(excess)


def insist(solver: str, reason: str) -> None:
    """Refuse a problem for a reason, if there is one.

    Raises:
        InputError: there is a reason (E210).
    """
    if reason:
        raise InputError("E210", f"solver '{solver}': {reason}", advice="solvers that take it: mpsearch solvers")
