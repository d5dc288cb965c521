"""Shares of high-impact weights per layer, as a continuous quadratic programme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import null_space

from mpsearch.errors import InputError
from mpsearch.solvers._reduced import Bools, Floats

#: Curvature and steps below this are rounding, once the objective is scaled to numbers of about 1.
_ROUNDING = 1e-12
#: An answer with a larger residual is not given.
_RESIDUAL = 1e-8


def high_impact_ratios(
    quadratic: Floats | Sequence[Sequence[float]],
    linear: Floats | Sequence[float],
    sizes: Floats | Sequence[float],
    mean_ratio: float,
) -> tuple[Floats, float]:
    """Return the share of high-impact weights of each layer: least ``r' Q r + c' r`` at a given mean share.

    ``sum n_l r_l = R sum n_l`` and ``0 <= r_l <= 1``. After the idea of arXiv 2511.17801, which spends a mean share of
    weights that are kept at moderate bits with regard to what layers do together; its own programme is not published in
    full, so this is not a reproduction. Q need not be symmetric, and must be convex for shares of equal mean: the
    answer is then the optimum (one of them, where Q is only semidefinite), found by an active set, from all shares at
    the mean. Where it is not convex the programme is refused: a local optimum would be proven nothing of.

    The residual is that of the conditions of Karush, Kuhn and Tucker, with the largest number of Q and c as the unit:
    how far a step along the gradient, less its part along n, would move any share within [0, 1]. It is at most 1e-8.
    Cost: O(L^3) for each change of the active set, some L of them. Unit of the loss: that of Q and c; lower is better.

    Args:
        quadratic: (L, L) Q.
        linear: (L,) c.
        sizes: (L,) weights of each layer, > 0.
        mean_ratio: R, 0 to 1.

    Raises:
        InputError: numbers of other shapes or ranges (E107), or a Q that is not convex (E210).

    >>> ratios, residual = high_impact_ratios([[1.0, 0.0], [0.0, 3.0]], [0.0, 0.0], [10, 10], 0.5)
    >>> ratios.round(6).tolist(), residual < 1e-8
    ([0.75, 0.25], True)
    """
    q, c, n = _checked(quadratic, linear, sizes, mean_ratio)
    if not len(n):
        return n, 0.0
    hessian = q + q.T
    unit = float(max(np.abs(hessian).max(initial=0.0), np.abs(c).max(initial=0.0))) or 1.0
    hessian, c, n = hessian / unit, c / unit, n / n.max(initial=0.0)
    curvature = np.linalg.eigvalsh(_along(hessian, n)[1]).min(initial=0.0)
    if curvature < -_ROUNDING * len(n):
        raise InputError(
            "E210",
            f"high-impact ratios: Q is not convex, its least curvature is {curvature * unit:.3g}",
            because="what is best nearby need not be best",
            advice="leave out interactions, or measure them better",
        )
    ratios = _active_set(hessian, c, n, np.full(len(n), float(mean_ratio)))
    residual = _residual(hessian @ ratios + c, n, ratios)
    residual = max(residual, abs(float(n @ ratios) - mean_ratio * float(n.sum())) / max(float(n.sum()), 1.0))
    if residual > _RESIDUAL:
        raise InputError("E210", f"high-impact ratios: the numbers are too ill-conditioned, residual {residual:.1e}")
    return ratios, residual


def _checked(
    quadratic: Floats | Sequence[Sequence[float]],
    linear: Floats | Sequence[float],
    sizes: Floats | Sequence[float],
    mean_ratio: float,
) -> tuple[Floats, Floats, Floats]:
    q, c, n = (np.array(values, dtype=np.float64) for values in (quadratic, linear, sizes))
    if n.ndim != 1 or c.shape != n.shape or q.shape != (len(n), len(n)):
        raise InputError("E107", f"high-impact ratios: Q, c and sizes have shapes {q.shape}, {c.shape} and {n.shape}")
    if not (np.isfinite(q).all() and np.isfinite(c).all() and np.isfinite(n).all() and (n > 0).all()):
        raise InputError("E107", "high-impact ratios: Q and c must be finite, and sizes above 0")
    if not 0 <= mean_ratio <= 1:
        raise InputError("E107", f"high-impact ratios: the mean ratio is {mean_ratio}, expected 0 to 1")
    return q, c, n


def _along(hessian: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Return a basis of the steps that keep the mean, and the curvature along it."""
    basis = null_space(n[None, :]) if len(n) > 1 else np.zeros((len(n), 0))
    return basis, basis.T @ hessian @ basis


def _active_set(hessian: Floats, c: Floats, n: Floats, ratios: Floats) -> Floats:
    """Step to the optimum of the free shares, fix the first that meets an end, free the one that is held wrongly."""
    free = np.ones(len(n), dtype=np.bool_)
    for turn in range(100 + 20 * len(n)):
        step, endless = _step(hessian, hessian @ ratios + c, n, free)
        if np.abs(step).max(initial=0.0) <= _ROUNDING:
            released = _held_wrongly(hessian @ ratios + c, n, ratios, free, first=turn > 10 * len(n))
            if not released.any():
                break
            free |= released
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(step > 0, (1 - ratios) / step, np.where(step < 0, -ratios / step, np.inf))
        first = int(room.argmin())
        if endless or room[first] < 1:
            ratios = np.clip(ratios + room[first] * step, 0.0, 1.0)
            ratios[first] = float(step[first] > 0)
            free[first] = False
        else:
            ratios = np.clip(ratios + step, 0.0, 1.0)
    return ratios


def _step(hessian: Floats, gradient: Floats, n: Floats, free: Bools) -> tuple[Floats, bool]:
    """Return the step to the optimum of the free shares, or a direction in which the loss falls without end."""
    step = np.zeros(len(n))
    basis, curvature = _along(hessian[np.ix_(free, free)], n[free])
    values, vectors = np.linalg.eigh(curvature)
    slope = vectors.T @ (basis.T @ gradient[free])
    flat = values <= _ROUNDING * len(n)
    endless = bool((flat & (np.abs(slope) > 1e-10)).any())
    along = np.where(flat, slope if endless else 0.0, 0.0 if endless else slope / np.where(flat, 1.0, values))
    step[free] = -(basis @ (vectors @ along))
    return step, endless


def _multiplier(gradient: Floats, n: Floats, ratios: Floats, free: Bools) -> float:
    """Return what one more unit of ``n' r`` costs: what the free shares say, or the middle of what the others allow."""
    if free.any():
        return float(n[free] @ gradient[free] / (n[free] @ n[free]))
    worth = gradient / n
    most = worth[ratios == 0].min(initial=np.inf)
    least = worth[ratios == 1].max(initial=-np.inf)
    return float(
        np.clip((most + least) / 2 if np.isfinite(most + least) else min(most, max(least, 0.0)), -1e300, 1e300)
    )


def _held_wrongly(gradient: Floats, n: Floats, ratios: Floats, free: Bools, *, first: bool) -> Bools:
    """Mark the share whose end is held most wrongly, or the first such; without free shares, one of each end."""
    pull = gradient - _multiplier(gradient, n, ratios, free) * n
    wrong = np.where(free, 0.0, np.where(ratios == 0, -pull, pull))
    released = np.zeros(len(n), dtype=np.bool_)
    for end in (ratios == 0, ratios == 1) if not free.any() else (np.ones(len(n), dtype=np.bool_),):
        found = np.flatnonzero(end & (wrong > 1e-10))
        if found.size:
            released[found[0] if first else found[wrong[found].argmax()]] = True
    return released


def _residual(gradient: Floats, n: Floats, ratios: Floats) -> float:
    free = (ratios > 0) & (ratios < 1)
    pull = gradient - _multiplier(gradient, n, ratios, free) * n
    return float(np.abs(ratios - np.clip(ratios - pull, 0.0, 1.0)).max(initial=0.0))
