"""Rows that take one format together, made one row."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.problem import Problem, exact_sum
from mpsearch.structure import Alignment, PairTerms
from mpsearch.tables import Array

Groups = NDArray[np.int64]


def tied(problem: Problem, group: Groups) -> tuple[Problem, Problem]:
    """Make one row of the rows of each group: losses and costs add up, and a format must be offered to all.

    A sum of fractions need not be a number that a float can hold. So there are two problems, which are one when all
    sums are exact: in the first every sum is rounded up, so that what keeps its budgets keeps those of the rows; in the
    second down, so that its bound is one for the rows.

    Args:
        problem: the problem.
        group: (N,) number of the group of each row, 0 to G - 1.
    """
    count = int(group.max()) + 1
    loss = np.zeros((count, problem.loss.shape[1]))
    np.add.at(loss, group, problem.loss)
    above, below = np.zeros((2, len(problem.cost), *loss.shape))
    for up, down, given in zip(above, below, problem.cost, strict=True):
        np.add.at(up, group, given)
        down[:] = up
        if (given != np.floor(given)).any() or np.abs(up).max(initial=0.0) >= 2.0**53:
            _round_both_ways(up, down, given, group)
    for table in (above, below):
        table[:, np.isinf(loss)] = 0.0
    first = np.unique(group, return_index=True)[1]
    pairs = None
    if problem.pairs is not None:
        loss, pairs = _tied_pairs(problem.pairs, group, loss)
    made = replace(
        problem,
        loss=loss,
        cost=above,
        names=tuple(problem.names[i] for i in first.tolist()),
        pairs=pairs,
        aligned=tuple(_tied_alignment(found, group) for found in problem.aligned),
    )
    return made, made if (above == below).all() else replace(made, cost=below)


def _round_both_ways(up: Array, down: Array, given: Array, group: Groups) -> None:
    """Put the exact sums of groups, rounded up and rounded down, into two tables."""
    sizes = np.bincount(group)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(sizes)
    for g in np.flatnonzero(sizes > 1).tolist():
        for f, column in enumerate(given[order[ends[g] - sizes[g] : ends[g]]].T.tolist()):
            exact, near = exact_sum(column), math.fsum(column)
            up[g, f] = near if Fraction(near) >= exact else math.nextafter(near, math.inf)
            down[g, f] = near if Fraction(near) <= exact else math.nextafter(near, -math.inf)


def _tied_pairs(pairs: PairTerms, group: Groups, loss: Array) -> tuple[Array, PairTerms]:
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


def _tied_alignment(found: Alignment, group: Groups) -> Alignment:
    rows = group[list(found.rows)]
    members, counts = np.unique(rows, return_counts=True)
    if len(counts) and (counts != counts[0]).any():
        raise InputError(
            "E213", "an alignment counts rows that are tied in groups of different sizes", advice="align whole ties"
        )
    size = int(counts[0]) if len(counts) else 1
    multiple = found.multiple // math.gcd(found.multiple, size)
    return Alignment(tuple(members.tolist()), found.formats, multiple)
