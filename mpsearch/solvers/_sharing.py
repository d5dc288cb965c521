"""How much of the pair terms the rows can carry alone, so that bounds for rows alone are bounds for all."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._blocks import Blocks
from mpsearch.solvers._reduced import Bools, Floats, Ints


@dataclass(frozen=True, eq=False)
class Shared:
    """The same losses, with as much of the pairs in the rows as was found.

    Attributes:
        loss: (N, F) of the rows; infinite where not offered.
        rest: (B, F, F) what is left of the pairs; not below zero, but for rounding and where a cell is not offered.
        slip: most by which the sum of the rows alone can be above the sum of the losses and pairs that were given.
    """

    loss: Floats
    rest: Floats
    slip: float


class Sharing:
    """Moves what pairs add into their rows, so that the least of the rows' sums rises.

    For a pair of rows, with T the sum of both rows' losses and the pair's table, each row gets half the least of T over
    the other row's cells, and the table keeps what is left, which is not below zero. The sum over any choice stays what
    it was; the sum of the rows' least losses never falls. This is block coordinate ascent on the dual of the strong
    linearisation (after Globerson and Jaakkola 2007, NIPS, "Fixing max-product").
    """

    def __init__(self, loss: Floats, blocks: Blocks) -> None:
        self.given, self.blocks = loss, blocks
        self.offered = np.isfinite(loss)
        self.sets = blocks.apart()
        self.left, self.right = np.zeros((2, *blocks.value.shape[:2]))

    def narrow(self, offered: Bools) -> None:
        """Go on with fewer cells, from where it stands."""
        self.blocks, kept = self.blocks.within(offered)
        self.given, self.offered = np.where(offered, self.given, np.inf), offered
        self.left, self.right = self.left[kept], self.right[kept]
        self.sets = self.blocks.apart()

    def improve(self, price: Floats, sweeps: int, deadline: float) -> None:
        """Go over all pairs some times, with what the cells cost at the prices of the budgets (N, F) added."""
        loss = np.where(self.offered, self._carried() + price, np.inf)
        for _ in range(sweeps):
            for found in self.sets:
                i, j = self.blocks.first[found], self.blocks.second[found]
                rest = self.blocks.value[found] - self.left[found][:, :, None] - self.right[found][:, None, :]
                both = loss[i][:, :, None] + loss[j][:, None, :] + rest
                self.left[found] += self._gain(loss, i, both.min(axis=2) / 2)
                self.right[found] += self._gain(loss, j, both.min(axis=1) / 2)
            if time.monotonic() > deadline:
                break

    def _gain(self, loss: Floats, rows: Ints, new: Floats) -> Floats:
        offered = self.offered[rows]
        gain: Floats = np.where(offered, new, 0.0) - np.where(offered, loss[rows], 0.0)
        loss[rows] = new
        return gain

    def _carried(self) -> Floats:
        found = np.where(self.offered, self.given, 0.0)
        np.add.at(found, self.blocks.first, self.left)
        np.add.at(found, self.blocks.second, self.right)
        return found

    def shared(self) -> Shared:
        """Return the losses as they are shared now."""
        rest = self.blocks.value - self.left[:, :, None] - self.right[:, None, :]
        tables = (self.blocks.value, self.left[:, :, None], self.right[:, None, :])
        size = sum(float(np.abs(table).max(axis=(1, 2), initial=0.0).sum()) for table in tables)
        size += float(np.abs(np.where(self.offered, self.given, 0.0)).max(axis=1, initial=0.0).sum())
        eps = float(np.finfo(np.float64).eps)
        slip = eps * (self.blocks.degree(len(self.given)) + 8) * size
        both = self.offered[self.blocks.first][:, :, None] & self.offered[self.blocks.second][:, None, :]
        slip -= float(rest.min(axis=(1, 2), initial=0.0, where=both).sum())
        return Shared(np.where(self.offered, self._carried(), np.inf), rest, slip)
