"""Turning scores into nats: fitting what plans of random formats were measured to lose.

Scores have units of their own, and their sums are off by factors; a few measured plans tell by how much.

- ``least_squares``: predicted(plan) = sum_k w_k sum_i T_k[i, choice_i] with all w_k >= 0.
- ``isotonic``: predicted(plan) = m(sum_i T[i, choice_i]) of one table, m the non-decreasing steps of least squared
  error, joined by straight lines, with m(0) = 0.

Losses of plans span orders of magnitude, so least squares minimises relative errors: residuals are divided by
sqrt(predicted^2 + spread^2), the prediction being that of the step before. (Dividing by what was measured would give
plans that came out small by chance more weight, and draw all predictions down.) Isotonic steps only average neighbours,
which are of one size, so that all plans count alike there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.front import Measurement
from mpsearch.tables import Array, SensitivityTable, Status

How = Literal["least_squares", "isotonic"]
Choices = NDArray[np.int64]
#: Bootstrap resamplings of the plans.
DRAWS = 400
#: How often residuals are divided anew by what is predicted.
_ROUNDS = 20
#: Relative change of the weights at which that ends.
_SETTLED = 1e-4
#: A prediction counts as at least this part of what was measured: none is trusted to be nothing.
_LEAST = 0.1


@dataclass(frozen=True, eq=False)
class Fit:
    """Scores fitted to measured losses.

    Attributes:
        tables: the scores.
        how: ``least_squares`` or ``isotonic``.
        weights: (K,) nats per unit of each table; empty for ``isotonic``.
        spread: (K,) their standard errors, by bootstrap over plans; empty for ``isotonic``.
        r2: share of the (weighted) variance of the losses that is predicted for plans left out, each in turn; can be
            negative; NaN for fewer than 3 plans.
        spearman: rank correlation of those predictions with the measured losses; NaN for fewer than 3 plans.
        plans: how many plans were measured.
    """

    tables: tuple[SensitivityTable, ...]
    how: How
    weights: Array
    spread: Array
    r2: float
    spearman: float
    plans: int
    _curves: tuple[tuple[Array, Array], ...]
    _draws: Array
    _errors: Array

    def predict(self, choice: Sequence[int] | Choices) -> tuple[float, float, float]:
        """Predict what a plan loses, in nats.

        Args:
            choice: (N,) column of each row; -1 for a row that stays as it is.

        Returns:
            The loss, and the ends of the 95 % interval of what a measurement would give: the bootstrap of the fit, with
            relative errors as they were met in plans left out.

        Raises:
            InputError: a choice that the tables do not have (E113).
        """
        totals = _totals(self.tables, np.asarray(choice)[None])
        if self.how == "isotonic":
            value = _interpolate(self._curves[0], totals[:, 0])[0]
            draws = np.array([_interpolate(curve, totals[:, 0])[0] for curve in self._curves[1:]])
        else:
            value = (totals @ self.weights)[0]
            draws = self._draws @ totals[0]
        low, high = np.quantile(np.outer(draws, 1.0 + self._errors), (0.025, 0.975))
        return float(value), float(min(low, value)), float(max(high, value))

    def table(self) -> SensitivityTable:
        """The fitted scores, in nats per token.

        Their standard error holds that of the scores (added up over the tables, for they come from the same data) and
        that of the weights.

        Raises:
            InputError: an isotonic fit maps totals, which no table of single decisions gives (E113).
        """
        if self.how == "isotonic":
            raise InputError("E113", "an isotonic fit of totals gives no table", advice='fit with how="least_squares"')
        first = self.tables[0]
        stack = np.stack([table.value for table in self.tables])
        value = np.tensordot(self.weights, stack, 1)
        drawn = np.tensordot(self._draws, stack, 1)
        scores = np.zeros_like(value)
        for weight, table in zip(self.weights, self.tables, strict=True):
            scores += weight * table.spread if weight else 0.0
        weights = np.sqrt(np.mean((drawn - value) ** 2, axis=0))
        status: tuple[tuple[Status, ...], ...] = tuple(
            tuple(next((x for x in cell if x != "ok"), "ok") for cell in zip(*rows, strict=True))
            for rows in zip(*(table.status for table in self.tables), strict=True)
        )
        bad = ~np.isfinite(value)
        return replace(
            first,
            value=np.where(bad, np.nan, value),
            spread=np.where(bad, np.nan, np.hypot(scores, weights)),
            unit="nats/token",
            status=status,
            samples=min(table.samples for table in self.tables),
            source={"fit": self.to_json()},
        )

    def to_json(self) -> dict[str, Any]:
        """Summary: what was fitted, and how well."""
        found: dict[str, Any] = {"how": self.how, "plans": self.plans}
        names = [str(table.source.get("estimator", i)) for i, table in enumerate(self.tables)]
        if self.how == "least_squares":
            found["weights"] = dict(zip(names, map(float, self.weights), strict=True))
        known = {"r2": self.r2, "spearman": self.spearman}
        return found | {name: value for name, value in known.items() if np.isfinite(value)}


def fit_scores(
    tables: Sequence[SensitivityTable] | SensitivityTable,
    plans: Choices | Sequence[Sequence[int]],
    measured: Array | Sequence[float] | Sequence[Measurement],
    spread: Array | Sequence[float] | None = None,
    how: How = "least_squares",
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Fit:
    """Fit scores to the measured losses of plans.

    Args:
        tables: scores of the same decisions in the same formats, or one table; one for ``isotonic``.
        plans: (P, N) column that each row of the tables takes in each plan; -1 for a row that stays as it is.
        measured: (P,) losses, in nats, or measurements, which know their standard errors.
        spread: (P,) standard errors of losses; 0 where left out or NaN.
        how: ``least_squares`` or ``isotonic``.
        draws: bootstrap resamplings of the plans.
        seed: of the resamplings.

    Raises:
        InputError: tables that do not fit together, shapes that do not fit, losses that are not finite, choices without
            a score, or fewer plans than there are tables (E113).

    >>> table = SensitivityTable(("a", "b"), ("x", "y"), [[1.0, 4.0], [2.0, 8.0]], [[0.0] * 2] * 2, "score")
    >>> fit = fit_scores([table], [[0, 0], [1, 0], [0, 1], [1, 1]], [0.3, 0.6, 0.9, 1.2])
    >>> round(float(fit.weights[0]), 6), round(float(fit.table().value[1, 1]), 6), round(fit.predict([1, -1])[0], 6)
    (0.1, 0.8, 0.4)
    """
    tables = [tables] if isinstance(tables, SensitivityTable) else tables
    runs = [m for m in measured if isinstance(m, Measurement)]
    if runs:
        measured, spread = [m.loss for m in runs], [m.spread for m in runs]
    chosen, losses, errors = _checked(tables, plans, measured, spread, how, draws)
    totals = _totals(tables, chosen)
    generator = np.random.default_rng(seed)
    samples = generator.integers(0, len(losses), (draws, len(losses)))
    if how == "isotonic":
        curves = [_curve(totals[:, 0], losses), *(_curve(totals[rows, 0], losses[rows]) for rows in samples)]
        left_out = _left_out(losses, lambda kept, i: _interpolate(_curve(totals[kept, 0], losses[kept]), totals[i])[0])
        weights, drawn, scale = np.zeros(0), np.zeros((0, 1)), np.ones(len(losses))
        fitted = _interpolate(curves[0], totals[:, 0])
    else:
        curves = []
        weights, scale = _weights(totals, losses, errors)
        drawn = np.stack([_weights(totals[rows], losses[rows], errors[rows], weights)[0] for rows in samples])
        left_out = _left_out(
            losses, lambda kept, i: totals[i] @ _weights(totals[kept], losses[kept], errors[kept], weights)[0]
        )
        fitted = totals @ weights
    residuals = left_out if len(losses) > 2 else fitted
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(residuals > 0, losses / residuals - 1.0, 0.0)
    spread_of = np.sqrt(np.mean((drawn - weights) ** 2, axis=0)) if how == "least_squares" else np.zeros(0)
    r2, spearman = _quality(losses, left_out, scale)
    return Fit(tuple(tables), how, weights, spread_of, r2, spearman, len(losses), tuple(curves), drawn, relative)


def _checked(
    tables: Sequence[SensitivityTable], plans: Any, measured: Any, spread: Any, how: str, draws: int
) -> tuple[Choices, Array, Array]:
    """Refuse what cannot be fitted; return choices, losses and errors as arrays."""
    if how not in ("least_squares", "isotonic"):
        raise InputError("E113", f"how is {how!r}; give 'least_squares' or 'isotonic'")
    if not isinstance(draws, int) or draws < 2:
        raise InputError("E113", f"draws is {draws!r}; give a whole number from 2")
    if not tables or (how == "isotonic" and len(tables) > 1):
        raise InputError("E113", f"{how} of {len(tables)} tables", advice="give one table, or several to least_squares")
    if any((x.layers, x.formats) != (tables[0].layers, tables[0].formats) for x in tables):
        raise InputError("E113", "the tables are of different decisions or formats")
    chosen, losses = np.asarray(plans), np.asarray(measured, dtype=np.float64)
    errors = np.zeros(losses.shape) if spread is None else np.asarray(spread, dtype=np.float64)
    expected = (len(losses), len(tables[0].layers))
    if losses.ndim != 1 or errors.shape != losses.shape or chosen.shape != expected:
        raise InputError("E113", f"plans {chosen.shape}, losses {losses.shape}, errors {errors.shape} do not fit")
    if not np.isfinite(losses).all():
        raise InputError("E113", f"{int((~np.isfinite(losses)).sum())} measured losses are not finite")
    if len(losses) < len(tables):
        raise InputError("E113", f"{len(losses)} plans cannot tell {len(tables)} weights apart", advice="more plans")
    return chosen, losses, np.nan_to_num(errors)


def _totals(tables: Sequence[SensitivityTable], plans: Choices) -> Array:
    """(P, K) sum of each table's scores over the rows of each plan."""
    rows, columns = tables[0].value.shape
    if plans.ndim != 2 or plans.shape[1] != rows or plans.dtype.kind not in "iu":
        raise InputError(
            "E113", f"choices of shape {plans.shape} and type {plans.dtype}", advice=f"{rows} columns each"
        )
    if plans.size and not -1 <= plans.min() <= plans.max() < columns:
        raise InputError("E113", f"choices from {plans.min()} to {plans.max()}", advice=f"-1 to {columns - 1}")
    cells = [np.where(plans < 0, 0.0, table.value[np.arange(rows), plans]) for table in tables]
    totals: Array = np.stack(cells, axis=-1).sum(axis=1)
    if not np.isfinite(totals).all():
        p, i = (int(x[0]) for x in np.nonzero(~np.isfinite(np.stack(cells, axis=-1)).all(axis=-1)))
        raise InputError(
            "E113", f"'{tables[0].layers[i]}' has no score in '{tables[0].formats[plans[p, i]]}'", advice="another plan"
        )
    return totals


def _weights(totals: Array, losses: Array, errors: Array, start: Array | None = None) -> tuple[Array, Array]:
    """Weights of least relative error, none below 0, and what residuals were divided by.

    Args:
        totals: (P, K) sums of scores.
        losses: (P,) measured losses.
        errors: (P,) their standard errors.
        start: weights to begin with; predictions are taken for the losses themselves when left out.
    """
    from scipy.optimize import nnls

    least = np.maximum(_LEAST * np.abs(losses), 1e-12 * np.abs(losses).max(initial=0.0))
    weights = np.zeros(totals.shape[1]) if start is None else start
    scale = np.hypot(np.maximum(np.abs(losses) if start is None else totals @ start, least), errors)
    if not scale.any():
        return np.zeros(totals.shape[1]), np.ones(len(losses))
    for _ in range(_ROUNDS):
        scale = np.where(scale > 0, scale, 1.0)
        rows = totals / scale[:, None]
        sizes = np.linalg.norm(rows, axis=0)
        sizes[sizes == 0] = 1.0
        found = nnls(rows / sizes, losses / scale)[0] / sizes
        settled = np.allclose(found, weights, rtol=_SETTLED, atol=0.0)
        weights = found
        if settled:
            break
        scale = np.hypot(np.maximum(totals @ weights, least), errors)
    return weights, scale


def _curve(totals: Array, losses: Array) -> tuple[Array, Array]:
    """Non-decreasing steps through the plans by total, from (0, 0) on; plans of equal totals are averaged."""
    from scipy.optimize import isotonic_regression

    places, index, counts = np.unique(totals, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=losses) / counts
    steps = isotonic_regression(means, weights=counts).x
    if places[0] > 0:
        places, steps = np.concatenate([[0.0], places]), np.concatenate([[0.0], steps])
    return places, steps


def _interpolate(curve: tuple[Array, Array], totals: Array) -> Array:
    """Straight lines between the steps; the last one goes on for larger totals."""
    found: Array = np.interp(totals, *curve)
    return found


def _left_out(losses: Array, predict: Any) -> Array:
    """Prediction of each plan from all others."""
    if len(losses) < 3:
        return np.full(len(losses), np.nan)
    everything = np.arange(len(losses))
    return np.array([float(predict(np.delete(everything, i), i)) for i in everything])


def _quality(losses: Array, left_out: Array, scale: Array) -> tuple[float, float]:
    """R^2, of residuals divided as in the fit, and Spearman's rank correlation."""
    from scipy.stats import rankdata

    if not np.isfinite(left_out).all():
        return np.nan, np.nan
    weight = scale**-2.0
    spread = (weight * (losses - np.average(losses, weights=weight)) ** 2).sum()
    r2 = 1.0 - (weight * (losses - left_out) ** 2).sum() / spread if spread > 0 else np.nan
    a, b = rankdata(losses), rankdata(left_out)
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    return float(r2), float(np.corrcoef(a, b)[0, 1]) if varies else np.nan
