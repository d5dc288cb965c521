"""Who predicts best: the standings of a tournament, from predictions and measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.budget import Budget
from mpsearch.front import Measurement
from mpsearch.planning import Labelled
from mpsearch.spread import mean_and_error

#: An estimator is as good as the winner if, with 97.5 % confidence, its plans lose at most this share more.
MARGIN = 0.05
_NORMAL = 1.96
#: Standard errors by which one must beat another to be said to, for the pair is picked from many.
_SIGNIFICANT = 3.0
#: Resamplings of the plans for the interval of a correlation.
_DRAWS = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of predicted and measured loss.

    Attributes:
        value: over all random plans.
        low: lower end of its 95 % interval, by resampling the plans within each size; too narrow for few plans.
        high: upper end.
        within: the mean of the correlations among plans of one size: what is left when larger plans being better,
            which every score knows, does not count.
    """

    value: float
    low: float
    high: float
    within: float


@dataclass(frozen=True)
class Entry:
    """What one estimator did.

    Attributes:
        estimator: its name.
        unit: unit of its scores.
        correlation: of its predictions with the measured losses of the random plans.
        excess: how much more the plans that it chooses lose than the best plan of this model that was measured at each
            size, relative to that: 0 is best, 0.1 is 10 % more; the mean over the sizes.
        behind: by how much that is more than the winner's, and its standard error over the validation samples. The
            winner is picked by the same samples, which makes others look a little worse than they are.
        seconds: computing time of its scores on one core, rounding included.
        why_not: why it took no part, or not all of it, or on part of the data.
    """

    estimator: str
    unit: str = ""
    correlation: Correlation | None = None
    excess: float | None = None
    behind: tuple[float, float] | None = None
    seconds: float = 0.0
    why_not: str = ""


@dataclass(frozen=True)
class Tournament:
    """How well each estimator predicts measured losses of one model, and what it costs.

    Attributes:
        entries: one per estimator, the winner first: least ``excess``; those that took no part last.
        plans: how many random plans were measured.
        sizes: budgets in bytes at which plans were drawn and chosen.
        recommended: the quickest estimator whose plans lose, with confidence, at most `MARGIN` more than the winner's;
            empty when fewer than two chose plans.
        beaten: (quicker estimator, dearest one that it beats beyond chance); empty when there is none.
    """

    entries: tuple[Entry, ...]
    plans: int
    sizes: tuple[int, ...]
    recommended: str
    beaten: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}

    @property
    def sentences(self) -> list[str]:
        """The outcome in words."""
        winner = self.entries[0]
        if winner.excess is None:
            return ["No estimator could choose a plan here."]
        lines = [f"{winner.estimator} chooses the best plans: {_percent(winner.excess)} above the best measured."]
        if not self.recommended:
            return [*lines, "One estimator alone says nothing of the others: none is recommended."]
        chosen = next(x for x in self.entries if x.estimator == self.recommended)
        if chosen is not winner:
            lines = [
                f"{lines[0]} {chosen.estimator} is at most {_percent(MARGIN)} worse and takes {chosen.seconds:.0f} s "
                f"instead of {winner.seconds:.0f} s."
            ]
        lines.append(f"Recommended for this model: {self.recommended}.")
        ranked = [(x.correlation.value, x) for x in self.entries if x.correlation is not None]
        value, best = max(ranked, key=lambda pair: pair[0])
        lines.append(f"Best rank correlation with {self.plans} measured random plans: {best.estimator}, {value:.3f}.")
        if self.beaten:
            seconds = {x.estimator: x.seconds for x in self.entries}
            lines.append(" beats ".join(f"{name} ({seconds[name]:.1f} s)" for name in self.beaten) + ", the dearest.")
        return lines


@dataclass(frozen=True)
class Drawn:
    """The random plans of one size."""

    limit: int
    budgets: tuple[Budget, ...]
    plans: tuple[Labelled, ...]


@dataclass(frozen=True)
class Predictions:
    """What one estimator predicts of the random plans of each size."""

    name: str
    unit: str = ""
    losses: Mapping[int, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0
    why_not: str = ""


def judge(
    found: Sequence[tuple[Predictions, Mapping[int, Labelled]]],
    drawn: Sequence[Drawn],
    measured: Mapping[str, Measurement],
    rivals: Mapping[int, float],
) -> Tournament:
    """Rank estimators.

    Args:
        found: of each estimator its predictions, and the plans that it chose, by size.
        drawn: the random plans.
        measured: key of a plan -> its measurement.
        rivals: size -> least loss of any plan that was ever chosen there.
    """
    losses = {size.limit: [_loss(measured.get(item.plan.key)) for item in size.plans] for size in drawn}
    shares = _shares(found, losses, measured, rivals)
    excess = {name: float(share.mean()) - 1 for name, share in shares.items()}
    winner = min(excess, key=lambda name: excess[name], default="")
    entries = [
        Entry(
            made.name,
            made.unit,
            _correlate(made.losses, losses),
            excess.get(made.name),
            mean_and_error((shares[made.name] - shares[winner]).tolist()) if made.name in shares else None,
            made.seconds,
            made.why_not,
        )
        for made, _ in found
    ]
    entries.sort(key=_place)
    near = [e for e in entries[1:] if e.behind is not None and e.behind[0] + _NORMAL * e.behind[1] <= MARGIN]
    recommended = min([entries[0], *near], key=lambda e: e.seconds).estimator if len(shares) > 1 else ""
    plans = sum(math.isfinite(loss) for of_size in losses.values() for loss in of_size)
    sizes = tuple(size.limit for size in drawn)
    return Tournament(tuple(entries), plans, sizes, recommended, _beaten(entries, shares))


def _beaten(entries: Sequence[Entry], shares: Mapping[str, NDArray[np.float64]]) -> tuple[str, ...]:
    """The best of those that take less than a tenth of the dearest one's time, if its plans are better than chance."""
    judged = [e for e in entries if e.estimator in shares]
    if not judged:
        return ()
    dear = max(judged, key=lambda e: e.seconds)
    for cheap in judged:
        mean, error = mean_and_error((shares[cheap.estimator] - shares[dear.estimator]).tolist())
        if cheap.seconds < dear.seconds / 10 and mean < -_SIGNIFICANT * error:
            return cheap.estimator, dear.estimator
    return ()


def _shares(
    found: Sequence[tuple[Predictions, Mapping[int, Labelled]]],
    losses: Mapping[int, Sequence[float]],
    measured: Mapping[str, Measurement],
    rivals: Mapping[int, float],
) -> dict[str, NDArray[np.float64]]:
    """Loss of each estimator's chosen plans over that of the best plan of the size, sample by sample.

    By sample, so that the difference of two estimators is free of what all plans share. Only estimators that chose a
    plan of every size, and whose plans could all be measured, take part.
    """
    ran = {
        made.name: {limit: measured[item.plan.key] for limit, item in chosen.items() if item.plan.key in measured}
        for made, chosen in found
    }
    known = {
        limit: [*of_size, *(runs[limit].loss for runs in ran.values() if limit in runs), rivals.get(limit, math.inf)]
        for limit, of_size in losses.items()
    }
    best = {limit: min(x for x in of_size if math.isfinite(x)) for limit, of_size in known.items()}
    return {
        name: np.mean([np.array(m.samples or (m.loss,)) / (best[limit] or 1.0) for limit, m in runs.items()], axis=0)
        for name, runs in ran.items()
        if len(runs) == len(losses)
    }


def _place(entry: Entry) -> tuple[Any, ...]:
    value = -2.0 if entry.correlation is None else entry.correlation.value
    return entry.excess is None, entry.excess or 0.0, -value, entry.estimator


def _loss(measurement: Measurement | None) -> float:
    return math.nan if measurement is None else measurement.loss


def _correlate(predicted: Mapping[int, Sequence[float]], losses: Mapping[int, Sequence[float]]) -> Correlation | None:
    """Correlate over all plans and within each size; None if a prediction is missing."""
    if not predicted:
        return None
    sizes = [(np.array(predicted[limit]), np.array(losses[limit])) for limit in losses]
    sizes = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in sizes]
    if not all(np.isfinite(x).all() for x, _ in sizes):
        return None
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(x), (_DRAWS, len(x))) for x, _ in sizes]
    resampled = spearman(
        np.concatenate([x[d] for (x, _), d in zip(sizes, draws, strict=True)], axis=1),
        np.concatenate([y[d] for (_, y), d in zip(sizes, draws, strict=True)], axis=1),
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    whole = spearman(np.concatenate([x for x, _ in sizes])[None], np.concatenate([y for _, y in sizes])[None])
    within = np.mean([float(spearman(x[None], y[None])[0]) for x, y in sizes])
    return Correlation(float(whole[0]), float(low), float(high), float(within))


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each row; ties get their mean rank, and a constant row correlates with nothing.

    >>> spearman(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 4.0, 9.0]])).tolist()
    [1.0]
    """
    from scipy.stats import rankdata

    a, b = rankdata(x, axis=1), rankdata(y, axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    product: NDArray[np.float64] = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    found: NDArray[np.float64] = np.where(product > 0, (a * b).sum(axis=1) / np.where(product > 0, product, 1.0), 0.0)
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
