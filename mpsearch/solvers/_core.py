"""All sets of small deviations from the choice that prices make."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._nearest import Nearest
from mpsearch.solvers._reduced import Floats, Ints

#: Sets of deviations held of each half of the rows.
_MOST_SETS = 1_500_000
#: From this many on, sets of the same cost are thinned out to the best.
_THIN = 2000


@dataclass(frozen=True, eq=False)
class Sets:
    """Sets of deviations, at most one of each row.

    Attributes:
        rise: (S,) total rise of each.
        step: (R, S) total counts of each.
        node: (S,) where its last deviation is found.
        parent: node that a node extends; -1 for the empty set.
        cell: deviation that a node adds, as a place in `Nearest`.
        thinned: whether sets were left out that are no better, up to rounding, than others of the same counts.
    """

    rise: Floats
    step: Ints
    node: Ints
    parent: Ints
    cell: Ints
    thinned: bool

    def members(self, place: int) -> list[int]:
        """Deviations in one of the sets."""
        found, node = [], int(self.node[place])
        while node > 0:
            found.append(int(self.cell[node]))
            node = int(self.parent[node])
        return found


def halves(near: Nearest, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Part the first ``count`` deviations by row into two halves of much the same rises, the largest first."""
    rows: dict[int, list[int]] = {}
    for place, row in enumerate(near.row[:count].tolist()):
        rows.setdefault(row, []).append(place)
    groups = list(rows.values())
    return groups[::2][::-1], groups[1::2][::-1]


def sets(near: Nearest, groups: list[list[int]], most: float, thin: bool, deadline: float) -> Sets | None:
    """Form all sets of one deviation a row at most that rise ``most`` together; None when they are too many.

    Args:
        near: the deviations.
        groups: deviations of one row each.
        most: largest total rise.
        thin: keep only the best of the sets of the same counts.
        deadline: when to give up, as of `time.monotonic`.
    """
    rise, step, node = np.zeros(1), np.zeros((len(near.step), 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    parents, cells, nodes, sparse = [np.array([-1])], [np.array([-1])], 1, _THIN
    thinned = False
    for group in groups:
        rises, steps, ids = [rise], [step], [node]
        for place in group:
            able = np.flatnonzero(rise <= most - near.rise[place])
            rises.append(rise[able] + near.rise[place])
            steps.append(step[:, able] + near.step[:, place, None])
            ids.append(np.arange(nodes, nodes + len(able)))
            parents.append(node[able])
            cells.append(np.full(len(able), place))
            nodes += len(able)
        rise, step, node = np.concatenate(rises), np.concatenate(steps, axis=1), np.concatenate(ids)
        if thin and len(rise) > sparse:
            best = _best_of_same(rise, step)
            rise, step, node = rise[best], step[:, best], node[best]
            sparse, thinned = max(_THIN, 2 * len(rise)), True
        if nodes > 4 * _MOST_SETS or len(rise) > _MOST_SETS or time.monotonic() > deadline:
            return None
    return Sets(rise, step, node, np.concatenate(parents), np.concatenate(cells), thinned)


def _best_of_same(rise: Floats, step: Ints) -> Ints:
    """Places of the least rise among sets of the same counts; with one resource, also of those dominated."""
    order = np.lexsort((rise, *step))
    if not len(step):
        return order[:1]
    same = (np.diff(step[:, order], axis=1) == 0).all(axis=0)
    return np.sort(order[np.r_[True, ~same]])
