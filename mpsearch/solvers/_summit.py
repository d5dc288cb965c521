"""The highest point under a set of planes, inside a box: the master problem of cutting planes."""

from __future__ import annotations

import numpy as np

from mpsearch.solvers._reduced import Floats

_EPS = float(np.finfo(np.float64).eps)


class Summit:
    """Maximise the lowest of ``height[k] + slope[k] @ x`` over ``low <= x <= high`` by the dual simplex method.

    There are one more unknowns than prices, so a basis is a system of a few equations. It is kept from call to call:
    after one more plane, a few exchanges reach the new summit. Source: Lemke 1954, Naval Research Logistics 1.
    """

    def __init__(self, low: Floats, high: Floats) -> None:
        size = len(low)
        self.low, self.high = low, high
        # In shares of the box, so that every unknown lies between 0 and 1; the first unknown is the height.
        self.span = np.where(high > low, high - low, 1.0)
        unit = np.eye(size + 1)[1:]
        self.rows: list[Floats] = [*unit, *-unit]
        self.rest: list[float] = [*((high - low) / self.span).tolist(), *[0.0] * size]
        self.basis: list[int] = []

    def add(self, height: float, slope: Floats) -> None:
        """Add a plane; slopes are per unit of ``x``."""
        self.rows.append(np.r_[1.0, -slope * self.span])
        self.rest.append(height + float(slope @ self.low))
        if not self.basis:
            places = np.arange(len(slope))
            walls = np.where(slope > 0, places, places + len(slope)).tolist()
            self.basis = [len(self.rows) - 1, *walls]

    def top(self, above: float) -> tuple[Floats, float]:
        """Return the point and its height.

        Args:
            above: a height near the summit; differences from it keep their digits.
        """
        rows = np.array(self.rows)
        planes = 2 * len(self.low)
        rest = np.array(self.rest)
        rest[planes:] -= above
        aim = np.eye(rows.shape[1])[0]
        place = np.zeros(rows.shape[1])
        for _ in range(20 + 4 * len(rows)):
            basis = rows[self.basis]
            place = np.linalg.solve(basis, rest[self.basis])
            over = rows @ place - rest
            over[np.abs(over) <= 8 * _EPS * (np.abs(rest) + np.abs(rows) @ np.abs(place))] = 0.0
            over[self.basis] = 0.0
            enters = int(over.argmax())
            if over[enters] <= 0:
                break
            share = np.linalg.solve(basis.T, rows[enters])
            weight = np.linalg.solve(basis.T, aim)
            able = share > 1e-12 * np.abs(share).max()
            if not able.any():
                break
            ratio = np.where(able, np.maximum(weight, 0.0) / np.where(able, share, 1.0), np.inf)
            self.basis[int(ratio.argmin())] = enters
        point = self.low + np.clip(place[1:], 0.0, 1.0) * self.span
        return point, above + float(place[0])
