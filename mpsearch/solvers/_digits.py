"""Costs as whole numbers of two digits, so that totals of floats of unlike size can be compared exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mpsearch.problem import Problem, exact_sum
from mpsearch.solvers._reduced import Bools, Floats, Ints, Reduced

#: Parts of one count, of which the second digit counts; sums of two digits carry at most one.
_BASE = 2**50


@dataclass(frozen=True, eq=False)
class Digits:
    """Costs above the row's least: ``whole`` counts of `Reduced`, and parts of a count, 2**50 to one.

    Attributes:
        whole: (R, N, F) whole counts.
        part: (R, N, F) parts of one more, each below 2**50.
        slack: (2, R) whole counts and parts that may be used.
        exact: whether nothing was rounded.
    """

    whole: Ints
    part: Ints
    slack: Ints
    exact: bool

    @classmethod
    def of(cls, problem: Problem, reduced: Reduced) -> Digits:
        """Take the costs of a reduced problem as they are; where two digits are too few, rounded down to counts."""
        part, slack = np.zeros_like(reduced.low), np.stack([reduced.slack, np.zeros_like(reduced.slack)])
        offered = np.isfinite(reduced.excess)
        for place, r in enumerate(reduced.kept):
            if (reduced.use[place] == reduced.low[place]).all():
                continue
            cost, unit = problem.cost[r][reduced.order], reduced.unit[place]
            least = np.where(offered, cost, np.inf).min(axis=1)
            parts = _parts(np.where(offered, cost, least[:, None]), least, reduced.low[place], unit)
            if parts is None:
                return cls(reduced.low, np.zeros_like(part), np.stack([reduced.slack, slack[1] * 0]), False)
            part[place] = parts
            room = exact_sum([float(problem.limit[r]), *(-least).tolist()]) / Fraction(unit)
            slack[:, place] = divmod(math.floor(room * _BASE), _BASE)
        return cls(reduced.low, part, slack, True)

    @classmethod
    def rounded_up(cls, reduced: Reduced) -> Digits:
        """Round up to whole counts: what fits then fits in truth."""
        none = np.zeros_like(reduced.slack)
        return cls(reduced.use, np.zeros_like(reduced.use), np.stack([reduced.slack, none]), False)

    def fits(self, spent: Ints) -> Bools:
        """Whether totals (2, R, P) keep every budget."""
        whole, part = self.slack[:, :, None]
        found: Bools = ((spent[0] < whole) | ((spent[0] == whole) & (spent[1] <= part))).all(axis=0)
        return found

    def add(self, spent: Ints, row: int, cells: Ints) -> Ints:
        """Add each of some cells of a row to each total: (2, R, P * cells)."""
        whole = spent[0][:, :, None] + self.whole[:, row, cells][:, None, :]
        part = spent[1][:, :, None] + self.part[:, row, cells][:, None, :]
        carried = np.stack([whole + part // _BASE, part % _BASE])
        return carried.reshape(2, len(self.whole), spent.shape[2] * len(cells))


def ranked(spent: Ints) -> Ints:
    """(R, P) numbers in the order of totals (2, R, P): equal ones have equal numbers."""
    if not spent[1].any():
        whole: Ints = spent[0]
        return whole
    ranks = np.empty(spent.shape[1:], dtype=np.int64)
    for r, (first, second) in enumerate(zip(*spent, strict=True)):
        order = np.lexsort((second, first))
        rises = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
        ranks[r, order] = np.concatenate([[0], np.cumsum(rises)])[: len(order)]
    return ranks


def amounts(spent: Ints, unit: float) -> Floats:
    """Totals (2, P) in the unit of the costs, rounded."""
    found: Floats = (spent[0] + spent[1] / _BASE) * unit
    return found


def _parts(cost: Floats, least: Floats, low: Ints, unit: float) -> Ints | None:
    """Return what ``cost - least`` is above ``low`` counts in parts of a count; None where that is no whole number."""
    high = cost - least[:, None]
    virtual = high - cost
    rest = (cost - (high - virtual)) - (least[:, None] + virtual)
    # The unit is a power of two here, so that both quotients are exact; so is the difference of leading digits.
    over, rest = (high - low * unit) / unit * _BASE, rest / unit * _BASE
    if (over != np.floor(over)).any() or (rest != np.floor(rest)).any():
        return None
    return over.astype(np.int64) + rest.astype(np.int64)
