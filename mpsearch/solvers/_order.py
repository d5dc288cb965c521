"""One order of the rows, whatever order they come in, so that an answer depends only on what the problem says."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.problem import Problem
from mpsearch.solvers._reduced import Floats, Ints
from mpsearch.structure import Alignment, PairTerms

Seals = NDArray[np.uint64]

#: Rounds in which rows that look the same are told apart by the rows they are paired with.
_ROUNDS = 3


def arrange(problem: Problem) -> tuple[Problem, Ints]:
    """Put the rows in the order of their content, and of their names where that is the same.

    Losses count in shares of the largest and costs in shares of their resource's largest, each to the next power of
    two, so that other units give the same order.

    Returns:
        The problem with its rows in order, and the row of the problem given at each place.

    >>> p = Problem(np.array([[3.0, 1.0], [2.0, 0.5]]), np.array([[[1.0, 2.0], [1.0, 3.0]]]), np.array([3.0]))
    >>> other = Problem(4 * p.loss[::-1], p.cost[:, ::-1], p.limit, names=("1", "0"))
    >>> one, two = arrange(p)[0], arrange(other)[0]
    >>> one.names == two.names, (4 * one.loss == two.loss).all()
    (True, np.True_)
    """
    seals = _seals(problem)
    order = _by_seal(seals, problem.names)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return replace(
        problem,
        loss=problem.loss[order],
        cost=problem.cost[:, order],
        names=tuple(problem.names[i] for i in order.tolist()),
        pairs=None if problem.pairs is None else _moved(problem.pairs, place),
        aligned=tuple(sorted((_placed(found, place) for found in problem.aligned), key=_content)),
    ), order


def power(values: Floats) -> int:
    """Return the least k such that every finite value is below ``2**k`` in size; 0 when all are zero."""
    return int(np.frexp(np.abs(values).max(initial=0.0, where=np.isfinite(values)))[1])


def scaled(value: float, by: int) -> float:
    """Return ``value * 2**by``, or the largest number of that sign where this is no number.

    >>> scaled(3.0, 2), scaled(-1.0, 2000)
    (12.0, -1.7976931348623157e+308)
    """
    try:
        return math.ldexp(value, by)
    except OverflowError:
        return math.copysign(float(np.finfo(np.float64).max), value)


def _seals(problem: Problem) -> Seals:
    seals: Seals = np.zeros(len(problem.loss), dtype=np.uint64)
    pairs = problem.pairs
    largest = power(problem.loss) if pairs is None else max(power(problem.loss), power(pairs.value))
    for table, size in ((problem.loss, largest), *((cost, power(cost)) for cost in problem.cost)):
        for column in np.ldexp(table, -size).T:
            seals = _stirred(seals, _bits(column))
    for _ in range(_ROUNDS if problem.aligned or pairs is not None else 0):
        more = np.zeros_like(seals)
        for found in problem.aligned:
            rows = list(found.rows)
            group = _text(f"{sorted(found.formats)} {found.multiple}") ^ seals[rows].sum(keepdims=True)
            more[rows] += _stirred(seals[rows], np.repeat(group, len(rows)))
        if pairs is not None:
            value = _bits(np.ldexp(pairs.value, -largest))
            for here, f, there, g in ((pairs.i, pairs.f, pairs.j, pairs.g), (pairs.j, pairs.g, pairs.i, pairs.f)):
                seal = _stirred(_stirred(_stirred(seals[there], value), f.view(np.uint64)), g.view(np.uint64))
                np.add.at(more, here, seal)
        seals = _stirred(seals, more)
    return seals


def _bits(values: Floats) -> Seals:
    # Adding zero turns -0.0, which has other bits, into 0.0.
    return np.ascontiguousarray(values + 0.0).view(np.uint64)


def _text(text: str) -> Seals:
    return np.array([zlib.crc32(text.encode())], dtype=np.uint64)


def _stirred(seals: Seals, more: Seals) -> Seals:
    seals = (seals ^ more) * np.uint64(0x9E3779B97F4A7C15)
    found: Seals = seals ^ (seals >> np.uint64(29))
    return found


def _by_seal(seals: Seals, names: Sequence[str]) -> Ints:
    order = np.argsort(seals, kind="stable")
    same = seals[order[1:]] == seals[order[:-1]]
    if not same.any():
        return order.astype(np.int64)
    shared = order[np.r_[same, False] | np.r_[False, same]].tolist()
    rank = np.zeros(len(seals), dtype=np.int64)
    # Numbers in order of size.
    rank[sorted(shared, key=lambda i: (len(names[i]), names[i], i))] = np.arange(len(shared))
    return np.lexsort((rank, seals)).astype(np.int64)


def _moved(pairs: PairTerms, place: Ints) -> PairTerms:
    i, j = place[pairs.i], place[pairs.j]
    swap = i > j
    i, f, j, g = (
        np.where(swap, j, i),
        np.where(swap, pairs.g, pairs.f),
        np.where(swap, i, j),
        np.where(swap, pairs.f, pairs.g),
    )
    order = np.lexsort((g, f, j, i))
    return PairTerms(i[order], f[order], j[order], g[order], pairs.value[order])


def _placed(found: Alignment, place: Ints) -> Alignment:
    return Alignment(tuple(sorted(place[list(found.rows)].tolist())), tuple(sorted(found.formats)), found.multiple)


def _content(found: Alignment) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return found.rows, found.formats, found.multiple
