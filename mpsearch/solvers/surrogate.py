"""A learned correction of the predicted loss of plans, from what was seen and from other searches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.solvers import _extra, _search
from mpsearch.solvers._posterior import expected_gain
from mpsearch.solvers._reduced import Floats, Ints
from mpsearch.trials import Seen, Trial

Row = tuple[tuple[float, ...], float]

#: Parts of the depth of a model, and sizes of steps above the row's best loss, that plans are described by.
_PARTS = 6
_MODELS = ("trees", "gp")
#: Models of the ensemble of trees, whose disagreement is the error.
_ENSEMBLE = 5


@dataclass(frozen=True)
class Surrogate:
    """Learn ``log(measured / predicted)`` of plans, and measure those of the largest expected gain.

    A plan is described by numbers that mean the same in every model (`features`), so that rows of other searches, of
    other models too, can be learned from: give them as ``history`` (`rows`). What is learned is the correction of the
    sum of the rows' losses, by an ensemble of boosted trees, each on a resample, or by a Gaussian process. Candidates
    are the best swaps around the best plan, and solutions of problems whose losses are multiplied by random factors.

    It is never worse, on the batches measured on, than the solved plan. Nothing is proven. Losses as measured, in nats
    per token; lower is better.

    Cost: per ask one fit (tenths of seconds) and ``draws`` solves. Memory: small.

    Sources: Jones, Schonlau and Welch 1998, J. Global Optimization 13 (expected gain); Friedman 2001 (boosted trees).

    Attributes:
        evaluations: most measurements.
        model: ``trees`` or ``gp``.
        together: plans of one ask.
        startup: plans around the start that are measured before the model is asked.
        swaps: swaps that are looked at in each ask.
        draws: problems with random factors that are solved in each ask.
        history: (features, log of measured over predicted loss) of plans of other searches.
        seed: seed of draws and fits.

    Raises:
        InputError: scikit-learn is not installed (E703).

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([3.0]))
    >>> Surrogate().ask(p, ())
    (Trial(choice=(1, 0), batches=0),)
    """

    evaluations: int = 60
    model: str = "trees"
    together: int = 4
    startup: int = 8
    swaps: int = 200
    draws: int = 16
    history: tuple[Row, ...] = ()
    seed: int = 0
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "nothing; never worse than the solved plan"
    cost: ClassVar[str] = "evaluations x one measurement, and a fit for each"

    def __post_init__(self) -> None:
        _search.one_of("surrogate", "model", self.model, _MODELS)
        history = tuple((tuple(map(float, row)), float(value)) for row, value in self.history)
        object.__setattr__(self, "history", history)
        if any(len(row) != _WIDTH or not np.isfinite([*row, value]).all() for row, value in history):
            raise InputError(
                "E107",
                f"searcher 'surrogate': history holds a row that is not {_WIDTH} finite numbers and a finite one",
                advice="make it with mpsearch.solvers.surrogate.rows",
            )
        _search.check(
            "surrogate",
            evaluations=(self.evaluations, 1),
            together=(self.together, 1),
            startup=(self.startup, 0),
            swaps=(self.swaps, 1),
            draws=(self.draws, 0),
            seed=(self.seed, 0),
        )
        _extra.load("surrogate", "sklearn")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        return _search.refuses(problem)

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name plans of the largest expected gain; none when there is no new one or the evaluations are used up."""
        if not seen:
            start = _search.solved(problem)
            return () if start is None else (_search.trial(start),)
        best = _search.leader(seen)
        if best is None or len(seen) >= self.evaluations:
            return ()
        known = {item.trial.choice for item in seen}
        found = {tuple(x.tolist()): x for x in self._candidates(problem, best, seen)}
        choices = [x for key, x in found.items() if key not in known]
        if not choices:
            return ()
        told = (*self.history, *rows(problem, seen))
        order = self._order(problem, choices, best, told, seen)
        return _search.fresh(seen, (_search.trial(choices[k]) for k in order[: self.together]), self.evaluations)

    def _candidates(self, problem: Problem, best: Seen, seen: Sequence[Seen]) -> Iterator[Ints]:
        rng = _search.generator(self.seed, seen)
        loss = np.where(problem.offered, problem.loss, 0.0)
        yield from _search.nearby(problem, np.array(best.trial.choice, dtype=np.int64), loss, self.swaps)
        for _ in range(self.draws):
            # Factors of rows, and of what else a row may do, so that the same row is not always the one to pay.
            factor = np.exp(rng.normal(0.0, 0.5, (len(loss), 1)) + rng.normal(0.0, 0.1, loss.shape))
            choice = _search.solved_quickly(problem, loss * factor)
            if choice is not None:
                yield choice

    def _order(
        self, problem: Problem, choices: Sequence[Ints], best: Seen, told: Sequence[Row], seen: Sequence[Seen]
    ) -> list[int]:
        """Numbers of the candidates, the best first."""
        rng = _search.generator(self.seed, seen, 1)
        if len(told) < max(self.startup, 2):
            # Nothing to learn from yet: the first are predicted to be the best, others are drawn.
            half = self.together // 2
            return [*range(half), *rng.permutation(np.arange(half, len(choices))).tolist()]
        described = np.array([features(problem, choice) for choice in choices])
        data, value = np.array([row for row, _ in told]), np.array([y for _, y in told])
        with _extra.quiet():
            mean, error = self._predict(data, value, described, int(rng.integers(2**31)))
        predicted = np.array([problem.total_loss(choice) for choice in choices])
        predicted = np.maximum(predicted, _least(problem))
        # The correction is a factor, so the gain is that of the logarithm: a share of the loss.
        gain = expected_gain(math.log(max(best.loss, _least(problem))), np.log(predicted) + mean, error**2)
        return [int(k) for k in np.argsort(-gain, kind="stable")]

    def _predict(self, data: Floats, value: Floats, asked: Floats, seed: int) -> tuple[Floats, Floats]:
        """Mean and standard error of the correction of some plans."""
        if self.model == "gp":
            kernels = _extra.load("surrogate", "sklearn.gaussian_process.kernels")
            process = _extra.load("surrogate", "sklearn.gaussian_process").GaussianProcessRegressor
            centre, width = data.mean(axis=0), np.maximum(data.std(axis=0), 1e-9)
            kernel = kernels.ConstantKernel() * kernels.RBF(math.sqrt(_WIDTH)) + kernels.WhiteKernel(0.1)
            fitted: Any = process(kernel, normalize_y=True, random_state=seed).fit((data - centre) / width, value)
            mean, error = fitted.predict((asked - centre) / width, return_std=True)
            return mean, error
        trees = _extra.load("surrogate", "sklearn.ensemble").GradientBoostingRegressor
        rng = np.random.default_rng(seed)
        found = []
        for k in range(_ENSEMBLE):
            taken = rng.integers(0, len(value), len(value))
            model = trees(n_estimators=30, max_depth=3, learning_rate=0.2, subsample=0.8, random_state=k)
            found.append(model.fit(data[taken], value[taken]).predict(asked))
        return np.mean(found, axis=0), np.std(found, axis=0, ddof=1)


def features(problem: Problem, choice: Ints) -> tuple[float, ...]:
    """Describe a plan by numbers that mean the same in every model: shares, and logarithms of them.

    The share of the predicted loss and of each budget in six parts of the depth, the shares of the loss in the one, two
    and four rows that lose most, the logarithm of the loss over that of the cheapest plan, and the share of rows that
    are at their cheapest and at their dearest column.

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([4.0]))
    >>> features(p, np.array([1, 0]))[:6]
    (0.25, 0.0, 0.0, 0.75, 0.0, 0.0)
    """
    rows_, count = np.arange(len(choice)), max(len(choice), 1)
    part = rows_ * _PARTS // count
    loss = np.maximum(problem.loss[rows_, choice], 0.0)
    total = max(float(loss.sum()), _least(problem))
    limit = np.where(np.isfinite(problem.limit) & (problem.limit > 0), problem.limit, np.inf)
    share = (problem.cost / limit[:, None, None]).max(axis=0, initial=0.0)
    spent = share[rows_, choice]
    order = np.sort(loss)[::-1]
    priced = np.where(problem.offered, share, np.nan)
    worst = np.where(problem.offered, problem.loss, -np.inf).max(axis=1, initial=0.0)
    found = [
        *(np.bincount(part, weights=loss, minlength=_PARTS) / total),
        *(np.bincount(part, weights=spent, minlength=_PARTS)),
        *(order[:k].sum() / total for k in (1, 2, 4)),
        math.log(total / max(float(worst.sum()), _least(problem))),
        float((spent <= np.nanmin(priced, axis=1)).sum()) / count,
        float((spent >= np.nanmax(priced, axis=1)).sum()) / count,
    ]
    return tuple(float(x) for x in found)


_WIDTH = 2 * _PARTS + 6


def rows(problem: Problem, seen: Sequence[Seen]) -> tuple[Row, ...]:
    """Return what is learned of a search: features and log of measured over predicted loss of whole measurements."""
    least = _least(problem)
    whole = [item for item in seen if not item.trial.batches and math.isfinite(item.loss)]
    choices = [np.array(item.trial.choice, dtype=np.int64) for item in whole]
    return tuple(
        (features(problem, x), math.log(max(item.loss, least) / max(problem.total_loss(x), least)))
        for x, item in zip(choices, whole, strict=True)
    )


def _least(problem: Problem) -> float:
    """A loss so small that it does not count."""
    finite = np.where(problem.offered, np.abs(problem.loss), 0.0)
    return max(1e-9 * float(finite.max(initial=0.0)), float(np.finfo(np.float64).tiny))
