"""Studies and all that belongs to them, on the way from one database to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpsearch.records import CellRow, ValueRow


@dataclass(frozen=True, slots=True)
class Asked:
    """A study on its way.

    Attributes:
        name: its name.
        spec: its question, as JSON values.
        state: where it stood.
    """

    name: str
    spec: Mapping[str, Any] = field(hash=False)
    state: str


@dataclass(frozen=True, slots=True)
class Belongs:
    """A value that belongs to a study: the row of a link, with the study's name."""

    study: str
    kind: str
    key: str
    label: str
    position: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A second, different value that was once refused."""

    kind: str
    key: str
    stored: Mapping[str, Any] = field(hash=False)
    offered: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Portion:
    """Part of a database. Each iterable can be gone through once, in the order of these fields.

    Attributes:
        studies: the studies.
        links: which values belong to them.
        values: the values.
        cells: scores, each with its scope; all cells of a scope stand together.
        conflicts: values that were refused.
    """

    studies: Sequence[Asked]
    links: Sequence[Belongs]
    values: Iterable[ValueRow]
    cells: Iterable[tuple[str, CellRow]]
    conflicts: Iterable[Refused] = ()

    def renamed(self, names: Mapping[str, str]) -> Portion:
        """Return the same with other names of studies.

        Args:
            names: old name -> new name.

        >>> Portion([Asked("a", {"name": "a"}, "new")], [], [], []).renamed({"a": "b"}).studies[0].spec
        {'name': 'b'}
        """
        studies = [
            replace(row, name=names[row.name], spec={**row.spec, "name": names[row.name]}) if row.name in names else row
            for row in self.studies
        ]
        links = [replace(row, study=names.get(row.study, row.study)) for row in self.links]
        return replace(self, studies=studies, links=links)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy brought.

    Attributes:
        studies: names of the studies, new or not.
        values: how many values were new.
        cells: how many cells were new.
    """

    studies: tuple[str, ...]
    values: int
    cells: int
