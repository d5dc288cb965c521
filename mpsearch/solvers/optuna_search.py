"""Searching with Optuna's samplers, told everything that was seen and asked for the next plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpsearch.problem import Problem
from mpsearch.solvers import _extra, _search
from mpsearch.solvers._optuna_study import OptunaStudy, quietly
from mpsearch.solvers._reduced import Ints
from mpsearch.solvers._spaces import Plans, Weights
from mpsearch.trials import Seen, Trial

_SAMPLERS = ("tpe", "nsga2", "gp")
_SPACES: Mapping[str, type[Plans] | type[Weights]] = {"weights": Weights, "plan": Plans}
#: Draws for each plan that is asked for, until one was not seen before.
_DRAWS = 20


@dataclass(frozen=True)
class Optuna:
    """Ask-and-tell with Optuna: a sampler is told every plan that was measured, and draws the next ones.

    ``sampler`` is ``tpe`` (tree-structured Parzen estimator), ``gp`` (Gaussian process) or ``nsga2`` (genetic, for the
    measured loss and the share of the budgets that is spent at once). ``space`` says what is drawn. ``weights``: what
    the predicted losses are multiplied by, for each block and each type of row, and the plan is the solution of the
    multiplied problem; few parameters, and every plan is a sensible one. ``plan``: the level of each row; the plan is
    brought within the budgets by the predicted losses. Both keep every budget by construction. The first plans are the
    solved one and, with ``nsga2``, those of smaller budgets.

    The study is made anew in memory from what was seen, with parameters read off the plans, so that nothing but what
    was seen decides what is asked. It is never worse, on the batches measured on, than the solved plan. Nothing is
    proven. Losses as measured, in nats per token; lower is better.

    Cost: per asked plan one draw (milliseconds for ``tpe`` and ``nsga2``, tenths of seconds for ``gp``, which needs
    torch) and one greedy solve. Memory: small.

    Sources: Akiba et al. 2019 (Optuna); Bergstra et al. 2011 (TPE); Deb et al. 2002 (NSGA-II); Frantar and Alistarh
    2022 (SPDY) for searching over multipliers of a sum that is then solved.

    Attributes:
        evaluations: most measurements.
        sampler: ``tpe``, ``nsga2`` or ``gp``.
        space: ``weights`` or ``plan``.
        together: plans of one ask.
        startup: plans that are drawn at random before the sampler learns; the population of ``nsga2``.
        seed: seed of the draws.
        shared: keep the trials of a stored study in Optuna's own tables of the same database too, for
            ``optuna-dashboard``. What is asked never depends on them.

    Raises:
        InputError: Optuna is not installed (E703).

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([3.0]))
    >>> Optuna().ask(p, ())
    (Trial(choice=(1, 0), batches=0),)
    """

    evaluations: int = 60
    sampler: str = "tpe"
    space: str = "weights"
    together: int = 4
    startup: int = 10
    seed: int = 0
    shared: bool = True
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "nothing; never worse than the solved plan"
    cost: ClassVar[str] = "evaluations x one measurement"

    def __post_init__(self) -> None:
        _search.one_of("optuna", "sampler", self.sampler, _SAMPLERS)
        _search.one_of("optuna", "space", self.space, tuple(_SPACES))
        _search.check(
            "optuna",
            evaluations=(self.evaluations, 1),
            together=(self.together, 1),
            startup=(self.startup, 1),
            seed=(self.seed, 0),
        )
        _extra.load("optuna", "optuna")

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        return _search.refuses(problem)

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name the plans that the sampler draws; none when the evaluations are used up, or nothing new is drawn."""
        if not seen:
            return self._first(problem)
        if len(seen) >= self.evaluations:
            return ()
        space = _SPACES[self.space](problem, spends=self.sampler != "nsga2")
        with quietly() as optuna:
            study = self._told(optuna, space, problem, seen)
            known = {item.trial.choice for item in seen}
            drawn = list(self._drawn(optuna, study, space, known))
        return _search.fresh(seen, drawn, self.evaluations)

    def _first(self, problem: Problem) -> tuple[Trial, ...]:
        start = _search.solved(problem)
        if start is None:
            return ()
        plans = [start]
        if self.sampler == "nsga2":
            whole = Weights(problem, spends=False)
            values = whole.read(start)
            smaller = (whole.plan({**dict.fromkeys(values, 0.0), "spent": k / 4}) for k in (3, 2, 1))
            plans += [choice for choice in smaller if choice is not None]
        return _search.fresh((), map(_search.trial, plans), self.evaluations)

    def _told(self, optuna: Any, space: Plans | Weights, problem: Problem, seen: Sequence[Seen]) -> Any:
        """Return a study in memory that was told everything."""
        seed = int(_search.generator(self.seed, seen).integers(2**31))
        several = self.sampler == "nsga2"
        study = optuna.create_study(sampler=self._made(optuna, seed), directions=["minimize"] * (1 + several))
        distributions = _distributions(optuna, space)
        worst = max((item.loss for item in seen if math.isfinite(item.loss)), default=1.0)
        for item in seen:
            choice = np.array(item.trial.choice, dtype=np.int64)
            # Samplers take finite numbers: a model that gives none is as bad as the worst that does.
            values = [min(item.loss, worst), *([spent(problem, choice)] if several else [])]
            values_of = space.read(choice)
            if several:
                # Generations are counted as trials are asked for.
                study.enqueue_trial(values_of)
                study.tell(study.ask(fixed_distributions=distributions), values)
            else:
                made = optuna.trial.create_trial(params=values_of, distributions=distributions, values=values)
                study.add_trial(made)
        return study

    def _made(self, optuna: Any, seed: int) -> Any:
        """Return the sampler."""
        if self.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(self.startup, 2), seed=seed)
        if self.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True)

    def _drawn(self, optuna: Any, study: Any, space: Plans | Weights, known: set[tuple[int, ...]]) -> Iterator[Trial]:
        """Draw plans that were not seen before."""
        distributions = _distributions(optuna, space)
        wanted = self.together
        for _ in range(_DRAWS * self.together):
            asked = study.ask(fixed_distributions=distributions)
            choice = space.plan(asked.params)
            key = None if choice is None else tuple(choice.tolist())
            if key is None or key in known:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            known.add(key)
            yield Trial(key)
            wanted -= 1
            if not wanted:
                return

    def study(self, url: str, name: str, budgets: Sequence[str] = ()) -> OptunaStudy:
        """Return a study of an Optuna database that can be told what is measured, with this searcher's parameters.

        Args:
            url: address of the database, as SQLAlchemy takes it.
            name: name of the study there.
            budgets: kept with it.
        """

        def read(optuna: Any, problem: Problem, choice: Ints) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
            space = _SPACES[self.space](problem, spends=self.sampler != "nsga2")
            return space.read(choice), _distributions(optuna, space)

        return OptunaStudy(url, name, read, budgets)

    @staticmethod
    def study_of_plans(url: str, name: str, budgets: Sequence[str] = ()) -> OptunaStudy:
        """Return a study of an Optuna database for the plans of any searcher, which have no parameters there."""
        return OptunaStudy(url, name, None, budgets)

    @staticmethod
    def publish(url: str, name: str, problem: Problem, seen: Sequence[Seen]) -> int:
        """Write what was seen into a study of an Optuna database, for its dashboard; return how many trials are new.

        A plan is one attribute of its trial. What was measured on part of the batches is a trial that was pruned.

        Args:
            url: address of the database, as SQLAlchemy takes it.
            name: name of the study there.
            problem: what was searched.
            seen: what was measured.

        Raises:
            InputError: Optuna is not installed (E703).
        """
        told = OptunaStudy(url, name)
        try:
            told.tell(problem, seen)
        finally:
            told.close()
        return told.added


def spent(problem: Problem, choice: Ints) -> float:
    """Largest share of a limit that a plan uses.

    >>> p = Problem(np.zeros((1, 1)), np.array([[[2.0]]]), np.array([8.0]))
    >>> spent(p, np.array([0]))
    0.25
    """
    limits = enumerate(problem.limit.tolist())
    totals = [float(x) for x in problem.totals(choice)]
    return max((totals[r] / limit for r, limit in limits if 0 < limit < math.inf), default=0.0)


def _distributions(optuna: Any, space: Plans | Weights) -> Mapping[str, Any]:
    kinds = optuna.distributions
    return {
        name: (kinds.IntDistribution if isinstance(high, int) else kinds.FloatDistribution)(low, high)
        for name, (low, high) in space.limits().items()
    }
