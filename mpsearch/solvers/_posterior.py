"""What measured plans say of the losses of cells and plans: Bayesian ridge regression around the predicted ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array
from scipy.special import ndtr

from mpsearch.problem import Problem
from mpsearch.solvers._reduced import Bools, Floats, Ints
from mpsearch.trials import Seen

#: Relative errors of the predicted losses, of pairs of rows, and of part of the batches, that are weighed.
_DOUBTS = (0.1, 0.3, 0.9)
_PAIRS = (0.03, 0.1, 0.3)
_PARTS = (0.02, 0.06, 0.2)
#: The least of the same on all batches.
_WHOLE = 1e-3
#: Share of the error of a cell that all formats of its row have in common.
_SHARED = 0.5
#: Relative error of the common scale.
_SCALE = 0.3
#: Losses below this share of the mean one are as uncertain as if they were that large.
_LEAST = 0.01


@dataclass(frozen=True, eq=False)
class Kernel:
    """How the losses of plans, relative to one of them, vary together before anything is measured.

    Attributes:
        origin: (N,) the plan that all is relative to.
        prior: (N, F) predicted losses, in the unit of the measured ones.
        width: (N, F) what errors of cells are shares of.
        doubt: relative error of cells, one part for each row and one for each cell.
        pair: relative error of what two rows that differ from the origin do together.
    """

    origin: Ints
    prior: Floats
    width: Floats
    doubt: float = _DOUBTS[1]
    pair: float = _PAIRS[1]

    def features(self, choices: Sequence[Ints]) -> csr_array:
        """(M, N F): 1 at cells that a plan takes, -1 at those of the origin that it leaves."""
        plan, cell, sign = [], [], []
        formats = self.prior.shape[1]
        for k, choice in enumerate(choices):
            for i in np.flatnonzero(choice != self.origin).tolist():
                plan += [k, k]
                cell += [i * formats + int(choice[i]), i * formats + int(self.origin[i])]
                sign += [1.0, -1.0]
        place = (np.array(plan, dtype=np.int64), np.array(cell, dtype=np.int64))
        return csr_array((np.array(sign), place), shape=(len(choices), self.prior.size))

    def scale(self, left: csr_array, right: csr_array) -> Floats:
        """Covariance from the common scale."""
        return _SCALE**2 * np.outer(left @ self.prior.ravel(), right @ self.prior.ravel())

    def cells(self, left: csr_array, right: csr_array) -> Floats:
        """Covariance from the errors of rows and cells, where these are as large as the losses."""
        rows, formats = self.width.shape
        a, b = (x.multiply(self.width.ravel()).tocsr() for x in (left, right))
        number = np.arange(rows * formats)
        by_row = csr_array((np.ones(len(number)), (number, number // max(formats, 1))), shape=(len(number), rows))
        found: Floats = _SHARED * ((a @ by_row) @ (b @ by_row).T).toarray() + (1 - _SHARED) * (a @ b.T).toarray()
        return found

    def pairs(self, left: csr_array, right: csr_array) -> Floats:
        """Covariance from what pairs do, where that is as large as the root of the product of what each row does."""
        moved = np.hypot(self.width, self.width[np.arange(len(self.origin)), self.origin][:, None]).ravel()
        a, b = ((x > 0).astype(np.float64) for x in (left, right))
        one, two = ((a.multiply(power).tocsr() @ b.T).toarray() for power in (moved, moved**2))
        # The sum over pairs of moved rows that both plans have, from the sums over rows.
        found: Floats = np.maximum(one**2 - two, 0.0) / 2
        return found

    def covariance(self, left: csr_array, right: csr_array) -> Floats:
        """Covariance of two sets of plans."""
        linear = self.doubt**2 * self.cells(left, right) + self.scale(left, right)
        return linear + self.pair**2 * self.pairs(left, right)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Losses of plans and cells, relative to a measured plan, given differences of measured plans.

    A plan ``x`` loses ``y(x0) + sum_i (w[i, x_i] - w[i, x0_i]) + sum_ij v[i, x_i, j, x_j]`` over rows and pairs of rows
    that differ from ``x0``. Before anything is seen ``w`` is ``s`` times the predicted loss ``l``, with
    ``s = y(x0) / sum_i l[i, x0_i]``, and ``v`` is 0, with independent normal errors (`Kernel`). A measured difference
    has a noise that goes with the root of the squares of the losses that differ; on all batches it is as large,
    relative to these, as the standard error of ``y(x0)`` is to ``y(x0)``. The other relative errors are those of the
    largest marginal likelihood on a grid.

    Attributes:
        problem: the problem.
        kernel: the errors before anything was seen.
        level: measured loss of ``x0``.
        mean: (N, F) posterior mean of ``w``, in the unit of the measured losses.
    """

    problem: Problem
    kernel: Kernel
    level: float
    mean: Floats
    _features: csr_array
    _noise: Floats
    _factor: tuple[Floats, bool]
    _weight: Floats

    @classmethod
    def of(cls, problem: Problem, origin: Seen, seen: Sequence[Seen]) -> Posterior:
        """Fit to what was seen, relative to a plan that was measured on every batch.

        What was measured on part of the batches counts where the plan ``origin`` was measured on the same part.
        """
        start = np.array(origin.trial.choice, dtype=np.int64)
        predicted = float(problem.loss[np.arange(len(start)), start].sum())
        scale = origin.loss / predicted if predicted > 0 and origin.loss > 0 else 1.0
        prior = np.where(problem.offered, scale * problem.loss, 0.0)
        size = np.abs(prior)
        width = np.maximum(size, _LEAST * size.sum() / max(int(problem.offered.sum()), 1))
        choices, differences, kinds = _differences(origin, seen)
        kernel = Kernel(start, prior, np.maximum(width, np.finfo(np.float64).tiny))
        features = kernel.features(choices)
        residual = differences - features @ prior.ravel()
        known = math.isfinite(origin.spread) and origin.loss > 0
        whole = max(_WHOLE, origin.spread / origin.loss) if known else _WHOLE
        kernel, noise = _weighed(kernel, features, residual, np.array(kinds, dtype=np.bool_), whole)
        if not len(residual):
            return cls(problem, kernel, origin.loss, prior, features, noise, (np.zeros((0, 0)), True), residual)
        factor = cho_factor(kernel.covariance(features, features) + np.diag(noise**2))
        weight = cho_solve(factor, residual)
        mean = prior + _spread(kernel, features, weight)
        return cls(problem, kernel, origin.loss, mean, features, noise, factor, weight)

    @property
    def origin(self) -> Ints:
        """The plan that all is relative to."""
        return self.kernel.origin

    def look(self, choices: Sequence[Ints]) -> tuple[Floats, Floats]:
        """Return what plans are expected to lose (M,), and the covariance of these losses (M, M)."""
        features = self.kernel.features(choices)
        mean = self.level + features @ self.kernel.prior.ravel()
        covariance = self.kernel.covariance(features, features)
        if len(self._weight):
            known = self.kernel.covariance(self._features, features)
            mean = mean + known.T @ self._weight
            covariance = covariance - known.T @ cho_solve(self._factor, known)
        return mean, covariance

    def drawn(self, rng: np.random.Generator) -> Floats:
        """Draw losses of all cells (N, F) from the posterior."""
        kernel, (rows, formats) = self.kernel, self.mean.shape
        shared, own = rng.standard_normal((rows, 1)), rng.standard_normal((rows, formats))
        error = kernel.doubt * kernel.width * (math.sqrt(_SHARED) * shared + math.sqrt(1 - _SHARED) * own)
        error = error + _SCALE * rng.standard_normal() * kernel.prior
        if len(self._weight):
            # What the drawn errors would have shown, taken back as the data does.
            rest = kernel.pair**2 * kernel.pairs(self._features, self._features) + np.diag(self._noise**2)
            values, vectors = np.linalg.eigh(rest)
            other = vectors @ (np.sqrt(np.maximum(values, 0.0)) * rng.standard_normal(len(values)))
            shown = self._features @ error.ravel() + other
            error = error - _spread(kernel, self._features, cho_solve(self._factor, shown))
        drawn: Floats = self.mean + error
        return drawn


def expected_gain(best: float, mean: Floats, variance: Floats) -> Floats:
    """Expected improvement below ``best`` of normal losses (Jones, Schonlau and Welch 1998).

    >>> expected_gain(1.0, np.array([0.5, 1.0]), np.array([0.0, 1.0])).round(4).tolist()
    [0.5, 0.3989]
    """
    error = np.sqrt(np.maximum(variance, 0.0))
    gain = best - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, gain / error, 0.0)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    found: Floats = np.where(error > 0, gain * ndtr(z) + error * density, np.maximum(gain, 0.0))
    return found


def choose(posterior: Posterior, choices: Sequence[Ints], best: float, count: int, least: float) -> list[int]:
    """Pick plans of the largest expected gain, one by one: what a pick would teach is known to the next one.

    Args:
        posterior: what is known.
        choices: the plans to pick from.
        best: what a plan must lose less than.
        count: how many at most.
        least: expected gain below which nothing is picked.
    """
    if not choices:
        return []
    mean, covariance = posterior.look(choices)
    picked: list[int] = []
    while len(picked) < count:
        gain = expected_gain(best, mean, np.diag(covariance))
        gain[picked] = -math.inf
        place = int(gain.argmax())
        if not gain[place] > least:
            break
        picked.append(place)
        column, own = covariance[:, place], float(covariance[place, place])
        if own > 0:
            covariance = covariance - np.outer(column, column) / own
    return picked


def _differences(origin: Seen, seen: Sequence[Seen]) -> tuple[list[Ints], Floats, list[bool]]:
    """Plans, what they lose beyond the origin, scaled to all batches, and whether that is of part of the batches."""
    levels = {item.trial.batches: item.loss for item in seen if item.trial.choice == origin.trial.choice}
    choices, differences, kinds = [], [], []
    for item in seen:
        level = levels.get(item.trial.batches, math.nan)
        if item.trial.choice == origin.trial.choice or not math.isfinite(item.loss) or not math.isfinite(level):
            continue
        choices.append(np.array(item.trial.choice, dtype=np.int64))
        differences.append((item.loss - level) * (origin.loss / level if level > 0 else 1.0))
        kinds.append(item.trial.batches > 0)
    return choices, np.array(differences), kinds


def _spread(kernel: Kernel, features: csr_array, weight: Floats) -> Floats:
    """(N, F) covariance of the losses of cells with some differences of plans, times a weight of each."""
    pull = (features.T @ weight).reshape(kernel.width.shape)
    width = kernel.doubt * kernel.width
    along = _SHARED * (width * pull).sum(axis=1, keepdims=True) + (1 - _SHARED) * width * pull
    found: Floats = width * along + _SCALE**2 * kernel.prior * float((kernel.prior * pull).sum())
    return found


def _weighed(kernel: Kernel, features: csr_array, residual: Floats, part: Bools, whole: float) -> tuple[Kernel, Floats]:
    """Return the kernel whose errors explain the differences best, and the noise of each difference."""
    moved = np.sqrt(abs(features) @ (kernel.width**2).ravel())
    best, found = -math.inf, (kernel, np.where(part, np.hypot(_PARTS[1], whole), whole) * moved)
    if not len(residual):
        return found
    scale, cells, pairs = (each(features, features) for each in (kernel.scale, kernel.cells, kernel.pairs))
    for doubt, pair, rough in itertools.product(_DOUBTS, _PAIRS, _PARTS if part.any() else _PARTS[1:2]):
        noise = np.where(part, np.hypot(rough, whole), whole) * moved
        factor, low = cho_factor(doubt**2 * cells + pair**2 * pairs + scale + np.diag(noise**2))
        # A log-normal prior, of half an e-fold, keeps a few differences from saying that there is no error at all.
        ratios = (doubt / _DOUBTS[1], pair / _PAIRS[1], rough / _PARTS[1])
        evidence = -2.0 * sum(math.log(ratio) ** 2 for ratio in ratios)
        evidence -= 0.5 * float(residual @ cho_solve((factor, low), residual)) + float(np.log(np.diag(factor)).sum())
        if evidence > best:
            best, found = evidence, (replace(kernel, doubt=doubt, pair=pair), noise)
    return found
