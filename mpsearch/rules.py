"""Rules on which choices count, beyond budgets; all of them become rows, cells, budgets and counts of a problem."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
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

    def __post_init__(self) -> None:
        _named("rows of a family", _listed("rows of a family", self.rows))
        _amount("limit of a family", self.limit)


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

    def __post_init__(self) -> None:
        for name in ("rows", "up", "down"):
            _named(f"{name} of a balance", _listed(f"{name} of a balance", getattr(self, name)))
        if not self.up or not self.down or set(self.up) & set(self.down):
            raise InputError("E213", "rules: a balance needs formats that go up and others that go down")


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

    def __post_init__(self) -> None:
        for step in _listed("steps of a peak", self.steps):
            _named("steps of a peak", _listed("steps of a peak", step))
        _amount("limit of a peak", self.limit)


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

    def __post_init__(self) -> None:
        for name in ("rows", "formats"):
            _named(f"{name} of an alignment", _listed(f"{name} of an alignment", getattr(self, name)))
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise InputError("E213", f"rules: multiple is {self.multiple!r}, expected a whole number from 1")


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

    def __post_init__(self) -> None:
        for name in ("pins", "floors"):
            for row, column in _table(name, getattr(self, name)).items():
                _named(f"{name} of '{row}'", [column])
        for row, columns in _table("bars", self.bars).items():
            _named(f"bars of '{row}'", _listed(f"bars of '{row}'", columns))
        for column, most in _table("at_most", self.at_most).items():
            if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most < 2**53:
                raise InputError("E213", f"rules: at_most of '{column}' is {most!r}, expected a whole number from 0")
        for resource, least in _table("at_least", self.at_least).items():
            _amount(f"at_least of '{resource}'", least)
        for tie in _listed("ties", self.ties):
            _named("ties", _listed("ties", tie))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Rules:
        """Make rules from plain values, as a TOML file holds them: a key for each field.

        Raises:
            InputError: an unknown key (E103) or a value that makes no rule (E213).

        >>> Rules.of({"pins": {"head": "bf16"}, "at_most": {"int2": 3}}).at_most
        {'int2': 3}
        """
        if not isinstance(values, Mapping):
            raise InputError("E213", f"rules are {values!r}, expected a table of rules")
        known = tuple(cls.__dataclass_fields__)
        if unknown := [key for key in values if key not in known]:
            close = did_you_mean(unknown[0], known)
            raise InputError("E103", f"no rule '{unknown[0]}'{close}", advice=f"there is {', '.join(known)}")
        parts: Mapping[str, Any] = {"families": Family, "balances": Balance, "peaks": Peak, "aligned": Aligned}
        made = {}
        for name, kind in parts.items():
            made[name] = tuple(_part(name, kind, item) for item in _listed(name, values.get(name, ())))
        return cls(**{**values, **made})

    def apply(self, problem: Problem) -> Ruled:
        """Make the problem that has the rules in it.

        Raises:
            InputError: a row, format or resource that is not there (E213), or rules that leave a row without a format
                (E213), or more of them than fit in memory (E212).
        """
        return build(problem, self)


def _table(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError("E213", f"rules: {name} is {value!r}, expected a table of names and values")
    return value


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError("E213", f"rules: {name}: got {value!r}, expected a list", advice=f"write [{value!r}]")
    return value


def _named(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, Integral)):
            raise InputError("E213", f"rules: {name}: got {value!r}, expected a name or a number")


def _amount(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise InputError("E213", f"rules: {name} is {str(value)[:40]}, expected a finite number")


def _part(name: str, kind: Any, item: Any) -> Any:
    known = tuple(kind.__dataclass_fields__)
    keys = set(_table(f"an entry of {name}", item))
    if keys != set(known):
        odd = sorted(keys ^ set(known))[0]
        what = "is missing" if odd in known else "is unknown"
        raise InputError("E213", f"rules: '{odd}' of an entry of {name} {what}", advice=f"keys: {', '.join(known)}")
    return kind(**item)
