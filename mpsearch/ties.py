"""Rows that take one format together, made one row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.structure import Alignment, PairTerms
from mpsearch.tables import Array


def tied(problem: Problem, group: NDArray[np.int64]) -> Problem:
    """Make one row of the rows of each group: losses and costs add up, and a format must be offered to all.

    Args:
        problem: the problem.
        group: (N,) number of the group of each row, 0 to G - 1.
    """
    count = int(group.max()) + 1
    loss = np.zeros((count, problem.loss.shape[1]))
    np.add.at(loss, group, problem.loss)
    cost = np.zeros((len(problem.cost), *loss.shape))
    for table, given in zip(cost, problem.cost, strict=True):
        np.add.at(table, group, given)
        if (given != np.floor(given)).any():
            # Sums of fractions are rounded; rounded up, what fits the sums fits the rows.
            table[np.bincount(group) > 1] = np.nextafter(table[np.bincount(group) > 1], np.inf)
    cost[:, np.isinf(loss)] = 0.0
    first = np.unique(group, return_index=True)[1]
    pairs = None
    if problem.pairs is not None:
        loss, pairs = _tied_pairs(problem.pairs, group, loss)
    return replace(
        problem,
        loss=loss,
        cost=cost,
        names=tuple(problem.names[i] for i in first.tolist()),
        pairs=pairs,
        aligned=tuple(_tied_alignment(found, group) for found in problem.aligned),
    )


def _tied_pairs(pairs: PairTerms, group: NDArray[np.int64], loss: Array) -> tuple[Array, PairTerms]:
    i, j, f, g = group[pairs.i], group[pairs.j], pairs.f, pairs.g
    inside = i == j
    # Tied rows take one format, so of the pairs between them only those of one format ever count.
    both = inside & (f == g)
    np.add.at(loss, (i[both], f[both]), pairs.value[both])
    swap = i > j
    places = np.stack([np.where(swap, j, i), np.where(swap, g, f), np.where(swap, i, j), np.where(swap, f, g)])
    kept, where = np.unique(places[:, ~inside], axis=1, return_inverse=True)
    value: Array = np.zeros(kept.shape[1])
    np.add.at(value, where.reshape(-1), pairs.value[~inside])
    return loss, PairTerms(kept[0], kept[1], kept[2], kept[3], value)


def _tied_alignment(found: Alignment, group: NDArray[np.int64]) -> Alignment:
    rows = group[list(found.rows)]
    members, counts = np.unique(rows, return_counts=True)
    if (counts != counts[0]).any():
        raise InputError(
            "E213", "an alignment counts rows that are tied in groups of different sizes", advice="align whole ties"
        )
    size = int(counts[0])
    multiple = found.multiple // math.gcd(found.multiple, size)
    return Alignment(tuple(members.tolist()), found.formats, multiple)
