from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from mpsearch.errors import InputError
from mpsearch.ports import Solver
from mpsearch.problem import Problem
from mpsearch.solvers._digits import Digits
from mpsearch.solvers._hull import Hull, dual_value, improve
from mpsearch.solvers._merge import merge, unbeaten
from mpsearch.solvers._reduced import Ints, Reduced
from mpsearch.solvers.dp import DynamicProgramme, cheapest
from mpsearch.solvers.fronts import exact_front, front, solve_many
from mpsearch.solvers.pareto import Pareto
from mpsearch.testing.solvers import ROUNDING, SolverSuite, brute_force
from tests.problems import nasty_problems

DATA = Path(__file__).parent / "data"


class TestFewBuckets(SolverSuite):
    """Every behaviour holds when costs are rounded to 7 units too."""

    count = 20

    @pytest.fixture
    def solver(self) -> Solver:
        return DynamicProgramme(buckets=7)


class TestFewPoints(SolverSuite):
    """Every behaviour holds when the merge is given up."""

    count = 20

    @pytest.fixture
    def solver(self) -> Solver:
        return Pareto(points=60)


def drawn(seed: int, budgets: int, whole: bool) -> Problem:
    """At most 6 rows x 4 formats: costs whole or not, losses of every kind, limits met exactly, cells left out."""
    rng = np.random.default_rng([11, seed, budgets])
    n, formats = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    shape = (n, formats)
    losses = [
        lambda: rng.random(shape),
        lambda: rng.integers(-3, 4, shape).astype(float),
        lambda: rng.normal(size=shape),
        lambda: rng.lognormal(0, 4, shape),
        lambda: np.sort(rng.random(shape))[:, ::-1] * rng.lognormal(0, 2, (n, 1)),
    ]
    costs = [
        lambda: rng.integers(0, 6, (budgets, *shape)).astype(float),
        lambda: rng.integers(-20, 900, (budgets, *shape)).astype(float),
        lambda: rng.integers(1, 100, (budgets, n, 1)) * 4096.0 * np.arange(1, formats + 1),
        lambda: rng.random((budgets, *shape)),
        lambda: rng.lognormal(0, 5, (budgets, *shape)),
    ]
    loss, cost = losses[seed % 5](), costs[int(rng.integers(0, 3 if whole else 5))]()
    if rng.random() < 0.3:
        loss = np.where(rng.random(shape) < 0.2, np.nan, loss)
    chosen = [int(rng.choice(np.flatnonzero(row))) if row.any() else 0 for row in np.isfinite(loss)]
    limit = np.empty(budgets)
    for r in range(budgets):
        low, high = cost[r].min(axis=1).sum(), cost[r].max(axis=1).sum()
        met = math.fsum(cost[r][np.arange(n), chosen].tolist())
        limit[r] = rng.choice([met, low + (high - low) * rng.uniform(-0.02, 0.8)])
    return Problem(loss, cost, limit)


def every_choice(problem: Problem) -> list[Ints]:
    return [np.array(c, dtype=np.int64) for c in itertools.product(*(np.flatnonzero(row) for row in problem.offered))]


# --- proofs against brute force


@pytest.mark.parametrize("chunk", range(10))
def test_dp_equals_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(100 * chunk, 100 * (chunk + 1)):
        problem = drawn(seed, 1, whole=True)
        best, solution = brute_force(problem), DynamicProgramme().solve(problem)
        seen[solution.status] += 1
        if math.isinf(best):
            assert solution.status == "infeasible", seed
            continue
        assert solution.status == "optimal", (seed, solution)
        assert abs(solution.loss - best) <= ROUNDING * abs(best), seed
        assert solution.bound <= best, seed
        assert problem.fits(solution.choice), seed
    # The chunk is worth running only if it meets both.
    assert min(seen["optimal"], seen["infeasible"]) >= 3, seen


@pytest.mark.parametrize("chunk", range(10))
def test_pareto_equals_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(100 * chunk, 100 * (chunk + 1)):
        problem = drawn(seed, 1 + seed % 2, whole=False)
        best, solution = brute_force(problem), Pareto().solve(problem)
        seen[solution.status] += 1
        if math.isinf(best):
            assert solution.status == "infeasible", seed
            continue
        assert solution.status == "optimal", (seed, solution)
        assert abs(solution.loss - best) <= ROUNDING * abs(best), seed
        assert solution.bound <= best, seed
        assert problem.fits(solution.choice), seed
    assert min(seen["optimal"], seen["infeasible"]) >= 3, seen


@pytest.mark.parametrize("buckets", [1, 3, 50])
def test_rounded_costs_keep_the_budget_and_an_honest_gap(buckets: int) -> None:
    exact = 0
    for seed in range(200):
        problem = drawn(seed, 1, whole=False)
        best, solution = brute_force(problem), DynamicProgramme(buckets=buckets).solve(problem)
        assert (solution.status == "infeasible") == math.isinf(best), seed
        if math.isinf(best):
            continue
        assert problem.fits(solution.choice), seed
        assert solution.bound <= best <= solution.loss, seed
        if solution.status == "optimal":
            assert solution.loss - best <= ROUNDING * abs(best), seed
        exact += solution.loss == best
    assert exact >= 100


def test_more_budget_is_never_worse() -> None:
    for seed in range(30):
        problem = drawn(seed, 1, whole=True)
        least = problem.least()[0]
        if math.isinf(least):
            continue
        limits = least + np.array([0.0, 1.0, 2.0, 5.0, 9.0, 100.0, 1e4, 1e6])
        for solver in (DynamicProgramme(), Pareto()):
            losses = [solver.solve(dataclasses.replace(problem, limit=np.array([x]))).loss for x in limits]
            assert all(b <= a + ROUNDING * abs(a) for a, b in itertools.pairwise(losses)), seed
        many = [solution.loss for solution in solve_many(problem, limits)]
        assert all(b <= a + ROUNDING * abs(a) for a, b in itertools.pairwise(many)), seed


# --- dp


def test_dp_finds_both_ends_however_coarse_its_units() -> None:
    rng = np.random.default_rng(3)
    cost = rng.random((1, 9, 4))
    loss = np.sort(rng.random((9, 4)), axis=1)
    loss = np.take_along_axis(loss[:, ::-1], cost[0].argsort(axis=1).argsort(axis=1), axis=1)
    low, high = cost[0].argmin(axis=1), cost[0].argmax(axis=1)
    for choice in (low, high):
        exact = math.fsum(cost[0][np.arange(9), choice].tolist())
        limit = exact if Problem(loss, cost, np.array([exact])).fits(choice) else math.nextafter(exact, math.inf)
        for buckets in (1, 2, 10_000):
            solution = DynamicProgramme(buckets=buckets).solve(Problem(loss, cost, np.array([limit])))
            assert solution.choice.tolist() == choice.tolist()


def test_dp_finds_what_rounding_to_the_nearest_unit_would_miss() -> None:
    # With costs rounded to halves of the budget, both first steps look as dear as the whole budget.
    problem = Problem(np.array([[5.0, 0.0], [4.0, 0.0]]), np.array([[[0.0, 3.0], [0.0, 3.0]]]), np.array([6.0]))
    tight = dataclasses.replace(problem, cost=problem.cost + np.array([[[0.0, 0.01], [0.0, 0.01]]]))
    assert DynamicProgramme(buckets=2).solve(problem).choice.tolist() == [1, 1]
    assert DynamicProgramme(buckets=2).solve(tight).choice.tolist() == [1, 0]


def test_cheapest_is_the_textbook_recursion() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        excess = np.where(rng.random((5, 4)) < 0.2, np.inf, rng.random((5, 4)))
        excess[:, 0] = rng.random(5)
        use = rng.integers(1, 7, (5, 4))
        use[:, 0] = 0
        slack = int(rng.integers(0, 20))
        choice, total = cheapest(excess, use, slack)
        assert use[np.arange(5), choice].sum() <= slack
        assert total == pytest.approx(excess[np.arange(5), choice].sum())
        choices = np.array(list(itertools.product(range(4), repeat=5)))
        fits = use[np.arange(5), choices].sum(axis=1) <= slack
        assert total == pytest.approx(excess[np.arange(5), choices].sum(axis=1)[fits].min())


def test_more_than_127_formats_need_a_wider_table() -> None:
    loss = np.arange(200.0)[None, ::-1]
    solution = DynamicProgramme().solve(Problem(loss, np.arange(200.0)[None, None], np.array([150.0])))
    assert solution.choice.tolist() == [150]


def test_settings_and_refusals() -> None:
    for made in (lambda: DynamicProgramme(buckets=0), lambda: Pareto(points=0)):
        with pytest.raises(InputError, match="expected a whole number above 0") as caught:
            made()
        assert caught.value.code == "E107"
    three = Problem(np.zeros((1, 1)), np.zeros((3, 1, 1)), np.zeros(3))
    long = Problem(np.zeros((60_000, 2)), np.zeros((1, 60_000, 2)), np.zeros(1))
    for solver, problem, word in (
        (DynamicProgramme(), three, "3 budgets, and this solver takes 1"),
        (DynamicProgramme(), long, "60000 rows times 10001 units"),
        (Pareto(), three, "3 budgets, and this solver takes 2"),
        (Pareto(points=1000), long, "120000 cells"),
    ):
        assert word in solver.refuses(problem)
        with pytest.raises(InputError, match=word) as caught:
            solver.solve(problem)
        assert caught.value.code == "E210"
    # Budgets without an end do not count.
    endless = dataclasses.replace(three, limit=np.array([0.0, np.inf, np.inf]))
    assert DynamicProgramme().solve(endless).status == "optimal"


# --- pareto


def test_a_merge_that_is_given_up_says_so() -> None:
    problem = curve(60)
    stopped, whole = Pareto(points=1000).solve(problem), Pareto().solve(problem)
    assert (stopped.status, whole.status) == ("feasible", "optimal")
    assert stopped.stats["stopped"] == "more than 1000 totals"
    assert stopped.bound <= whole.loss <= stopped.loss


def test_two_budgets_that_hold_only_one_by_one_are_infeasible() -> None:
    loss, cost = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[[0.0, 4.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]])
    assert Pareto().solve(Problem(loss, cost, np.full(2, 3.0))).status == "infeasible"
    assert Pareto().solve(Problem(loss, cost, np.array([4.0, 3.0]))).choice.tolist() == [1, 0]


def test_costs_that_no_common_unit_holds_are_merged_twice() -> None:
    # 1 + 2**-60 is above the limit of 1, and rounds to it.
    problem = Problem(np.array([[10.0, 0.0], [1.0, 0.0]]), np.array([[[0.0, 1.0], [0.0, 2.0**-60]]]), np.array([1.0]))
    for solver in (Pareto(), DynamicProgramme()):
        solution = solver.solve(problem)
        assert solution.choice.tolist() == [1, 0]
        assert solution.bound <= 1.0


def test_unbeaten_points_are_those_that_no_other_beats() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        count, resources = int(rng.integers(0, 40)), seed % 3
        use, excess = rng.integers(0, 6, (resources, count)), rng.integers(0, 6, count).astype(float)
        found = unbeaten(use, excess)
        points = np.vstack([use, excess])
        for k in range(count):
            no_worse = (points <= points[:, k : k + 1]).all(axis=0)
            beaten = (no_worse & (points < points[:, k : k + 1]).any(axis=0)).any()
            same = (points[:, found] == points[:, k : k + 1]).all(axis=0).sum()
            assert same == (0 if beaten else 1), (seed, k)


def test_merging_stops_at_its_cap() -> None:
    excess, use = np.array([[1.0, 0.0]] * 3), np.array([[[0, 1], [0, 2], [0, 4]]])
    digits = Digits(use, np.zeros_like(use), np.zeros((2, 1), dtype=np.int64), True)
    everything = lambda i, use, excess: np.ones(len(excess), dtype=np.bool_)  # noqa: E731
    found = merge(excess, digits, everything, 14)
    assert found is not None
    assert found.spent[0].tolist() == [[0, 1, 3, 7]]
    assert [found.choice(k).tolist() for k in range(4)] == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert merge(excess, digits, everything, 11) is None


# --- fronts


def curve(rows: int, formats: int = 8, resources: int = 1, seed: int = 0) -> Problem:
    """Losses that fall with the bits, at costs of bytes, and of a time that is not monotone in them."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 16, formats)
    size = rng.integers(1, 2000, (rows, 1)) * 64.0
    loss = 4.0 ** (-bits * rng.uniform(0.5, 1.2, (rows, 1))) * rng.lognormal(0.0, 0.3, (rows, formats))
    cost = np.stack([np.floor(size * bits / 8), np.round(size * rng.uniform(0.2, 3.0, (rows, formats)), 4)])[:resources]
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    return Problem(loss, cost, np.floor(low + (high - low) * 0.3))


def test_the_front_is_the_lower_convex_hull_of_all_choices() -> None:
    for seed in range(80):
        problem = drawn(seed, 1, whole=True)
        if not problem.offered.any(axis=1).all():
            continue
        found = front(problem)
        choices = every_choice(problem)
        cost = np.array([float(problem.totals(c)[0]) for c in choices])
        loss = np.array([problem.total_loss(c) for c in choices])
        assert (np.diff(found.cost) > 0).all(), seed
        assert (np.diff(found.loss) < 0).all(), seed
        for k in range(len(found.cost)):
            assert float(problem.totals(found.choice(k))[0]) == pytest.approx(found.cost[k], rel=1e-13, abs=1e-13), seed
            assert problem.total_loss(found.choice(k)) == pytest.approx(found.loss[k], rel=1e-12, abs=1e-12), seed
        # No choice lies below the line through the points.
        reached = np.interp(cost, found.cost, found.loss)
        assert (loss >= reached - 1e-9 * (1 + np.abs(reached))).all(), seed
        assert found.cost[0] == pytest.approx(cost.min())
        assert found.loss[-1] == pytest.approx(loss.min())


def test_each_plan_of_the_front_is_the_one_before_with_one_row_upgraded() -> None:
    problem = curve(30)
    found = front(problem)
    assert len(found.cost) == len(found.row) + 1 > 100
    for k, (row, before, after) in enumerate(zip(found.row, found.before, found.after, strict=True)):
        one, two = found.choice(k), found.choice(k + 1)
        assert np.flatnonzero(one != two).tolist() == [row]
        assert (one[row], two[row]) == (before, after)
        assert problem.cost[0, row, after] > problem.cost[0, row, before]
    slopes = np.diff(found.loss) / np.diff(found.cost)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[1:])).all()


@pytest.mark.parametrize("resources", [1, 2])
def test_the_exact_front_is_all_that_nothing_beats(resources: int) -> None:
    for seed in range(40):
        problem = drawn(seed, resources, whole=True)
        if not problem.offered.any(axis=1).all():
            continue
        found = exact_front(problem)
        choices = every_choice(problem)
        points = np.array([[*map(float, problem.totals(c)), problem.total_loss(c)] for c in choices])
        points = np.round(points, 9)
        expected = {
            tuple(p)
            for p in np.unique(points, axis=0)
            if not ((points <= p).all(axis=1) & (points < p).any(axis=1)).any()
        }
        assert {tuple(p) for p in np.round(np.vstack([found.cost, found.loss]).T, 9) + 0.0} == expected, seed
        for k in range(len(found.loss)):
            assert problem.total_loss(found.choice(k)) == pytest.approx(found.loss[k], rel=1e-12, abs=1e-12)
            assert [float(t) for t in problem.totals(found.choice(k))] == pytest.approx(found.cost[:, k].tolist())


def test_the_exact_front_holds_the_supported_one() -> None:
    problem = curve(12)
    supported, exact = front(problem), exact_front(problem)
    assert set(supported.cost) <= set(exact.cost[0])
    assert len(exact.loss) > len(supported.loss)


def test_fronts_refuse_what_they_cannot_hold() -> None:
    two = curve(3, resources=2)
    for ask, word in (
        (lambda: front(two), "there are 2 resources, expected one"),
        (lambda: front(Problem(np.array([[np.nan]]), np.ones((1, 1, 1)), np.ones(1))), "row '0' has no format"),
        (lambda: exact_front(two, points=10), "more than 10 totals"),
        (lambda: solve_many(two, np.ones((4, 3))), "limits of shape"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            ask()
        assert caught.value.code == "E210"


# --- many budgets


def test_many_budgets_are_answered_as_well_as_single_ones() -> None:
    problem = curve(40, 8)
    low, high = problem.least()[0], float(problem.cost[0].max(axis=1).sum())
    limits = low + (high - low) * np.linspace(-0.05, 1.05, 21)
    solutions = solve_many(problem, limits)
    assert [s.status == "infeasible" for s in solutions] == [limit < low for limit in limits]
    for limit, solution in zip(limits, solutions, strict=True):
        single = dataclasses.replace(problem, limit=np.array([limit]))
        if solution.status == "infeasible":
            assert "cheapest formats" in solution.stats["reason"]
            continue
        best = Pareto().solve(single)
        assert best.status == "optimal"
        assert single.fits(solution.choice)
        assert solution.bound <= best.loss <= solution.loss * (1 + ROUNDING)
        assert solution.loss <= best.loss * 1.02
        assert solution.prices[0] >= 0
    assert solutions[-1].prices == (0.0,)


def test_many_budgets_of_two_resources() -> None:
    problem = curve(15, 4, resources=2)
    low, high = np.array(problem.least()), problem.cost.max(axis=2).sum(axis=1)
    limits = np.array([low + (high - low) * f for f in itertools.product([0.1, 0.2, 0.4, 1.0], repeat=2)])
    limits = np.vstack([limits, [np.inf, np.inf], [np.inf, low[1]]])
    found = 0
    for limit, solution in zip(limits, solve_many(problem, limits), strict=True):
        single = dataclasses.replace(problem, limit=limit)
        best = Pareto().solve(single)
        if solution.status in ("infeasible", "unsolved"):
            assert solution.status == "unsolved" or best.status == "infeasible"
            continue
        found += 1
        assert single.fits(solution.choice)
        assert solution.bound <= best.loss <= solution.loss * (1 + ROUNDING)
    assert found >= 12


def test_many_budgets_equal_brute_force_or_say_how_far_they_are() -> None:
    for seed in range(100):
        problem = drawn(seed, 1, whole=False)
        least = problem.least()[0]
        spread = float(np.where(problem.offered, problem.cost[0], 0.0).max(axis=1).sum()) - least
        limits = least + spread * np.array([-0.1, 0.0, 0.2, 0.5, 0.9, 2.0]) if math.isfinite(least) else np.ones(2)
        for limit, solution in zip(limits, solve_many(problem, limits), strict=True):
            best = brute_force(dataclasses.replace(problem, limit=np.array([limit])))
            assert (solution.status == "infeasible") == math.isinf(best), seed
            if math.isfinite(best):
                assert solution.bound <= best, seed
                assert solution.loss >= best, seed
                if solution.status == "optimal":
                    assert solution.loss - best <= ROUNDING * abs(best), seed


def test_order_of_rows_and_scale_of_losses_do_not_matter_to_many_budgets() -> None:
    problem = curve(25, 5)
    limits = problem.limit[0] * np.array([0.9, 1.0, 1.3])
    order = np.random.default_rng(1).permutation(25)
    plain = solve_many(problem, limits)
    other = Problem(np.ldexp(problem.loss[order], -40), problem.cost[:, order], problem.limit)
    for one, two in zip(plain, solve_many(other, limits), strict=True):
        assert one.choice[order].tolist() == two.choice.tolist()
        assert two.bound == math.ldexp(one.bound, -40)


def test_prices_agree_with_what_one_more_unit_saves() -> None:
    # The budget ends two units into the second row's step, which saves 6 for 3 units.
    problem = Problem(np.array([[8.0, 0.0], [6.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 3.0]]]), np.array([4.0]))
    for solution in (*solve_many(problem, np.array([4.0])), DynamicProgramme().solve(problem), Pareto().solve(problem)):
        assert solution.prices == pytest.approx((2.0,))


def test_improving_never_loses_and_finds_the_best_pair() -> None:
    for seed in range(30):
        reduced = Reduced.of(curve(8, 4, seed=seed))
        excess, use, slack = reduced.excess, reduced.use[0], int(reduced.slack[0])
        hull = Hull.of(excess, use)
        start = hull.choice(hull.fitting(slack))
        assert use[np.arange(8), start].sum() == hull.used[hull.fitting(slack)] <= slack
        better = improve(excess, use, start, slack, hull.price(slack))
        assert use[np.arange(8), better].sum() <= slack
        total = reduced.total(better)
        assert dual_value(excess, reduced.low[0], slack, hull.price(slack)) <= total <= reduced.total(start)
        rows = np.arange(8)
        for i, j in itertools.combinations(range(8), 2):
            for f, g in itertools.product(range(4), repeat=2):
                other = better.copy()
                other[i], other[j] = f, g
                if np.isfinite(excess[rows, other]).all() and use[rows, other].sum() <= slack:
                    assert reduced.total(other) >= total - 1e-12


def check_nasty(problem: Problem, solver: Solver) -> None:
    best = min((problem.total_loss(c) for c in every_choice(problem) if problem.fits(c)), default=math.inf)
    if solver.refuses(problem):
        return
    solution = solver.solve(problem)
    assert solution.bound <= best
    if solution.status in ("infeasible", "unsolved"):
        assert solution.status == "unsolved" or math.isinf(best)
        return
    assert problem.fits(solution.choice)
    assert solution.loss >= best
    if solution.status == "optimal":
        assert solution.loss - best <= ROUNDING * abs(best)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(nasty_problems())
def test_nasty_numbers(problem: Problem) -> None:
    for solver in (DynamicProgramme(), DynamicProgramme(buckets=3), Pareto()):
        check_nasty(problem, solver)
    if len(problem.cost):
        for solution, limit in zip(solve_many(problem, problem.limit[None]), [problem.limit], strict=True):
            best = min((problem.total_loss(c) for c in every_choice(problem) if problem.fits(c)), default=math.inf)
            assert solution.bound <= best <= solution.loss
            assert len(limit) == len(solution.prices)


# --- reference tables


def table(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return data


EXACT = [DynamicProgramme(), Pareto()]


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_spdy_dynamic_programme(solver: Solver) -> None:
    data = table("spdy_dp_example")
    # In tenths, so that a sum meets a budget where it does on paper.
    cost, loss = np.round(np.array(data["times"]) * 10), np.array(data["errors"])
    for case in data["cases"]:
        solution = solver.solve(Problem(loss, cost, np.array([round(case["budget"] * 10)])))
        if case["exact"] is None:
            assert solution.status == "infeasible"
            continue
        assert solution.status == "optimal"
        assert solution.choice.tolist() == case["exact"]["choice"]
        assert solution.loss == pytest.approx(case["exact"]["objective"], rel=1e-12, abs=1e-12)


def test_spdy_buckets_never_break_the_budget() -> None:
    data = table("spdy_dp_example")
    cost, loss = np.array(data["times"]), np.array(data["errors"])
    assert any(case["dp"] and case["dp"]["exceeds_budget"] for case in data["cases"])
    for case in data["cases"]:
        problem = Problem(loss, cost, np.array([case["budget"]]))
        solution = DynamicProgramme(buckets=case["buckets"]).solve(problem)
        if case["exact"] is None:
            assert solution.status == "infeasible"
            continue
        assert problem.fits(solution.choice)
        assert solution.bound <= brute_force(problem) <= solution.loss
        # In floats too, the optimum is met where the table's own programme breaks the budget.
        assert solution.loss <= case["exact"]["objective"] + 1e-12 or case["budget"] == 19.3


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_adaquant_integer_programme(solver: Solver) -> None:
    data = table("adaquant_ip")
    size = np.array(data["params"], dtype=float)
    loss = np.stack([np.zeros(len(size)), np.maximum(data["dL_4bit"], 1e-6)], axis=1)
    cost = size[:, None] * np.array([8.0, 4.0])
    for case in data["results"]:
        solution = solver.solve(Problem(loss, cost, np.array([case["max_mean_bits"] * size.sum()])))
        assert solution.status == ("optimal" if case["feasible"] else "infeasible")
        if case["feasible"]:
            assert solution.loss == pytest.approx(case["delta_loss"], rel=1e-12)
            assert solution.choice.tolist() == case["replaced_by_4bit"]


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_modelopt_gradient_mode(solver: Solver) -> None:
    data = table("modelopt_autoquant")
    weights = sum(layer["numel"] for layer in data["layers"])
    for case in data["results"]:
        limit = case["effective_bits_target"] / 16 * weights
        solution = solver.solve(Problem(np.array(data["monotone_scores"]), np.array(data["costs"]), np.array([limit])))
        expected = case["gradient_mode_exact"]
        assert solution.status == ("infeasible" if expected is None else "optimal")
        if expected is not None:
            assert solution.loss == pytest.approx(expected["score"], rel=1e-12)
            assert [data["formats"][f] for f in solution.choice] == expected["formats"]


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_llamacpp_target_bpw(solver: Solver) -> None:
    data = table("llamacpp_target_bpw")
    size = np.array([tensor["numel"] for tensor in data["tensors"]], dtype=float)
    loss = np.array([tensor["error_per_type"] for tensor in data["tensors"]])
    cost = size[:, None] * np.array([kind["bpw"] for kind in data["types"]])
    limits = np.array([case["target_bpw"] * size.sum() for case in data["allocation"]])
    many = solve_many(Problem(loss, cost, limits[:1]), limits)
    for case, limit, quick in zip(data["allocation"], limits, many, strict=True):
        solution, expected = solver.solve(Problem(loss, cost, np.array([limit]))), case["exact"]
        assert solution.status == ("infeasible" if expected is None else "optimal")
        assert (quick.status == "infeasible") == (expected is None)
        if expected is not None:
            assert solution.loss == pytest.approx(expected["error"], rel=1e-12)
            assert [data["types"][f]["name"] for f in solution.choice] == expected["types"]
            assert quick.bound <= solution.loss <= quick.loss <= case["greedy_hull"]["error"] * (1 + 1e-12)


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_exllamav2_optimise(solver: Solver) -> None:
    data = table("exllamav2_optimize")
    size = np.array(data["numel"], dtype=float)
    options = np.array(data["options (bpw, 1-accuracy)"])
    for case in data["exact"]:
        # As in the repository, the budget is cut to a whole number of bits.
        limit = float(int(size.sum() * case["bpw"]))
        solution = solver.solve(
            Problem(options[:, :, 1] ** case["norm"], size[:, None] * options[:, :, 0], np.array([limit]))
        )
        assert solution.status == "optimal"
        assert solution.choice.tolist() == case["choice"]
        assert solution.loss == pytest.approx(case["sum_err^norm"], rel=1e-12)
        assert solution.cost[0] / size.sum() == pytest.approx(case["achieved_bpw"])


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_higgs_allocation(solver: Solver) -> None:
    data = table("higgs_grids_dp")["example"]
    size = np.array([layer["params"] for layer in data["layers"]], dtype=float)
    loss = np.outer(data["expected_alpha"], data["grid_mse"])
    for case in data["allocations"]:
        limit = case["target_bits"] * size.sum()
        solution = solver.solve(Problem(loss, np.outer(size, data["grid_bits"]), np.array([limit])))
        assert solution.status == ("optimal" if case["feasible"] else "infeasible")
        if case["feasible"]:
            assert [data["grid_n"][f] for f in solution.choice] == case["grid_n_per_layer"]
            assert solution.loss == pytest.approx(case["objective_sum_alpha_mse"], rel=1e-12)
            assert solution.cost[0] / size.sum() == pytest.approx(case["achieved_bits"])
