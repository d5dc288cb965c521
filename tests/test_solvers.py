from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from scipy.optimize import linprog

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.ports import Solver
from mpsearch.problem import Problem, Solution
from mpsearch.solvers import _milp
from mpsearch.solvers._moves import exchange, repair, top_up
from mpsearch.solvers._programmes import cover
from mpsearch.solvers._reduced import Reduced
from mpsearch.solvers.greedy import Greedy, climb
from mpsearch.solvers.ilp import Ilp
from mpsearch.solvers.lagrangian import Lagrangian, lagrangian_bound, maximise
from mpsearch.testing.solvers import SolverSuite, brute_force, random_problem
from tests.problems import nasty_problems

DATA = Path(__file__).parent / "data"
#: Names that were run by the suite; the last test of this file compares them with the registry.
NAMES = registry.names("solvers")
#: Solvers that draw at random, row by row.
RANDOM = {"random"}


class TestEveryName(SolverSuite):
    @pytest.fixture(params=NAMES)
    def solver(self, request: pytest.FixtureRequest) -> Solver:
        made: Solver = registry.make("solvers", request.param)
        return made

    def ignores_order(self, solver: Solver) -> bool:
        return type(solver) not in {registry.load("solvers", name) for name in RANDOM}


class TestCbc(SolverSuite):
    count = 15

    @pytest.fixture
    def solver(self) -> Solver:
        return Ilp(backend="cbc")


def test_every_name_of_the_registry_is_run() -> None:
    assert set(registry.BUILT_IN["solvers"]) <= set(NAMES)
    marks = {mark.name for mark in getattr(TestEveryName, "pytestmark", [])}
    assert not marks & {"skip", "skipif", "xfail"}
    for name in NAMES:
        solver = registry.make("solvers", name)
        assert any(not solver.refuses(random_problem(seed)) for seed in range(8)), name
        assert all(isinstance(text, str) and text for text in (solver.takes, solver.proves, solver.cost)), name


# --- the exact solver against brute force


def varied_problem(seed: int) -> Problem:
    """At most 7 rows x 4 formats, 1 to 3 budgets; small and large whole costs, floats, limits met exactly, gaps."""
    rng = np.random.default_rng([7, seed])
    n, formats, budgets = int(rng.integers(1, 8)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    shape = (n, formats)
    loss = [
        lambda: rng.random(shape),
        lambda: rng.integers(-3, 4, shape).astype(float),
        lambda: rng.normal(size=shape),
        lambda: rng.lognormal(0, 4, shape),
        lambda: np.sort(rng.random(shape))[:, ::-1] * rng.lognormal(0, 2, (n, 1)),
    ][seed % 5]()
    cost = [
        lambda: rng.integers(0, 6, (budgets, *shape)).astype(float),
        lambda: rng.integers(1, 2**33, (budgets, *shape)).astype(float),
        lambda: rng.random((budgets, *shape)),
        lambda: rng.lognormal(0, 5, (budgets, *shape)),
        lambda: rng.integers(1, 100, (budgets, n, 1)) * 4096.0 * np.arange(1, formats + 1),
    ][int(rng.integers(0, 5))]()
    if rng.random() < 0.3:
        loss = np.where(rng.random(shape) < 0.2, np.nan, loss)
    offered = np.isfinite(loss)
    chosen = [int(rng.choice(np.flatnonzero(row))) if row.any() else 0 for row in offered]
    limit = np.empty(budgets)
    for r in range(budgets):
        low, high = cost[r].min(axis=1).sum(), cost[r].max(axis=1).sum()
        met = math.fsum(cost[r][np.arange(n), chosen].tolist())
        limit[r] = rng.choice([met, low + (high - low) * rng.uniform(-0.02, 0.8)])
    return Problem(loss, cost, limit)


def check_exact(problem: Problem, solver: Ilp, what: object) -> Solution:
    best, solution = brute_force(problem), solver.solve(problem)
    if math.isinf(best):
        assert solution.status == "infeasible", what
    else:
        assert solution.status == "optimal", (what, solution)
        assert solution.loss == best, what
        assert solution.bound <= best, what
        assert problem.fits(solution.choice), what
    return solution


@pytest.mark.parametrize("chunk", range(10))
def test_ilp_equals_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(100 * chunk, 100 * (chunk + 1)):
        solution = check_exact(varied_problem(seed), Ilp(), seed)
        seen[solution.status] += 1
        seen["programmes"] += solution.stats.get("programmes", 0)
        assert "fallback" not in solution.stats, seed
    # The chunk is worth running only if it meets all of these.
    assert min(seen["optimal"], seen["infeasible"], seen["programmes"]) >= 10, seen


def test_cbc_equals_brute_force() -> None:
    programmes = 0
    for seed in range(2000, 2100):
        solution = check_exact(varied_problem(seed), Ilp(backend="cbc"), seed)
        programmes += solution.stats.get("programmes", 0)
        assert solution.stats.get("backend", "none") in ("none", "cbc"), seed
        assert "fallback" not in solution.stats, seed
    assert programmes >= 10


@pytest.mark.parametrize("name", ["greedy", "lagrangian"])
def test_heuristics_are_honest_and_mostly_find_a_choice(name: str) -> None:
    found = feasible = 0
    for seed in range(200):
        problem = varied_problem(seed)
        best, solution = brute_force(problem), registry.make("solvers", name).solve(problem)
        if math.isinf(best):
            assert solution.status in ("infeasible", "unsolved"), seed
            continue
        feasible += 1
        assert solution.status != "infeasible", seed
        assert solution.bound <= best <= solution.loss, seed
        found += solution.status != "unsolved"
    assert found >= 0.95 * feasible


def large_problem(rows: int, seed: int = 0) -> Problem:
    """Two budgets that both bind: bytes, and a time that is not monotone in the bits."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 16, 8)
    size = rng.integers(1, 2000, (rows, 1)) * 64.0
    loss = 4.0 ** (-bits * rng.uniform(0.5, 1.2, (rows, 1))) * rng.lognormal(0.0, 0.3, (rows, 8))
    cost = np.stack([np.floor(size * bits / 8), np.round(size * rng.uniform(0.2, 3.0, (rows, 8)), 4)])
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    return Problem(loss, cost, np.floor(low + (high - low) * 0.3))


def test_backends_agree_on_a_larger_problem() -> None:
    problem = large_problem(150)
    highs, cbc = Ilp().solve(problem), Ilp(backend="cbc").solve(problem)
    assert (highs.status, cbc.status) == ("optimal", "optimal")
    assert (highs.stats["backend"], cbc.stats["backend"]) == ("highs", "cbc")
    assert highs.loss == cbc.loss
    assert highs.gap <= 1e-9
    greedy, bound = Greedy().solve(problem), Lagrangian().solve(problem)
    assert greedy.bound <= highs.loss <= greedy.loss <= 1.2 * highs.loss
    assert bound.bound <= highs.loss <= bound.loss <= 1.05 * highs.loss


@pytest.mark.parametrize("seed", [1, 2])
def test_highs_goes_on_below_its_usual_gap(seed: int) -> None:
    # HiGHS stops these two at gaps of 6e-5 unless told otherwise. No cell is dropped beforehand but the dominated.
    reduced = Reduced.of(large_problem(100, seed=seed))
    offered = np.isfinite(reduced.excess)
    model = _milp.Model(np.where(offered, reduced.excess, 0.0) * 1024, offered, reduced.low, reduced.slack)
    outcome = _milp.solve(model, "highs", 60.0)
    assert outcome.status == "optimal"
    assert outcome.choice is not None
    total = math.fsum(model.objective[np.arange(100), outcome.choice].tolist())
    assert total - outcome.bound <= 1e-9 * total


def test_many_rows() -> None:
    problem = large_problem(20_000)
    for name in ("greedy", "lagrangian"):
        solution = registry.make("solvers", name).solve(problem)
        assert solution.status == "feasible"
        assert solution.gap < 1e-3, name


# --- traps of the backends


def test_a_choice_within_the_solvers_tolerance_but_over_the_budget_is_cut_off() -> None:
    # Both upgrades together cost 1 + 2**-60, which a float cannot tell from the limit of 1.
    problem = Problem(np.array([[10.0, 0.0], [1.0, 0.0]]), np.array([[[0.0, 1.0], [0.0, 2.0**-60]]]), np.array([1.0]))
    assert not problem.fits(np.array([1, 1]))
    solution = Ilp().solve(problem)
    assert (solution.status, solution.choice.tolist(), solution.loss) == ("optimal", [1, 0], 1.0)
    assert solution.stats["cuts"] == 1


def test_cuts_do_not_cut_off_the_optimum() -> None:
    cuts = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # Costs beside which others vanish in floats, under a limit of whole numbers.
        cost = np.where(
            rng.random((1, 5, 3)) < 0.5, rng.integers(1, 5, (1, 5, 3)), rng.integers(0, 3, (1, 5, 3)) * 2.0**-58
        )
        limit = float(rng.integers(3, 9))
        solution = check_exact(Problem(rng.integers(0, 9, (5, 3)).astype(float), cost, np.array([limit])), Ilp(), seed)
        cuts += solution.stats.get("cuts", 0)
    assert cuts


def test_a_cover_excludes_the_choice_and_no_choice_that_fits() -> None:
    problem = large_problem(6, seed=3)
    reduced = Reduced.of(problem)
    choices = [np.array(c) for c in itertools.product(range(8), repeat=6)][::97]
    offered = np.isfinite(reduced.excess)
    choices = [c for c in choices if offered[np.arange(6), c].all()]
    over = [c for c in choices if not problem.fits(reduced.back(c))]
    fitting = [c for c in choices if problem.fits(reduced.back(c))]
    assert over
    assert fitting
    for choice in over[::50]:
        cells, most = cover(problem, reduced, choice)
        assert cells[np.arange(6), choice].sum() > most
        assert all(cells[np.arange(6), c].sum() <= most for c in fitting)


def test_highs_failure_falls_back_to_cbc_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large_problem(20, seed=1)
    usual = Ilp().solve(problem)
    assert usual.stats["programmes"] >= 1

    def fail(self: Any, lp: Any) -> None:
        raise pulp.PulpSolverError("broken on purpose")

    monkeypatch.setattr(pulp.HiGHS, "actualSolve", fail)
    solution = Ilp().solve(problem)
    assert solution.stats["backend"] == "cbc"
    assert "broken on purpose" in solution.stats["fallback"]
    assert (solution.status, solution.loss) == ("optimal", usual.loss)


def test_missing_highspy_falls_back_to_cbc_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    solution = Ilp().solve(large_problem(20, seed=1))
    assert solution.status == "optimal"
    assert solution.stats["backend"] == "cbc"
    assert "highspy" in solution.stats["fallback"]


def test_without_any_backend_the_best_choice_comes_with_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large_problem(20, seed=1)
    best = Ilp().solve(problem).loss
    monkeypatch.setattr(_milp, "missing", lambda backend: f"no {backend} here")
    solution = Ilp().solve(problem)
    assert solution.status == "feasible"
    assert (solution.stats["fallback"], solution.stats["report"]) == ("no highs here", "no cbc here")
    assert solution.bound < best <= solution.loss


def test_time_out_returns_a_choice_with_an_honest_gap() -> None:
    problem = large_problem(60)
    best = Ilp().solve(problem).loss
    solution = Ilp(time_limit=1e-6).solve(problem)
    assert solution.status == "feasible"
    assert solution.bound < best <= solution.loss
    assert solution.gap > 1e-9
    assert solution.stats["report"] == "no time left"


def test_time_out_is_not_taken_for_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large_problem(60)
    best = Ilp().solve(problem).loss
    solve = _milp.solve
    monkeypatch.setattr(_milp, "solve", lambda model, backend, seconds: solve(model, backend, 0.0))
    solution = Ilp().solve(problem)
    assert "Time limit" in solution.stats["report"]
    assert solution.status == "feasible"
    assert solution.bound < best <= solution.loss


#: Each budget can be kept alone, and half of each cell of the first row keeps both; no whole choice does.
ONLY_TOGETHER = Problem(
    np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[[0.0, 4.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]]), np.full(2, 3.0)
)


def test_model_infeasible_in_both_backends() -> None:
    model = _milp.Model(
        np.zeros((1, 2)), np.ones((1, 2), dtype=np.bool_), np.array([[[0, 4]], [[4, 0]]]), np.array([3, 3])
    )
    for backend in ("highs", "cbc"):
        outcome = _milp.solve(model, backend, 10.0)
        assert (outcome.status, outcome.choice) == ("infeasible", None)


def test_infeasible_only_together() -> None:
    assert lagrangian_bound(ONLY_TOGETHER)[0] < 1.0
    assert Ilp().solve(ONLY_TOGETHER).status == "infeasible"
    assert Ilp(backend="cbc").solve(ONLY_TOGETHER).status == "infeasible"
    tighter = dataclasses.replace(ONLY_TOGETHER, limit=np.full(2, 1.0))
    # Half of each costs 2 and 2: here the relaxation proves it too.
    assert Greedy().solve(tighter).status == Lagrangian().solve(tighter).status == "infeasible"
    assert lagrangian_bound(tighter)[0] == math.inf


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert Ilp(backend=backend).solve(large_problem(20, seed=1)).stats["programmes"] >= 1
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ilp = Ilp(backend="cbc")
    assert ilp.solve(large_problem(20, seed=1)).status == "optimal"
    # Without its preprocessing CBC crashes on this one, and PuLP leaves its files where they are.
    assert ilp.solve(ONLY_TOGETHER).stats["programmes"] == 1
    assert os.listdir(tmp_path) == []


def test_coefficients_are_small_and_cut_nothing_off() -> None:
    use, limit = np.array([[0, 6 * 2**30, 9 * 2**30]]), 15 * 2**30 + 7
    coefficients, top = _milp._small(use, limit)
    assert (coefficients.tolist(), top) == ([[0.0, 2.0, 3.0]], 5.0)
    use = np.array([[0, 2**50 + 1, 2**49 + 2]])
    coefficients, top = _milp._small(use, 2**61 + 1)
    scale = 2.0**-38
    assert coefficients.max() < 2**13
    assert (coefficients == use * scale).all()
    assert top > 2.0**61 * scale


def test_settings_and_refusals() -> None:
    with pytest.raises(InputError, match="time_limit"):
        Ilp(time_limit=0.0)
    with pytest.raises(InputError, match="time_limit"):
        Ilp(time_limit=math.nan)
    with pytest.raises(InputError, match="no backend 'glpk'"):
        Ilp(backend="glpk")
    huge = Problem(np.array([[1e308, 0.0], [1e308, 0.0]]), np.ones((1, 2, 2)), np.array([2.0]))
    for solver in (Ilp(), Greedy(), Lagrangian()):
        assert "losses" in solver.refuses(huge)
        assert "limits" in solver.refuses(Problem(np.zeros((1, 1)), np.ones((1, 1, 1)), np.array([1e308])))
        with pytest.raises(InputError, match="so large"):
            solver.solve(huge)


# --- bound


def linear_relaxation(problem: Problem) -> float:
    """The optimum of the linear relaxation, by another method."""
    i, f = np.nonzero(problem.offered)
    rows = np.zeros((len(problem.loss), len(i)))
    rows[i, np.arange(len(i))] = 1.0
    result = linprog(
        problem.loss[i, f], A_ub=problem.cost[:, i, f], b_ub=problem.limit, A_eq=rows, b_eq=np.ones(len(rows))
    )
    return float(result.fun) if result.status == 0 else math.inf


def test_bound_is_as_tight_as_the_linear_relaxation() -> None:
    for seed in range(60):
        problem = random_problem(seed, rows=12)
        bound, prices = lagrangian_bound(problem)
        relaxed = linear_relaxation(problem)
        assert min(prices) >= 0.0
        if math.isinf(relaxed):
            assert bound == math.inf
        else:
            assert bound <= relaxed + 1e-12 * abs(relaxed), seed
            assert bound >= relaxed - 1e-7 * abs(relaxed), seed


def test_prices_are_loss_saved_per_unit() -> None:
    # The budget ends two units into the second row's step, which saves 6 for 3 units.
    problem = Problem(np.array([[8.0, 0.0], [6.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 3.0]]]), np.array([4.0]))
    bound, prices = lagrangian_bound(problem)
    assert bound == pytest.approx(2.0, abs=1e-12)
    assert bound <= 2.0
    assert prices == pytest.approx((2.0,))
    # Other units of loss and cost: prices follow.
    other = Problem(problem.loss * 2.0**20, problem.cost / 1024.0, problem.limit / 1024.0)
    assert lagrangian_bound(other)[1] == pytest.approx((2.0 * 2.0**30,))


def test_a_budget_that_cannot_bind_has_no_price() -> None:
    cost = np.array([[[1.0, 5.0], [1.0, 5.0]], [[1.0, 2.0], [1.0, 2.0]], [[9.0, 9.0], [9.0, 9.0]]])
    problem = Problem(np.array([[1.0, 0.0], [2.0, 0.0]]), cost, np.array([8.0, 4.0, math.inf]))
    for solver in (Ilp(), Greedy(), Lagrangian()):
        solution = solver.solve(problem)
        assert solution.choice.tolist() == [0, 1]
        assert solution.prices[0] > 0.0
        assert solution.prices[1:] == (0.0, 0.0)
    # The same with the budgets in another order.
    prices = lagrangian_bound(Problem(problem.loss, cost[::-1], problem.limit[::-1]))[1]
    assert prices == (0.0, 0.0, lagrangian_bound(problem)[1][0])


def test_bound_holds_at_any_number_of_rounds() -> None:
    problem = large_problem(40)
    best = Ilp().solve(problem).loss
    bounds = [lagrangian_bound(problem, rounds)[0] for rounds in (0, 3, 6, 100)]
    assert all(bound <= best for bound in bounds)
    assert bounds[0] < bounds[-1]
    assert Lagrangian(rounds=3).solve(problem).bound <= best


def test_no_row_has_a_choice_to_make() -> None:
    single = Problem(np.array([[2.0], [-1.0]]), np.array([[[3.0], [4.0]]]), np.array([7.0]))
    for solver in (Ilp(), Greedy(), Lagrangian()):
        solution = solver.solve(single)
        assert (solution.status, solution.loss, solution.gap) == ("optimal", 1.0, 0.0)
    nothing = Problem(np.zeros((0, 0)), np.zeros((2, 0, 0)), np.array([0.0, -1.0]))
    for solver in (Ilp(), Greedy(), Lagrangian()):
        assert solver.solve(nothing).status == "infeasible"
        fine = solver.solve(dataclasses.replace(nothing, limit=np.zeros(2), resources=()))
        assert (fine.status, fine.loss, fine.bound) == ("optimal", 0.0, 0.0)


# --- greedy and its moves


def test_greedy_is_exact_for_equal_steps_and_convex_rows() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        steps = np.sort(rng.random((9, 5)), axis=1)[:, ::-1]
        loss = np.hstack([np.cumsum(steps[:, ::-1], axis=1)[:, ::-1], np.zeros((9, 1))])
        cost = np.tile(np.arange(6.0), (9, 1))[None]
        problem = Problem(loss, cost, np.array([float(rng.integers(0, 46))]))
        assert Greedy().solve(problem).loss == pytest.approx(Ilp().solve(problem).loss, rel=1e-12)


def test_greedy_goes_on_after_what_does_not_fit() -> None:
    # The best step, of row 0, does not fit; those of rows 1 and 2 do.
    loss = np.array([[9.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    problem = Problem(loss, np.array([[[0.0, 4.0], [0.0, 2.0], [0.0, 1.0]]]), np.array([3.0]))
    assert Greedy().solve(problem).choice.tolist() == [0, 1, 1]


def test_climbing_goes_on_after_what_does_not_fit() -> None:
    loss = np.array([[9.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    reduced = Reduced.of(Problem(loss, np.array([[[0.0, 4.0], [0.0, 2.0], [0.0, 1.0]]]), np.array([3.0])))
    choice = climb(reduced, np.zeros(3, dtype=np.int64), reduced.use[0].astype(float))
    assert reduced.back(choice).tolist() == [0, 1, 1]


def test_greedy_tops_up_with_cells_off_the_hull() -> None:
    # The hull goes from the first cell straight to the last, which does not fit; the middle one lies above it.
    problem = Problem(np.array([[10.0, 8.0, 0.0]]), np.array([[[0.0, 3.0, 4.0]]]), np.array([3.0]))
    assert Greedy().solve(problem).choice.tolist() == [1]


def test_moves_keep_the_budgets_and_never_lose() -> None:
    problem = large_problem(50, seed=2)
    reduced = Reduced.of(problem)
    dual = maximise(reduced, 2)
    over = reduced.excess.argmin(axis=1)
    assert not reduced.fits(over)
    start = repair(reduced, over, dual.weights)
    assert start is not None
    assert reduced.fits(start)
    topped = top_up(reduced, start)
    better = exchange(reduced, topped, dual.weights)
    assert reduced.fits(topped)
    assert reduced.fits(better)
    assert reduced.total(better) < reduced.total(topped) <= reduced.total(start)


# --- numbers


def test_counts_are_exact_or_rounded_to_the_safe_side() -> None:
    cost = np.array([[[0.1, 0.3, 1e-30], [3.0, 2.0**40 + 1.0, 0.7]], [[512.0, 1024.0, 4096.0], [0.0, 1536.0, 512.0]]])
    reduced = Reduced.of(Problem(np.array([[2.0, 1.0, 3.0], [1.0, 0.0, 2.0]]), cost, np.array([5.0, 2000.0])))
    there = cost[:, reduced.order]
    for r in range(2):
        above = there[r] - there[r].min(axis=1, keepdims=True)
        assert (reduced.low[r] * reduced.unit[r] <= above).all()
        assert (reduced.use[r] * reduced.unit[r] >= above * (1 - 1e-15)).all()
        assert (reduced.use[r] - reduced.low[r] <= 1).all()
    # Bytes: the common divisor is taken out, and the limit rounded down.
    assert (reduced.unit[1], reduced.slack[1]) == (512.0, 2)
    assert (reduced.use[1] == reduced.low[1]).all()


def slow_brute_force(problem: Problem) -> float:
    """Every choice in exact arithmetic; for numbers too far apart for `brute_force`."""
    cells = [np.flatnonzero(row) for row in problem.offered]
    choices = (np.array(choice, dtype=np.int64) for choice in itertools.product(*cells))
    return min((problem.total_loss(c) for c in choices if problem.fits(c)), default=math.inf)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(nasty_problems())
def test_nasty_numbers(problem: Problem) -> None:
    best = slow_brute_force(problem)
    assert lagrangian_bound(problem)[0] <= best
    for solver in (Ilp(), Greedy(), Lagrangian()):
        solution = solver.solve(problem)
        assert solution.bound <= best
        if solution.status in ("infeasible", "unsolved"):
            assert solution.status == "unsolved" or math.isinf(best)
            assert isinstance(solver, Greedy | Lagrangian) or math.isinf(best)
            continue
        assert problem.fits(solution.choice)
        assert solution.loss >= best
        if solution.status == "optimal":
            assert solution.loss - best <= 1e-9 * abs(best)


def test_numbers_too_far_apart_for_one_scale() -> None:
    # The first row must take its cheap cell or the second one cannot take its good one; 1e300 hides 1e-300.
    loss = np.array([[1e300, 1.0, 0.0], [3e-300, 1e-300, 0.0], [2e-300, 1e-300, 0.0]])
    cost = np.array([[[0.0, 1.0, 9.0], [0.0, 1.0, 2.0], [0.0, 1.0, 3.0]]])
    small = Problem(loss[1:], cost[:, 1:], np.array([3.0]))
    assert Ilp().solve(small).loss == 1e-300
    both = Ilp().solve(Problem(np.vstack([loss, loss[1:]]), np.hstack([cost, cost[:, 1:]]), np.array([12.0])))
    assert both.status == "optimal"
    assert both.loss == slow_brute_force(
        Problem(np.vstack([loss, loss[1:]]), np.hstack([cost, cost[:, 1:]]), np.array([12.0]))
    )


# --- reference tables


def table(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return data


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_adaquant_integer_programme(backend: str) -> None:
    data = table("adaquant_ip")
    size = np.array(data["params"], dtype=float)
    loss = np.stack([np.zeros(len(size)), np.maximum(data["dL_4bit"], 1e-6)], axis=1)
    cost = size[:, None] * np.array([8.0, 4.0])
    for case in data["results"]:
        solution = Ilp(backend=backend).solve(Problem(loss, cost, case["max_mean_bits"] * size.sum()))
        if case["feasible"]:
            assert solution.status == "optimal"
            assert solution.loss == pytest.approx(case["delta_loss"], rel=1e-12)
            assert solution.choice.tolist() == case["replaced_by_4bit"]
            assert solution.cost[0] / size.sum() == pytest.approx(case["mean_bits"])
        else:
            assert solution.status == "infeasible"


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_modelopt_gradient_mode(backend: str) -> None:
    data = table("modelopt_autoquant")
    weights = sum(layer["numel"] for layer in data["layers"])
    for case in data["results"]:
        limit = case["effective_bits_target"] / 16 * weights
        problem = Problem(np.array(data["monotone_scores"]), np.array(data["costs"]), np.array([limit]))
        solution, expected = Ilp(backend=backend).solve(problem), case["gradient_mode_exact"]
        if expected is None:
            assert solution.status == "infeasible"
        else:
            assert solution.status == "optimal"
            assert solution.loss == pytest.approx(expected["score"], rel=1e-12)
            assert [data["formats"][f] for f in solution.choice] == expected["formats"]
            assert solution.cost[0] * 16 / weights == pytest.approx(expected["effective_bits"])


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_llamacpp_target_bpw(backend: str) -> None:
    data = table("llamacpp_target_bpw")
    size = np.array([tensor["numel"] for tensor in data["tensors"]], dtype=float)
    loss = np.array([tensor["error_per_type"] for tensor in data["tensors"]])
    cost = size[:, None] * np.array([kind["bpw"] for kind in data["types"]])
    worse = 0
    for case in data["allocation"]:
        problem = Problem(loss, cost, case["target_bpw"] * size.sum())
        solution, expected = Ilp(backend=backend).solve(problem), case["exact"]
        if expected is None:
            assert solution.status == "infeasible"
            continue
        assert solution.status == "optimal"
        assert solution.loss == pytest.approx(expected["error"], rel=1e-12)
        assert [data["types"][f]["name"] for f in solution.choice] == expected["types"]
        greedy = Greedy().solve(problem)
        # The greedy choice of the table breaks no budget; ours must be no worse, and neither is always exact.
        assert solution.loss <= greedy.loss <= case["greedy_hull"]["error"] * (1 + 1e-12)
        assert greedy.bound <= solution.loss
        worse += greedy.loss > solution.loss
    assert worse
