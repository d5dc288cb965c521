from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsearch.errors import InfeasibleError, InputError
from mpsearch.ports import Solver
from mpsearch.problem import Problem
from mpsearch.solvers._ranked import Ladder
from mpsearch.solvers.closed_form import ClosedForm, integer_repair, water_fill
from mpsearch.solvers.double_pointer import DoublePointer
from mpsearch.solvers.dp import DynamicProgramme
from mpsearch.solvers.pareto import Pareto
from mpsearch.solvers.threshold import Threshold
from mpsearch.solvers.top_k import TopK
from mpsearch.testing.solvers import ROUNDING, SolverSuite, brute_force, random_problem

DATA = Path(__file__).parent / "data"


class TestOtherSettings(SolverSuite):
    """Every behaviour holds with settings other than those of the registry."""

    count = 20

    @pytest.fixture(params=[Threshold(by="ratio"), ClosedForm(decay=1.0)], ids=str)
    def solver(self, request: pytest.FixtureRequest) -> Solver:
        made: Solver = request.param
        return made


def baq() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / "baq_example.json").read_text())
    return data


CASES = {case["name"]: case for case in baq()["continuous"]}

# --- water-filling


@pytest.mark.parametrize("name", CASES)
def test_water_filling_is_that_of_the_table(name: str) -> None:
    case = CASES[name]
    c, budget = np.array(case["c"]), case["mean_bits"] * len(case["c"])
    filled = water_fill(c, budget)
    assert filled.bits == pytest.approx(case["bits_reverse_waterfill"], abs=1e-12)
    assert filled.loss == pytest.approx(case["objective"], rel=1e-12)
    assert (filled.bits > 0).tolist() == case["active"]
    assert c * 4.0**-filled.bits == pytest.approx(case["equal_loss_on_active"], rel=1e-9)
    assert filled.spent == pytest.approx(budget, rel=1e-14)
    assert filled.stationarity < 1e-12
    assert filled.overrun < 1e-14
    if case["all_nonnegative"]:
        assert filled.bits == pytest.approx(case["bits_closed_form_unclipped"], abs=1e-12)
        assert filled.loss / case["uniform_objective"] == pytest.approx(case["gain_GM_over_AM"])
    else:
        # Clipped but not filled again, the formula breaks the budget.
        assert np.maximum(case["bits_closed_form_unclipped"], 0).sum() > budget + 0.1


@pytest.mark.parametrize("name", CASES)
def test_whole_bits_are_those_of_the_table(name: str) -> None:
    case = CASES[name]
    exact = case["integer_bits_exact"]
    bits = integer_repair(case["c"], float(exact["budget_total_bits"]))
    assert bits.tolist() in exact["optimal_solutions"]
    assert (np.array(case["c"]) * 4.0**-bits).sum() == pytest.approx(exact["objective"], rel=1e-12)


def test_rounding_levels_instead_of_bits_breaks_the_budget() -> None:
    rule = baq()["repo_rule"]
    c = np.array(rule["column_loss"])
    budget = rule["R_ref"] * float(len(c))
    # The rule of the repository is the formula with its own decay, its levels rounded and clamped at one.
    free = water_fill(c, budget, low=-10.0, decay=rule["th"])
    levels = np.maximum(1, np.round(2.0**free.bits))
    assert levels.tolist() == rule["levels"]
    assert np.log2(levels).mean() == pytest.approx(rule["mean_bits"])
    assert rule["mean_bits"] > rule["R_ref"]
    assert water_fill(c, budget, decay=rule["th"]).spent == pytest.approx(budget, rel=1e-14)
    assert integer_repair(c, budget, decay=rule["th"]).sum() == budget


def test_water_filling_meets_its_conditions_for_any_weights_and_ends() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rows = int(rng.integers(1, 40))
        c = rng.lognormal(0, 6, rows) * (rng.random(rows) > 0.15)
        n = rng.integers(1, 2000, rows) * 64.0 if seed % 2 else rng.lognormal(0, 2, rows)
        low = rng.integers(0, 3, rows) * 1.0
        high = low + rng.choice([0.0, 1.0, 5.0, np.inf], rows)
        decay = float(rng.uniform(0.5, 3))
        least, most = float(n @ low), float(n @ np.minimum(high, 12.0))
        budget = least + (most - least) * float(rng.choice([0.0, 1e-9, 0.3, 0.8, 1.0, 1.5]))
        filled = water_fill(c, budget, weights=n, low=low, high=high, decay=decay)
        assert (filled.bits >= low).all(), seed
        assert (filled.bits <= high).all(), seed
        assert filled.stationarity <= 1e-9, seed
        assert filled.overrun <= 1e-12, seed
        assert (filled.bits[c == 0] == low[c == 0]).all(), seed
        # The dual of a convex problem: no amounts within the budget lose less than this.
        price, marginal = filled.price, n * c * decay * math.log(2) * 2.0 ** (-decay * filled.bits)
        inside = (filled.bits > low + 1e-9) & (filled.bits < high - 1e-9)
        at_low, at_high = (filled.bits == low) & (low < high), (filled.bits == high) & (low < high) & (c > 0)
        assert marginal[inside] == pytest.approx(price * n[inside], rel=1e-6), seed
        assert (marginal[at_low] <= price * n[at_low] * (1 + 1e-6)).all(), seed
        assert (marginal[at_high] >= price * n[at_high] * (1 - 1e-6)).all(), seed


def test_water_filling_at_both_ends_of_the_budget() -> None:
    c, n = np.array([5.0, 1.0, 0.0]), np.array([1.0, 3.0, 2.0])
    cheapest = water_fill(c, 12.0, weights=n, low=2.0, high=8.0)
    assert cheapest.bits.tolist() == [2.0, 2.0, 2.0]
    assert cheapest.price > 0
    # Whatever a row without loss gets is wasted: it stays at its fewest bits.
    fullest = water_fill(c, 100.0, weights=n, low=2.0, high=8.0)
    assert (fullest.bits.tolist(), fullest.price, fullest.spent) == ([8.0, 8.0, 2.0], 0.0, 36.0)
    assert water_fill([0.0, 0.0], 4.0).bits.tolist() == [0.0, 0.0]
    assert water_fill([], 0.0).bits.tolist() == []
    with pytest.raises(InfeasibleError, match=r"12\.0 together, the budget is 11\.9"):
        water_fill(c, 11.9, weights=n, low=2.0)
    with pytest.raises(InfeasibleError, match="2 bits for every row"):
        integer_repair(c, 11.9, weights=n, low=2)


def test_water_filling_of_many_columns() -> None:
    rng = np.random.default_rng(0)
    c = rng.lognormal(0, 3, 100_000)
    filled = water_fill(c, 300_000.0, high=8.0)
    assert filled.spent == pytest.approx(300_000.0, rel=1e-12)
    assert filled.stationarity < 1e-9
    whole = integer_repair(c, 300_000.0)
    assert whole.sum() == 300_000
    # Whole bits cannot do better than real ones, and rounding costs little.
    assert filled.loss <= (c * 4.0**-whole).sum() <= 1.3 * filled.loss


def test_numbers_out_of_range_are_refused() -> None:
    for c, more, word in (
        ([[1.0]], {}, "shape"),
        ([-1.0], {}, "coefficients must be finite"),
        ([math.nan], {}, "coefficients must be finite"),
        ([1.0], {"weights": 0.0}, "weights must be finite"),
        ([1.0], {"low": 2.0, "high": 1.0}, "the fewest bits"),
        ([1.0], {"decay": 0.0}, "decay must be above 0"),
    ):
        with pytest.raises(ValueError, match=word):
            water_fill(c, 3.0, **more)


def test_whole_bits_of_equal_weight_are_exact() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        c, budget = rng.lognormal(0, 3, 5), float(rng.integers(0, 21)) + 0.5
        choices = np.array(list(itertools.product(range(5), repeat=5)))
        losses = (c * 4.0**-choices).sum(axis=1)[choices.sum(axis=1) <= budget]
        bits = integer_repair(c, budget, high=4)
        assert bits.sum() <= budget
        assert (c * 4.0**-bits).sum() == pytest.approx(losses.min(), rel=1e-12), seed


def test_whole_bits_pass_over_rows_that_do_not_fit() -> None:
    # The first row saves most per weight but does not fit; the second one takes all there is.
    assert integer_repair([100.0, 1.0], 5.0, weights=[6.0, 1.0]).tolist() == [0, 5]


@pytest.mark.parametrize("name", CASES)
def test_closed_form_over_a_table_of_bits(name: str) -> None:
    case = CASES[name]
    exact = case["integer_bits_exact"]
    bits = np.arange(9.0)
    loss = np.array(case["c"])[:, None] * 4.0**-bits
    problem = Problem(loss, np.tile(bits, (1, len(loss), 1)), np.array([float(exact["budget_total_bits"])]))
    solution = ClosedForm().solve(problem)
    assert solution.loss == pytest.approx(exact["objective"], rel=1e-12)
    assert solution.choice.tolist() in exact["optimal_solutions"]
    assert solution.stats["stationarity"] < 1e-9


def test_closed_form_finds_each_rows_own_decay() -> None:
    rng = np.random.default_rng(4)
    bits, size = np.linspace(2, 8, 13), rng.integers(1, 400, (60, 1)) * 64.0
    rate = rng.uniform(0.8, 2.5, (60, 1))
    loss = rng.lognormal(0, 2, (60, 1)) * 2.0 ** (-rate * bits)
    cost = size * bits / 8
    low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    for share in (0.1, 0.4, 0.7):
        problem = Problem(loss, cost, np.array([low + share * (high - low)]))
        solution = ClosedForm().solve(problem)
        assert solution.gap < 0.05, share
        # Every row on its own law alone: without rounding the level is the same for all.
        assert solution.stats["stationarity"] < 1e-9


def test_closed_form_takes_losses_without_logarithm() -> None:
    loss = np.array([[4.0, 1.0, 0.0], [0.0, -1.0, -2.0], [0.0, 0.0, 0.0], [1e-320, 0.0, -1e-320]])
    problem = Problem(loss, np.tile([1.0, 2.0, 3.0], (1, 4, 1)), np.array([7.0]))
    solution = ClosedForm().solve(problem)
    assert solution.cost[0] <= 7.0
    assert solution.bound <= brute_force(problem) <= solution.loss <= problem.total_loss(np.zeros(4, dtype=np.int64))


# --- threshold


def two(loss: list[list[float]], cost: list[list[float]], limit: float) -> Problem:
    return Problem(np.array(loss), np.array([cost]), np.array([limit]), formats=("int4", "int8"))


def test_threshold_gives_the_large_format_to_the_most_sensitive_rows() -> None:
    loss = [[3.0, 0.0], [9.0, 8.0], [5.0, 1.0], [1.0, 0.0]]
    cost = [[1.0, 2.0]] * 4
    for limit, by_worst, by_ratio in (
        (4.0, [0, 0, 0, 0], [0, 0, 0, 0]),
        (5.0, [0, 1, 0, 0], [0, 0, 1, 0]),
        (6.9, [0, 1, 1, 0], [1, 0, 1, 0]),
        (8.0, [1, 1, 1, 1], [1, 1, 1, 1]),
    ):
        assert Threshold().solve(two(loss, cost, limit)).choice.tolist() == by_worst
        assert Threshold(by="ratio").solve(two(loss, cost, limit)).choice.tolist() == by_ratio


def test_threshold_by_ratio_weighs_what_a_row_costs() -> None:
    problem = two([[4.0, 0.0], [3.0, 0.0]], [[0.0, 8.0], [0.0, 1.0]], 8.0)
    assert Threshold().solve(problem).choice.tolist() == [1, 0]
    assert Threshold(by="ratio").solve(problem).choice.tolist() == [0, 1]


def test_threshold_takes_the_most_rows_that_fit_whatever_is_between() -> None:
    # The large format is slower for the first row and faster for the second: one alone breaks the budget, both do not.
    cost = np.array([[[1.0, 2.0], [1.0, 2.0]], [[1.0, 3.0], [3.0, 1.0]]])
    problem = Problem(np.array([[5.0, 0.0], [1.0, 0.0]]), cost, np.array([4.0, 4.0]))
    assert Threshold().solve(problem).choice.tolist() == [1, 1]
    # With no room in the first budget for either, and one of the second: the search goes all the way down.
    tight = Problem(problem.loss, cost, np.array([3.0, 4.0]))
    assert Threshold().solve(tight).choice.tolist() == [0, 0]


def test_threshold_checks_budgets_exactly() -> None:
    # In floats 0.1 + 0.2 is above 0.3, and so is the sum of the numbers that those floats are.
    cost = [[0.0, 0.1], [0.0, 0.2]]
    assert Threshold().solve(two([[2.0, 0.0], [1.0, 0.0]], cost, 0.3)).choice.tolist() == [1, 0]
    assert Threshold().solve(two([[2.0, 0.0], [1.0, 0.0]], cost, 0.1 + 0.2)).choice.tolist() == [1, 1]


def test_formats_are_named_or_chosen_by_loss() -> None:
    rng = np.random.default_rng(1)
    loss = np.sort(rng.lognormal(0, 2, (12, 4)), axis=1)[:, ::-1]
    cost = np.tile([2.0, 3.0, 4.0, 8.0], (1, 12, 1))
    problem = Problem(loss, cost, np.array([45.0]), formats=("int2", "int3", "int4", "int8"))
    for made in (Threshold, TopK):
        losses = {}
        for small, large in itertools.combinations(problem.formats, 2):
            solution = made(small=small, large=large).solve(problem)
            if len(solution.choice):
                assert {problem.formats[f] for f in solution.choice} <= {small, large}
                losses[small, large] = solution.loss
        assert made().solve(problem).loss == min(losses.values())
        assert made(small="int2").solve(problem).loss == min(v for k, v in losses.items() if k[0] == "int2")
        assert made(small=0, large=3).solve(problem).loss == losses["int2", "int8"]


def test_rows_without_both_formats_take_what_they_are_offered() -> None:
    nan = np.nan
    loss = np.array([[5.0, nan, 1.0], [nan, 2.0, 1.0], [nan, 3.0, nan], [4.0, 9.0, nan]])
    problem = Problem(loss, np.tile([1.0, 2.0, 3.0], (1, 4, 1)), np.array([9.0]))
    for made in (Threshold(small=0, large=2), TopK(small=0, large=2)):
        # The second row is offered the large one only, the third neither, the last the small one only.
        assert made.solve(problem).choice.tolist() == [2, 2, 1, 0]


# --- top_k


def test_top_k_sorts_by_what_is_saved() -> None:
    loss = [[3.0, 0.0], [9.0, 8.0], [5.0, 1.0], [1.0, 0.0]]
    assert TopK().solve(two(loss, [[1.0, 2.0]] * 4, 6.0)).choice.tolist() == [1, 0, 1, 0]


def test_top_k_is_optimal_for_two_formats_and_equal_rows() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        loss = rng.random((9, 2))
        loss[:, 1] = np.minimum(loss[:, 1], loss[:, 0])
        problem = Problem(loss, np.tile([1.0, 2.0], (1, 9, 1)), np.array([9.0 + rng.integers(0, 10)]))
        assert TopK().solve(problem).loss == pytest.approx(brute_force(problem), rel=1e-12)


def test_top_k_percent_counts_rows_or_cost() -> None:
    # Rows of unequal length: the two that save most hold nearly all.
    loss = [[9.0, 0.0], [8.0, 0.0], [7.0, 0.0], [6.0, 0.0]]
    cost = [[45.0, 90.0], [3.0, 6.0], [1.0, 2.0], [1.0, 2.0]]
    problem = two(loss, cost, 1000.0)
    choices = {
        (percent, counts): TopK("int4", "int8", percent, counts).solve(problem).choice.tolist()
        for percent in (0, 49, 50, 92, 100)
        for counts in ("rows", "cost")
    }
    assert choices[0, "rows"] == choices[0, "cost"] == [0, 0, 0, 0]
    assert (choices[49, "rows"], choices[49, "cost"]) == ([1, 0, 0, 0], [0, 0, 0, 0])
    assert (choices[50, "rows"], choices[92, "rows"]) == ([1, 1, 0, 0], [1, 1, 1, 0])
    assert choices[92, "cost"] == [1, 0, 0, 0]
    assert choices[100, "rows"] == choices[100, "cost"] == [1, 1, 1, 1]


def test_top_k_share_that_does_not_fit_is_unsolved_not_changed() -> None:
    problem = two([[3.0, 0.0], [2.0, 0.0]], [[1.0, 2.0]] * 2, 3.0)
    assert TopK("int4", "int8", percent=100).solve(problem).status == "unsolved"
    assert TopK("int4", "int8", percent=50).solve(problem).choice.tolist() == [1, 0]
    assert TopK("int4", "int8").solve(problem).choice.tolist() == [1, 0]


def test_top_k_percent_is_cut_as_in_the_paper() -> None:
    loss, cost = np.tile([1.0, 0.0], (100, 1)), np.tile([1.0, 2.0], (1, 100, 1))
    for percent in range(0, 101, 7):
        solution = TopK(0, 1, percent=percent).solve(Problem(loss, cost, np.array([200.0])))
        assert solution.choice.sum() == 100 * percent // 100


# --- double_pointer


def steps(loss: list[list[float]], limit: float, cost: list[float] | None = None) -> Problem:
    table = np.array(loss)
    per_row = np.array(cost or [2.0, 3.0, 4.0])
    return Problem(table, np.tile(per_row, (1, len(table), 1)), np.array([limit]), formats=("int2", "int3", "int4"))


def test_as_many_rows_go_up_as_go_down() -> None:
    loss = [[90.0, 40.0, 10.0], [0.3, 0.2, 0.1], [9.0, 5.0, 1.0], [3.0, 2.5, 2.0], [6.0, 2.0, 1.0]]
    solution = DoublePointer(base="int3").solve(steps(loss, 15.0))
    assert solution.choice.tolist() == [2, 0, 2, 0, 1]
    assert solution.cost == (15.0,)


def test_the_number_of_pairs_is_the_best_of_all() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        loss = np.sort(rng.lognormal(0, 1.5, (9, 3)), axis=1)[:, ::-1]
        problem = steps(loss.tolist(), 27.0)
        solution = DoublePointer(base=1, low=0, high=2).solve(problem)
        order = np.argsort(loss[:, 2] - loss[:, 0])
        losses = []
        for k in range(5):
            choice = np.ones(9, dtype=np.int64)
            choice[order[:k]], choice[order[9 - k :]] = 2, 0
            losses.append(problem.total_loss(choice))
        assert solution.loss == min(losses), seed
        assert solution.cost == (27.0,)


def test_the_base_is_the_one_of_least_loss_that_fits() -> None:
    loss = [[9.0, 4.0, 1.0], [3.0, 1.0, 0.5], [1.0, 0.5, 0.2]]
    for limit, mean in ((6.0, 2.0), (8.9, 2.0), (9.0, 3.0), (12.0, 4.0)):
        assert sum(DoublePointer().solve(steps(loss, limit)).cost) == 3 * mean
    assert DoublePointer(base="int3").solve(steps(loss, 8.9)).status == "unsolved"
    assert DoublePointer().solve(steps(loss, 5.9)).status == "infeasible"


def test_pairs_that_break_the_budget_are_left_out() -> None:
    # The step up costs more than the step down gives back.
    problem = steps([[9.0, 8.0, 1.0], [1.0, 0.9, 0.8], [2.0, 1.5, 1.0]], 9.0, [2.0, 3.0, 7.0])
    assert DoublePointer(base=1).solve(problem).choice.tolist() == [1, 1, 1]


def test_rows_without_the_three_formats_stay_near_the_base() -> None:
    nan = np.nan
    loss = [[9.0, 4.0, 1.0], [5.0, nan, 0.5], [nan, nan, 0.2], [1.0, 0.5, nan], [0.2, 0.1, 0.0]]
    solution = DoublePointer(base=1).solve(steps(loss, 100.0))
    # Of two equally near formats the cheaper one; rows 0 and 4 are a pair.
    assert solution.choice.tolist() == [2, 0, 2, 1, 0]


# --- all of them


BASELINES: list[Solver] = [Threshold(), Threshold(by="ratio"), TopK(), DoublePointer(), ClosedForm()]


@pytest.mark.parametrize("solver", BASELINES, ids=str)
def test_baselines_are_honest(solver: Solver) -> None:
    found = optimal = 0
    for seed in range(80):
        problem = random_problem(seed)
        if solver.refuses(problem):
            continue
        best, solution = brute_force(problem), solver.solve(problem)
        assert solution.bound <= best, seed
        if solution.status in ("infeasible", "unsolved"):
            assert solution.status == "unsolved" or math.isinf(best), seed
            continue
        found += 1
        assert problem.fits(solution.choice), seed
        assert solution.loss >= best - ROUNDING * abs(best), seed
        if solution.status == "optimal":
            optimal += 1
            assert solution.loss - best <= ROUNDING * abs(best), seed
    # They are baselines: they find plans, and are seldom the best.
    assert found >= 15
    assert optimal < found


@pytest.mark.parametrize("solver", [*BASELINES, DynamicProgramme(), DynamicProgramme(50), Pareto()], ids=str)
def test_order_of_rows_and_scale_of_losses_do_not_change_the_plan(solver: Solver) -> None:
    compared = 0
    for seed in range(60):
        problem = random_problem(seed, rows=9)
        if solver.refuses(problem):
            continue
        order = np.random.default_rng(seed).permutation(len(problem.loss))
        other = Problem(np.ldexp(problem.loss[order], seed - 30), problem.cost[:, order], problem.limit)
        one, two_ = solver.solve(problem), solver.solve(other)
        assert one.status == two_.status, seed
        if len(one.choice):
            compared += 1
            assert one.choice[order].tolist() == two_.choice.tolist(), seed
    assert compared >= 10


def test_a_ladder_is_checked_exactly_where_floats_are_too_close() -> None:
    # Ten tenths in floats are above 1 in exact arithmetic.
    problem = Problem(np.tile([1.0, 0.0], (10, 1)), np.tile([0.0, 0.1], (1, 10, 1)), np.array([1.0]))
    ladder = Ladder(np.zeros(10, dtype=np.int64), np.arange(10), np.ones(10, dtype=np.int64))
    choice = ladder.first_that_fits(problem, range(10, -1, -1))
    assert choice is not None
    assert choice.sum() == 9
    assert ladder.totals(problem.loss).tolist() == [10.0 - k for k in range(11)]


def test_settings_are_checked() -> None:
    for make, word in (
        (lambda: Threshold(by="best"), "by is 'best'"),  # type: ignore[arg-type]
        (lambda: Threshold(small=-1), "small is -1"),
        (lambda: TopK(percent=101), "percent is 101"),
        (lambda: TopK(percent=math.nan), "percent is nan"),
        (lambda: TopK(counts="bytes"), "counts is 'bytes'"),  # type: ignore[arg-type]
        (lambda: DoublePointer(high=-2), "high is -2"),
        (lambda: ClosedForm(decay=0.0), r"decay is 0\.0"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            make()
        assert caught.value.code == "E107"


def test_formats_that_a_problem_lacks_are_refused() -> None:
    problem = two([[3.0, 0.0]], [[1.0, 2.0]], 3.0)
    for solver in (Threshold(small="int2"), TopK(large=2), DoublePointer(base="nf4")):
        assert "it has no format" in solver.refuses(problem)
        with pytest.raises(InputError, match="int4, int8") as caught:
            solver.solve(problem)
        assert caught.value.code == "E210"
    free = Problem(problem.loss, np.zeros((0, 1, 2)), np.zeros(0))
    assert "no resource" in TopK(percent=10, counts="cost").refuses(free)
    assert "takes 1" in ClosedForm().refuses(Problem(problem.loss, np.ones((2, 1, 2)), np.ones(2)))
