"""Local swaps around the solved plan, with the predicted losses corrected by what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers import _search
from mpsearch.solvers._posterior import Posterior, choose
from mpsearch.solvers._reduced import Ints
from mpsearch.trials import Seen, Trial


@dataclass(frozen=True)
class Refine:
    """Measure the solved plan and plans around it, correct the predicted losses, solve again, until nothing is gained.

    Solving adds up losses of single rows; what rows do together is not in them. Differences of measured plans are
    explained by Bayesian ridge regression on the cells that differ (`mpsearch.solvers._posterior`):

    ``y(x) - y(x0) = sum_i (w[i, x_i] - w[i, x0_i]) + sum_ij v[i, x_i, j, x_j]``, ``w ~ Normal(s l, (doubt s l)^2)``

    with ``l`` the predicted losses, ``s`` their common scale, ``x0`` the best plan so far, and ``v``, normal around 0,
    what pairs of rows that differ do together; so what lies near ``x0`` counts most. Each round proposes the best swaps
    of one row or two around ``x0``, the problem solved with the corrected losses, and the problem solved with losses
    drawn from the posterior. The plans of the largest expected gain are measured on the first ``screen`` batches, and
    those that then still promise a gain on all. The search ends when no plan is expected to gain ``tolerance`` of the
    loss.

    What it settles on is the measured plan that is expected to lose least, noise left out (`best`). It is never worse,
    on the batches measured on, than the solved plan. Nothing is proven: the corrected
    losses are right near ``x0`` only. Losses as measured, in nats per token; lower is better.

    Cost: ``evaluations`` measurements, most of them on ``screen`` batches, and per round O(M^2) for M swaps, a dozen
    solves and O(n^3) for n plans seen. Memory: O(M^2 + n N F).

    Sources: Jones, Schonlau and Welch 1998, J. Global Optimization 13, for the expected gain; Thompson 1933,
    Biometrika 25, for solving drawn problems; Frantar and Alistarh 2022 (SPDY) for searching around a solved sum.

    Attributes:
        evaluations: most measurements, each counting one however few its batches.
        screen: batches that plans are first measured on; 0 measures all at once.
        width: plans of one round.
        confirms: most of them that are measured on all batches.
        tolerance: share of the loss that a round must be expected to gain.
        swaps: swaps that are looked at in each round.
        draws: problems drawn from the posterior in each round.
        seed: seed of the draws.

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([3.0]))
    >>> Refine(screen=2).ask(p, ())
    (Trial(choice=(1, 0), batches=2), Trial(choice=(1, 0), batches=0))
    """

    evaluations: int = 60
    screen: int = 4
    width: int = 6
    confirms: int = 2
    tolerance: float = 5e-4
    swaps: int = 200
    draws: int = 8
    seed: int = 0
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "nothing; never worse than the solved plan on the data it measures"
    cost: ClassVar[str] = "evaluations x one measurement"

    def __post_init__(self) -> None:
        _search.check(
            "refine",
            evaluations=(self.evaluations, 1),
            screen=(self.screen, 0),
            width=(self.width, 1),
            confirms=(self.confirms, 1),
            tolerance=(self.tolerance, 0),
            swaps=(self.swaps, 1),
            draws=(self.draws, 0),
            seed=(self.seed, 0),
        )

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        return _search.refuses(problem)

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name the plans to measure next; none when no gain is expected or the evaluations are used up."""
        if not seen:
            start = _search.solved(problem)
            levels = dict.fromkeys((self.screen, 0) if self.evaluations > 1 else (0,))
            return () if start is None else tuple(_search.trial(start, level) for level in levels)
        best = self.best(problem, seen)
        if best is None or len(seen) >= self.evaluations:
            return ()
        posterior = Posterior.of(problem, best, seen)
        return self._confirm(posterior, best, seen) or self._propose(problem, posterior, best, seen)

    def best(self, problem: Problem, seen: Sequence[Seen]) -> Seen | None:
        """Return the plan that is expected to lose least of those that measured no more than the first.

        Of many plans the one that measured least was lucky too; what is expected of it leaves the luck out.
        """
        whole = [item for item in seen if not item.trial.batches and np.isfinite(item.loss)]
        kept = [item for item in whole if item.loss <= whole[0].loss]
        if len(kept) < 2:
            return _search.leader(kept)
        mean, _ = Posterior.of(problem, whole[0], seen).look([np.array(item.trial.choice) for item in kept])
        return kept[int(mean.argmin())]

    def _confirm(self, posterior: Posterior, best: Seen, seen: Sequence[Seen]) -> tuple[Trial, ...]:
        """Name the plans of the last screening that still promise a gain."""
        if not seen[-1].trial.batches:
            return ()
        whole = {item.trial.choice for item in seen if not item.trial.batches}
        waiting = [item.trial.choice for item in seen if item.trial.batches and item.trial.choice not in whole]
        choices = [np.array(choice, dtype=np.int64) for choice in waiting]
        picked = choose(posterior, choices, best.loss, self.confirms, self.tolerance * best.loss)
        return _search.fresh(seen, (_search.trial(choices[place]) for place in picked), self.evaluations)

    def _propose(self, problem: Problem, posterior: Posterior, best: Seen, seen: Sequence[Seen]) -> tuple[Trial, ...]:
        """Name new plans of the largest expected gain."""
        known = {item.trial.choice for item in seen}
        found = {tuple(choice.tolist()): choice for choice in self._candidates(problem, posterior, seen)}
        choices = [choice for key, choice in found.items() if key not in known]
        count = self.width if self.screen else self.confirms
        picked = choose(posterior, choices, best.loss, count, self.tolerance * best.loss)
        trials = [_search.trial(choices[place], self.screen) for place in picked]
        return _search.fresh(seen, trials, self.evaluations)

    def _candidates(self, problem: Problem, posterior: Posterior, seen: Sequence[Seen]) -> list[Ints]:
        rng = _search.generator(self.seed, seen)
        tables = [posterior.mean, *(posterior.drawn(rng) for _ in range(self.draws))]
        solved = [_search.solved_quickly(problem, table) for table in tables]
        swapped = _search.nearby(problem, posterior.origin, posterior.mean, self.swaps)
        return [*swapped, *(choice for choice in solved if choice is not None)]
