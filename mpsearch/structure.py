"""What ties rows of a problem together beyond its budgets: pairs of cells, and counts that come in multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.tables import Array

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PairTerms:
    """Loss that pairs of cells add: ``value[k]`` when row ``i[k]`` takes ``f[k]`` and row ``j[k]`` takes ``g[k]``.

    Attributes:
        i: (P,) row of the first cell.
        f: (P,) its format.
        j: (P,) row of the second cell, larger than ``i``.
        g: (P,) its format.
        value: (P,) loss that both add beyond what each does alone; may be negative.

    >>> pairs = PairTerms([0], [1], [1], [0], [-0.5])
    >>> pairs.total(np.array([1, 0])), pairs.total(np.array([1, 1]))
    (-0.5, 0.0)
    """

    i: Places
    f: Places
    j: Places
    g: Places
    value: Array

    def __post_init__(self) -> None:
        for name in ("i", "f", "j", "g"):
            array = np.array(getattr(self, name), dtype=np.int64).reshape(-1)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        value = np.array(self.value, dtype=np.float64).reshape(-1)
        value.flags.writeable = False
        object.__setattr__(self, "value", value)
        if any(len(getattr(self, name)) != len(value) for name in ("i", "f", "j", "g")):
            raise ValueError("pairs need as many rows and formats as values")
        if (self.i >= self.j).any():
            raise ValueError("a pair names two rows, the first one first")
        if not np.isfinite(value).all():
            raise ValueError("pairs hold a value that is not finite")
        places = np.stack([self.i, self.f, self.j, self.g])
        if len(np.unique(places, axis=1).T) < len(value):
            raise ValueError("a pair of cells is given twice")

    def __len__(self) -> int:
        return len(self.value)

    def chosen(self, choice: Places) -> Array:
        """Values of the pairs of which a choice takes both cells."""
        found: Array = self.value[(choice[self.i] == self.f) & (choice[self.j] == self.g)]
        return found

    def total(self, choice: Places) -> float:
        """Loss that the pairs add to a choice."""
        return math.fsum(self.chosen(choice).tolist())


@dataclass(frozen=True)
class Alignment:
    """How many of ``rows`` take one of ``formats`` must be a multiple of ``multiple``, such as channels of a tile.

    Attributes:
        rows: numbers of the rows.
        formats: columns that are counted.
        multiple: at least 1.
    """

    rows: tuple[int, ...]
    formats: tuple[int, ...]
    multiple: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
        object.__setattr__(self, "formats", tuple(int(column) for column in self.formats))
        if self.multiple < 1 or len(set(self.rows)) < len(self.rows) or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"an alignment needs distinct rows and formats and a multiple of at least 1, got {self}")

    def holds(self, choice: Places) -> bool:
        """Whether a choice keeps it."""
        return int(np.isin(choice[list(self.rows)], self.formats).sum()) % self.multiple == 0


def check_structure(pairs: PairTerms | None, aligned: Sequence[Alignment], rows: int, formats: int) -> None:
    """Refuse what names rows or formats that are not there.

    Raises:
        ValueError: a row or a format beyond the table.
    """
    if pairs is not None and len(pairs):
        low = min(int(getattr(pairs, name).min()) for name in ("i", "f", "j", "g"))
        if low < 0 or pairs.j.max() >= rows or max(pairs.f.max(), pairs.g.max()) >= formats:
            raise ValueError(f"a pair names a cell beyond the {rows} rows and {formats} formats")
    for found in aligned:
        if any(not 0 <= row < rows for row in found.rows) or any(not 0 <= f < formats for f in found.formats):
            raise ValueError(f"an alignment names a cell beyond the {rows} rows and {formats} formats")
