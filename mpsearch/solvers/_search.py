"""What searchers share: their settings, the solved start, plans nearby that fit, and what was seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.solvers._reduced import Bools, Floats, Ints, refusal
from mpsearch.solvers.greedy import Greedy
from mpsearch.solvers.ilp import Ilp
from mpsearch.trials import Seen, Trial

#: Moves of one row that are paired with each other: those of least loss per cost.
_PAIRED = 300
#: Share of the limits below which a step counts as free.
_FREE = 1e-12


def check(name: str, **values: tuple[float, float]) -> None:
    """Refuse settings below their least value.

    Raises:
        InputError: E107.
    """
    for setting, (value, least) in values.items():
        if isinstance(value, bool) or not value >= least or math.isinf(value):
            raise InputError("E107", f"searcher '{name}': {setting} is {value!r}, expected at least {least}")


def one_of(name: str, setting: str, value: str, known: Sequence[str]) -> None:
    """Refuse a setting that is not one of those known.

    Raises:
        InputError: E107.
    """
    if value not in known:
        raise InputError("E107", f"searcher '{name}': {setting} is {value!r}", advice=f"there is {', '.join(known)}")


def generator(seed: int, seen: Sequence[Seen], *more: int) -> np.random.Generator:
    """Return random numbers that depend on the seed and on how much was seen, and on nothing else."""
    return np.random.default_rng([seed, len(seen), *more])


def refuses(problem: Problem) -> str:
    """Say why a problem cannot be searched; empty when it can: searchers start from the solved sum of rows."""
    return refusal(problem)


def solved(problem: Problem) -> Ints | None:
    """Return the plan of least predicted loss; None when there is none."""
    solution = Ilp().solve(problem)
    return solution.choice if solution.status in ("optimal", "feasible") else None


def solved_quickly(problem: Problem, loss: Floats) -> Ints | None:
    """Return a good plan for other losses of the same cells; None when none is found."""
    # Losses below zero are as good as any: only differences within a row count.
    solution = Greedy().solve(dataclasses.replace(problem, loss=np.where(problem.offered, loss, np.inf)))
    return solution.choice if solution.status in ("optimal", "feasible") else None


def leader(seen: Iterable[Seen]) -> Seen | None:
    """Return what lost least of all that was measured on every batch, of equal ones the first."""
    whole = [item for item in seen if not item.trial.batches and math.isfinite(item.loss)]
    return min(whole, key=lambda item: item.loss, default=None)


def fresh(seen: Sequence[Seen], wanted: Iterable[Trial], evaluations: int) -> tuple[Trial, ...]:
    """Return those of the wanted trials that were not asked for before, as many as evaluations are left for."""
    before = {item.trial for item in seen}
    new = [trial for trial in dict.fromkeys(wanted) if trial not in before]
    return tuple(new[: max(evaluations - len(seen), 0)])


def trial(choice: Ints | Sequence[int], batches: int = 0) -> Trial:
    """Make a trial of a choice."""
    return Trial(tuple(int(column) for column in choice), batches)


def settle(problem: Problem, choice: Ints, loss: Floats) -> Ints | None:
    """Bring a choice within its budgets and spend what is left of them; None when it cannot be brought there.

    Args:
        problem: the problem.
        choice: (N,) columns that are offered.
        loss: (N, F) what moves are judged by, finite where offered.
    """
    found = lower(problem, choice, loss)
    return None if found is None else fill(problem, found, loss)


def lower(problem: Problem, choice: Ints, loss: Floats) -> Ints | None:
    """Move rows, least rise of loss per share of overrun removed first, until every budget is kept."""
    choice, rows = np.array(choice, dtype=np.int64), np.arange(len(choice))
    cost, limit, scale = _shares(problem)
    for _ in range(4 * problem.loss.size + 1):
        if problem.fits(choice):
            return choice
        above = cost[:, rows, choice].sum(axis=1) - limit
        after = np.tensordot(scale, np.maximum(above[:, None, None] + _steps(cost, choice), 0.0), axes=1)
        removed = float(scale @ np.maximum(above, 0.0)) - after
        able = problem.offered & (removed > 0)
        if not able.any():
            return None
        rise = np.where(able, loss - loss[rows, choice][:, None], 0.0)
        # Of moves that even save loss, the one that saves most.
        asked = np.where(able, np.where(rise > 0, rise / np.where(able, removed, 1.0), rise), np.inf)
        row, column = np.unravel_index(int(asked.argmin()), asked.shape)
        choice[row] = column
    return None


def fill(problem: Problem, choice: Ints, loss: Floats) -> Ints:
    """Move rows to cells of less loss, most saved per share of the limits first, as long as one fits."""
    choice, rows = np.array(choice, dtype=np.int64), np.arange(len(choice))
    cost, limit, scale = _shares(problem)
    barred: Bools = ~problem.offered
    for _ in range(4 * problem.loss.size + 1):
        room = limit - cost[:, rows, choice].sum(axis=1)
        step = _steps(cost, choice)
        saved = np.where(barred, 0.0, loss[rows, choice][:, None] - np.where(barred, 0.0, loss))
        able = ~barred & (saved > 0) & (step <= room[:, None, None]).all(axis=0)
        if not able.any():
            break
        share = np.tensordot(scale, np.maximum(step, 0.0), axes=1)
        with np.errstate(over="ignore"):
            worth = np.where(able, saved / np.maximum(share, _FREE), -np.inf)
        row, column = np.unravel_index(int(worth.argmax()), worth.shape)
        before = choice[row]
        choice[row] = column
        if not problem.fits(choice):
            # Float sums drift by roundings; the exact sum decides.
            choice[row] = before
            barred[row, column] = True
    return choice


def nearby(problem: Problem, choice: Ints, loss: Floats, count: int) -> list[Ints]:
    """List plans one row away, or two of which one pays for the other, that fit; least total loss first.

    Cost: O(R M^2) for the M moves of one row of least loss per cost that are paired.

    Args:
        problem: the problem.
        choice: (N,) a plan that fits.
        loss: (N, F) what plans are ranked by, finite where offered.
        count: how many at most.
    """
    rows = np.arange(len(choice))
    cost, limit, scale = _shares(problem)
    room = limit - cost[:, rows, choice].sum(axis=1)
    step = _steps(cost, choice)
    rise = np.where(problem.offered, loss - loss[rows, choice][:, None], np.inf)
    rise[rows, choice] = np.inf
    i, f = _moves(rise, np.tensordot(scale, step, axes=1))
    gain, need = rise[i, f], step[:, i, f]
    both = gain[:, None] + gain
    both[i[:, None] >= i] = np.inf
    # A move paired with itself stands for the move alone.
    np.fill_diagonal(both, gain)
    for amount, have in zip(need, room.tolist(), strict=True):
        total = amount[:, None] + amount
        np.fill_diagonal(total, amount)
        both[total > have + 1e-9 * abs(have)] = np.inf
    order = np.argsort(both, axis=None, kind="stable")[: 4 * count]
    found: list[Ints] = []
    for place in order.tolist():
        first, second = divmod(place, len(i))
        if len(found) == count or not np.isfinite(both[first, second]):
            break
        other = choice.copy()
        other[i[first]], other[i[second]] = f[first], f[second]
        if problem.fits(other):
            found.append(other)
    return found


def _moves(rise: Floats, share: Floats) -> tuple[Ints, Ints]:
    """Rows and columns of the moves to pair: those that save most per cost, and those that free most per loss."""
    finite = np.isfinite(rise)
    ratio = np.where(finite, rise, 0.0) / np.where(np.abs(share) > 0, np.abs(share), np.finfo(np.float64).eps)
    dear, cheap = np.where(finite & (share > 0), ratio, np.inf), np.where(finite & (share <= 0), ratio, np.inf)
    taken = []
    for table in (dear, cheap):
        order = np.argsort(table, axis=None, kind="stable")[:_PAIRED]
        taken.append(order[np.isfinite(table.ravel()[order])])
    i, f = np.unravel_index(np.concatenate(taken), rise.shape)
    # Pairs are looked at once, the earlier row first.
    order = np.argsort(i, kind="stable")
    return i[order].astype(np.int64), f[order].astype(np.int64)


def _shares(problem: Problem) -> tuple[Floats, Floats, Floats]:
    """Costs and limits of the budgets that have an end, and what makes costs shares of what the plans can differ by."""
    finite = np.isfinite(problem.limit)
    cost, limit = problem.cost[finite], problem.limit[finite]
    width = np.abs(cost).max(axis=(1, 2), initial=0.0)
    return cost, limit, 1.0 / np.where(width > 0, width, 1.0)


def _steps(cost: Floats, choice: Ints) -> Floats:
    rows = np.arange(len(choice))
    step: Floats = cost - cost[:, rows, choice][:, :, None]
    return step
