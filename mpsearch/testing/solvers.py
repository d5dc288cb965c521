"""What every solver must do. Subclass `SolverSuite`, give it a solver, and run it with pytest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mpsearch.ports import Solver
from mpsearch.problem import Problem, Solution

#: Two sums of the same losses in another order differ by less than this share.
ROUNDING = 1e-9


def random_problem(seed: int, rows: int = 5, formats: int = 4) -> Problem:
    """Make a small problem of 1 to 3 budgets; every other has float costs, some have cells that are not offered.

    About one in five has no choice that fits.
    """
    rng = np.random.default_rng([seed, rows, formats])
    n, budgets = int(rng.integers(1, rows + 1)), int(rng.integers(1, 4))
    # Mostly falling with the costs, as losses are; sometimes not, as measured ones are.
    loss = np.sort(rng.lognormal(0.0, 1.5, (n, formats)), axis=1)[:, ::-1] - (0.5 if seed % 3 == 0 else 0.0)
    cost = np.sort(rng.integers(1, 200, (budgets, n, formats)), axis=2).astype(np.float64)
    if seed % 2:
        cost = cost * rng.uniform(0.5, 1.5, cost.shape)
    if seed % 5 == 0:
        loss = np.where(rng.random(loss.shape) < 0.3, np.nan, loss)
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    limit = low + (high - low) * rng.uniform(-0.1, 0.7, budgets)
    return Problem(loss, cost, np.floor(limit))


def tied_problem(seed: int) -> Problem:
    """Make a problem of 8 rows whose steps save the same loss per cost, but are of unequal size."""
    rng = np.random.default_rng(seed)
    cost = np.hstack([np.zeros((8, 1)), np.cumsum(rng.integers(1, 9, (8, 2)), axis=1)])
    return Problem(cost[:, -1:] - cost, cost[None], np.array([float(rng.integers(10, 40)) + 0.5]))


def brute_force(problem: Problem) -> float:
    """Return the least total loss of all choices that fit, in exact arithmetic; infinite when there is none.

    For up to some 100,000 choices.
    """
    cells = [np.flatnonzero(row) for row in problem.offered]
    choices = (
        np.stack([axis.ravel() for axis in np.meshgrid(*cells, indexing="ij")], axis=1) if cells else np.zeros((1, 0))
    )
    choices = choices.astype(np.int64)
    rows = np.arange(len(cells))
    near = np.ones(len(choices), dtype=np.bool_)
    for table, limit in zip(problem.cost, problem.limit.tolist(), strict=True):
        # Far from the limit a float sum decides; near it the exact sum will.
        slip = ROUNDING * (1.0 + float(np.abs(table).sum()))
        near &= table[rows, choices].sum(axis=1) <= limit + slip
    choices = choices[near]
    losses = problem.loss[rows, choices].sum(axis=1)
    slip = ROUNDING * float(np.abs(np.where(problem.offered, problem.loss, 0.0)).sum())
    best = math.inf
    for place in np.argsort(losses, kind="stable").tolist():
        if losses[place] > best + slip:
            break
        if problem.fits(choices[place]):
            best = min(best, problem.total_loss(choices[place]))
    return best


def same_loss(a: Solution, b: Solution) -> bool:
    """Whether two solutions have the same loss, up to the rounding of sums."""
    return a.loss == b.loss or abs(a.loss - b.loss) <= ROUNDING * abs(a.loss)


class SolverSuite:
    """The behaviour of a solver.

    A subclass overrides the fixture `solver`. A solver may refuse problems, but not all of them.

    Attributes:
        count: how many random problems each test takes.
    """

    count = 40

    @pytest.fixture
    def solver(self) -> Solver:
        """The solver under test."""
        raise NotImplementedError

    def ignores_order(self, solver: Solver) -> bool:
        """Say no for a solver that draws at random row by row: its answer may change with the order of the rows."""
        return True

    def problems(self, solver: Solver) -> Iterator[tuple[int, Problem]]:
        """Yield random problems that the solver takes; fail if there is none."""
        taken = 0
        for seed in range(self.count):
            problem = random_problem(seed)
            if not solver.refuses(problem):
                taken += 1
                yield seed, problem
        assert taken, "the solver refuses every problem"

    def test_keeps_every_budget(self, solver: Solver) -> None:
        """A choice fits in exact arithmetic, and loss, costs and gap are those of the choice."""
        found = 0
        for seed, problem in self.problems(solver):
            solution = solver.solve(problem)
            if solution.status not in ("optimal", "feasible"):
                continue
            found += 1
            assert problem.fits(solution.choice), seed
            assert solution.choice.dtype == np.int64, seed
            assert (solution.choice >= 0).all(), seed
            assert solution.loss == problem.total_loss(solution.choice), seed
            assert solution.cost == tuple(float(total) for total in problem.totals(solution.choice)), seed
            assert solution.gap >= 0, seed
            assert len(solution.prices) == len(problem.limit), seed
            assert all(0 <= price < math.inf for price in solution.prices), seed
        assert found, "no problem was solved"

    def test_optimal_means_optimal(self, solver: Solver) -> None:
        """What is called optimal is as good as the best of all choices."""
        for seed, problem in self.problems(solver):
            solution = solver.solve(problem)
            if solution.status == "optimal":
                best = brute_force(problem)
                assert abs(solution.loss - best) <= ROUNDING * abs(best), seed

    def test_bound_is_never_above_the_optimum(self, solver: Solver) -> None:
        """The bound is a bound, with or without a choice."""
        for seed, problem in self.problems(solver):
            assert solver.solve(problem).bound <= brute_force(problem), seed

    def test_says_infeasible_only_when_nothing_fits(self, solver: Solver) -> None:
        """Without a choice there is none in the answer; with one it is never called infeasible."""
        for seed, problem in self.problems(solver):
            solution = solver.solve(problem)
            if math.isinf(brute_force(problem)):
                assert solution.status in ("infeasible", "unsolved"), seed
            else:
                assert solution.status != "infeasible", seed
            if solution.status in ("infeasible", "unsolved"):
                assert len(solution.choice) == 0, seed
                assert solution.loss == math.inf, seed

    def test_says_infeasible_below_the_cheapest_cells(self, solver: Solver) -> None:
        """One unit below the cheapest cells is infeasible; exactly at them there is one choice."""
        loss = np.array([[3.0, 1.0], [2.0, 1.0], [5.0, 1.0]])
        cost = np.array([[[4.0, 9.0], [3.0, 5.0], [2.0, 8.0]]])
        below, at = Problem(loss, cost, np.array([8.0])), Problem(loss, cost, np.array([9.0]))
        if not solver.refuses(below):
            assert solver.solve(below).status == "infeasible"
            assert solver.solve(at).choice.tolist() == [0, 0, 0]

    def test_a_row_without_formats_is_infeasible(self, solver: Solver) -> None:
        """A row that cannot take any format has no choice."""
        problem = Problem(np.array([[1.0, 2.0], [np.nan, np.inf]]), np.ones((1, 2, 2)), np.array([10.0]))
        if not solver.refuses(problem):
            assert solver.solve(problem).status == "infeasible"

    def test_takes_only_what_is_offered(self, solver: Solver) -> None:
        """Cells of NaN or infinite loss are never chosen, however cheap they are."""
        loss = np.array([[np.nan, 5.0, 4.0], [np.inf, np.nan, 3.0], [1.0, np.nan, np.inf]])
        cost = np.array([[[0.0, 2.0, 3.0], [np.nan, -5.0, 1.0], [1.0, 0.0, np.inf]]])
        problem = Problem(loss, cost, np.array([4.0]))
        if not solver.refuses(problem):
            assert solver.solve(problem).choice.tolist() == [1, 2, 0]

    def test_takes_no_rows_and_no_budgets(self, solver: Solver) -> None:
        """Nothing to choose costs nothing; without a budget, or with endless ones, a choice is found."""
        empty = Problem(np.zeros((0, 3)), np.zeros((1, 0, 3)), np.array([1.0]))
        if not solver.refuses(empty):
            solution = solver.solve(empty)
            assert solution.status in ("optimal", "feasible")
            assert (len(solution.choice), solution.loss, solution.cost) == (0, 0.0, (0.0,))
        loss = np.array([[2.0, 1.0], [0.0, 3.0]])
        for problem in (
            Problem(loss, np.zeros((0, 2, 2)), np.zeros(0)),
            Problem(loss, np.ones((1, 2, 2)), np.array([np.inf])),
        ):
            if not solver.refuses(problem):
                solution = solver.solve(problem)
                assert problem.fits(solution.choice)
                assert solution.bound <= 1.0

    def test_order_of_the_rows_does_not_matter(self, solver: Solver) -> None:
        """The same rows in another order have the same total loss."""
        if not self.ignores_order(solver):
            return
        tied = ((seed, tied_problem(seed)) for seed in range(self.count))
        for seed, problem in (*self.problems(solver), *tied):
            if solver.refuses(problem):
                continue
            order = np.random.default_rng(seed).permutation(len(problem.loss))
            other = Problem(problem.loss[order], problem.cost[:, order], problem.limit)
            assert same_loss(solver.solve(problem), solver.solve(other)), seed

    def test_scale_of_the_losses_does_not_matter(self, solver: Solver) -> None:
        """Losses times a power of two, which is exact, give the same choice times that power."""
        for seed, problem in self.problems(solver):
            one = solver.solve(problem)
            for power in (-60, 40):
                other = solver.solve(dataclasses.replace(problem, loss=np.ldexp(problem.loss, power)))
                assert other.status == one.status, seed
                assert same_loss(other, dataclasses.replace(one, loss=math.ldexp(one.loss, power))), seed

    def test_more_budget_is_never_worse(self, solver: Solver) -> None:
        """Where both answers are optimal, the one with more budget loses no more."""
        for seed, problem in self.problems(solver):
            less = solver.solve(problem)
            more = solver.solve(dataclasses.replace(problem, limit=problem.limit * 1.2 + 1.0))
            if less.status == "optimal":
                assert more.status != "infeasible", seed
                if more.status == "optimal":
                    assert more.loss <= less.loss + ROUNDING * abs(less.loss), seed

    def test_same_problem_same_answer(self, solver: Solver) -> None:
        """Solving again gives the same choice and the same bound."""
        for seed, problem in self.problems(solver):
            one, two = solver.solve(problem), solver.solve(problem)
            assert one.choice.tolist() == two.choice.tolist(), seed
            assert (one.status, one.bound) == (two.status, two.bound), seed

    def test_nothing_is_written_into_the_problem(self, solver: Solver) -> None:
        """The problem's arrays are as they were."""
        for seed, problem in self.problems(solver):
            before = [array.tobytes() for array in self._arrays(problem)]
            solver.solve(problem)
            assert [array.tobytes() for array in self._arrays(problem)] == before, seed

    @staticmethod
    def _arrays(problem: Problem) -> tuple[NDArray[np.float64], ...]:
        return problem.loss, problem.cost, problem.limit
