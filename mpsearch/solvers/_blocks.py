"""Pair terms as one table per pair of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._reduced import Bools, Floats, Ints
from mpsearch.structure import PairTerms


@dataclass(frozen=True, eq=False)
class Blocks:
    """For each pair of rows that have terms, what each two of their cells add.

    Attributes:
        first: (B,) one row of each pair.
        second: (B,) the other.
        value: (B, F, F), zero where there is no term or a cell is not offered.
    """

    first: Ints
    second: Ints
    value: Floats

    @classmethod
    def of(cls, pairs: PairTerms, offered: Bools) -> Blocks:
        """Make the tables; terms of cells that are not offered are left out."""
        rows, formats = offered.shape
        kept = offered[pairs.i, pairs.f] & offered[pairs.j, pairs.g] & (pairs.value != 0)
        codes, block = np.unique(pairs.i[kept] * rows + pairs.j[kept], return_inverse=True)
        value = np.zeros((len(codes), formats, formats))
        value[block.reshape(-1), pairs.f[kept], pairs.g[kept]] = pairs.value[kept]
        return cls(codes // max(rows, 1), codes % max(rows, 1), value)

    def within(self, offered: Bools) -> tuple[Blocks, Bools]:
        """Take out what cells that are no longer offered add; return what is left, and which pairs of rows that is."""
        both = offered[self.first][:, :, None] & offered[self.second][:, None, :]
        value = np.where(both, self.value, 0.0)
        kept = np.asarray(value.any(axis=(1, 2)), dtype=np.bool_)
        return Blocks(self.first[kept], self.second[kept], value[kept]), kept

    def field(self, choice: Ints, rows: int) -> Floats:
        """(N, F) what each cell adds with the other rows as they are."""
        blocks = np.arange(len(self.first))
        found = np.zeros((rows, self.value.shape[2]))
        np.add.at(found, self.first, self.value[blocks, :, choice[self.second]])
        np.add.at(found, self.second, self.value[blocks, choice[self.first], :])
        return found

    def mean(self, offered: Bools) -> Floats:
        """(N, F) what each cell adds on average over the cells of the other rows."""
        share = offered / np.maximum(offered.sum(axis=1, keepdims=True), 1)
        found = np.zeros(offered.shape)
        np.add.at(found, self.first, np.einsum("bfg,bg->bf", self.value, share[self.second]))
        np.add.at(found, self.second, np.einsum("bfg,bf->bg", self.value, share[self.first]))
        return found

    def together(self, choice: Ints) -> Floats:
        """(B, F, F) what two moves add beyond what each adds alone."""
        blocks = np.arange(len(self.first))
        f, g = choice[self.first], choice[self.second]
        left, right = self.value[blocks, f, :], self.value[blocks, :, g]
        found: Floats = self.value - left[:, None, :] - right[:, :, None] + self.value[blocks, f, g][:, None, None]
        return found

    def degree(self, rows: int) -> int:
        """Return the most pairs that a row is in."""
        return int(np.bincount(np.r_[self.first, self.second], minlength=max(rows, 1)).max())

    def apart(self) -> list[Ints]:
        """Part the pairs into sets in which no row is twice, first come first served."""
        used = dict.fromkeys([*self.first.tolist(), *self.second.tolist()], 0)
        sets: list[list[int]] = []
        for block, (i, j) in enumerate(zip(self.first.tolist(), self.second.tolist(), strict=True)):
            free = ~(used[i] | used[j])
            bit = free & -free
            used[i] |= bit
            used[j] |= bit
            if bit.bit_length() > len(sets):
                sets.append([])
            sets[bit.bit_length() - 1].append(block)
        return [np.array(found, dtype=np.int64) for found in sets]
