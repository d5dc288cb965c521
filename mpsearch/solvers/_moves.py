"""Moves of single rows and of pairs: bring a choice within its budgets, and spend what is left of them."""

from __future__ import annotations

import numpy as np

from mpsearch.solvers._reduced import Floats, Ints, Reduced

#: Rounds without an end in sight are given up.
_ROUNDS = 200
#: Pairs are formed of this many moves, those of least reduced cost.
_MOVES = 1000


def repair(reduced: Reduced, choice: Ints, weights: Floats) -> Ints | None:
    """Move rows to cheaper cells until every budget is kept; None when no single move gets nearer.

    The overrun is measured in shares of each resource's largest cell. In each round every row offers the move with the
    least rise of ``excess + weights @ use`` per overrun removed, and the best offers are taken first. Cost O(R N F)
    per round.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    scale = 1.0 / np.maximum(reduced.use.max(axis=(1, 2), initial=1), 1).astype(np.float64)
    priced = _priced(reduced, weights)
    for _ in range(_ROUNDS):
        over = reduced.counts(choice) - reduced.slack
        if (over <= 0).all():
            return choice
        step = reduced.use - reduced.use[:, rows, choice][:, :, None]
        after = np.tensordot(scale, np.maximum(over[:, None, None] + step, 0), axes=1)
        removed = float(scale @ np.maximum(over, 0)) - after
        able = (removed > 0) & np.isfinite(priced)
        rise = np.where(able, priced - priced[rows, choice][:, None], 0.0)
        asked = np.where(able, rise / np.where(able, removed, 1.0), np.inf)
        best = asked.argmin(axis=1)
        least = asked[rows, best]
        moved = False
        for i in np.argsort(least, kind="stable").tolist():
            if not np.isfinite(least[i]) or (over <= 0).all():
                break
            there = over + step[:, i, best[i]]
            if scale @ np.maximum(there, 0) < scale @ np.maximum(over, 0):
                choice[i], over, moved = best[i], there, True
        if not moved:
            return None
    return None


def top_up(reduced: Reduced, choice: Ints) -> Ints:
    """Move rows to cells of less loss as long as one fits; what does not fit is passed over, not stopped at.

    In each round every row offers its best loss saved per share of the room that is left, and the best offers are
    taken first. The loss never rises. Cost O(R N F) per round.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    for _ in range(_ROUNDS):
        room = reduced.slack - reduced.counts(choice)
        step = reduced.use - reduced.use[:, rows, choice][:, :, None]
        saved = reduced.excess[rows, choice][:, None] - reduced.excess
        able = (saved > 0) & (step <= room[:, None, None]).all(axis=0)
        if not able.any():
            break
        worth = np.where(able, np.minimum(saved, 1.0) / shares(step, room), -np.inf)
        best = worth.argmax(axis=1)
        most = worth[rows, best]
        for i in np.argsort(-most, kind="stable").tolist():
            if most[i] == -np.inf:
                break
            need = step[:, i, best[i]]
            if (need <= room).all():
                choice[i] = best[i]
                room = room - need
    return choice


def exchange(reduced: Reduced, choice: Ints, weights: Floats) -> Ints:
    """Move one row or two at a time, the pair that saves most first, until none that fits saves anything.

    Only the moves that raise ``excess + weights @ use`` least are paired: near the best prices, a choice is as good as
    these sums and the room it leaves are small. Cost O(R N F + R M^2) per step for M moves.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    priced = _priced(reduced, weights)
    for _ in range(_ROUNDS):
        room = reduced.slack - reduced.counts(choice)
        rise = priced - priced[rows, choice][:, None]
        rise[rows, choice] = np.inf
        i, f = np.unravel_index(_smallest(rise.ravel()), rise.shape)
        if not len(i):
            break
        gain = reduced.excess[i, f] - reduced.excess[i, choice[i]]
        step = reduced.use[:, i, f] - reduced.use[:, i, choice[i]]
        both = gain[:, None] + gain
        both[i[:, None] == i] = np.inf
        # A move paired with itself stands for the move alone.
        np.fill_diagonal(both, gain)
        for need, have in zip(step, room, strict=True):
            total = need[:, None] + need
            np.fill_diagonal(total, need)
            both[total > have] = np.inf
        first, second = np.unravel_index(int(both.argmin()), both.shape)
        if not both[first, second] < 0:
            break
        choice[i[first]] = f[first]
        choice[i[second]] = f[second]
    return choice


def shares(step: Ints, room: Ints) -> Floats:
    """(N, F) cost of each step (R, N, F) in shares of the room left, added up over the resources; never zero."""
    weights = 1.0 / np.maximum(room, 1).astype(np.float64)
    total: Floats = np.tensordot(weights, np.maximum(step, 0), axes=1)
    return np.maximum(total, np.finfo(np.float64).tiny)


def _priced(reduced: Reduced, weights: Floats) -> Floats:
    priced: Floats = reduced.excess + np.tensordot(weights, reduced.use.astype(np.float64), axes=1)
    return priced


def _smallest(values: Floats) -> Ints:
    """Indices of the finite smallest values, `_MOVES` at most; of equal ones the first."""
    if len(values) > _MOVES:
        edge = np.partition(values, _MOVES - 1)[_MOVES - 1]
        found = np.flatnonzero(values <= edge)
    else:
        found = np.arange(len(values))
    found = found[np.isfinite(values[found])]
    return found[np.argsort(values[found], kind="stable")][:_MOVES]
