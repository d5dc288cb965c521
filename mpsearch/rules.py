"""Rules on which choices count, beyond budgets; all of them become rows, cells, budgets and counts of a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpsearch.errors import InputError, did_you_mean
from mpsearch.problem import Problem
from mpsearch.ruled import Ruled, build

#: A row, or all rows whose name matches: a name, a pattern such as ``*.down_proj``, or a number.
Rows = str | int
Column = str | int


@dataclass(frozen=True)
class Family:
    """A budget of some rows only, such as those of one part of a model.

    Attributes:
        rows: its rows.
        resource: what is limited.
        limit: the most that the rows may total.
    """

    rows: Sequence[Rows]
    resource: Column
    limit: float


@dataclass(frozen=True)
class Balance:
    """As many of the rows take one of ``up`` as take one of ``down``, so that the mean stays where it is.

    Attributes:
        rows: the group.
        up: formats above the base.
        down: formats below it.
    """

    rows: Sequence[Rows]
    up: Sequence[Column]
    down: Sequence[Column]


@dataclass(frozen=True)
class Peak:
    """The largest total of any step stays within a limit, as memory does whose tensors live for some steps only.

    Attributes:
        steps: the rows that are alive at each step.
        resource: what is limited.
        limit: the most that the rows of one step may total.
    """

    steps: Sequence[Sequence[Rows]]
    resource: Column
    limit: float


@dataclass(frozen=True)
class Aligned:
    """How many of the rows take one of ``formats`` is a multiple of ``multiple``, as tiles of a kernel ask.

    Attributes:
        rows: the tile.
        formats: what is counted.
        multiple: at least 1.
    """

    rows: Sequence[Rows]
    formats: Sequence[Column]
    multiple: int


@dataclass(frozen=True)
class Rules:
    """Rules for the choice. Rows, formats and resources are given by name, rows also by pattern, or by number.

    Attributes:
        pins: row -> the only format it may take.
        bars: row -> formats it may not take.
        floors: row -> format: nothing cheaper than this in the first resource.
        ties: groups of rows that take one format together; their losses and costs add up.
        at_most: format -> how many rows may take it.
        at_least: resource -> the least that the rows must total.
        families: budgets of some rows only.
        balances: groups that keep their mean.
        peaks: limits on the largest total of any step.
        aligned: counts that must be multiples.

    >>> import numpy as np
    >>> problem = Problem(np.array([[3.0, 1.0], [2.0, 0.5]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> ruled = Rules(pins={0: 0}).apply(problem)
    >>> ruled.problem.offered.tolist()
    [[True, False], [True, True]]
    """

    pins: Mapping[Rows, Column] = field(default_factory=dict)
    bars: Mapping[Rows, Sequence[Column]] = field(default_factory=dict)
    floors: Mapping[Rows, Column] = field(default_factory=dict)
    ties: Sequence[Sequence[Rows]] = ()
    at_most: Mapping[Column, int] = field(default_factory=dict)
    at_least: Mapping[Column, float] = field(default_factory=dict)
    families: Sequence[Family] = ()
    balances: Sequence[Balance] = ()
    peaks: Sequence[Peak] = ()
    aligned: Sequence[Aligned] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Rules:
        """Make rules from plain values, as a TOML file holds them: a key for each field.

        Raises:
            InputError: an unknown key (E103) or a value that makes no rule (E213).

        >>> Rules.of({"pins": {"head": "bf16"}, "at_most": {"int2": 3}}).at_most
        {'int2': 3}
        """
        known = tuple(cls.__dataclass_fields__)
        if unknown := [key for key in values if key not in known]:
            close = did_you_mean(unknown[0], known)
            raise InputError("E103", f"no rule '{unknown[0]}'{close}", advice=f"there is {', '.join(known)}")
        parts: Mapping[str, Any] = {"families": Family, "balances": Balance, "peaks": Peak, "aligned": Aligned}
        try:
            made = {name: tuple(kind(**item) for item in values.get(name, ())) for name, kind in parts.items()}
            for name in ("pins", "bars", "floors", "at_most", "at_least"):
                dict(values.get(name, {}))
            return cls(**{**values, **made})
        except (TypeError, ValueError) as error:
            raise InputError("E213", f"rules: {error}") from error

    def apply(self, problem: Problem) -> Ruled:
        """Make the problem that has the rules in it.

        Raises:
            InputError: a row, format or resource that is not there (E213), or rules that leave a row without a format
                (E213), or more of them than fit in memory (E212).
        """
        return build(problem, self)
