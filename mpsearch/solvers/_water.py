"""Reverse water-filling: real amounts of bits for losses that fall exponentially, and whole ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpsearch.errors import InfeasibleError
from mpsearch.solvers._reduced import Floats, Ints


@dataclass(frozen=True, eq=False)
class WaterFill:
    """Real amounts of bits, and how well they meet the conditions of an optimum.

    Attributes:
        bits: (N,) bits of each row.
        loss: total loss ``sum n c 2^(-decay bits)``.
        level: loss per weight of every row between its ends; 0 when the budget is not used up.
        price: loss saved by one more unit of budget, ``decay ln(2) level``.
        spent: ``sum n bits``.
        stationarity: most bits by which a row misses what the level asks of it, between its ends or beyond them.
        overrun: mean bits by which ``spent`` is above the budget, or misses it although the price is not zero.
    """

    bits: Floats
    loss: float
    level: float
    price: float
    spent: float
    stationarity: float
    overrun: float


def water_fill(
    coefficients: ArrayLike,
    budget: float,
    *,
    weights: ArrayLike = 1.0,
    low: ArrayLike = 0.0,
    high: ArrayLike = math.inf,
    decay: float = 2.0,
) -> WaterFill:
    """Minimise ``sum n_j c_j 2^(-decay R_j)`` over real bits R with ``sum n_j R_j <= budget``, ``low <= R <= high``.

    The optimum is ``R_j = clip(log2(c_j / level) / decay, low_j, high_j)`` with the level at which the budget is spent:
    all rows between their ends lose the same per weight. The level is found without iteration: what is spent is
    piecewise linear in its logarithm, with a corner where a row meets an end. Exact up to rounding for any weights;
    the residuals say how exact. Rows with ``c = 0`` get ``low``. Cost O(N log N), so rows may be columns or groups.

    Sources: Shannon 1959 for reverse water-filling; BAQ 2025, arXiv 2506.05664, for its use on bit widths.

    Args:
        coefficients: (N,) loss of each row at zero bits, per weight, >= 0.
        budget: most bits in all; the mean times the sum of the weights.
        weights: (N,) numbers each row holds, > 0, or one for all.
        low: fewest bits, for each row or for all.
        high: most bits, for each row or for all.
        decay: halvings of the loss per bit, > 0; 2 for a squared error.

    Raises:
        ValueError: numbers out of range, or of another shape.
        InfeasibleError: the budget is below ``sum n low`` by more than rounding (E201).

    >>> water_fill([16.0, 4.0, 0.0001, 1.0], 6.0).bits.round(9).tolist()
    [3.0, 2.0, 0.0, 1.0]
    """
    c, n, least, most = _checked(coefficients, weights, low, high, decay)
    with np.errstate(divide="ignore"):
        return fill(np.log2(c), n, least, most, budget, decay)


def fill(height: Floats, n: Floats, low: Floats, high: Floats, budget: float, decay: float) -> WaterFill:
    """Do what `water_fill` does with the base-2 logarithms of the coefficients."""
    active = np.isfinite(height)
    least = math.fsum((n * low).tolist())
    # Real amounts are rounded anyway; a budget that is the same sum in another order is no smaller one.
    if least - budget > 1e-12 * math.fsum((n * np.abs(low)).tolist()):
        raise InfeasibleError("E201", f"the fewest bits of all rows are {least!r} together, the budget is {budget!r}")
    bits = low.copy()
    full = math.fsum((n[active] * high[active]).tolist())
    room = budget - math.fsum((n[~active] * low[~active]).tolist())
    if full <= room:
        bits[active] = high[active]
        return _with_residuals(bits, height, n, low, high, budget, decay, -math.inf)
    water = _water(height[active], n[active], low[active], high[active], room, decay)
    bits[active] = np.clip((height[active] - water) / decay, low[active], high[active])
    return _with_residuals(bits, height, n, low, high, budget, decay, water)


def integer_repair(
    coefficients: ArrayLike,
    budget: float,
    *,
    weights: ArrayLike = 1.0,
    low: int = 0,
    high: int = 8,
    decay: float = 2.0,
) -> Ints:
    """Whole bits for the problem of `water_fill`: from ``low`` on, one bit at a time where it saves most per weight.

    Exact for equal weights, because the loss of each row is convex and every step costs the same. With unequal weights
    a step that does not fit is passed over, and the loss is above the optimum by at most what the first such step
    would have saved.
    Cost O(N B log(N B)) for B = high - low.

    Raises:
        ValueError: numbers out of range, or of another shape.
        InfeasibleError: the budget is below ``sum n low`` (E201).

    >>> integer_repair([16.0, 4.0, 0.0001, 1.0], 6.0).tolist()
    [3, 2, 0, 1]
    """
    c, n, least, _ = _checked(coefficients, weights, float(low), float(high), decay)
    room = budget - math.fsum((n * least).tolist())
    if room < 0:
        raise InfeasibleError("E201", f"{low} bits for every row are above the budget of {budget!r} bits")
    with np.errstate(divide="ignore"):
        worth = np.log2(c)[:, None] - decay * np.arange(low, high)
    row, step = np.nonzero(np.isfinite(worth))
    order = np.lexsort((step, row, -worth[row, step]))
    row = row[order]
    # What fits without a doubt is taken at once; the rest is looked at step by step.
    sure = int(np.searchsorted(np.cumsum(n[row]), room * (1.0 - 1e-9), side="right"))
    bits = low + np.bincount(row[:sure], minlength=len(c)).astype(np.int64)
    room = budget - math.fsum((n * bits).tolist())
    full = np.zeros(len(c), dtype=np.bool_)
    for i in row[sure:].tolist():
        if room < n.min():
            break
        # The steps of a row come in order: without this one there is no next one.
        full[i] |= bool(n[i] > room)
        if not full[i]:
            bits[i] += 1
            room -= float(n[i])
    return bits


def _water(height: Floats, n: Floats, low: Floats, high: Floats, room: float, decay: float) -> float:
    """Base-2 logarithm of the level at which ``room`` bits are spent."""
    # Below `enter` a row has more than its fewest bits, below `leave` it has its most.
    enter, leave = height - decay * low, height - decay * high
    corners = np.concatenate([enter, leave])
    slope = np.concatenate([n, -n]) / decay
    order = np.argsort(-corners, kind="stable")
    corners, slope = corners[order], np.cumsum(slope[order])
    finite = int(np.isfinite(corners).sum())
    gained = np.concatenate([[0.0], np.cumsum(slope[: finite - 1] * -np.diff(corners[:finite]))])
    spent = math.fsum((n * low).tolist()) + gained
    place = max(0, min(int(np.searchsorted(spent, room, side="right")) - 1, finite - 1))
    # Between two corners the same rows are between their ends, and the level follows from what is left for them.
    upper = corners[place]
    lower = corners[place + 1] if place + 1 < len(corners) else -math.inf
    between = (enter >= upper) & (leave <= lower)
    if not between.any():
        return float(upper)
    at_low = (enter < upper) & ~between
    at_high = ~between & ~at_low
    fixed = math.fsum([*(n[at_low] * low[at_low]).tolist(), *(n[at_high] * high[at_high]).tolist()])
    weight = math.fsum(n[between].tolist())
    return (math.fsum((n[between] * height[between]).tolist()) - decay * (room - fixed)) / weight


def _with_residuals(
    bits: Floats, height: Floats, n: Floats, low: Floats, high: Floats, budget: float, decay: float, water: float
) -> WaterFill:
    spent = math.fsum((n * bits).tolist())
    asked = np.clip((height - water) / decay, low, high) if math.isfinite(water) else bits
    missed = abs(spent - budget) if math.isfinite(water) else max(0.0, spent - budget)
    with np.errstate(over="ignore", under="ignore"):
        loss = math.fsum((n * np.exp2(height - decay * bits)).tolist())
        level = float(np.exp2(water))
    return WaterFill(
        bits,
        loss,
        level,
        decay * math.log(2.0) * level,
        spent,
        float(np.abs(bits - asked).max(initial=0.0)),
        missed / math.fsum(n.tolist()) if len(n) else 0.0,
    )


def _checked(
    coefficients: ArrayLike, weights: ArrayLike, low: ArrayLike, high: ArrayLike, decay: float
) -> tuple[Floats, Floats, Floats, Floats]:
    c = np.asarray(coefficients, dtype=np.float64)
    if c.ndim != 1:
        raise ValueError(f"coefficients must be (rows,), got shape {c.shape}")
    n, least, most = (np.broadcast_to(np.asarray(a, dtype=np.float64), c.shape).copy() for a in (weights, low, high))
    if not (np.isfinite(c).all() and (c >= 0).all()):
        raise ValueError("coefficients must be finite and >= 0")
    if not (np.isfinite(n).all() and (n > 0).all()):
        raise ValueError("weights must be finite and > 0")
    if not (np.isfinite(least).all() and (least <= most).all()):
        raise ValueError("the fewest bits must be finite and no more than the most bits")
    if not 0 < decay < math.inf:
        raise ValueError(f"decay must be above 0, got {decay}")
    return c, n, least, most
