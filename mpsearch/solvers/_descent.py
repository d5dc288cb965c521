"""Local search by moves of one row and of two, under budgets, counts and pair terms."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpsearch.solvers._blocks import Blocks
from mpsearch.solvers._reduced import Bools, Floats, Ints

#: Moves of one row that are paired with each other: those of least rise.
_MOVES = 600
#: Moves that are forced, one after the other, when nothing else saves anything; and rounds of them.
_FORCED = 100
_ROUNDS = 3
#: What saves less than this share of the largest value is no gain, but rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Ground:
    """What moves of one row and of two are judged by.

    Attributes:
        loss: (N, F); infinite where not offered.
        blocks: what pairs add.
        use: (R', N, F) whole counts.
        slack: (R',) counts that may be used.
        counts: cells (N, F), and what their number must be a multiple of.
    """

    loss: Floats
    blocks: Blocks
    use: Ints
    slack: Ints
    counts: tuple[tuple[Bools, int], ...] = ()

    def descend(self, choice: Ints, price: Floats, deadline: float) -> Ints:
        """Take the move of one row that saves most, or else of two, until none saves anything or time is up.

        Of moves of two rows only those are looked at whose parts raise loss plus price (N, F) least, 600 at most.
        Cost: O(R N F) for a move of one row, O(B F^2 + R M^2) for one of two.
        """
        choice = choice.copy()
        while self._one(choice) or self._two(choice, price):
            if time.monotonic() > deadline:
                break
        return choice

    def force(self, choice: Ints, price: Floats, deadline: float) -> Ints:
        """Force moves of one row, make each good by moves of others, descend, and keep what is better.

        Only moves that raise loss plus price least are forced, 100 in each of 3 rounds at most. Counts would be broken
        by most of them; a choice with counts is left as it is.
        """
        rows = np.arange(len(choice))
        for _ in range(_ROUNDS if not self.counts else 0):
            field = self.loss + self.blocks.field(choice, len(choice)) + price
            ranked = field - field[rows, choice][:, None]
            ranked[rows, choice] = np.inf
            best, least = choice, self.total(choice) - _ROUNDING
            for place in np.argsort(ranked, axis=None, kind="stable")[:_FORCED].tolist():
                row, cell = divmod(place, ranked.shape[1])
                if time.monotonic() > deadline or not np.isfinite(ranked[row, cell]):
                    break
                tried = choice.copy()
                tried[row] = cell
                if self._repair(tried, row):
                    tried = self.descend(tried, price, deadline)
                    total = self.total(tried)
                    if total < least:
                        best, least = tried, total
            if best is choice:
                break
            choice = best
        return choice

    def total(self, choice: Ints) -> float:
        """Return the loss of a choice, pairs included, up to rounding."""
        blocks = np.arange(len(self.blocks.first))
        pairs = self.blocks.value[blocks, choice[self.blocks.first], choice[self.blocks.second]]
        return float(self.loss[np.arange(len(choice)), choice].sum() + pairs.sum())

    def _repair(self, choice: Ints, kept: int) -> bool:
        """Move rows other than one until every budget is kept, by least rise per overrun removed; say whether it is."""
        rows = np.arange(len(choice))
        scale = 1.0 / np.maximum(self.use.max(axis=(1, 2), initial=1), 1)
        field = self.loss + self.blocks.field(choice, len(choice))
        for _ in range(len(choice)):
            step, room, _ = self._step(choice)
            if (room >= 0).all():
                return True
            after = np.tensordot(scale, np.maximum(step - room[:, None, None], 0), axes=1)
            removed = float(scale @ np.maximum(-room, 0)) - after
            removed[kept] = 0.0
            able = (removed > 0) & np.isfinite(field)
            rise = np.where(able, field - field[rows, choice][:, None], 0.0)
            # What saves loss as well goes first, the largest saving ahead.
            asked = np.where(able, np.where(rise > 0, rise / np.where(able, removed, 1.0), rise), np.inf)
            i, f = np.unravel_index(int(asked.argmin()), asked.shape)
            if not np.isfinite(asked[i, f]):
                return False
            self._follow(field, int(i), int(choice[i]), int(f))
            choice[i] = f
        return False

    def _step(self, choice: Ints) -> tuple[Ints, Ints, list[Ints]]:
        """Return what each move uses more (R', N, F), the room left (R',), and what it adds to each count (N, F)."""
        rows = np.arange(len(choice))
        taken = self.use[:, rows, choice]
        added = [cells.astype(np.int64) - cells[rows, choice][:, None] for cells, _ in self.counts]
        return self.use - taken[:, :, None], self.slack - taken.sum(axis=1), added

    def _one(self, choice: Ints) -> bool:
        """Take moves of one row until none saves anything; say whether one was taken."""
        rows = np.arange(len(choice))
        field = self.loss + self.blocks.field(choice, len(choice))
        moved = False
        while True:
            step, room, added = self._step(choice)
            able = (step <= room[:, None, None]).all(axis=0)
            for more, (_, multiple) in zip(added, self.counts, strict=True):
                able &= more % multiple == 0
            rise = np.where(able, field - field[rows, choice][:, None], np.inf)
            if not rise.size or not rise.min() < -_ROUNDING:
                return moved
            i, f = np.unravel_index(int(rise.argmin()), rise.shape)
            self._follow(field, int(i), int(choice[i]), int(f))
            choice[i], moved = f, True

    def _follow(self, field: Floats, row: int, old: int, new: int) -> None:
        """Bring what cells add up to date after a move."""
        blocks = self.blocks
        here = blocks.first == row
        field[blocks.second[here]] += blocks.value[here, new, :] - blocks.value[here, old, :]
        here = blocks.second == row
        field[blocks.first[here]] += blocks.value[here, :, new] - blocks.value[here, :, old]

    def _two(self, choice: Ints, price: Floats) -> bool:
        """Take the best move of two rows, if it saves anything."""
        rows = np.arange(len(choice))
        field = self.loss + self.blocks.field(choice, len(choice))
        rise = field - field[rows, choice][:, None]
        ranked = rise + price - price[rows, choice][:, None]
        ranked[rows, choice] = np.inf
        best = np.argsort(ranked, axis=None, kind="stable")[:_MOVES]
        i, f = np.unravel_index(best[np.isfinite(ranked.reshape(-1)[best])], rise.shape)
        if len(i) < 2:
            return False
        gain = rise[i, f]
        both = gain[:, None] + gain + self._added(choice, i, f)
        both[i[:, None] == i] = np.inf
        step, room, added = self._step(choice)
        for need, have in zip(step[:, i, f], room.tolist(), strict=True):
            both[need[:, None] + need > have] = np.inf
        for more, (_, multiple) in zip(added, self.counts, strict=True):
            both[(more[i, f][:, None] + more[i, f]) % multiple != 0] = np.inf
        a, b = np.unravel_index(int(both.argmin()), both.shape)
        if not both[a, b] < -_ROUNDING:
            return False
        choice[i[a]], choice[i[b]] = f[a], f[b]
        return True

    def _added(self, choice: Ints, i: Ints, f: Ints) -> Floats:
        """(M, M) what each two of the moves to cells (i, f) add beyond what each adds alone."""
        found = np.zeros((len(i), len(i)))
        move = np.full(self.loss.shape, -1, dtype=np.int64)
        move[i, f] = np.arange(len(i))
        left, right = move[self.blocks.first], move[self.blocks.second]
        block, here, there = np.nonzero((left >= 0)[:, :, None] & (right >= 0)[:, None, :])
        value = self.blocks.together(choice)[block, here, there]
        a, b = left[block, here], right[block, there]
        found[a, b] = value
        found[b, a] = value
        return found
