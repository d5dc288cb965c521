"""Level switches: how plans mutate, within rows of one cost as published, and between any rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers import _search
from mpsearch.solvers._reduced import Floats, Ints


class Levels:
    """The offered columns of each row from cheap to dear, by their shares of the limits of all resources together.

    Attributes:
        columns: of each row, its columns in order.
        groups: rows that cost the same in every column and offer the same, and so can trade levels.
    """

    def __init__(self, problem: Problem) -> None:
        limit = np.where(np.isfinite(problem.limit) & (problem.limit > 0), problem.limit, np.inf)
        share = (problem.cost / limit[:, None, None]).sum(axis=0)
        self.columns = [
            np.array(sorted(np.flatnonzero(row).tolist(), key=lambda f: (cost[f], f)), dtype=np.int64)
            for row, cost in zip(problem.offered, share, strict=True)
        ]
        alike: dict[bytes, list[int]] = {}
        for i, row in enumerate(problem.offered):
            key = row.tobytes() + np.where(row, problem.cost[:, i], 0.0).tobytes()
            alike.setdefault(key, []).append(i)
        self.groups = list(alike.values())

    def place(self, choice: Ints, i: int) -> int:
        """Level of a row."""
        return int(np.flatnonzero(self.columns[i] == choice[i])[0])

    def moved(self, choice: Ints, i: int, step: int) -> int | None:
        """Column of a row some levels away; None where there is none."""
        level = self.place(choice, i) + step
        return int(self.columns[i][level]) if 0 <= level < len(self.columns[i]) else None


def flips(rng: np.random.Generator) -> int:
    """Draw how many switches a mutation makes: the lesser of two throws of 1, 2 or 3."""
    return int(min(rng.integers(1, 4), rng.integers(1, 4)))


def published(problem: Problem, levels: Levels, parent: Ints, rng: np.random.Generator) -> Iterator[Ints]:
    """Yield mutations without end: in each switch one row of a group steps down and one steps up."""
    weight = np.array([len(group) for group in levels.groups], dtype=np.float64)
    while True:
        child = parent.copy()
        for _ in range(flips(rng)):
            group = levels.groups[int(rng.choice(len(weight), p=weight / weight.sum()))]
            down = {i: column for i in group if (column := levels.moved(child, i, -1)) is not None}
            up = {i: column for i in group if (column := levels.moved(child, i, 1)) is not None}
            if not down or not up:
                continue
            lower, upper = int(rng.choice([*down])), int(rng.choice([*up]))
            # A row that is drawn twice stays as it is.
            if lower != upper:
                child[lower], child[upper] = down[lower], up[upper]
        if problem.fits(child):
            yield child
        else:
            yield parent


def published_start(problem: Problem, levels: Levels, rng: np.random.Generator) -> Ints | None:
    """Return the least common level that breaks a budget, or the highest, with random rows lowered until all hold."""
    highest = max((len(columns) for columns in levels.columns), default=0)
    choice = np.zeros(len(levels.columns), dtype=np.int64)
    for level in range(highest):
        choice = np.array([columns[min(level, len(columns) - 1)] for columns in levels.columns], dtype=np.int64)
        if not problem.fits(choice):
            break
    weight = np.array([len(group) for group in levels.groups], dtype=np.float64)
    while not problem.fits(choice):
        able = [k for k, group in enumerate(levels.groups) if any(levels.place(choice, i) for i in group)]
        if not able:
            return None
        group = levels.groups[int(rng.choice(able, p=weight[able] / weight[able].sum()))]
        i = int(rng.choice([row for row in group if levels.place(choice, row)]))
        choice[i] = levels.columns[i][levels.place(choice, i) - 1]
    return choice


def between(problem: Problem, levels: Levels, parent: Ints, rng: np.random.Generator) -> Iterator[Ints]:
    """Yield mutations without end: rows of any size step up or down, and others pay for it or use what it frees.

    Who pays is decided by the predicted losses, each row's times a random factor, so that the payer changes.
    """
    free = [i for i, columns in enumerate(levels.columns) if len(columns) > 1]
    finite: Floats = np.where(problem.offered, problem.loss, 0.0)
    while True:
        child = parent.copy()
        loss = finite * np.exp(rng.normal(0.0, 0.5, (len(parent), 1)))
        for _ in range(flips(rng) if free else 0):
            i = int(rng.choice(free))
            there = levels.moved(child, i, int(rng.choice([-1, 1])))
            if there is not None:
                child[i] = there
                # The row keeps its new level: nothing else of it counts as better.
                loss[i] = np.where(np.arange(loss.shape[1]) == there, -1.0, 1.0) * (1.0 + np.abs(finite).sum())
        settled = _search.settle(problem, child, loss)
        yield parent if settled is None else settled


def distinct(children: Iterator[Ints], known: set[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Return the first new ones of some mutations; fewer where a hundred draws for each do not find as many."""
    found: list[tuple[int, ...]] = []
    before = set(known)
    for child in itertools.islice(children, 100 * count):
        key = tuple(child.tolist())
        if key not in before:
            before.add(key)
            found.append(key)
            if len(found) == count:
                break
    return found
