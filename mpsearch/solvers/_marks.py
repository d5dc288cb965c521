"""Reduction where cells differ in more than loss and cost: in what counts or pairs see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers._reduced import Bools, Floats, Ints, Reduced


def reduce(problem: Problem, marks: Sequence[Floats] = ()) -> Reduced:
    """Reduce a problem, dropping a cell only for another one of the same marks.

    A dominated cell may be needed to make a count come out, or for what it adds with another row's cell; one that is
    dominated by a cell of equal marks may not. Marks become resources that no choice can break: each as it is and
    negated, so that no cell of another mark is the cheaper one in both. `Reduced` passes over resources that the
    dearest cells cannot break; a spare column, which a cell of its own row dominates, makes them breakable until the
    dominated cells are gone.

    Args:
        problem: a problem that `impossible` has nothing to say about.
        marks: tables (N, F) of whole numbers.
    """
    rows, formats = problem.loss.shape
    marks = [mark for mark in marks if _tells_apart(problem, mark)]
    if not marks:
        return Reduced.of(problem)
    signs = np.array([sign * mark for mark in marks for sign in (1.0, -1.0)])
    most = np.where(problem.offered, signs, -np.inf).max(axis=2)
    spare = np.zeros((len(problem.limit) + len(signs), rows))
    twin = int(problem.offered[0].argmax())
    spare[:, 0] = np.r_[problem.cost[:, 0, twin], most[:, 0] + 1.0]
    loss = np.full((rows, 1), np.inf)
    loss[0] = problem.loss[0, twin]
    reduced = Reduced.of(
        Problem(
            np.hstack([problem.loss, loss]),
            np.concatenate([np.concatenate([problem.cost, signs]), spare[:, :, None]], axis=2),
            np.r_[problem.limit, most.sum(axis=1)],
        )
    )
    use = reduced.use[:, :, :formats]
    low = use if reduced.low is reduced.use else reduced.low[:, :, :formats]
    return replace(reduced, excess=reduced.excess[:, :formats], use=use, low=low)


def counted(problem: Problem) -> list[tuple[Bools, int]]:
    """Return the cells (N, F) that each alignment counts, and what their number must be a multiple of."""
    found = []
    for alignment in problem.aligned:
        cells = np.zeros(problem.loss.shape, dtype=np.bool_)
        cells[np.ix_(alignment.rows, alignment.formats)] = True
        found.append((cells, alignment.multiple))
    return found


def settle(reduced: Reduced, choice: Ints, counts: Sequence[tuple[Bools, int]], weights: Floats) -> Ints | None:
    """Move the rows that rise least in ``excess + weights @ use`` until all counts are multiples; None if that fails.

    Each count is made good once, by fewer or by more, whichever rises less and fits; one that a later count spoils
    stays so.

    Args:
        reduced: the problem.
        choice: (N,) a choice that keeps every budget.
        counts: cells (N, F) in the order of ``reduced``, and the multiple of each.
        weights: (R',) prices of one count.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    priced = reduced.excess + np.tensordot(weights, reduced.use.astype(np.float64), axes=1)
    for cells, multiple in counts:
        inside = cells[rows, choice]
        over = int(inside.sum()) % multiple
        if not over:
            continue
        options = []
        for leaving, number in ((True, over), (False, multiple - over)):
            rise = np.where(cells != leaving, priced, np.inf)
            best = rise.argmin(axis=1)
            asked = np.where(inside == leaving, rise[rows, best] - priced[rows, choice], np.inf)
            asked[~cells.any(axis=1)] = np.inf
            movers = np.argsort(asked, kind="stable")[:number]
            tried = choice.copy()
            tried[movers] = best[movers]
            if len(movers) == number and np.isfinite(asked[movers]).all() and reduced.fits(tried):
                options.append((float(asked[movers].sum()), not leaving, tried))
        if not options:
            return None
        choice = min(options, key=lambda option: option[:2])[2]
    held = all(int(cells[rows, choice].sum()) % multiple == 0 for cells, multiple in counts)
    return choice if held else None


def _tells_apart(problem: Problem, mark: Floats) -> bool:
    """Whether any row offers cells of different marks."""
    most = np.where(problem.offered, mark, -np.inf).max(axis=1, initial=-np.inf)
    least = np.where(problem.offered, mark, np.inf).min(axis=1, initial=np.inf)
    return bool((most > least).any())
