"""What every searcher must do. Subclass `SearcherSuite`, give it a searcher, and run it with pytest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpsearch.ports import Searcher
from mpsearch.problem import Problem
from mpsearch.searching import drive
from mpsearch.trials import Seen, Trial


@dataclass(frozen=True, eq=False)
class Truth:
    """Losses that plans really have, which the problem predicts in part: rows, pairs of rows, and noise of few batches.

    Attributes:
        problem: what is predicted.
        loss: (N, F) what each row really adds.
        pair: (N, N) what two rows add together: times the root of what each adds.
        noise: relative noise of one batch.
        batches: how many batches there are.
        seed: seed of the noise, which is the same each time that a trial is measured.
    """

    problem: Problem
    loss: NDArray[np.float64]
    pair: NDArray[np.float64]
    noise: float = 0.0
    batches: int = 16
    seed: int = 0

    def of(self, choice: Sequence[int]) -> float:
        """Loss of a plan on all batches."""
        own = self.loss[np.arange(len(choice)), list(choice)]
        root = np.sqrt(np.maximum(own, 0.0))
        return float(own.sum() + root @ self.pair @ root)

    def measure(self, trials: Sequence[Trial]) -> list[Seen]:
        """Measure some trials: the fewer batches, the noisier."""
        found = []
        for trial in trials:
            count = min(trial.batches or self.batches, self.batches)
            error = self.noise * math.sqrt((self.batches - count) / (self.batches * count))
            rng = np.random.default_rng([self.seed, count, *trial.choice])
            loss = self.of(trial.choice)
            # Noise of what plans share falls out of differences; what is left goes with the loss.
            found.append(Seen(trial, loss * (1 + error * float(rng.normal())), abs(loss) * self.noise / 4))
        return found


def truth(seed: int, rows: int = 12, formats: int = 5, interaction: float = 0.3, noise: float = 0.05) -> Truth:
    """Make losses that fall fourfold per bit, predicted with errors, with rows of few sizes that interact.

    Args:
        seed: of everything.
        rows: how many rows.
        formats: how many formats.
        interaction: how much pairs add, relative to what their rows add.
        noise: relative noise of one batch.
    """
    rng = np.random.default_rng([11, seed])
    bits = np.arange(2, 2 + formats)
    size = rng.choice([64, 128, 256], rows)
    loss = rng.lognormal(0.0, 1.0, (rows, 1)) * 4.0 ** -(bits - 2.0)
    predicted = loss * rng.lognormal(0.0, 0.3, (rows, 1)) * rng.lognormal(0.0, 0.1, (rows, formats))
    pair = np.triu(rng.normal(0.0, interaction, (rows, rows)) * (rng.random((rows, rows)) < 0.3), 1)
    cost = (size[:, None] * bits).astype(np.float64)
    problem = Problem(predicted, cost[None], np.array([float(size.sum() * 3.5)]))
    return Truth(problem, loss, pair, noise, seed=seed)


class SearcherSuite:
    """The behaviour of a searcher.

    A subclass overrides the fixture `searcher`, and `settled` and `better` for one that does not look for the least
    loss.

    Attributes:
        seeds: problems that each test takes.
        evaluations: measurements of each search.
    """

    seeds: tuple[int, ...] = (0, 1)
    evaluations = 16

    @pytest.fixture
    def searcher(self) -> Searcher:
        """The searcher under test; it is set up to end after `evaluations`."""
        raise NotImplementedError

    def settled(self, searcher: Any, problem: Problem, seen: Sequence[Seen]) -> Seen | None:
        """What the searcher settles on: the least loss on all batches."""
        return min((item for item in seen if not item.trial.batches), key=lambda item: item.loss, default=None)

    def better(self, problem: Problem, found: Seen, start: Seen) -> bool:
        """Whether what was found is at least as good as the start."""
        return found.loss <= start.loss

    def searched(self, searcher: Searcher, seed: int) -> tuple[Truth, tuple[Seen, ...]]:
        """Run a search."""
        world = truth(seed)
        return world, drive(world.problem, searcher, world.measure, self.evaluations)

    def test_asks_only_for_plans_within_the_budgets(self, searcher: Searcher) -> None:
        """Every trial fits in exact arithmetic, under one budget and under two."""
        for seed in self.seeds:
            world = truth(seed)
            cost = np.concatenate([world.problem.cost, np.sqrt(world.problem.cost)])
            limit = np.array([world.problem.limit[0], np.sqrt(world.problem.cost[0]).mean(axis=1).sum()])
            for problem in (world.problem, dataclasses.replace(world.problem, cost=cost, limit=limit, resources=())):
                if searcher.refuses(problem):
                    continue
                seen = drive(problem, searcher, world.measure, self.evaluations)
                assert seen, seed
                assert all(problem.fits(np.array(item.trial.choice)) for item in seen), seed

    def test_ends_within_its_evaluations_and_never_asks_twice(self, searcher: Searcher) -> None:
        """The searcher, asked without a cut, stops by itself, and all its trials differ."""
        for seed in self.seeds:
            world = truth(seed)
            seen = drive(world.problem, searcher, world.measure, 10 * self.evaluations)
            assert 1 <= len(seen) <= self.evaluations, seed
            assert len({item.trial for item in seen}) == len(seen), seed
            assert not searcher.ask(world.problem, seen), seed

    def test_the_same_seen_leads_to_the_same_ask(self, searcher: Searcher) -> None:
        """At every step of a search, a copy of the searcher asks for the same: nothing is remembered between asks."""
        world, seen = self.searched(searcher, self.seeds[0])
        place = 0
        while place < len(seen):
            asked = dataclasses.replace(searcher).ask(world.problem, seen[:place])  # type: ignore[type-var]
            assert [item.trial for item in seen[place : place + len(asked)]] == list(asked)[: len(seen) - place]
            assert asked, place
            place += len(asked)

    def test_the_best_is_never_worse_than_the_start(self, searcher: Searcher) -> None:
        """What the searcher settles on was measured on all batches, and is as good as the first plan."""
        for seed in self.seeds:
            world, seen = self.searched(searcher, seed)
            found = self.settled(searcher, world.problem, seen)
            start = next(item for item in seen if not item.trial.batches)
            assert found is not None
            assert not found.trial.batches
            assert self.better(world.problem, found, start), seed

    def test_plans_that_give_no_finite_values_do_not_stop_a_search(self, searcher: Searcher) -> None:
        """Every third plan is lost, and the search goes on."""
        world = truth(self.seeds[0])

        def measure(trials: Sequence[Trial]) -> list[Seen]:
            found = world.measure(trials)
            return [Seen(x.trial, math.inf) if sum(x.trial.choice) % 3 == 1 else x for x in found]

        seen = drive(world.problem, searcher, measure, self.evaluations)
        assert len({item.trial for item in seen}) == len(seen) >= 1

    def test_takes_problems_with_nothing_to_choose(self, searcher: Searcher) -> None:
        """One plan is measured, and the search ends; a budget that no plan keeps leads to none."""
        loss, cost = np.array([[1.0], [2.0]]), np.ones((1, 2, 1))
        single = Problem(loss, cost, np.array([2.0]))
        if not searcher.refuses(single):
            seen = drive(single, searcher, lambda trials: [Seen(trial, 3.0, 0.1) for trial in trials], self.evaluations)
            assert {item.trial.choice for item in seen} == {(0, 0)}
        none = Problem(loss, cost, np.array([1.0]))
        if not searcher.refuses(none):
            assert not searcher.ask(none, ())
