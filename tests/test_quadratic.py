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
from hypothesis import strategies as st
from scipy.optimize import minimize

from mpsearch.errors import InputError
from mpsearch.problem import Problem, Solution
from mpsearch.solvers import _milp
from mpsearch.solvers._blocks import Blocks
from mpsearch.solvers._descent import Ground
from mpsearch.solvers._sharing import Sharing
from mpsearch.solvers.ilp import Ilp
from mpsearch.solvers.quadratic import Quadratic
from mpsearch.solvers.ratios import high_impact_ratios
from mpsearch.structure import Alignment, PairTerms
from mpsearch.testing.solvers import SolverSuite, random_problem
from tests.conftest import many

DATA = Path(__file__).parent / "data"


class TestQuadratic(SolverSuite):
    count = 15

    @pytest.fixture
    def solver(self) -> Quadratic:
        return Quadratic()


def paired(seed: int, *, aligned: bool = False) -> Problem:
    """2 to 6 rows x 2 to 4 formats, 1 to 3 budgets, in numbers whose sums are exact; few or many pair terms.

    Some cells are not offered, some rows are pinned; about one in six has no choice that fits.
    """
    rng = np.random.default_rng([13, seed])
    rows, formats, budgets = int(rng.integers(2, 7)), int(rng.integers(2, 5)), int(rng.integers(1, 4))
    loss = np.round(np.sort(rng.lognormal(0, 1, (rows, formats)), axis=1)[:, ::-1] * 2**20) / 2**20
    cost = np.sort(rng.integers(0, 30, (budgets, rows, formats)), axis=2).astype(float)
    if seed % 4 == 0:
        loss[rng.random(loss.shape) < 0.2] = np.nan
    if seed % 5 == 0:
        loss[0, np.arange(formats) != rng.integers(formats)] = np.inf
    low, high = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    limit = np.floor(low + (high - low) * rng.uniform(-0.03, 0.8, budgets))
    cells = [
        (i, f, j, g)
        for i, j in itertools.combinations(range(rows), 2)
        if rng.random() < 0.7
        for f, g in itertools.product(range(formats), repeat=2)
    ]
    kept = [cell for cell in cells if rng.random() < (1.0, 0.6, 0.1)[seed % 3]]
    value = np.round(rng.normal(0, (0.1, 0.5, 2.0)[seed // 3 % 3], len(kept)) * 2**20) / 2**20
    places = np.array(kept, dtype=np.int64).reshape(-1, 4).T
    counts = []
    if aligned:
        members = rng.permutation(rows)[: int(rng.integers(2, rows + 1))]
        counts.append(Alignment(tuple(members), (int(rng.integers(formats)),), 2))
    return Problem(loss, cost, limit, pairs=PairTerms(*places, value), aligned=tuple(counts))


def best_of_all(problem: Problem) -> float:
    choices = np.array(list(itertools.product(*(np.flatnonzero(row) for row in problem.offered))), dtype=np.int64)
    if not len(choices):
        return math.inf
    rows = np.arange(len(problem.loss))
    fits = np.ones(len(choices), dtype=np.bool_)
    for table, limit in zip(problem.cost, problem.limit, strict=True):
        fits &= table[rows, choices].sum(axis=1) <= limit
    for found in problem.aligned:
        fits &= np.isin(choices[:, list(found.rows)], found.formats).sum(axis=1) % found.multiple == 0
    total = problem.loss[rows, choices].sum(axis=1)
    assert problem.pairs is not None
    p = problem.pairs
    total += ((choices[:, p.i] == p.f) & (choices[:, p.j] == p.g)) @ p.value
    return float(total[fits].min(initial=math.inf))


def check(problem: Problem, solution: Solution, best: float, what: object) -> None:
    """Whatever is said is true."""
    if solution.status in ("infeasible", "unsolved"):
        assert solution.status == "unsolved" or math.isinf(best), what
        assert solution.stats.get("lower_bound", -math.inf) <= best, what
        return
    assert problem.fits(solution.choice), what
    assert solution.bound <= best <= solution.loss, (what, solution, best)
    assert solution.loss == problem.total_loss(solution.choice), what
    if solution.status == "optimal":
        assert solution.loss - best <= 1e-9 * abs(best), (what, solution, best)


@pytest.mark.parametrize("chunk", range(many(2, 4)))
def test_equals_brute_force(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(60 * chunk, 60 * (chunk + 1)):
        problem = paired(seed)
        best, solution = best_of_all(problem), Quadratic().solve(problem)
        check(problem, solution, best, seed)
        assert solution.status == ("infeasible" if math.isinf(best) else "optimal"), (seed, solution)
        seen[solution.status] += 1
        seen["programmes"] += solution.stats.get("programmes", 0)
        assert "fallback" not in solution.stats, seed
    assert min(seen["optimal"], seen["infeasible"], seen["programmes"]) >= 5, seen


def test_local_search_is_honest_and_mostly_finds_the_optimum() -> None:
    optima = solved = 0
    for seed in range(60):
        problem = paired(seed)
        best, solution = best_of_all(problem), Quadratic(exact_terms=0).solve(problem)
        check(problem, solution, best, seed)
        if math.isfinite(best) and solution.status in ("optimal", "feasible"):
            solved += 1
            optima += solution.loss == best
            # Without terms it is the additive programme, and there is nothing to search.
            assert "terms" not in solution.stats or solution.stats["programmes"] == 0, seed
    assert solved >= 45
    assert optima >= 0.9 * solved


def test_counts_that_must_be_multiples() -> None:
    binding = 0
    for seed in range(48):
        problem = paired(seed, aligned=True)
        best, exact = best_of_all(problem), Quadratic().solve(problem)
        check(problem, exact, best, seed)
        assert exact.status == ("infeasible" if math.isinf(best) else "optimal"), (seed, exact)
        binding += best_of_all(dataclasses.replace(problem, aligned=())) < best < math.inf
        if seed % 4 == 0:
            check(problem, Quadratic(exact_terms=0).solve(problem), best, seed)
    assert binding >= 8


def test_every_backend_solves_the_linearised_programme() -> None:
    # Negative terms, positive ones and barred pairs, one cell each and many; a row with a single cell.
    rng = np.random.default_rng(4)
    objective, offered = rng.random((4, 3)), np.ones((4, 3), dtype=np.bool_)
    offered[3, 1:] = False
    many, few = rng.normal(size=(3, 3)), np.zeros((3, 3))
    many[0, 1] = few[0, 0] = math.inf
    few[2, 1] = -3.0
    single = rng.normal(size=(3, 3))
    model = _milp.Model(
        objective, offered, np.zeros((0, 4, 3), dtype=np.int64), np.zeros(0, dtype=np.int64),
        pairs=((0, 1, many), (1, 2, few), (0, 3, single)),
    )  # fmt: skip

    def total(choice: tuple[int, ...]) -> float:
        pairs = many[choice[0], choice[1]] + few[choice[1], choice[2]] + single[choice[0], choice[3]]
        return float(objective[np.arange(4), choice].sum() + pairs)

    best = min(itertools.product(range(3), range(3), range(3), [0]), key=total)
    for backend in _milp.BACKENDS:
        outcome = _milp.solve(model, backend, 10.0)
        assert (outcome.status, outcome.choice is not None and outcome.choice.tolist()) == ("optimal", list(best))
        assert outcome.bound == pytest.approx(total(best), abs=1e-6)


def test_without_pair_terms_it_is_the_additive_optimum() -> None:
    for seed in range(20):
        problem = random_problem(seed)
        empty = PairTerms([], [], [], [], [])
        one, two = Quadratic().solve(dataclasses.replace(problem, pairs=empty)), Ilp().solve(problem)
        assert one.choice.tolist() == two.choice.tolist()
        assert (one.status, one.bound, one.solver) == (two.status, two.bound, "quadratic")


def test_terms_of_cells_that_are_not_offered_count_for_nothing() -> None:
    loss = np.array([[1.0, np.nan], [1.0, 2.0]])
    pairs = PairTerms([0], [1], [1], [0], [-100.0])
    solution = Quadratic().solve(Problem(loss, np.ones((1, 2, 2)), np.array([2.0]), pairs=pairs))
    assert (solution.choice.tolist(), solution.loss, solution.status) == ([0, 0], 2.0, "optimal")


@pytest.mark.parametrize("exact_terms", [0, 20_000])
def test_order_and_unit_do_not_change_the_plan(exact_terms: int) -> None:
    solver = Quadratic(exact_terms=exact_terms)
    for seed in range(25 if exact_terms else 10):
        problem = paired(seed + 1, aligned=seed % 3 == 0)
        plan = solver.solve(problem)
        rows = len(problem.loss)
        rng = np.random.default_rng(seed)
        order, power = rng.permutation(rows), int(rng.integers(-200, 200))
        place = np.argsort(order)
        p = problem.pairs
        assert p is not None
        a, b = place[p.i], place[p.j]
        swap = a > b
        pairs = PairTerms(
            np.where(swap, b, a), np.where(swap, p.g, p.f), np.where(swap, a, b), np.where(swap, p.f, p.g),
            np.ldexp(p.value, power),
        )  # fmt: skip
        other = solver.solve(
            Problem(
                np.ldexp(problem.loss[order], power), problem.cost[:, order], problem.limit,
                names=tuple(problem.names[i] for i in order), pairs=pairs,
                aligned=tuple(Alignment(tuple(place[list(x.rows)]), x.formats, x.multiple) for x in problem.aligned),
            )
        )  # fmt: skip
        assert other.status == plan.status, seed
        if len(plan.choice):
            assert other.choice.tolist() == plan.choice[order].tolist(), seed
            assert other.bound == math.ldexp(plan.bound, power), seed


def test_more_budget_is_never_worse() -> None:
    for seed in range(0, 60, 2):
        problem = paired(seed)
        less = Quadratic().solve(problem)
        more = Quadratic().solve(dataclasses.replace(problem, limit=problem.limit + 3.0))
        if less.status == "optimal":
            assert more.status == "optimal", seed
            assert more.loss <= less.loss, seed


ODD = [0.0, -0.0, 5e-324, 1e-300, 0.1, 1.0, 1.0 + 2.0**-52, -1.0, 7.0, 1e300, -1e300]


@st.composite
def odd_problems(draw: st.DrawFn) -> Problem:
    rows, formats, budgets = draw(st.integers(2, 3)), draw(st.integers(2, 3)), draw(st.integers(0, 2))
    number = st.sampled_from(ODD) | st.floats(-9.0, 9.0)
    cells = rows * formats
    losses = draw(st.lists(number | st.just(math.nan), min_size=cells, max_size=cells))
    cost = st.sampled_from(ODD) | st.integers(0, 9).map(float)
    costs = draw(st.lists(cost, min_size=budgets * cells, max_size=budgets * cells))
    limits = draw(st.lists(cost | st.just(math.inf), min_size=budgets, max_size=budgets))
    places = [
        (i, f, j, g)
        for i, j in itertools.combinations(range(rows), 2)
        for f, g in itertools.product(range(formats), repeat=2)
    ]
    values = draw(st.dictionaries(st.sampled_from(places), number, max_size=12))
    columns = np.array(list(values), dtype=np.int64).reshape(-1, 4).T
    return Problem(
        np.array(losses).reshape(rows, formats),
        np.array(costs).reshape(budgets, rows, formats),
        np.array(limits, dtype=float),
        pairs=PairTerms(*columns, np.array(list(values.values()), dtype=float)),
    )


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(odd_problems())
def test_odd_numbers(problem: Problem) -> None:
    cells = (np.flatnonzero(row) for row in problem.offered)
    choices = (np.array(choice, dtype=np.int64) for choice in itertools.product(*cells))
    best = min((problem.total_loss(c) for c in choices if problem.fits(c)), default=math.inf)
    for exact_terms in (0, 1000):
        check(problem, Quadratic(exact_terms=exact_terms).solve(problem), best, problem)


# --- larger ones


def large(rows: int, formats: int, share: float, strength: float, seed: int = 0) -> Problem:
    """Pair terms in proportion to the square roots of both losses, of either sign, for a share of the row pairs."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(8, 2, formats)
    loss = 4.0 ** (-bits / 2) * rng.lognormal(0, 1, (rows, 1)) * rng.lognormal(0, 0.2, (rows, formats))
    cost = rng.integers(10, 200, (rows, 1)) * bits
    i, j = np.triu_indices(rows, 1)
    kept = rng.random(len(i)) < share
    i, j = i[kept], j[kept]
    value = strength * rng.normal(size=(len(i), 1, 1)) * np.sqrt(loss[i][:, :, None] * loss[j][:, None, :])
    block, f, g = np.indices(value.shape).reshape(3, -1)
    limit = cost.min(axis=1).sum() + 0.4 * (cost.max(axis=1) - cost.min(axis=1)).sum()
    return Problem(loss, cost[None], np.array([limit]), pairs=PairTerms(i[block], f, j[block], g, value.reshape(-1)))


def test_the_bound_is_nearly_tight_where_pairs_are_weak() -> None:
    problem = large(40, 4, 0.3, 0.1)
    local = Quadratic(exact_terms=0).solve(problem)
    assert local.status == "feasible"
    assert local.gap < 0.03
    exact = Quadratic().solve(problem)
    assert exact.status == "optimal"
    assert local.bound <= exact.loss <= local.loss
    assert exact.stats["cells"] < 160
    additive = Ilp(backend="scipy").solve(dataclasses.replace(problem, pairs=None))
    assert exact.loss < problem.total_loss(additive.choice)


def test_a_time_out_is_no_proof() -> None:
    problem = large(30, 4, 0.5, 1.0)
    solution = Quadratic(time_limit=0.3).solve(problem)
    assert solution.status == "feasible"
    assert problem.fits(solution.choice)
    assert solution.bound < solution.loss
    assert solution.gap == (solution.loss - solution.bound) / abs(solution.loss)


def test_sharing_keeps_every_sum_and_never_lowers_the_bound() -> None:
    problem = large(12, 3, 0.6, 1.0, seed=3)
    assert problem.pairs is not None
    blocks = Blocks.of(problem.pairs, problem.offered)
    sharing = Sharing(problem.loss, blocks)
    rng = np.random.default_rng(0)
    before = -math.inf
    for _ in range(6):
        sharing.improve(np.zeros((12, 3)), 1, math.inf)
        shared = sharing.shared()
        bound = shared.loss.min(axis=1).sum() - shared.slip
        assert bound >= before - 1e-12
        before = bound
        for _ in range(20):
            choice = rng.integers(0, 3, 12)
            rest = shared.rest[np.arange(len(blocks.first)), choice[blocks.first], choice[blocks.second]]
            rows = shared.loss[np.arange(12), choice].sum()
            assert rows + rest.sum() == pytest.approx(problem.total_loss(choice), rel=1e-12)
            assert rows - shared.slip <= problem.total_loss(choice)
    assert before > (problem.loss.min(axis=1)).sum() + blocks.value.min(axis=(1, 2)).sum()


def test_sets_of_pairs_share_no_row() -> None:
    problem = large(15, 2, 0.5, 1.0)
    assert problem.pairs is not None
    blocks = Blocks.of(problem.pairs, problem.offered)
    sets = blocks.apart()
    assert sorted(np.concatenate(sets).tolist()) == list(range(len(blocks.first)))
    for found in sets:
        rows = np.r_[blocks.first[found], blocks.second[found]]
        assert len(set(rows.tolist())) == len(rows)


def test_moves_see_pairs_and_keep_budgets() -> None:
    problem = large(14, 3, 0.6, 1.5, seed=1)
    assert problem.pairs is not None
    blocks = Blocks.of(problem.pairs, problem.offered)
    use = np.round(problem.cost * 2).astype(np.int64)
    ground = Ground(problem.loss, blocks, use, np.floor(problem.limit * 2).astype(np.int64))
    price = np.zeros(problem.loss.shape)
    start = np.full(14, 2, dtype=np.int64)
    assert ground.total(start) == pytest.approx(problem.total_loss(start), rel=1e-12)
    found = ground.descend(start, price, math.inf)
    forced = ground.force(found, price, math.inf)
    assert problem.fits(found)
    assert problem.fits(forced)
    assert problem.total_loss(forced) <= problem.total_loss(found) < problem.total_loss(start)
    # No move of one row or of two that fits is left.
    for (i, f), (j, g) in itertools.combinations_with_replacement(itertools.product(range(14), range(3)), 2):
        other = found.copy()
        other[i], other[j] = f, g
        assert not problem.fits(other) or problem.total_loss(other) >= problem.total_loss(found) - 1e-12


def test_settings_and_refusals() -> None:
    for bad in ({"exact_terms": -1}, {"exact_terms": True}, {"time_limit": 0.0}, {"time_limit": math.nan}):
        with pytest.raises(InputError, match=next(iter(bad))) as caught:
            Quadratic(**bad)  # type: ignore[arg-type]
        assert caught.value.code == "E107"
    problem = Problem(
        np.zeros((2, 2)), np.ones((1, 2, 2)), np.array([2.0]), pairs=PairTerms([0], [0], [1], [0], [1e308])
    )
    assert "pair terms" in Quadratic().refuses(problem)
    with pytest.raises(InputError, match="pair terms") as caught:
        Quadratic().solve(problem)
    assert caught.value.code == "E210"
    assert "pair terms" in Ilp().refuses(problem)


# --- the table of the paper's model


def clado() -> tuple[dict[str, Any], Problem]:
    data: dict[str, Any] = json.loads((DATA / "clado_example.json").read_text())
    formats = len(data["bits"])
    loss = np.array(data["single_dL"]).reshape(-1, formats)
    cross = np.array(data["C"])
    a, b = np.triu_indices(len(cross), 1)
    kept = (a // formats != b // formats) & (cross[a, b] != 0)
    a, b = a[kept], b[kept]
    pairs = PairTerms(a // formats, a % formats, b // formats, b % formats, cross[a, b])
    cost = np.array(data["params"], dtype=float)[:, None] * np.array(data["bits"], dtype=float)
    return data, Problem(loss, cost[None], np.array([0.0]), pairs=pairs)


@pytest.mark.parametrize("exact_terms", [0, 20_000])
def test_clado(exact_terms: int) -> None:
    data, problem = clado()
    clipped = diagonal = 0
    for case in data["cases"]:
        at = dataclasses.replace(problem, limit=np.array([float(case["budget_bits"])]))
        solution, exact = Quadratic(exact_terms=exact_terms).solve(at), case["exact"]
        if exact is None:
            assert solution.status == "infeasible"
            continue
        # Local search finds the enumerated optimum at every budget too; it cannot always prove it.
        assert [data["bits"][f] for f in solution.choice] == exact["bits"]
        assert solution.loss == pytest.approx(exact["predicted_loss"], abs=1e-12)
        assert solution.cost == (exact["size_bits"],)
        assert solution.status == "optimal" or not exact_terms
        assert solution.bound <= solution.loss
        clipped += case["psd_clipped_then_solved"]["bits"] != exact["bits"]
        diagonal += case["diagonal_only"]["bits"] != exact["bits"]
        # The diagonal model is the additive problem.
        alone = Ilp(backend="scipy").solve(dataclasses.replace(at, pairs=None))
        assert [data["bits"][f] for f in alone.choice] == case["diagonal_only"]["bits"]
    assert (len(data["cases"]), clipped, diagonal) == (11, 3, 5)


# --- ratios of high-impact weights


def test_ratios_are_optimal() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        count, rank = int(rng.integers(1, 8)), int(rng.integers(0, 8))
        root = rng.normal(size=(count, rank))
        # A part that is not symmetric changes nothing.
        skew = rng.normal(size=(count, count))
        quadratic = root @ root.T + skew - skew.T
        linear = rng.normal(size=count) * rng.choice([0.0, 1.0, 10.0])
        sizes = rng.integers(1, 100, count).astype(float)
        mean = float(rng.choice([0.0, 0.1, 0.5, 1.0, rng.random()]))
        ratios, residual = high_impact_ratios(quadratic, linear, sizes, mean)
        assert residual < 1e-8, seed
        assert ((ratios >= 0) & (ratios <= 1)).all(), seed
        assert sizes @ ratios == pytest.approx(mean * sizes.sum(), abs=1e-9 * sizes.sum()), seed

        def value(r: np.ndarray, q: np.ndarray = quadratic, c: np.ndarray = linear) -> float:
            return float(r @ q @ r + c @ r)

        other = minimize(
            value, np.full(count, mean), bounds=[(0, 1)] * count, method="SLSQP",
            constraints=[{"type": "eq", "fun": lambda r, n=sizes, m=mean: n @ r / n.sum() - m}],
            options={"ftol": 1e-12, "maxiter": 300},
        )  # fmt: skip
        assert value(ratios) <= other.fun + 1e-7 * (1 + abs(other.fun)), seed


def test_ratios_by_hand() -> None:
    # The gradient 2 q r is the same for both per weight: r = (3/4, 1/4).
    ratios, _ = high_impact_ratios(np.diag([1.0, 3.0]), np.zeros(2), np.ones(2), 0.5)
    assert ratios.tolist() == pytest.approx([0.75, 0.25])
    # Linear: the layer that gains most per weight is filled first.
    ratios, _ = high_impact_ratios(np.zeros((3, 3)), -np.array([1.0, 3.0, 2.0]), np.ones(3), 0.5)
    assert ratios.tolist() == pytest.approx([0.0, 1.0, 0.5])
    ratios, _ = high_impact_ratios(np.zeros((0, 0)), np.zeros(0), np.zeros(0), 0.5)
    assert len(ratios) == 0


def test_ratios_refuse_what_is_not_convex() -> None:
    with pytest.raises(InputError, match="not convex") as caught:
        high_impact_ratios(-np.eye(2), np.zeros(2), np.ones(2), 0.5)
    assert caught.value.code == "E210"
    # Not convex, but convex for shares of equal mean, which is all that counts.
    pair = np.array([[0.0, -1.0], [-1.0, 0.0]])
    ratios, residual = high_impact_ratios(pair, np.array([0.0, 0.5]), np.ones(2), 0.5)
    assert residual < 1e-8
    assert ratios.tolist() == pytest.approx([0.625, 0.375])
    for quadratic, sizes, mean in (
        (np.eye(2), np.ones(2), 1.5),
        (np.eye(2), np.zeros(2), 0.5),
        (np.eye(3), np.ones(2), 0.5),
        (np.full((2, 2), np.nan), np.ones(2), 0.5),
    ):
        with pytest.raises(InputError) as caught:
            high_impact_ratios(quadratic, np.zeros(2), sizes, mean)
        assert caught.value.code == "E107"
