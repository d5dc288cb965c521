"""Searchers on measured losses: the suite by registry name, what they find, and searching in a study."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpsearch as mp
from mpsearch import registry
from mpsearch.cli.main import run
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.evaluate.first import First
from mpsearch.optuna_trials import database_url
from mpsearch.ports import Searcher
from mpsearch.problem import Problem
from mpsearch.searching import Searched, drive
from mpsearch.solvers import _search, _switches
from mpsearch.solvers._posterior import Posterior
from mpsearch.solvers._spaces import Plans, Weights
from mpsearch.solvers.bisection import Bisection
from mpsearch.solvers.evolve import Evolve
from mpsearch.solvers.optuna_search import Optuna
from mpsearch.solvers.refine import Refine
from mpsearch.solvers.surrogate import Surrogate, features, rows
from mpsearch.structure import PairTerms
from mpsearch.testing.searchers import SearcherSuite, Truth, truth
from mpsearch.trials import Seen, Trial
from tests.conftest import study_settings

NAMES = registry.names("searchers")
SETTINGS: dict[str, dict[str, Any]] = {"bisection": {"target": 2.0}, "evolve": {"offspring": 8, "survivors": (3, 1)}}


class TestEveryName(SearcherSuite):
    @pytest.fixture(params=[name for name in NAMES if name != "bisection"])
    def searcher(self, request: pytest.FixtureRequest) -> Searcher:
        settings = {"evaluations": self.evaluations, **SETTINGS.get(request.param, {})}
        made: Searcher = registry.make("searchers", request.param, **settings)
        return made


class TestPublished(SearcherSuite):
    evaluations = 40

    @pytest.fixture
    def searcher(self) -> Searcher:
        return Evolve(evaluations=self.evaluations, schedule="published", offspring=10, survivors=(4, 2))


class TestNsga(SearcherSuite):
    @pytest.fixture(params=["plan", "weights"])
    def searcher(self, request: pytest.FixtureRequest) -> Searcher:
        return Optuna(evaluations=self.evaluations, sampler="nsga2", space=request.param, startup=6)


class TestBisection(SearcherSuite):
    @pytest.fixture
    def searcher(self) -> Searcher:
        return Bisection(evaluations=self.evaluations, target=2.0)

    def settled(self, searcher: Any, problem: Problem, seen: Sequence[Seen]) -> Seen | None:
        found: Seen | None = searcher.best(problem, seen)
        return found

    def better(self, problem: Problem, found: Seen, start: Seen) -> bool:
        cheaper = problem.totals(np.array(found.trial.choice)) <= problem.totals(np.array(start.trial.choice))
        return cheaper and found.loss <= max(2.0, start.loss)


def test_every_name_of_the_registry_is_run() -> None:
    assert set(registry.BUILT_IN["searchers"]) <= set(NAMES)
    for suite in (TestEveryName, TestPublished, TestNsga, TestBisection):
        assert not {mark.name for mark in getattr(suite, "pytestmark", [])} & {"skip", "skipif", "xfail"}


# --- what they find


def ends(world: Truth, searcher: Searcher) -> tuple[float, float, int]:
    """True loss of the first whole plan and of the best one, and how many measurements it took."""
    seen = drive(world.problem, searcher, world.measure, 10_000)
    whole = [item for item in seen if not item.trial.batches]
    best = min(whole, key=lambda item: item.loss)
    return world.of(whole[0].trial.choice), world.of(best.trial.choice), len(seen)


def test_refine_lowers_the_true_loss_where_rows_interact() -> None:
    gains, used = [], []
    for seed in range(4):
        start, best, count = ends(truth(seed, rows=20), Refine(evaluations=60))
        gains.append(1 - best / start)
        used.append(count)
    assert max(used) <= 60
    assert min(gains) >= 0
    assert np.mean(gains) > 0.05


def test_refine_ends_early_where_the_prediction_is_right() -> None:
    world = truth(3, interaction=0.0, noise=0.0)
    exact = Truth(Problem(world.loss, world.problem.cost, world.problem.limit), world.loss, world.pair)
    start, best, count = ends(exact, Refine(evaluations=200, tolerance=0.02))
    assert best == start
    assert count < 60


def test_the_corrected_losses_tend_to_the_true_ones() -> None:
    world = truth(1, interaction=0.0, noise=0.0)
    rng = np.random.default_rng(0)
    start = np.full(12, 2)
    choices = [start, *(np.clip(start + rng.integers(-1, 2, 12), 0, 4) for _ in range(60))]
    seen = world.measure([Trial(tuple(choice.tolist())) for choice in choices])
    posterior = Posterior.of(world.problem, seen[0], seen)
    moves = [start + np.eye(12, dtype=np.int64)[i] * step for i, step in itertools.product(range(12), (-1, 1))]
    true = np.array([world.of(move.tolist()) - world.of(start.tolist()) for move in moves])
    scale = world.of(start.tolist()) / float(world.problem.loss[np.arange(12), start].sum())
    prior = np.array([scale * (world.problem.loss[np.arange(12), m] - world.problem.loss[:, 2]).sum() for m in moves])
    mean, covariance = posterior.look(moves)
    fitted = mean - posterior.level
    assert np.abs(fitted - true).sum() < 0.2 * np.abs(prior - true).sum()
    assert (np.linalg.eigvalsh(covariance) > -1e-9).all()
    alone = Posterior.of(world.problem, seen[0], seen[:1])
    assert np.allclose(alone.look(moves)[0] - alone.level, prior)
    drawn = np.mean([posterior.drawn(np.random.default_rng(k)) for k in range(400)], axis=0)
    assert np.abs(drawn - posterior.mean).max() < 0.2 * posterior.kernel.width.max()


@pytest.mark.parametrize(
    ("searcher", "gain"),
    [
        (Evolve(evaluations=300, seed=1), 0.04),
        (Optuna(evaluations=40, seed=1), 0.01),
        (Surrogate(evaluations=40, seed=1), 0.03),
    ],
    ids=["evolve", "optuna", "surrogate"],
)
def test_searchers_lower_the_true_loss(searcher: Searcher, gain: float) -> None:
    found = [ends(truth(seed, noise=0.02), searcher) for seed in (0, 2)]
    assert np.mean([1 - best / start for start, best, _ in found]) > gain


# --- evolution as published


def test_published_generations_are_as_published() -> None:
    made = Evolve(schedule="published")
    assert (made.generations, made.offspring, made.survivors, made.batches) == (150, 128, (16, 4), (1, 8, 0))
    world = truth(0)
    searcher = Evolve(schedule="published", evaluations=10_000, generations=3)
    seen = drive(world.problem, searcher, world.measure, 10_000)
    runs = [(level, len(list(group))) for level, group in itertools.groupby(item.trial.batches for item in seen)]
    assert [level for level, _ in runs] == [0, 1, 8, 0, 1, 8, 0, 1, 8, 0]
    assert runs[0] == (0, 1)
    assert all(count <= {1: 128, 8: 16, 0: 4}[level] for level, count in runs)
    assert runs[1:4] == [(1, 128), (8, 16), (0, 4)]
    # Bits never move between sizes: rows of one size keep what they had in all.
    sizes = world.problem.cost[0, :, 0]
    totals = {tuple(sum(np.array(item.trial.choice)[sizes == size]) for size in np.unique(sizes)) for item in seen}
    assert len(totals) == 1
    # The parent of each generation is the best so far, and children differ from it in 1 to 6 rows.
    first, parent = seen[0], min((item for item in seen[:149] if not item.trial.batches), key=lambda x: x.loss)
    for children, origin in ((seen[1:129], first), (seen[149:200], parent)):
        moved = {sum(a != b for a, b in zip(x.trial.choice, origin.trial.choice, strict=True)) for x in children}
        assert moved <= {2, 3, 4, 5, 6}


def test_survivors_are_those_of_least_loss() -> None:
    world = truth(4)
    seen = drive(world.problem, Evolve(evaluations=33, seed=2), world.measure, 33)
    screened = sorted((item for item in seen if item.trial.batches == 1), key=lambda item: item.loss)
    assert [x.trial.choice for x in seen if x.trial.batches == 8] == [x.trial.choice for x in screened[:6]]


def test_bits_move_between_sizes_and_budgets_stay_full() -> None:
    world = truth(5)
    levels = _switches.Levels(world.problem)
    parent = _search.solved(world.problem)
    assert parent is not None
    sizes = world.problem.cost[0, :, 0]
    children = list(itertools.islice(_switches.between(world.problem, levels, parent, np.random.default_rng(0)), 50))
    assert all(world.problem.fits(child) for child in children)
    assert len({tuple(sum(child[sizes == size]) for size in np.unique(sizes)) for child in children}) > 5
    used = [float(world.problem.totals(child)[0]) for child in children]
    assert min(used) > world.problem.limit[0] - 256 * 2


# --- bisection


def test_bisection_finds_the_cheapest_plan_that_keeps_the_target() -> None:
    world = truth(0, rows=30, interaction=0.0, noise=0.0)
    exact = Truth(Problem(world.loss, world.problem.cost, world.problem.limit), world.loss, world.pair)
    plans = Bisection(target=1.0, points=64)._plans(exact.problem)
    assert len(plans) > 40
    for target in (1.02 * exact.of(plans[-1].tolist()), 3.0, 8.0):
        searcher = Bisection(target=target, points=64)
        seen = drive(exact.problem, searcher, exact.measure, 100)
        assert len(seen) <= 1 + math.ceil(math.log2(len(plans)))
        best = searcher.best(exact.problem, seen)
        cheapest = next(plan for plan in plans if exact.of(plan.tolist()) <= target)
        assert best is not None
        assert best.trial.choice == tuple(cheapest.tolist())
        assert "is kept beyond" in searcher.report(exact.problem, seen) or best.loss + best.spread > target


def test_bisection_says_that_a_target_is_out_of_reach_or_within_noise() -> None:
    problem = Problem(np.array([[4.0, 1.0], [3.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([4.0]))
    searcher = Bisection(target=1.0)
    seen = [Seen(Trial((1, 1)), 2.0, 0.1)]
    assert searcher.ask(problem, seen) == ()
    assert "is not kept within the budgets: at best 2 ± 0.1 at 0 4" in searcher.report(problem, seen)
    near = [Seen(Trial((1, 1)), 1.05, 0.1)]
    assert "though within its standard error" in searcher.report(problem, near)
    assert "within the standard error" in Bisection(target=2.05).report(problem, seen)
    assert "beyond the standard error" in Bisection(target=3.0).report(problem, seen)
    with pytest.raises(InputError, match="target is None"):
        Bisection()
    assert "no resource 'latency'" in Bisection(target=1.0, resource="latency").refuses(problem)


# --- plans as parameters, and features


def test_parameters_are_read_off_the_plans_that_they_make() -> None:
    problem = truth(6).problem
    start = _search.solved(problem)
    assert start is not None
    plans = Plans(problem)
    assert np.array_equal(plans.plan(plans.read(start)), start)
    weights = Weights(problem)
    assert all(abs(value) < 0.3 for value in weights.read(start).values())
    names = list(weights.limits())
    asked = {**dict.fromkeys(names, 0.0), names[0]: 1.5}
    made = weights.plan(asked)
    assert made is not None
    read = weights.read(made)
    assert max(read, key=lambda name: read[name]) == names[0]
    spent = Weights(problem, spends=False)
    half = spent.plan({**dict.fromkeys(names, 0.0), "spent": 0.5})
    assert half is not None
    assert 0.4 < spent.read(half)["spent"] <= 0.5


def test_features_mean_the_same_in_every_model() -> None:
    world = truth(2)
    seen = world.measure([Trial((2,) * 12), Trial((1,) * 12), Trial((1,) * 12, 2)])
    found = rows(world.problem, seen)
    assert len(found) == 2
    scaled = Problem(world.problem.loss * 8, world.problem.cost * 4, world.problem.limit * 4)
    assert np.allclose(features(scaled, np.full(12, 2)), found[0][0])
    assert found[0][1] == pytest.approx(math.log(seen[0].loss / world.problem.total_loss(np.full(12, 2))))
    other = truth(8, rows=20)
    trained = Surrogate(history=rows(other.problem, other.measure([Trial((k % 3,) * 20) for k in range(3)])) * 3)
    assert trained.ask(world.problem, seen) != Surrogate().ask(world.problem, seen)
    with pytest.raises(InputError, match="history"):
        Surrogate(history=(((1.0, 2.0), 0.0),))


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("refine", {"evaluations": 0}, "evaluations is 0"),
        ("refine", {"tolerance": math.nan}, "tolerance is nan"),
        ("evolve", {"schedule": "mine"}, "there is solved, published"),
        ("evolve", {"batches": (1, 2)}, "batches is"),
        ("evolve", {"batches": (1, 0, 0)}, "batches is"),
        ("optuna", {"sampler": "grid"}, "sampler is 'grid'"),
        ("surrogate", {"model": "oracle"}, "model is 'oracle'"),
        ("bisection", {"target": -1.0}, "target is -1.0"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as error:
        registry.make("searchers", name, **settings)
    assert error.value.code == "E107"
    assert what in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("optuna", "optuna"), ("surrogate", "scikit-learn")])
def test_a_missing_package_is_named_with_how_to_install_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"scikit-learn": "sklearn"}.get(package, package), None)
    with pytest.raises(InputError, match=f"needs the package '{package}'") as error:
        registry.make("searchers", name)
    assert error.value.code == "E703"
    assert "pip install 'mpsearch[search]'" in str(error.value)


def settings_of(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return study_settings(model, folder, estimator="weight_mse", **changes)


def test_searchers_refuse_pairs_and_the_driver_refuses_bad_trials() -> None:
    world = truth(0)
    pairs = PairTerms([0], [1], [1], [1], [0.5])
    problem = Problem(world.problem.loss, world.problem.cost, world.problem.limit, pairs=pairs)
    for name in NAMES:
        made = registry.make("searchers", name, **({"target": 1.0} if name == "bisection" else {}))
        assert "pair" in made.refuses(problem)

    class Stubborn:
        def __init__(self, trial: Trial) -> None:
            self.trial = trial

        def refuses(self, problem: Problem) -> str:
            return ""

        def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
            return [self.trial]

    with pytest.raises(ValueError, match="a second time"):
        drive(world.problem, Stubborn(Trial((0,) * 12)), world.measure, 5)
    with pytest.raises(ValueError, match="does not fit"):
        drive(world.problem, Stubborn(Trial((4,) * 12)), world.measure, 5)


# --- in a study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def searched(small_llama: Path, folder: Path) -> tuple[Any, Searched]:
    study = mp.study(**settings_of(small_llama, folder))
    return study, study.search("refine", evaluations=12, screen=1)


def validation_of(study: Any) -> Any:
    spec = study.spec
    cut = {"length": spec.length, "tokens": spec.validation_tokens, "batch_size": spec.batch_size}
    return mp.batches(spec.model, spec.validation, **cut)


def trace(found: Searched) -> list[tuple[Any, ...]]:
    return [(item.trial, item.loss, item.spread) for item in found.trials]


def test_a_search_measures_counts_and_keeps(searched: tuple[Any, Searched]) -> None:
    study, found = searched
    assert study.computed > len(found.trials) - 1
    assert 3 <= len(found.trials) <= 12
    # 16 sequences of 32 tokens in 4 batches.
    assert list(found.tokens) == [128 if item.trial.batches else 512 for item in found.trials]
    assert found.best.loss == min(item.loss for item in found.trials if not item.trial.batches) <= found.start.loss
    assert found.history[-1] == (found.history[-1][0], found.best.loss)
    assert found.plan.bytes <= 4 * found.plan.layers.weights // 8
    assert found.plan.predicted.loss is not None
    assert found.plan.source["search"] == "refine"
    assert found.held_out is not None
    start, best = found.held_out
    # What was chosen on the calibration text is judged on the validation text.
    assert {m.label: m.loss for m in study.measurements} == {"mixed refine": best.loss}
    assert best.loss != found.best.loss
    assert mp.measure(study.spec.model, found.plan, validation_of(study)).loss == pytest.approx(best.loss, rel=1e-6)
    assert (start.loss == best.loss) == (found.start == found.best)
    assert mp.BitPlan.from_json(json.loads(json.dumps(found.plan.to_json()))) == found.plan
    assert study.plans[0].plan.assignment == found.plan.assignment


def test_a_search_resumes_with_nothing_measured_twice(
    searched: tuple[Any, Searched], small_llama: Path, folder: Path
) -> None:
    again = mp.study(**settings_of(small_llama, folder))
    found = again.search("refine", evaluations=12, screen=1)
    assert again.computed == 0
    assert trace(found) == trace(searched[1])
    assert found.plan.key == searched[1].plan.key


def test_a_killed_search_goes_on_with_two_workers(
    searched: tuple[Any, Searched], small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpsearch.session import Session

    study = mp.study(**settings_of(small_llama, tmp_path))
    measure, calls = Session.measure, []

    def stop(self: Session, *args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return measure(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            study.search("refine", evaluations=12, screen=1)
    measured = sum(
        row[0] == "measurement" for row in sqlite3.connect(tmp_path / "results.db").execute("select kind from value")
    )
    assert measured >= 3
    other = mp.study(**settings_of(small_llama, tmp_path, workers=2))
    found = other.search("refine", evaluations=12, screen=1)
    assert trace(found) == trace(searched[1])
    assert other.computed == len(found.trials) + len({found.start, found.best}) - measured


def test_the_costs_of_a_plan_are_those_of_the_planner(searched: tuple[Any, Searched]) -> None:
    study, found = searched
    plan = study.plan()
    same = next(item for item in found.trials if not item.trial.batches)
    assert found.start == same
    assert set(plan.cost) == set(found.plan.cost)
    with study.session() as session:
        from mpsearch.searching import _plan

        columns = [str(fmt) for fmt in session.planner.formats]
        rows_ = session.planner.layers.decisions
        choice = tuple(columns.index(str(plan.formats[row.layers[0].name])) for row in rows_)
        made = _plan(session.planner, choice, {})
    assert made.assignment == plan.assignment
    assert dict(made.cost) == dict(plan.cost)


def test_bisection_in_a_study_and_errors(searched: tuple[Any, Searched]) -> None:
    study, found = searched
    loose = study.search("bisection", evaluations=10, target=1.5 * found.best.loss + 0.1)
    assert "is kept" in loose.note
    assert loose.best.loss <= 1.5 * found.best.loss + 0.1
    assert loose.plan.bytes <= found.plan.bytes
    with pytest.raises(InfeasibleError):
        study.search(budgets=["weights <= 1 bits"])
    with pytest.raises(InputError, match="did you mean 'refine'"):
        study.search("refin")
    with pytest.raises(InputError, match="no setting 'speed'"):
        study.search("refine", speed=3)
    with pytest.raises(InputError, match="evaluations is 0"):
        study.search("refine", evaluations=0)


def test_the_command_searches_writes_the_plan_and_an_optuna_study(
    searched: tuple[Any, Searched], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, out = str(folder / "results.db"), folder / "found.json"
    line = ["search", "small", "--evaluations", "12", "--set", "screen=1", "--storage", storage, "--quiet"]
    for _ in range(2):
        assert run([*line, "--workers", "1", "--out", str(out), "--optuna-storage"]) == 0
    text = capsys.readouterr().out
    assert f"measured    {len(searched[1].trials)} plans" in text
    assert mp.BitPlan.load(out).key == searched[1].plan.key
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kept = optuna.load_study(study_name="small refine", storage=database_url(storage))
    assert len(kept.trials) == len(searched[1].trials)
    assert kept.best_value == searched[1].best.loss
    # The database still is one of studies.
    assert run(["show", "small", "--storage", storage]) == 0
    assert run(["search", "small", "--set", "screen", "--storage", storage]) == 2
    capsys.readouterr()
    assert run([*line, "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(searched[1].to_json()))


def test_what_gives_no_finite_values_is_remembered(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpsearch.evaluate.kl import Kl

    measure = Kl.measure
    lost: list[str] = []

    def fail(self: Kl, model: Any, plan: Any, batches: Any, label: str = "") -> Any:
        if len(set(map(str, plan.formats.values()))) > 2 and len(lost) < 3:
            lost.append(plan.assignment)
            raise InputError("E511", "no finite values")
        return measure(self, model, plan, batches, label)

    monkeypatch.setattr(Kl, "measure", fail)
    study = mp.study(**settings_of(small_llama, tmp_path))
    found = study.search("evolve", evaluations=14, offspring=8, survivors=(2,), batches=(1, 0))
    assert sum(math.isinf(item.loss) for item in found.trials) == len(lost) > 0
    assert math.isfinite(found.best.loss)
    again = mp.study(**settings_of(small_llama, tmp_path))
    assert trace(again.search("evolve", evaluations=14, offspring=8, survivors=(2,), batches=(1, 0))) == trace(found)
    assert again.computed == 0


def test_the_first_batches_are_measured_as_they_are_alone(small_llama: Path) -> None:
    from mpsearch.evaluate.kl import Kl
    from mpsearch.evaluate.rounded import Rounded
    from mpsearch.format import Format
    from mpsearch.model.apply import Change
    from mpsearch.model.model import load_model
    from mpsearch.plan import BitPlan

    loaded = load_model(small_llama)
    batches = list(mp.batches(small_llama, "stdlib:validation", tokens=512, length=32, batch_size=4))
    found = mp.layers(loaded)
    plan = BitPlan(found, {layer.name: Format.parse("int3-g64") for layer in found})
    part, alone = Kl().measure(loaded, plan, First(batches, 2)), Kl().measure(loaded, plan, batches[:2])
    assert (part.loss, part.samples, part.data) == (alone.loss, alone.samples, alone.data)
    whole = Kl().measure(loaded, plan, First(batches, 99))
    assert whole.samples == Kl().measure(loaded, plan, batches).samples
    assert whole.samples[: len(part.samples)] == part.samples
    kept = Rounded.of(loaded, batches)
    formats = {layer: Format.parse("int4-g64") for layer in found}
    for size in (2**30, 2**12, 0):
        change, plain = kept.change(formats, size), Change.of(loaded, formats)
        assert list(change.weights) == list(plain.weights)
        assert all((change.weights[x] == plain.weights[x]).all() for x in formats)
        assert kept.bytes == sum(w.numel() * w.element_size() for w in kept.kept.values()) <= max(size, 0)
