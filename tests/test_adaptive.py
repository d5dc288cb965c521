"""Sampling until the plan is clear, against scores whose noise is known; scores that get worse with more bytes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import mpsearch as mp
from mpsearch import registry, rivals
from mpsearch.adaptive import Adaptive, Builder, Sampled, Scorer
from mpsearch.notices import order_notices
from mpsearch.planning import Planner
from mpsearch.problem import Problem, Solution
from mpsearch.spec import StudySpec
from mpsearch.tables import SensitivityTable
from mpsearch.testing.estimators import small_classifier
from tests.tiny_models import tiny, tokens

MENU = ("int2", "int3", "int4")
ROWS = 6
CHOICES = np.array(list(itertools.product(range(3), repeat=ROWS)))
#: The cells that each choice takes, in a table that is laid out row by row.
CELLS = 3 * np.arange(ROWS) + CHOICES


class Enumerate:
    """The exact optimum of a problem of six rows and three formats."""

    def refuses(self, problem: Problem) -> str:
        return ""

    def solve(self, problem: Problem) -> Solution:
        fits = (problem.cost.reshape(len(problem.cost), -1)[:, CELLS].sum(axis=2) <= problem.limit[:, None]).all(axis=0)
        if not fits.any():
            return Solution.without(problem, "infeasible", "enumerate")
        loss = np.where(fits, problem.loss.ravel()[CELLS].sum(axis=1), np.inf)
        best = CHOICES[int(loss.argmin())]
        return Solution.of(problem, best, bound=float(loss.min()), prices=[0.0], solver="enumerate", proven=True)


@pytest.fixture(autouse=True)
def enumerate_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.BUILT_IN["solvers"], "enumerate": f"{__name__}:Enumerate"}
    monkeypatch.setattr(registry, "BUILT_IN", {**registry.BUILT_IN, "solvers": known})
    monkeypatch.setattr(registry, "load", _load(registry.load))


def _load(load: Any) -> Any:
    return lambda kind, name: Enumerate if name == "enumerate" else load(kind, name)


class Bench:
    """Scores with a known truth and noise of a known size, and a budget of bits per row."""

    def __init__(self, seed: int, noise: float, bits: float = 3.0, truth: Any = None) -> None:
        sizes = np.array([2.0, 3.0, 4.0])
        scale = np.exp(np.random.default_rng(seed).standard_normal(ROWS))
        self.truth = scale[:, None] * 4.0 ** -(sizes - 2) if truth is None else np.array(truth, dtype=float)
        self.noise = noise
        self.seed = seed
        self.cost = np.tile(sizes, (ROWS, 1))
        self.limit = bits * ROWS
        self.names = tuple(f"l{i}" for i in range(ROWS))
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def score(self, names: Sequence[str], batch: int) -> SensitivityTable:
        self.asked.append((tuple(names), batch))
        rows = [self.names.index(name) for name in names]
        # What a cell scores on a batch must not depend on what else is asked for.
        errors = [np.random.default_rng([self.seed, 7, row, batch]).standard_normal(3) for row in rows]
        value = self.truth[rows] * (1 + self.noise * np.array(errors))
        return SensitivityTable(tuple(names), MENU, value, np.full(value.shape, math.nan), "nats/token")

    def build(self, table: SensitivityTable) -> Problem:
        return Problem(table.value, self.cost, np.array([self.limit]))

    def run(self, batches: int = 16, **settings: Any) -> Sampled:
        return Adaptive(solver="enumerate", **settings).sample(self.score, self.build, self.names, batches)

    def regret(self, choice: Any) -> float:
        """True regret of a choice, as a share of the least true loss."""
        exact = Problem(self.truth, self.cost, np.array([self.limit]))
        best = Enumerate().solve(exact).loss
        return (exact.total_loss(choice) - best) / best


def test_the_true_regret_stays_under_the_tolerance() -> None:
    found = []
    for seed in range(100):
        bench = Bench(seed, noise=0.2)
        sampled = bench.run(batches=24)
        found.append((bench.regret(sampled.choice), sampled.cells / sampled.full, sampled.stopped))
    regrets = np.array([regret for regret, _, _ in found])
    assert (regrets <= 0.02).mean() >= 0.9
    assert regrets.max() > 0  # the noise is large enough to matter
    assert np.mean([spent for _, spent, _ in found]) < 0.5
    assert {stopped for _, _, stopped in found} <= {"tolerance", "batches"}


def test_clear_decisions_are_left_alone() -> None:
    """Two rows compete for one upgrade and nearly tie; of the others nobody would doubt what they get."""
    truth = [
        [8, 2, 0.5],
        [8, 2, 0.5],
        [1.0, 0.25, 0.06],
        [1.02, 0.25, 0.06],
        [0.01, 0.004, 0.002],
        [0.01, 0.004, 0.002],
    ]
    bench = Bench(3, noise=0.02, bits=15 / 6, truth=truth)
    sampled = bench.run(tolerance=1e-6)
    assert sampled.batches[4:] == (3, 3)
    assert max(sampled.batches) == 16
    assert sampled.cells == 3 * sum(sampled.batches) < sampled.full == 3 * 16 * ROWS
    assert sampled.stopped == "batches"
    assert sampled.rounds[-1].doubtful < ROWS
    regrets = [found.regret for found in sampled.rounds]
    assert regrets[-1] < 0.3 * regrets[0]


def test_where_all_are_in_doubt_the_full_design_is_spent() -> None:
    bench = Bench(0, noise=1.0, truth=np.tile([1.0, 0.5, 0.1], (ROWS, 1)))
    sampled = bench.run(batches=6, tolerance=0.0)
    assert sampled.batches == (6,) * ROWS
    assert sampled.cells == sampled.full == 3 * 6 * ROWS
    assert sampled.stopped == "batches"
    # Then the table is the mean over all batches, as without sampling.
    whole = SensitivityTable.mean([bench.score(bench.names, batch) for batch in range(6)])
    assert sampled.table.value.tobytes() == whole.value.tobytes()
    assert sampled.table.spread.tobytes() == whole.spread.tobytes()
    assert sampled.table.samples == whole.samples


@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_a_budget_that_leaves_no_choice_stops_at_once(bits: float) -> None:
    sampled = Bench(1, noise=0.01 if bits == 4.0 else 5.0, bits=bits).run()
    assert len(sampled.rounds) == 1
    assert sampled.batches == (3,) * ROWS
    assert sampled.rounds[0].regret == 0.0
    assert sampled.stopped == "tolerance"
    assert set(sampled.choice.tolist()) == {0 if bits == 2.0 else 2}


def test_cells_have_the_mean_of_their_own_batches() -> None:
    bench = Bench(3, noise=0.2)
    sampled = bench.run(tolerance=0.0, batches=10)
    assert len(set(sampled.batches)) > 1
    for row, count in enumerate(sampled.batches):
        name = bench.names[row]
        assert [batch for names, batch in bench.asked if name in names] == list(range(count))
        own = SensitivityTable.mean([bench.score([name], batch) for batch in range(count)])
        assert sampled.table.value[row].tobytes() == own.value[0].tobytes()
        assert sampled.table.spread[row].tobytes() == own.spread[0].tobytes()
    assert sampled.table.samples == min(sampled.batches)


def test_the_regret_is_that_of_a_bet_between_two() -> None:
    """One upgrade for two rows whose gains are Normal: the expected loss of choosing wrongly has a closed form."""
    from scipy.stats import norm

    truth = np.tile([0.0, 0.0, 0.0], (ROWS, 1))
    truth[0], truth[1] = [5.0, 0.0, 0.0], [4.0, 0.0, 0.0]
    names = tuple(f"l{i}" for i in range(ROWS))
    spread = np.zeros((ROWS, 3))
    spread[:2, 0] = 1.0
    table = SensitivityTable(names, MENU, truth, spread, "nats/token")

    def build(scores: SensitivityTable) -> Problem:
        return Problem(scores.value, np.tile([2.0, 3.0, 4.0], (ROWS, 1)), np.array([2.0 * ROWS + 1]))

    plan, change, found = Adaptive(solver="enumerate", draws=4000)._look(table, build, 0)
    gap, deviation = 1.0, math.sqrt(2)
    expected = deviation * norm.pdf(gap / deviation) - gap * norm.sf(gap / deviation)
    assert plan.tolist()[:2] == [1, 0]
    assert abs(found.regret - expected) < 3 * found.error
    assert found.error < 0.1 * expected
    assert change[0] == pytest.approx(norm.sf(gap / deviation), abs=0.03)
    assert found.within == pytest.approx(deviation * norm.ppf(0.9) - gap, abs=0.12)


def test_the_same_answer_twice_and_another_for_another_seed() -> None:
    reports = [Bench(5, noise=0.3).run(seed=seed).report for seed in (0, 0, 1)]
    assert reports[0] == reports[1] != reports[2]
    sampled = Bench(5, noise=0.3).run()
    assert sampled.table.source["adaptive"] == sampled.report
    text = json.dumps(sampled.table.to_json(), allow_nan=False)
    assert SensitivityTable.from_json(json.loads(text)).key == sampled.table.key


@pytest.mark.parametrize("solver", ["greedy", "lagrangian", "ilp"])
def test_the_built_in_solvers_serve(solver: str) -> None:
    bench = Bench(2, noise=0.02)
    sampled = Adaptive(solver=solver, draws=16).sample(bench.score, bench.build, bench.names, 8)
    assert bench.regret(sampled.choice) <= 0.02


def test_a_format_that_is_not_offered_is_never_chosen_nor_counted() -> None:
    bench = Bench(2, noise=0.1)

    def score(names: Sequence[str], batch: int) -> SensitivityTable:
        table = bench.score(names, batch)
        value = table.value.copy()
        value[:, 1] = math.nan
        return SensitivityTable(table.layers, MENU, value, table.spread, table.unit)

    sampled = Adaptive(solver="enumerate").sample(score, bench.build, bench.names, 8)
    assert 1 not in sampled.choice
    assert sampled.full == 2 * ROWS * 8
    assert sampled.cells == 2 * sum(sampled.batches)


def test_what_cannot_be_sampled() -> None:
    for settings in (
        {"tolerance": -0.1},
        {"tolerance": math.nan},
        {"share": 1.5},
        {"confidence": "0.9"},
        {"first": 1},
        {"draws": 1},
        {"seed": True},
    ):
        with pytest.raises(mp.InputError, match="E113"):
            Adaptive(**settings)  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match="E504"):
        Bench(0, noise=0.1).run(batches=2)
    with pytest.raises(mp.InfeasibleError, match="E203"):
        Bench(0, noise=0.1, bits=1.0).run()


# mp.score with budgets


@pytest.mark.parametrize("estimator", ["divergence", "gauss_newton", "output_mse"])
def test_scores_for_a_budget(estimator: str) -> None:
    model = tiny(layers=2)
    batches = [{"input_ids": tokens(12, 16)["input_ids"][2 * i : 2 * i + 2]} for i in range(6)]
    menu = ["int8-channel", "int2-channel", "int4-channel"]
    layers = mp.layers(model)
    found = mp.score(model, batches, menu, estimator, layers=layers, budgets=["weights <= 9 bits"], doubt=0.1)
    report = found.source["adaptive"]
    assert found.formats == tuple(menu)
    assert report["full"] == 6 * 3 * len(layers.decisions)
    assert report["cells"] == 3 * sum(report["batches"].values()) <= report["full"]
    for row, name in enumerate(found.layers):
        used = report["batches"][name]
        decision = next(x for x in layers.decisions if x.name == name)
        own = [
            registry.make("estimators", estimator).score(model, [batch], decision.layers, mp_formats(menu))
            for batch in batches[:used]
        ]
        assert found.value[row] == pytest.approx(SensitivityTable.mean(own).value[0], rel=1e-6)


def mp_formats(menu: Sequence[str]) -> Any:
    from mpsearch.format import parse_formats

    return parse_formats(menu)


def test_a_loose_budget_needs_the_first_batches_only() -> None:
    model, batches, layers = small_classifier()
    menu = ["int2-channel", "int8-channel"]
    found = mp.score(model, batches, menu, layers=layers, budgets=["weights <= 31 bits"])
    assert found.source["adaptive"]["stopped"] in ("tolerance", "no doubt")
    assert set(found.source["adaptive"]["batches"].values()) == {3}


def test_budgets_of_caches_and_pairs_of_formats() -> None:
    model = tiny(layers=1)
    batches = [{"input_ids": tokens(8, 16)["input_ids"][2 * i : 2 * i + 2]} for i in range(4)]
    menu = ["kv-int8-token", "int8-channel", "kv-int4-token", "int8-channel@int8-token"]
    budgets = ["weights <= 9 bits", "kv <= 45 % at context 64"]
    found = mp.score(model, batches, menu, budgets=budgets, doubt=1.0)
    assert found.formats == tuple(menu)
    used = found.source["adaptive"]["batches"]
    assert set(used.values()) <= {3, 4}
    for count in set(used.values()):
        plain = mp.score(model, batches[:count], menu)
        assert (found.layers, found.status) == (plain.layers, plain.status)
        rows = [row for row, name in enumerate(found.layers) if used[name] == count]
        assert np.allclose(found.value[rows], plain.value[rows], rtol=1e-5, equal_nan=True)
    with pytest.raises(mp.InputError, match="E420"):
        mp.score(model, batches, menu[1:2], budgets=budgets)


def test_what_scores_for_a_budget_refuse() -> None:
    model, batches, layers = small_classifier()
    ask: dict[str, Any] = {"formats": ["int2-channel", "int4-channel"], "layers": layers}
    for estimator in ("hessian_trace", "lrp", "weight_mse"):
        with pytest.raises(mp.InputError, match="E506"):
            mp.score(model, batches, estimator=estimator, budgets=["weights <= 31 bits"], **ask)
    with pytest.raises(mp.InfeasibleError, match="E201"):
        mp.score(model, batches, budgets=["weights <= 1 bits"], **ask)
    with pytest.raises(mp.InputError, match="E504"):
        mp.score(model, batches[:2], budgets=["weights <= 31 bits"], **ask)
    with pytest.raises(mp.InputError, match="E113"):
        mp.score(model, batches, budgets=["weights <= 31 bits"], doubt=-1.0, **ask)
    with pytest.raises(mp.InputError, match="E111"):
        mp.score(model, batches, budgets=["weights <= few"], **ask)


# Scores that get worse with more bytes


def noisy() -> tuple[SensitivityTable, np.ndarray[Any, Any]]:
    value = [[4.0, 5.0, 1.0], [1.0, 1.1, 1.05], [3.0, math.nan, 4.0]]
    spread = [[0.3, 0.4, 0.1], [0.1, 0.1, 0.1], [0.1, math.nan, math.nan]]
    cost = np.array([[2.0, 3.0, 4.0], [2.0, 3.0, 3.0], [2.0, 3.0, 4.0]])
    return SensitivityTable(("a", "b", "c"), MENU, value, spread, "nats/token"), cost  # type: ignore[arg-type]


def test_increases_beyond_chance_are_named() -> None:
    table, cost = noisy()
    assert table.non_monotone(cost) == []
    found = table.non_monotone(cost, z=1.9)
    assert found == [("a", "int2", "int3", 1.0, pytest.approx(2.0))]
    # Equal costs are not compared, nor errors that are not known.
    assert [pair[:3] for pair in table.non_monotone(cost, z=0.0)] == [
        ("a", "int2", "int3"), ("b", "int2", "int3"), ("b", "int2", "int4"),
    ]  # fmt: skip


def test_clamped_scores_never_rise_with_the_cost_and_nothing_falls_below_the_least() -> None:
    table, cost = noisy()
    found = table.clamped(cost)
    assert np.array_equal(found.value, [[4.0, 4.0, 1.0], [1.0, 1.0, 1.0], [3.0, math.nan, 3.0]], equal_nan=True)
    assert np.array_equal(found.spread, [[0.3, 0.3, 0.1], [0.1, 0.1, 0.1], [0.1, math.nan, 0.1]], equal_nan=True)
    assert (found.status, found.source["clamped"]) == (table.status, "cost")
    assert found.non_monotone(cost, z=0.0) == []
    again = found.clamped(cost)
    assert np.array_equal(again.value, found.value, equal_nan=True)
    noise = np.random.default_rng(0)
    value, cost = noise.standard_normal((20, 5)), noise.permuted(np.tile(np.arange(5.0), (20, 1)), axis=1)
    random = SensitivityTable(tuple(map(str, range(20))), tuple("abcde"), value, np.zeros((20, 5)), "u").clamped(cost)
    order = cost.argsort(axis=1)
    running = np.minimum.accumulate(np.take_along_axis(value, order, axis=1), axis=1)
    assert np.array_equal(np.take_along_axis(random.value, order, axis=1), running)


def test_formats_that_round_inputs_differently_are_not_compared() -> None:
    names = ("int4@int8", "int8@int4", "int8@int8")
    table = SensitivityTable(("a",), names, [[1.0, 3.0, 2.0]], [[0.1, 0.1, 0.1]], "u")  # type: ignore[arg-type]
    cost = np.array([[4.0, 8.0, 8.0]])
    assert [pair[1:3] for pair in table.non_monotone(cost)] == [("int4@int8", "int8@int8")]
    assert table.clamped(cost).value.tolist() == [[1.0, 3.0, 1.0]]


def test_a_study_says_so_and_clamps_when_asked() -> None:
    layers = mp.layers(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
    menu = ("int2-channel", "int3-channel", "int4-channel")
    value = [[5.0, 9.0, 1.0], [5.0, 3.0, 2.0]]
    scores = SensitivityTable(("0", "1"), menu, value, np.full((2, 3), 0.1), "nats/token")  # type: ignore[arg-type]
    ask: dict[str, Any] = {"model": "m", "calibration": "c", "formats": menu, "budgets": ("weights <= 9 bits",)}
    plain, clamping = (Planner(StudySpec(**ask, clamp=clamp), layers, {"name": "m"}) for clamp in (False, True))
    (notice,) = order_notices(scores, plain.sizes)
    assert notice.code == "W517"
    assert notice.message.startswith("1 scores get worse with more bytes ('0': int3-channel by 4 nats/token")
    assert "clamp = true" in notice.message
    assert "are taken" in order_notices(scores, plain.sizes, clamp=True)[0].message
    assert order_notices(scores.clamped(plain.sizes), plain.sizes) == []
    uniform = next(x.plan for x in rivals.uniform(plain) if "int3" in x.label)
    predicted = [planner.predict(scores, uniform).predicted for planner in (plain, clamping)]
    assert [x.loss for x in predicted if x is not None] == [12.0, 8.0]


def test_a_question_without_clamping_is_the_question_it_was() -> None:
    ask: dict[str, Any] = {"model": "m", "calibration": "c", "budgets": ("4 bits",)}
    assert "clamp" not in StudySpec(**ask).question()
    question = StudySpec(**ask, clamp=True).question()
    assert question["clamp"] is True
    assert StudySpec.from_question(question, "sqlite://").clamp
    with pytest.raises(mp.InputError, match="E113"):
        StudySpec.of_values(**ask, clamp="yes")


def test_types_of_the_seams_are_exported() -> None:
    bench = Bench(0, noise=0.1)
    score: Scorer = bench.score
    build: Builder = bench.build
    assert build(score(bench.names, 0)).loss.shape == (ROWS, 3)
