from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from mpsearch.errors import InputError
from mpsearch.ports import Solver
from mpsearch.problem import Problem, Solution, exact_sum
from mpsearch.solvers import mckp
from mpsearch.solvers._core import halves, sets
from mpsearch.solvers._nearest import nearest
from mpsearch.solvers._pairing import join
from mpsearch.solvers._reduced import PROVEN, Reduced
from mpsearch.solvers._summit import Summit
from mpsearch.solvers.ilp import Ilp
from mpsearch.solvers.lagrangian import lagrangian_bound, maximise
from mpsearch.solvers.mckp import Mckp
from mpsearch.structure import Alignment, PairTerms
from mpsearch.testing.solvers import SolverSuite, brute_force


class TestMckpWithAGap(SolverSuite):
    count = 15

    @pytest.fixture
    def solver(self) -> Solver:
        return Mckp(gap=0.05)


def small_problem(seed: int) -> Problem:
    """Up to 6 rows x 4 formats, 1 to 3 budgets: ties, zero and negative numbers, missing cells, limits met exactly."""
    rng = np.random.default_rng([31, seed])
    rows, formats, budgets = int(rng.integers(1, 7)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    shape = (rows, formats)
    loss = [
        lambda: rng.integers(-3, 4, shape).astype(float),
        lambda: rng.normal(size=shape),
        lambda: rng.lognormal(0.0, 3.0, shape),
        lambda: np.sort(rng.random(shape), axis=1)[:, ::-1] * rng.lognormal(0.0, 1.0, (rows, 1)) - 0.2,
        lambda: np.tile(rng.integers(0, 5, formats), (rows, 1)).astype(float),
    ][seed % 5]()
    cost = [
        lambda: rng.integers(0, 4, (budgets, *shape)).astype(float),
        lambda: rng.random((budgets, *shape)),
        lambda: rng.integers(1, 50, (budgets, rows, 1)) * 512.0 * np.arange(formats),
        lambda: np.round(rng.uniform(-2.0, 9.0, (budgets, *shape)), 1),
        lambda: np.tile(rng.integers(0, 6, (budgets, 1, formats)), (1, rows, 1)).astype(float),
    ][int(rng.integers(0, 5))]()
    if rng.random() < 0.25:
        loss = np.where(rng.random(shape) < 0.2, np.nan, loss)
    limit = np.empty(budgets)
    for r in range(budgets):
        met = math.fsum(cost[r][np.arange(rows), rng.integers(0, formats, rows)].tolist())
        low, high = cost[r].min(axis=1).sum(), cost[r].max(axis=1).sum()
        limit[r] = rng.choice([met, low + (high - low) * rng.uniform(-0.02, 0.9)])
    return Problem(loss, cost, limit)


def realistic(rows: int, seed: int) -> Problem:
    """Losses that fall with the bits; bytes, and a time that does not grow evenly with them."""
    rng = np.random.default_rng([5, seed])
    bits = np.arange(2, 10)
    size = rng.integers(1, 200, (rows, 1)) * 64.0
    loss = rng.lognormal(0.0, 1.5, (rows, 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (rows, 8))
    cost = np.stack([size * bits / 8, np.round(size * np.sqrt(bits) * rng.uniform(0.8, 1.2, (rows, 8)))])
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    return Problem(loss, cost, np.floor(low + (high - low) * 0.4))


def check(problem: Problem, solution: Solution, best: float, what: object) -> None:
    assert solution.bound <= best, what
    if math.isinf(best):
        assert solution.status == "infeasible", what
        return
    assert solution.status == "optimal", what
    assert best <= solution.loss <= best + PROVEN * abs(best), what
    assert solution.loss == problem.total_loss(solution.choice), what
    assert solution.gap <= PROVEN, what
    rows = np.arange(len(problem.loss))
    for table, limit, total in zip(problem.cost, problem.limit.tolist(), solution.cost, strict=True):
        exact = exact_sum(table[rows, solution.choice].tolist())
        assert exact <= exact_sum([limit]), what
        assert total == float(exact), what


@pytest.mark.parametrize("chunk", range(5))
def test_equals_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(300 * chunk, 300 * (chunk + 1)):
        problem = small_problem(seed)
        solution = Mckp().solve(problem)
        check(problem, solution, brute_force(problem), seed)
        seen[solution.status] += 1
        seen[f"{len(problem.limit)} budgets"] += 1
        seen["expanded"] += solution.stats.get("deviations", 0) > 0
    assert min(seen.values()) >= 20, seen


def distinct(problem: Problem) -> bool:
    cells = np.concatenate([np.nan_to_num(problem.loss, posinf=1e300)[None], problem.cost])
    rows = cells.transpose(1, 0, 2).reshape(len(problem.loss), -1)
    return len(np.unique(rows, axis=0)) == len(rows)


def test_order_and_scale_do_not_change_the_plan() -> None:
    same_plan = 0
    for seed in range(300):
        problem = small_problem(seed)
        one = Mckp().solve(problem)
        order = np.random.default_rng(seed).permutation(len(problem.loss))
        power = int(np.random.default_rng(seed).integers(-40, 40))
        moved = Problem(np.ldexp(problem.loss[order], power), problem.cost[:, order], problem.limit)
        other = Mckp().solve(moved)
        assert other.status == one.status, seed
        assert other.loss == math.ldexp(one.loss, power), seed
        if len(one.choice) and distinct(problem):
            assert other.choice.tolist() == one.choice[order].tolist(), seed
            same_plan += 1
    assert same_plan >= 100


@pytest.mark.parametrize("seed", range(20))
def test_proves_what_the_integer_programme_proves(seed: int) -> None:
    problem = realistic(300, seed)
    one, other = Mckp().solve(problem), Ilp().solve(problem)
    assert (one.status, other.status) == ("optimal", "optimal")
    assert one.loss == pytest.approx(other.loss, rel=2e-9)
    assert one.bound <= other.loss
    assert one.stats["programme"] == "not needed"


def test_a_plan_of_many_rows_is_permuted_with_them() -> None:
    problem = realistic(6000, 0)
    order = np.random.default_rng(0).permutation(6000)
    moved = Problem(problem.loss[order] * 8.0, problem.cost[:, order], problem.limit)
    one, other = Mckp().solve(problem), Mckp().solve(moved)
    assert one.status == other.status == "optimal"
    assert other.choice.tolist() == one.choice[order].tolist()


def test_many_rows_are_proven_and_the_bound_is_that_of_the_whole_table() -> None:
    problem = realistic(30_000, 1)
    solution = Mckp().solve(problem)
    assert solution.status == "optimal"
    assert solution.gap <= PROVEN
    # The Lagrangian function at the prices, summed up without any of the solver's shortcuts.
    priced = problem.loss + np.tensordot(np.array(solution.prices), problem.cost, axes=1)
    dual = math.fsum(priced.min(axis=1).tolist()) - float(np.array(solution.prices) @ problem.limit)
    assert dual <= solution.loss
    assert dual == pytest.approx(solution.loss, rel=1e-5)
    # Its limits are rounded down to what whole steps of cost can reach.
    assert dual * (1 - 1e-12) <= lagrangian_bound(problem)[0] == pytest.approx(dual, rel=1e-6)


def test_rows_that_are_all_the_same() -> None:
    loss = np.tile([8.0, 3.0, 1.0, 0.0], (5000, 1))
    cost = np.tile([0.0, 2.0, 3.0, 5.0], (5000, 1))[None]
    solution = Mckp().solve(Problem(loss, cost, np.array([11_001.0])))
    # Two units save 5 and the third 2: all rows take two, and 1001 of them the third.
    assert (solution.status, solution.loss) == ("optimal", 15_000.0 - 2.0 * 1001)


def test_four_and_no_budgets() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cost = rng.integers(1, 30, (4, 6, 4)).astype(float)
        problem = Problem(rng.random((6, 4)), cost, np.floor(cost.mean(axis=2).sum(axis=1)))
        check(problem, Mckp().solve(problem), brute_force(problem), seed)
    free = Problem(np.array([[2.0, 1.0], [0.0, 3.0]]), np.zeros((0, 2, 2)), np.zeros(0))
    assert Mckp().solve(free).choice.tolist() == [1, 0]


def test_a_gap_is_true_and_saves_work() -> None:
    problem = realistic(300, 3)
    best = Mckp().solve(problem)
    rough = Mckp(gap=1e-3).solve(problem)
    assert rough.stats["deviations"] < best.stats["deviations"]
    assert rough.bound <= best.loss <= rough.loss
    assert rough.gap == (rough.loss - rough.bound) / rough.loss <= 1e-3


def test_what_the_sets_leave_open_goes_to_the_integer_programme(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = realistic(60, 2)
    best = Mckp().solve(problem)
    monkeypatch.setattr(mckp, "sets", lambda *_: None)
    other = Mckp().solve(problem)
    assert (other.status, other.loss) == ("optimal", best.loss)
    assert other.stats["programme"] != "not needed"
    monkeypatch.setattr(mckp, "_PROGRAMME", 0)
    honest = Mckp().solve(problem)
    assert (honest.status, honest.stats["sets"]) == ("feasible", 0)
    assert honest.bound <= best.loss <= honest.loss
    assert honest.gap > PROVEN


def test_out_of_time() -> None:
    problem = realistic(60, 2)
    best = Mckp().solve(problem).loss
    solution = Mckp(time_limit=1e-9).solve(problem)
    assert solution.status in ("feasible", "unsolved")
    assert solution.bound <= best <= solution.loss
    assert solution.stats["programme"] == "no time left"


def test_infeasible_only_together() -> None:
    problem = Problem(
        np.array([[0.0, 0.0], [1.0, 0.0]]),
        np.array([[[0.0, 4.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]]),
        np.full(2, 3.0),
    )
    assert Mckp().solve(problem).status == "infeasible"


def test_settings_and_refusals() -> None:
    for time_limit in (0.0, math.nan):
        with pytest.raises(InputError, match="time_limit"):
            Mckp(time_limit=time_limit)
    for gap in (-1e-3, math.nan, math.inf):
        with pytest.raises(InputError, match="gap"):
            Mckp(gap=gap)
    problem = realistic(4, 0)
    paired = dataclasses.replace(problem, pairs=PairTerms([0], [1], [1], [0], [0.5]))
    aligned = dataclasses.replace(problem, aligned=(Alignment((0, 1), (0,), 2),))
    for refused in (paired, aligned):
        assert Mckp().refuses(refused)
        with pytest.raises(InputError):
            Mckp().solve(refused)


# --- its parts


def test_every_pair_of_sets_that_fits_is_met() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        budgets = int(rng.integers(1, 4))
        cost = rng.integers(0, 2 ** int(rng.integers(3, 40)), (budgets, 8, 3)).astype(float)
        problem = Problem(rng.random((8, 3)), cost, np.floor(cost.mean(axis=2).sum(axis=1)))
        reduced = Reduced.of(problem)
        weights = maximise(reduced, budgets).weights
        near = nearest(reduced, weights, None, 10_000)
        assert near.complete
        room = reduced.slack - reduced.counts(near.base)
        most = float(np.quantile(near.rise, 0.5)) if len(near.rise) else 0.0
        one, two = (sets(near, groups, most, False, math.inf) for groups in halves(near, len(near.rise)))
        assert one is not None
        assert two is not None
        found = join(one, two, room, weights, most, 0.0, math.inf)
        assert found is not None
        rise = one.rise[:, None] + two.rise
        unused = room[:, None, None] - one.step[:, :, None] - two.step[:, None]
        total = np.where((unused >= 0).all(axis=0), rise + np.tensordot(weights, unused, axes=1), np.inf)
        if total.min() <= most:
            assert found.cost[0] == pytest.approx(total.min(), rel=1e-12)
        else:
            assert not found.cost


def test_the_summit_is_that_of_a_linear_programme() -> None:
    from scipy.optimize import linprog

    for seed in range(60):
        rng = np.random.default_rng(seed)
        size, planes = int(rng.integers(1, 4)), int(rng.integers(1, 30))
        height, slope = rng.normal(size=planes), rng.normal(size=(planes, size))
        summit = Summit(np.zeros(size), np.full(size, 2.0))
        for k in range(planes):
            summit.add(float(height[k]), slope[k])
            point, top = summit.top(0.0)
            assert top == pytest.approx(float((height[: k + 1] + slope[: k + 1] @ point).min()), abs=1e-9)
        answer = linprog(
            np.r_[-1.0, np.zeros(size)],
            A_ub=np.c_[np.ones(planes), -slope],
            b_ub=height,
            bounds=[(None, None), *[(0.0, 2.0)] * size],
        )
        assert top == pytest.approx(-answer.fun, abs=1e-9)
