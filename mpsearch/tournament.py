"""Which estimator to trust on a model: all of them against the same measured plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch import registry
from mpsearch.budget import Budget
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.planning import Labelled
from mpsearch.scoring import blind_to
from mpsearch.session import Session
from mpsearch.spread import mean_and_error
from mpsearch.studying import Study
from mpsearch.tables import SensitivityTable

#: Differences of less than this many standard errors are chance.
_SIGNIFICANT = 1.96
#: Resamplings of the plans for the interval of a correlation.
_DRAWS = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of predicted and measured loss.

    Attributes:
        value: over all random plans.
        low: lower end of its 95 % interval, by resampling the plans within each size.
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
        excess: how much more the plans that it chooses lose than the best plan measured at each size, relative to
            that: 0 is best, 0.1 is 10 % more; the mean over the sizes.
        behind: by how much that is more than the winner's, and its standard error over the validation samples.
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
        recommended: the quickest estimator whose chosen plans are not measurably worse than the winner's.
    """

    entries: tuple[Entry, ...]
    plans: int
    sizes: tuple[int, ...]
    recommended: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}

    @property
    def sentences(self) -> list[str]:
        """The outcome in words."""
        winner = self.entries[0]
        if winner.excess is None:
            return ["No estimator could choose a plan here."]
        lines = [f"{winner.estimator} chooses the best plans: {_percent(winner.excess)} above the best measured."]
        chosen = next(x for x in self.entries if x.estimator == self.recommended)
        if chosen is not winner:
            lines = [
                f"{lines[0]} {chosen.estimator} is not measurably worse and takes {chosen.seconds:.2g} s "
                f"instead of {winner.seconds:.2g} s."
            ]
        lines.append(f"Recommended for this model: {self.recommended}.")
        ranked = [(x.correlation.value, x) for x in self.entries if x.correlation is not None]
        value, best = max(ranked, key=lambda pair: pair[0])
        lines.append(f"Best rank correlation with {self.plans} measured random plans: {best.estimator}, {value:.3f}.")
        judged = [(x.excess, x) for x in self.entries if x.excess is not None]
        loss, dear = max(judged, key=lambda pair: pair[1].seconds)
        beating = [x for excess, x in judged if x.seconds < dear.seconds / 10 and excess < loss]
        if beating:
            cheap = min(beating, key=lambda x: x.excess or 0.0)
            lines.append(
                f"{cheap.estimator} ({cheap.seconds:.2g} s) beats the dearest, {dear.estimator} ({dear.seconds:.2g} s)."
            )
        return lines


@dataclass(frozen=True)
class _Drawn:
    """The random plans of one size."""

    limit: int
    budgets: tuple[Budget, ...]
    plans: tuple[Labelled, ...]


def hold(
    study: Study, estimators: Sequence[str] = (), *, plans: int = 100, sizes: int = 5, limit: float = 60.0
) -> Tournament:
    """Let estimators predict the losses of random plans, and choose plans of their own; measure both.

    Everything is kept in the study's store, so that a second call computes only what is missing. The plans are no part
    of the study's front.

    Args:
        study: says the model, the texts, the menu, pins and the budgets of anything but weights.
        estimators: names; all when left out, with their default settings.
        plans: how many random plans, in equal parts of each size.
        sizes: at how many sizes, evenly between the smallest and the largest plan.
        limit: seconds on one core that an estimator may take. One that scores batch by batch and would need longer, by
            the time of its first batch, scores fewer batches, at least one.

    Raises:
        InputError: too few plans for a correlation (E113), or as `Study.run`.
    """
    if sizes < 1 or plans < 4 * sizes:
        raise InputError("E113", f"{plans} plans of {sizes} sizes", advice="give at least 4 plans of each size")
    names = list(estimators) or list(registry.names("estimators"))
    for name in names:
        registry.make("estimators", name)
    with study.session() as session:
        drawn = list(_draw(session, study.budgets, plans // sizes, sizes))
        if not drawn:
            raise InputError("E113", "no plan of any size keeps the other budgets", advice="loosen them")
        measured = session.measure([item for size in drawn for item in size.plans])
        found = [_enter(session, name, drawn, limit) for name in names]
        chosen = session.measure([item for _, items in found for item in items.values()])
    outcome = _judge(found, drawn, measured | chosen)
    body = outcome.to_json()
    seconds = {entry["estimator"]: entry.pop("seconds") for entry in body["entries"]}
    # Who is quickest may change from run to run.
    volatile = {"seconds": seconds, "recommended": body.pop("recommended")}
    study.store.put("tournament", content_key(body), body, volatile)
    study.store.link(study.name, "tournament", content_key(body))
    return outcome


def _draw(session: Session, budgets: Sequence[Budget], each: int, sizes: int) -> Iterator[_Drawn]:
    planner = session.planner
    weights = planner.costs[0]
    others = [b for b in budgets if b.resource != "weights"]
    offered = weights.value + planner.mask
    least = math.fsum(np.nanmin(offered, axis=1)) + weights.fixed
    most = math.fsum(np.nanmax(offered, axis=1)) + weights.fixed
    blank = SensitivityTable(
        weights.layers, weights.formats, np.where(np.isnan(offered), np.nan, 0.0), np.full(offered.shape, np.nan), ""
    )
    for k in range(sizes):
        limit = int(least + (most - least) * (k + 1) / (sizes + 1))
        wanted = (Budget("weights", Fraction(limit), "B"), *others)
        plans = tuple(planner.random(blank, wanted, each))
        if plans:
            yield _Drawn(limit, wanted, plans)


def _enter(
    session: Session, name: str, drawn: Sequence[_Drawn], limit: float
) -> tuple[_Predictions, dict[int, Labelled]]:
    """Score with one estimator; predict the random plans and choose one plan of each size."""
    planner = session.planner
    blind = blind_to(name, planner.formats)
    if blind is not None:
        return _Predictions(name, why_not=f"it does not see {blind[0]}, so it cannot score '{blind[1]}'"), {}
    try:
        scores, seconds = session.score(name, limit)
    except InputError as error:
        if error.code != "E506":
            raise
        return _Predictions(name, why_not=error.message), {}
    predicted: dict[int, list[float]] = {}
    chosen: dict[int, Labelled] = {}
    why_not = ""
    for size in drawn:
        losses = [planner.predict(scores, item.plan).predicted.loss for item in size.plans]
        predicted[size.limit] = [math.nan if loss is None else loss for loss in losses]
        try:
            chosen[size.limit] = Labelled(f"{name} {size.limit}", planner.mixed(scores, size.budgets))
        except InfeasibleError:
            why_not = "formats without scores leave no plan of some sizes"
        except InputError as error:
            if error.code != "E211":
                raise
            why_not = error.message
    if scores.source["batches"] < session.survey.batches and not why_not:
        why_not = f"{scores.source['batches']} of {session.survey.batches} batches: all would take too long"
    return _Predictions(name, scores.unit, predicted, seconds, why_not), chosen


@dataclass(frozen=True)
class _Predictions:
    """What one estimator predicts of the random plans of each size."""

    name: str
    unit: str = ""
    losses: Mapping[int, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0
    why_not: str = ""


def _judge(
    found: Sequence[tuple[_Predictions, Mapping[int, Labelled]]],
    drawn: Sequence[_Drawn],
    measured: Mapping[str, Measurement],
) -> Tournament:
    def measure_of(item: Labelled) -> Measurement | None:
        return measured.get(item.plan.key)

    losses = {size.limit: [_loss(measured.get(item.plan.key)) for item in size.plans] for size in drawn}
    shares = _shares(found, losses, measured)
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
    near = [e for e in entries if e.behind is not None and not e.behind[0] > _SIGNIFICANT * e.behind[1]]
    recommended = min(near, key=lambda e: e.seconds).estimator if near else ""
    return Tournament(tuple(entries), sum(map(len, losses.values())), tuple(size.limit for size in drawn), recommended)


def _shares(
    found: Sequence[tuple[_Predictions, Mapping[int, Labelled]]],
    losses: Mapping[int, Sequence[float]],
    measured: Mapping[str, Measurement],
) -> dict[str, NDArray[np.float64]]:
    """Loss of each estimator's chosen plans over that of the best plan of the size, sample by sample.

    By sample, so that the difference of two estimators is free of what all plans share. Only estimators that chose a
    plan of every size, and whose plans could all be measured, take part.
    """
    ran = {
        made.name: {limit: measured[item.plan.key] for limit, item in chosen.items() if item.plan.key in measured}
        for made, chosen in found
    }
    best = {
        limit: min(x for x in [*of_size, *(r[limit].loss for r in ran.values() if limit in r)] if math.isfinite(x))
        for limit, of_size in losses.items()
    }
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
