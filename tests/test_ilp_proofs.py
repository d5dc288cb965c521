"""What the integer programme promises, over thousands of instances; and what every solver promises on odd numbers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers import _milp
from mpsearch.solvers._marks import reduce, settle
from mpsearch.solvers._order import arrange
from mpsearch.solvers.ilp import Ilp
from mpsearch.solving import solve_problem
from mpsearch.structure import Alignment, PairTerms
from mpsearch.testing.solvers import SolverSuite
from tests.conftest import many

#: Of 250 instances each.
CHUNKS = many(8, 20)


class TestScipy(SolverSuite):
    count = 15

    @pytest.fixture
    def solver(self) -> Ilp:
        return Ilp(backend="scipy")


# --- thousands of instances against brute force


def instance(seed: int, *, aligned: bool = False) -> Problem:
    """2 to 8 rows x 2 to 4 formats, 1 to 3 budgets, in numbers whose sums are exact.

    Some losses are negative or equal, some costs zero, some cells not offered; some rows are two rows tied into one,
    some are pinned to one cell, some occur twice. About one in six has no choice that fits.
    """
    rng = np.random.default_rng([11, seed])
    rows, formats, budgets = int(rng.integers(2, 9)), int(rng.integers(2, 5)), int(rng.integers(1, 4))
    shape = (rows, formats)
    loss = (
        np.round(rng.lognormal(0, 2, shape) * 2**20) / 2**20,
        rng.integers(-4, 5, shape).astype(float),
        np.round(np.sort(rng.random(shape))[:, ::-1] * 2**30) / 2**30,
        np.round(rng.normal(size=shape) * 2**10) / 2**10,
    )[seed % 4]
    cost = (
        rng.integers(0, 7, (budgets, *shape)).astype(float),
        rng.integers(1, 500, (budgets, rows, 1)) * np.arange(1.0, formats + 1) * 1024,
        rng.integers(0, 2**34, (budgets, *shape)) / 2.0**10,
    )[int(rng.integers(3))]
    if rng.random() < 0.3:
        loss[0], cost[:, 0] = loss[0] + loss[-1], cost[:, 0] + cost[:, -1]
    if rng.random() < 0.3:
        loss[-1], cost[:, -1] = loss[0], cost[:, 0]
    if rng.random() < 0.3:
        loss[rng.random(shape) < 0.2] = np.nan
    if rng.random() < 0.3:
        loss[0, np.arange(formats) != rng.integers(formats)] = np.inf
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    limit = low + (high - low) * rng.uniform(-0.03, 0.7, budgets)
    met = cost[:, np.arange(rows), rng.integers(0, formats, rows)].sum(axis=1)
    limit = np.where(rng.random(budgets) < 0.4, met, limit)
    counts = []
    for _ in range(int(rng.integers(1, 3)) if aligned else 0):
        members = rng.permutation(rows)[: int(rng.integers(2, rows + 1))]
        columns = rng.permutation(formats)[: int(rng.integers(1, formats + 1))]
        counts.append(Alignment(tuple(members), tuple(columns), int(rng.integers(2, 4))))
    return Problem(loss, cost, limit, aligned=tuple(counts))


def best_of_all(problem: Problem) -> float:
    """Least loss of all choices, for numbers whose sums are exact."""
    cells = [np.flatnonzero(row) for row in problem.offered]

    def sums(table: np.ndarray) -> np.ndarray:
        total = np.zeros(1)
        for row, found in zip(table, cells, strict=True):
            total = (total[:, None] + row[found]).reshape(-1)
        return total

    fits = np.logical_and.reduce(
        [sums(table) <= limit for table, limit in zip(problem.cost, problem.limit, strict=True)]
    )
    for found in problem.aligned:
        counted = np.zeros(problem.loss.shape)
        counted[np.ix_(found.rows, found.formats)] = 1.0
        fits &= sums(counted) % found.multiple == 0
    return float(np.where(fits, sums(problem.loss), np.inf).min(initial=np.inf))


def check(problem: Problem, solution: Solution, what: object) -> None:
    """The answer is the optimum and says only what is true."""
    best = best_of_all(problem)
    if math.isinf(best):
        assert (solution.status, len(solution.choice), solution.bound) == ("infeasible", 0, math.inf), what
        return
    assert solution.status == "optimal", (what, solution)
    assert solution.loss == best, (what, solution)
    assert solution.bound <= best, (what, solution)
    assert solution.gap == (0.0 if solution.bound == best else (best - solution.bound) / abs(best)), what
    for r, limit in enumerate(problem.limit.tolist()):
        spent = sum(Fraction(problem.cost[r, i, f]) for i, f in enumerate(solution.choice))
        assert spent <= Fraction(limit), what
    assert all(found.holds(solution.choice) for found in problem.aligned), what


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_thousands_of_instances_equal_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(250 * chunk, 250 * (chunk + 1)):
        problem = instance(seed)
        solution = Ilp(backend=("scipy", "scipy", "scipy", "highs")[seed % 4]).solve(problem)
        check(problem, solution, seed)
        seen[solution.status] += 1
        seen["programmes"] += solution.stats.get("programmes", 0)
        assert "fallback" not in solution.stats, seed
        if solution.status == "optimal" and seed % 5 == 0:
            more = Ilp(backend="scipy").solve(dataclasses.replace(problem, limit=problem.limit * 1.1 + 1.0))
            assert more.status == "optimal", seed
            assert more.loss <= solution.loss, seed
    assert min(seen["optimal"] / 3, seen["infeasible"], seen["programmes"]) >= 20, seen


@pytest.mark.parametrize("chunk", range(many(2, 5)))
def test_thousands_of_instances_through_the_door_equal_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1000 * chunk, 1000 * (chunk + 1)):
        problem = instance(seed)
        best, solution = best_of_all(problem), solve_problem(problem)
        seen[solution.status] += 1
        assert solution.solver == "mckp", seed
        assert solution.bound <= best, seed
        if math.isinf(best):
            assert solution.status == "infeasible", seed
            continue
        assert solution.status == "optimal", seed
        assert best <= solution.loss <= best + 1e-9 * abs(best), seed
        assert problem.fits(solution.choice), seed
    assert min(seen.values()) >= 100, seen


@pytest.mark.parametrize("chunk", range(many(2, 4)))
def test_counts_that_must_be_multiples_equal_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(200 * chunk, 200 * (chunk + 1)):
        problem = instance(seed, aligned=True)
        backend = "scipy" if seed % 8 else ("highs", "cbc")[seed // 8 % 2]
        solution = Ilp(backend=backend).solve(problem)
        check(problem, solution, seed)
        seen[solution.status] += 1
        seen["programmes"] += solution.stats.get("programmes", 0)
        free = best_of_all(dataclasses.replace(problem, aligned=()))
        seen["binding"] += solution.status == "optimal" and free < solution.loss
        assert "fallback" not in solution.stats, seed
    # A count that never changes the answer would prove nothing.
    assert min(seen["optimal"], seen["infeasible"], seen["binding"]) >= 20, seen


def test_a_dominated_cell_may_be_the_one_that_makes_a_count_come_out() -> None:
    # Format 2 is worse than format 1 in everything, and the only way to an even number of formats 1 and 0.
    loss, cost = np.array([[9.0, 1.0, 2.0], [1.0, np.nan, np.nan]]), np.array([[[9.0, 1.0, 2.0], [1.0, 0.0, 0.0]]])
    plain = Problem(loss, cost, np.array([10.0]))
    counted = dataclasses.replace(plain, aligned=(Alignment((0, 1), (1,), 2),))
    assert Ilp().solve(plain).choice.tolist() == [1, 0]
    for backend in _milp.BACKENDS:
        assert Ilp(backend=backend).solve(counted).choice.tolist() == [2, 0]
    cells = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.isfinite(reduce(plain).excess).sum() == 2
    assert np.isfinite(reduce(plain, [cells]).excess).sum() == 3


def test_a_larger_count_is_settled_and_proven() -> None:
    problem = hulls(300, 2)
    tiles = tuple(Alignment(tuple(range(k, k + 50)), (0, 1, 2), 16) for k in range(0, 300, 50))
    counted = dataclasses.replace(problem, aligned=tiles)
    free, tiled = Ilp(backend="scipy").solve(problem), Ilp(backend="scipy").solve(counted)
    assert (free.status, tiled.status) == ("optimal", "optimal")
    assert not all(tile.holds(free.choice) for tile in tiles)
    assert all(tile.holds(tiled.choice) for tile in tiles)
    assert free.loss < tiled.loss < 1.2 * free.loss
    stopped = Ilp(time_limit=1e-9).solve(counted)
    assert stopped.status == "feasible"
    assert stopped.bound <= tiled.loss <= stopped.loss


def test_settling_keeps_budgets_and_says_when_it_cannot() -> None:
    problem = hulls(40, 5)
    reduced = reduce(problem)
    cheap = reduced.use.sum(axis=0).argmin(axis=1)
    cells = np.zeros(reduced.excess.shape, dtype=np.bool_)
    cells[:7, cheap[0]] = True
    settled = settle(reduced, cheap, [(cells, 5)], np.zeros(1))
    assert settled is not None
    assert reduced.fits(settled)
    assert cells[np.arange(40), settled].sum() % 5 == 0
    assert settle(reduced, cheap, [(cells & (np.arange(40) < 3)[:, None], 4)], np.zeros(1)) is not None
    everything = np.isfinite(reduced.excess)
    assert settle(reduced, cheap, [(everything, 7)], np.zeros(1)) is None


# --- the same plan whatever order and unit the rows come in


def moved(problem: Problem, order: np.ndarray, power: int = 0) -> Problem:
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return dataclasses.replace(
        problem,
        loss=np.ldexp(problem.loss[order], power),
        cost=problem.cost[:, order],
        names=tuple(problem.names[i] for i in order),
        aligned=tuple(Alignment(tuple(place[list(a.rows)]), a.formats[::-1], a.multiple) for a in problem.aligned),
    )


@pytest.mark.parametrize("chunk", range(many(2, 4)))
def test_hundreds_of_orders_and_units_give_the_same_plan(chunk: int) -> None:
    several = 0
    for seed in range(100 * chunk, 100 * (chunk + 1)):
        problem = instance(4 * seed + 1, aligned=seed % 4 == 0)
        rng = np.random.default_rng(seed)
        solver = Ilp(backend="scipy" if seed % 5 else "highs")
        plan = solver.solve(problem)
        for power in (0, int(rng.integers(-300, 300)), 0)[: 2 + seed % 2]:
            order = rng.permutation(len(problem.loss))
            other = solver.solve(moved(problem, order, power))
            assert other.status == plan.status, seed
            assert other.choice.tolist() == plan.choice[order if len(plan.choice) else []].tolist(), seed
            several += 1
    assert several == 250


def test_rows_stand_in_one_order_whatever_their_order_and_unit() -> None:
    rng = np.random.default_rng(3)
    loss, cost = rng.integers(0, 3, (40, 3)).astype(float), rng.integers(0, 2, (2, 40, 3)).astype(float)
    i, j = np.triu_indices(40, 1)
    kept = rng.random(len(i)) < 0.1
    i, j = i[kept], j[kept]
    pairs = PairTerms(i, rng.integers(0, 3, len(i)), j, rng.integers(0, 3, len(i)), rng.normal(size=len(i)))
    counts = (Alignment((3, 1, 8), (1, 0), 2), Alignment((5, 2), (2,), 3))
    problem = Problem(loss, cost, np.array([9.0, 30.0]), pairs=pairs, aligned=counts)
    first, order = arrange(problem)
    assert first.loss.tolist() == loss[order].tolist()
    choice = rng.integers(0, 3, 40)
    assert first.total_loss(choice[order]) == pytest.approx(problem.total_loss(choice), rel=1e-14)
    assert len({(*row, *costs) for row, costs in zip(loss.tolist(), cost.reshape(40, -1).tolist(), strict=True)}) > 1
    for seed in range(20):
        shuffle = np.random.default_rng(seed).permutation(40)
        place = np.argsort(shuffle)
        a, b = place[i], place[j]
        swap = a > b
        other = dataclasses.replace(
            moved(problem, shuffle, 7),
            cost=problem.cost[:, shuffle] * 8,
            pairs=PairTerms(
                np.where(swap, b, a), np.where(swap, pairs.g, pairs.f), np.where(swap, a, b),
                np.where(swap, pairs.f, pairs.g), pairs.value * 128,
            ),
        )  # fmt: skip
        again, _ = arrange(other)
        assert again.names == first.names
        assert (again.loss == 128 * first.loss).all()
        assert again.pairs is not None
        assert first.pairs is not None
        assert (again.pairs.value == 128 * first.pairs.value).all()
        assert (again.pairs.i == first.pairs.i).all()
        assert again.aligned == first.aligned


# --- shadow prices


def hulls(rows: int, seed: int, formats: int = 6) -> Problem:
    """One budget; every cell lies on the convex hull of its row."""
    rng = np.random.default_rng([5, seed])
    steps = np.cumsum(rng.integers(1, 40, (rows, formats)), axis=1)
    worth = np.sort(rng.lognormal(0, 1, (rows, formats - 1)), axis=1)[:, ::-1]
    loss = np.cumsum((worth * np.diff(steps, axis=1))[:, ::-1], axis=1)[:, ::-1]
    cost = steps[None].astype(float)
    low, high = cost.min(axis=2).sum(), cost.max(axis=2).sum()
    return Problem(np.hstack([loss, np.zeros((rows, 1))]), cost, np.array([np.floor(low + 0.4 * (high - low))]))


def relaxed(problem: Problem, more: float) -> float:
    """Optimum of the linear relaxation with more of the one budget."""
    rows, formats = problem.loss.shape
    found = linprog(
        problem.loss.ravel(),
        A_ub=problem.cost[0].reshape(1, -1),
        b_ub=problem.limit + more,
        A_eq=np.kron(np.eye(rows), np.ones(formats)),
        b_eq=np.ones(rows),
    )
    return float(found.fun)


@pytest.mark.parametrize("seed", range(6))
def test_price_lies_between_what_one_less_costs_and_one_more_saves(seed: int) -> None:
    problem = hulls(20, seed)
    rng = np.random.default_rng(seed)
    # Once where the relaxation ends on whole cells, where losing and gaining differ, and once anywhere.
    if seed % 2:
        price = Ilp().solve(problem).prices[0]
        cells = (problem.loss + price * problem.cost[0]).argmin(axis=1)
        problem = dataclasses.replace(problem, limit=problem.cost[0][np.arange(20), cells].sum(keepdims=True))
    price = Ilp().solve(problem).prices[0]
    step = float(rng.uniform(0.2, 0.9))
    here = relaxed(problem, 0.0)
    saved, lost = (here - relaxed(problem, step)) / step, (relaxed(problem, -step) - here) / step
    assert saved * (1 - 1e-7) <= price <= lost * (1 + 1e-7)
    assert saved > 0
    if not seed % 2:
        assert saved == pytest.approx(lost)


def test_prices_agree_with_solving_again() -> None:
    ratios = []
    for seed in range(8):
        problem = hulls(60, seed)
        base = Ilp(backend="scipy").solve(problem)
        for more in (20.0, 40.0, 80.0):
            again = Ilp(backend="scipy").solve(dataclasses.replace(problem, limit=problem.limit + more))
            ratios.append((base.loss - again.loss) / more / base.prices[0])
    # Single steps are whole cells, more or less than the price says; on average they agree.
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)
    assert 0.5 < min(ratios) <= max(ratios) < 1.5


# --- odd numbers, every solver

ODD = [0.0, -0.0, 5e-324, 1e-310, 1e-300, 0.1, 0.30000000000000004, 1.0, 1.0 + 2.0**-52, -1.0, 2.0**53, 1e300, 1e308]


@st.composite
def odd_problems(draw: st.DrawFn) -> Problem:
    rows, formats, budgets = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    loss = st.sampled_from([*ODD, -1e300, -1e308, math.nan, math.inf]) | st.floats(-9.0, 9.0)
    cost = st.sampled_from([*ODD, -1e300]) | st.integers(0, 9).map(float)
    cells = rows * formats
    losses = draw(st.lists(loss, min_size=cells, max_size=cells))
    costs = draw(st.lists(cost, min_size=budgets * cells, max_size=budgets * cells))
    limits = draw(st.lists(cost | st.just(math.inf), min_size=budgets, max_size=budgets))
    if rows > 1 and draw(st.booleans()):
        losses[formats : 2 * formats] = losses[:formats]
    return Problem(
        np.array(losses).reshape(rows, formats),
        np.array(costs).reshape(budgets, rows, formats),
        np.array(limits, dtype=float),
    )


@settings(max_examples=many(300, 850), deadline=None, derandomize=True, database=None)
@given(odd_problems())
def test_every_solver_gives_a_plan_or_a_typed_error(problem: Problem) -> None:
    found: dict[str, Solution] = {}
    for name in registry.names("solvers"):
        solver = registry.make("solvers", name)
        if solver.refuses(problem):
            with pytest.raises(InputError) as caught:
                solver.solve(problem)
            assert caught.value.code == "E210", name
            continue
        solution = solver.solve(problem)
        if solution.status in ("optimal", "feasible"):
            assert problem.fits(solution.choice), name
            assert solution.loss == problem.total_loss(solution.choice), name
            assert solution.bound <= solution.loss, name
            assert not math.isnan(solution.gap), name
        else:
            assert len(solution.choice) == 0, name
        found[name] = solution
    # No bound above any plan, and nothing infeasible of which another has a plan.
    best = min((solution.loss for solution in found.values()), default=math.inf)
    for name, solution in found.items():
        assert solution.bound <= best, (name, best)
        assert solution.status != "infeasible" or math.isinf(best), name
        if solution.status == "optimal":
            assert solution.loss - best <= 1e-9 * abs(best), (name, best)
