"""Evolution by level switches, judged on few batches first: as EvoPress does, and with bits moving between sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.problem import Problem
from mpsearch.solvers import _search, _switches
from mpsearch.trials import Seen, Trial

_SCHEDULES: dict[str, dict[str, Any]] = {
    "solved": {"offspring": 24, "survivors": (6, 2), "batches": (1, 8, 0), "generations": 10_000},
    "published": {"offspring": 128, "survivors": (16, 4), "batches": (1, 8, 0), "generations": 150},
}


@dataclass(frozen=True)
class Evolve:
    """Mutate the best plan, measure all children on few batches, the survivors on more, the last ones on all.

    The best of the last stage and the parent is the parent of the next generation; the parent joins in the last stage
    only.

    ``schedule="published"`` is EvoPress's rule: 150 generations of 128 children, of which 16 and then 4 survive, on
    2,048, 16,384 and 131,072 tokens, which is 1 : 8 : 64 batches where the validation text has 64. A child differs in
    the lesser of two throws of 1 to 3 switches; in each, one row goes down a level and another one up, both of one
    group of rows that cost the same, so bits never move between groups. The start is the next common level above the
    budgets, with random rows lowered until they hold; one is drawn, and batches are the first ones, where the
    reference code draws both anew. Children that were measured on all batches before are not measured again.

    ``schedule="solved"`` starts from the solved plan. Switches go up or down in any row; rows of any size, chosen by
    predicted losses with random factors, pay until every budget holds, or take what is left. Generations are smaller.

    It is never worse, on the batches measured on, than its start. Nothing is proven. Losses as measured, in nats per
    token; lower is better.

    Cost: measurements; per generation O(offspring R N F) for mutations, times the moves that repair them. Memory:
    O(offspring N).

    Sources: Sieberling et al. 2024 (EvoPress); IST-DASLab/EvoPress ``evo_quant_search.py``.

    Attributes:
        evaluations: most measurements, each counting one however few its batches.
        schedule: ``solved`` or ``published``; what the next four are unless they are given.
        offspring: children of a generation.
        survivors: how many go from each stage to the next.
        batches: batches of each stage; 0, for all, in the last.
        generations: most generations.
        seed: seed of the mutations.

    >>> p = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([3.0]))
    >>> start = Evolve().ask(p, ())
    >>> start
    (Trial(choice=(1, 0), batches=0),)
    >>> Evolve().ask(p, [Seen(start[0], 5.0)])
    (Trial(choice=(0, 1), batches=1), Trial(choice=(0, 0), batches=1))
    """

    evaluations: int = 200
    schedule: str = "solved"
    offspring: int | None = None
    survivors: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    generations: int | None = None
    seed: int = 0
    takes: ClassVar[str] = "any budgets"
    proves: ClassVar[str] = "nothing; never worse than its start"
    cost: ClassVar[str] = "evaluations x one measurement, most on few batches"

    def __post_init__(self) -> None:
        _search.one_of("evolve", "schedule", self.schedule, tuple(_SCHEDULES))
        for name, value in _SCHEDULES[self.schedule].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("survivors", "batches"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        _search.check(
            "evolve",
            evaluations=(self.evaluations, 1),
            offspring=(self.offspring or 0, 1),
            generations=(self.generations or 0, 1),
            survivors=(min((*self._survivors, 1)), 1),
            seed=(self.seed, 0),
        )
        batches = self._batches
        if (
            len(batches) != len(self._survivors) + 1
            or len(batches) < 2
            or [x > 0 for x in batches].index(False) < len(batches) - 1
        ):
            raise InputError(
                "E107",
                f"searcher 'evolve': batches is {batches} for the survivors {self._survivors}",
                advice="give one number of batches per stage, the last one 0, and one stage more than survivors",
            )
        if len(set(batches)) < len(batches):
            raise InputError("E107", f"searcher 'evolve': batches is {batches}, expected distinct numbers")

    @property
    def _survivors(self) -> tuple[int, ...]:
        return self.survivors or ()

    @property
    def _batches(self) -> tuple[int, ...]:
        return self.batches or ()

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        return _search.refuses(problem)

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name the children of a generation, or the survivors of a stage; none when the search is over."""
        if not seen:
            levels, rng = _switches.Levels(problem), _search.generator(self.seed, seen)
            first = (
                _switches.published_start(problem, levels, rng)
                if self.schedule == "published" and problem.offered.any(axis=1).all()
                else _search.solved(problem)
            )
            return () if first is None else (_search.trial(first),)
        # The last stage measures something in every generation, so that its end marks the next one's beginning.
        begin = max(k for k, item in enumerate(seen) if not item.trial.batches) + 1
        if begin == len(seen) and self._generation(seen) > (self.generations or 0):
            return ()
        children = self._children(problem, seen[:begin])
        losses = {item.trial: item.loss for item in seen}
        for stage, batches in enumerate(self._batches):
            trials = [Trial(child, batches) for child in children]
            missing = _search.fresh(seen, trials, self.evaluations)
            if missing or len(seen) >= self.evaluations:
                return missing
            if stage < len(self._survivors):
                ranked = sorted(range(len(trials)), key=lambda k: (losses.get(trials[k], math.inf), k))
                children = [children[k] for k in ranked[: self._survivors[stage]]]
        return ()

    def _generation(self, seen: Sequence[Seen]) -> int:
        """Number of the generation that begins after what was seen, from 1."""
        whole = [not item.trial.batches for item in seen]
        return 1 + sum(now and not before for before, now in itertools.pairwise(whole))

    def _children(self, problem: Problem, seen: Sequence[Seen]) -> list[tuple[int, ...]]:
        parent = _search.leader(seen) or seen[0]
        rng, levels = _search.generator(self.seed, seen), _switches.Levels(problem)
        mutate = _switches.published if self.schedule == "published" else _switches.between
        known = {item.trial.choice for item in seen if not item.trial.batches}
        choice = np.array(parent.trial.choice, dtype=np.int64)
        return _switches.distinct(
            mutate(problem, levels, choice, rng), known | {parent.trial.choice}, self.offspring or 0
        )
