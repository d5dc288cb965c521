"""Fitting scores to measured losses: known weights, honest intervals, and the estimator that does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import mpsearch as mp
from mpsearch import registry
from mpsearch.format import parse_formats
from mpsearch.layer import decisions
from mpsearch.loss_fit import fit_scores
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.sensitivity.combine import Combine, random_plans
from mpsearch.sensitivity.harm import Harm, change_to
from mpsearch.tables import SensitivityTable
from mpsearch.testing.estimators import FORMATS, small_classifier
from tests.tiny_models import tiny, tokens

ROWS, COLUMNS = 12, 5


def made_table(seed: int, scale: float = 1.0, spread: float = 0.0) -> SensitivityTable:
    """Scores that fall by a factor of about 4 per format, as rounding errors do."""
    noise = np.random.default_rng(seed)
    value = scale * noise.lognormal(0.0, 1.0, (ROWS, 1)) * 4.0 ** -np.arange(COLUMNS)
    names = tuple(f"layer{i}" for i in range(ROWS)), tuple(f"f{j}" for j in range(COLUMNS))
    return SensitivityTable(*names, value, spread * value, f"unit {seed}", source={"estimator": f"made{seed}"})


def made_plans(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(seed)
    level = np.linspace(0, COLUMNS - 1, count)[:, None]
    return np.clip(np.round(level + noise.normal(0, 1, (count, ROWS))), 0, COLUMNS - 1).astype(int)


def totals(table: SensitivityTable, plans: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return table.value[np.arange(ROWS), plans].sum(axis=1)


def test_weights_that_made_the_losses_are_found() -> None:
    tables = [made_table(1), made_table(2, 1e4), made_table(3, 1e-6)]
    plans = made_plans(30)
    losses = 0.5 * totals(tables[0], plans) + 3e-5 * totals(tables[1], plans)
    fit = fit_scores(tables, plans, losses)
    assert fit.weights[:2] == pytest.approx([0.5, 3e-5], rel=1e-6)
    assert fit.weights[2] * 1e-6 < 1e-6
    assert fit.r2 == pytest.approx(1.0, abs=1e-9)
    assert fit.spearman == pytest.approx(1.0)
    expected = 0.5 * tables[0].value + 3e-5 * tables[1].value
    found = fit.table()
    assert found.unit == "nats/token"
    assert np.allclose(found.value, expected, rtol=1e-5)
    assert found.layers == tables[0].layers
    new = made_plans(7, seed=9)
    for plan, loss in zip(new, 0.5 * totals(tables[0], new) + 3e-5 * totals(tables[1], new), strict=True):
        value, low, high = fit.predict(plan)
        assert value == pytest.approx(loss, rel=1e-5)
        assert low <= value <= high
    assert fit.predict([-1] * ROWS)[0] == 0.0
    assert fit.to_json()["weights"]["made1"] == pytest.approx(0.5)


def test_no_weight_is_below_zero() -> None:
    good, bad = made_table(1), made_table(1)
    bad = SensitivityTable(bad.layers, bad.formats, bad.value.max() - bad.value, bad.spread, "upside down")
    plans = made_plans(24)
    fit = fit_scores([good, bad], plans, 2.0 * totals(good, plans) * np.random.default_rng(0).lognormal(0, 0.2, 24))
    assert (fit.weights >= 0).all()
    assert fit.weights[0] > 1.0


def test_relative_errors_keep_small_losses_right_without_drawing_all_down() -> None:
    table, plans = made_table(4), made_plans(400)
    truth = 0.7 * totals(table, plans)
    noise = np.random.default_rng(1)
    # Mean 1, standard deviation 0.3, whatever the size.
    losses = truth * noise.gamma(1 / 0.09, 0.09, len(truth))
    fit = fit_scores([table], plans, losses, draws=50)
    error = 0.7 * 0.3 / np.sqrt(len(plans))
    assert abs(fit.weights[0] - 0.7) < 4 * error
    # Divided by the losses themselves it would be near 0.7 (1 - 2 0.09); absolute errors listen to the largest alone.
    by_measured = (truth / 0.7 / losses).sum() / ((truth / 0.7 / losses) ** 2).sum()
    assert by_measured < 0.7 * 0.92
    assert fit.spread[0] == pytest.approx(error, rel=0.4)


def test_what_is_poorly_measured_counts_less() -> None:
    table, plans = made_table(5), made_plans(20)
    losses, spread = totals(table, plans), np.zeros(20)
    losses[:5] *= 10
    spread[:5] = 100 * losses[:5]
    spread[7] = np.nan  # not known
    assert fit_scores([table], plans, losses, spread).weights[0] == pytest.approx(1.0, rel=0.01)
    assert fit_scores([table], plans, losses).weights[0] > 1.2


@pytest.mark.parametrize("how", ["least_squares", "isotonic"])
def test_intervals_hold_what_new_plans_lose(how: Any) -> None:
    table = made_table(6)
    new = made_plans(20, seed=77)
    inside = []
    for repetition in range(40):
        noise = np.random.default_rng(repetition)
        plans = made_plans(30, seed=100 + repetition)
        losses = 0.3 * totals(table, plans) * noise.gamma(25, 1 / 25, 30)
        fit = fit_scores([table], plans, losses, how=how, draws=60, seed=repetition)
        drawn = 0.3 * totals(table, new) * noise.gamma(25, 1 / 25, 20)
        for plan, loss in zip(new, drawn, strict=True):
            _, low, high = fit.predict(plan)
            inside.append(low <= loss <= high)
    assert 0.88 <= np.mean(inside) <= 0.99


def test_errors_of_the_table_hold_scores_and_weights() -> None:
    exact, noisy = made_table(7), made_table(7, spread=0.5)
    plans = made_plans(24)
    clean = totals(exact, plans)
    rough = clean * np.random.default_rng(2).lognormal(0, 0.3, 24)
    assert np.allclose(fit_scores([exact], plans, clean).table().spread, 0.0, atol=1e-9)
    assert np.allclose(fit_scores([noisy], plans, clean).table().spread, 0.5 * exact.value, rtol=1e-6)
    fit = fit_scores([noisy], plans, rough)
    expected = np.hypot(fit.weights[0] * 0.5, fit.spread[0]) * exact.value
    assert np.allclose(fit.table().spread, expected, rtol=1e-9)
    assert fit.spread[0] > 0.02


def test_an_isotonic_fit_follows_any_rising_curve() -> None:
    table, plans = made_table(8), made_plans(60)
    total = totals(table, plans)
    losses = 0.1 * total**2.5
    fit = fit_scores([table], plans, losses, how="isotonic")
    straight = fit_scores([table], plans, losses)
    inner = np.argsort(total)[5:-5]
    predicted = np.array([fit.predict(plan)[0] for plan in plans[inner]])
    assert predicted == pytest.approx(losses[inner], rel=1e-9)
    assert fit.r2 > max(0.9, straight.r2)
    assert fit.spearman > 0.99
    values = [fit.predict(plan)[0] for plan in plans[np.argsort(total)]]
    assert np.all(np.diff(values) >= 0)
    assert fit.predict([-1] * ROWS)[0] == 0.0
    with pytest.raises(mp.InputError, match="E113"):
        fit.table()
    # The published example of pooling: 1, 2, 6, 2, 7 becomes 1, 2, 4, 4, 7.
    one = SensitivityTable(("a",), tuple("vwxyz"), [[1.0, 2.0, 3.0, 4.0, 5.0]], [[0.0] * 5], "score")
    steps = fit_scores([one], [[j] for j in range(5)], [1, 2, 6, 2, 7], how="isotonic")
    assert [steps.predict([j])[0] for j in range(5)] == [1.0, 2.0, 4.0, 4.0, 7.0]


def test_same_bits_twice_and_other_seeds_other_intervals() -> None:
    table, plans = made_table(9), made_plans(16)
    losses = totals(table, plans) * np.random.default_rng(3).lognormal(0, 0.3, 16)
    first, again, other = (fit_scores([table], plans, losses, seed=seed) for seed in (5, 5, 6))
    assert first.predict(plans[3]) == again.predict(plans[3])
    assert first.predict(plans[3])[0] == other.predict(plans[3])[0]
    assert first.predict(plans[3])[1:] != other.predict(plans[3])[1:]


def test_what_cannot_be_fitted_is_refused() -> None:
    table, plans = made_table(1), made_plans(6)
    losses = totals(table, plans)
    hole = table.value.copy()
    hole[0, :] = np.nan
    holed = SensitivityTable(table.layers, table.formats, hole, hole, "u")
    other = SensitivityTable(("x", *table.layers[1:]), table.formats, table.value, table.spread, "u")
    for values in (
        {"how": "splines"},
        {"draws": 1},
        {"tables": []},
        {"tables": [table, table], "how": "isotonic"},
        {"tables": [table, other]},
        {"tables": [holed]},
        {"measured": losses[:5]},
        {"measured": [np.inf, *losses[1:]]},
        {"spread": losses[:2]},
        {"plans": plans[:, :3]},
        {"plans": plans + COLUMNS},
        {"plans": plans - 5},
        {"plans": plans.astype(float)},
        {"plans": plans[:1], "measured": losses[:1], "tables": [table, made_table(2)]},
    ):
        with pytest.raises(mp.InputError, match="E113"):
            fit_scores(**{"tables": [table], "plans": plans, "measured": losses, **values})
    with pytest.raises(mp.InputError, match="E113"):
        fit_scores([table], plans, losses).predict([0])


def test_plans_without_any_loss_give_scores_of_zero() -> None:
    table, plans = made_table(1), made_plans(6)
    fit = fit_scores([table], plans, np.zeros(6))
    assert fit.weights.tolist() == [0.0]
    assert not fit.table().value.any()
    assert np.isnan(fit.r2)
    assert fit.predict(plans[0]) == (0.0, 0.0, 0.0)
    assert np.isnan(fit_scores([table], plans[:2], [0.1, 0.2]).spearman)


MENU = ["int2-g16", "int3-g16", "int4-g16", "int6-g16", "int8-g16", "int4-g16@int4-token"]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny(layers=2, initializer_range=0.12)


DATA = [{"input_ids": part} for part in tokens(12, 24)["input_ids"].split(2)]


def measured(model: Model, plans: Any, formats: Any, layers: Any) -> np.ndarray[Any, Any]:
    found = []
    for batch in DATA:
        harm = Harm(model, batch, "kl")
        for plan in plans:
            chosen = {x: formats[j] for row, j in zip(decisions(layers), plan, strict=True) for x in row.layers}
            harm.prepare(list(chosen))
            found.append(np.mean(harm.values(change_to(model, chosen))))
    return np.mean(np.array(found).reshape(len(DATA), len(plans)), axis=0)


def test_combined_scores_predict_new_plans_in_nats(model: Model) -> None:
    """Averaging the fits of batches is stable: the weights of batches scatter, what is predicted does not."""
    formats, layers = parse_formats(MENU), find_layers(model, DATA)
    table = mp.score(model, DATA, MENU, "combine", plans=16)
    assert table.unit == "nats/token"
    assert table.source["estimator"] == "combine"
    plans = random_plans(layers, formats, [table], 20, seed=321)
    losses = measured(model, plans, formats, layers)
    assert losses.max() > 30 * losses.min()
    predicted = table.value[np.arange(len(plans[0])), plans].sum(axis=1)
    assert abs(np.log(np.median(predicted / losses))) < 0.25
    assert spearmanr(predicted, losses)[0] > 0.9
    output_mse = mp.score(model, DATA, MENU, "output_mse").value[np.arange(len(plans[0])), plans].sum(axis=1)

    def wrong(values: Any) -> float:
        return float(np.std(np.log(values / losses)))

    assert wrong(predicted) < wrong(output_mse)
    # One fit to the averages of all batches, on plans of its own, says the same.
    pooled = random_plans(layers, formats, [table], 40, seed=5)
    tables = [registry.make("estimators", name).score(model, DATA, layers, formats) for name in Combine().estimators]
    together = fit_scores(tables, pooled, measured(model, pooled, formats, layers), draws=20)
    whole = np.array([together.predict(plan)[0] for plan in plans])
    assert np.abs(predicted / whole - 1.0).max() < 0.3
    assert np.nanmedian(table.spread / table.value) < 0.3


def test_plans_are_spread_over_all_levels(model: Model) -> None:
    formats, layers = parse_formats(MENU), find_layers(model, DATA)
    table = mp.score(model, DATA[:1], MENU, "output_mse")
    plans = random_plans(layers, formats, [table], 25, seed=1)
    # W4A4 has the fewest bits of weights and inputs together, then come weights of 2, 3, 4, 6 and 8 bits.
    rank = np.array([1, 2, 3, 4, 5, 0])[plans[:, 1:]].mean(axis=1)
    assert rank[:3].mean() < 1
    assert rank[-3:].mean() > 4
    assert np.abs(np.diff(rank)).max() < 1.5
    assert len({tuple(plan) for plan in plans.tolist()}) > 20
    # The embedding cannot round its input: that column is never drawn for it.
    assert np.isnan(table.value[0, 5])
    assert 5 not in plans[:, 0]
    assert 5 in plans[:, 1:]
    assert (plans == random_plans(layers, formats, [table], 25, seed=1)).all()


def test_a_blind_estimator_takes_part_beside_one_that_sees(model: Model) -> None:
    menu = ["int4-g16", "int8-g16", "kv-int4-token", "kv-int8-token"]
    table = mp.score(model, DATA[:2], menu, "combine", estimators=("weight_mse", "divergence"), plans=12)
    kinds = {x.name: x.kind for x in mp.layers(model, caches=True)}
    for i, name in enumerate(table.layers):
        cache = kinds.get(name) == "kv_cache"
        assert [x == "ok" for x in table.status[i]] == (
            [False, False, True, True] if cache else [True, True, False, False]
        )
        if cache:
            assert table.value[i, 2] > table.value[i, 3] > 0
    for formats, names in ((["int4-g16@int8-token"], ("weight_mse",)), (["kv-int8-token"], ("output_mse",))):
        with pytest.raises(mp.InputError, match="E506"):
            mp.score(model, DATA[:1], formats, "combine", estimators=names)


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in (
        {"estimators": ()},
        {"estimators": "fisher"},
        {"estimators": ("fisher", "fisher")},
        {"estimators": ("combine",)},
        {"estimators": ("fishers",)},
        {"estimators": (1,)},
        {"plans": 5},
        {"plans": "24"},
        {"plans": True},
    ):
        with pytest.raises(mp.InputError, match="E113"):
            Combine(**settings)
    assert Combine(estimators=["fisher"]).estimators == ("fisher",)  # type: ignore[arg-type]
    assert "needs logits" in Combine().refuses(Model(small_classifier()[0].module))
    without_loss = Model(small_classifier()[0].module, logits=lambda m, b: m(b[0]))
    assert Combine().refuses(without_loss) == ""
    assert "'hessian_trace': it needs a loss" in Combine(estimators=("hessian_trace",)).refuses(without_loss)


def test_plans_that_are_not_finite_are_left_out_and_all_of_them_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, layers = small_classifier()
    right = Harm.values
    calls: list[int] = []

    def sometimes(self: Harm, change: Any) -> list[float]:
        calls.append(1)
        return [float("nan")] if len(calls) % 3 == 0 else right(self, change)

    monkeypatch.setattr(Harm, "values", sometimes)
    fit = Combine(plans=12).fit(model, batches[0], layers, FORMATS)
    assert len(calls) == 12
    assert fit.plans == 8
    monkeypatch.setattr(Harm, "values", lambda self, change: [float("nan")])
    with pytest.raises(mp.InputError, match="E511"):
        Combine(plans=8).fit(model, batches[0], layers, FORMATS)


def test_a_list_of_estimators_survives_a_study_file(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'model = "bundled:tiny-llama"\ncalibration = "stdlib:calibration"\nbudgets = "4.5 bits"\n'
        'formats = ["int4-g64", "int8-g64"]\ntokens = 256\nvalidation_tokens = 256\nlength = 64\nbatch_size = 2\n'
        'points = 0\nstorage = "sqlite:///study.db"\n'
        'estimator = {name = "combine", estimators = ["weight_mse", "output_mse"], plans = 6}\n'
    )
    spec = mp.StudySpec.load(tmp_path / "study.toml", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert spec.estimator_settings == {"estimators": ["weight_mse", "output_mse"], "plans": 6}

    def run(asked: mp.StudySpec) -> mp.Study:
        study = mp.Study(asked, registry.make("stores", "sql", url=asked.storage))
        study.run()
        return study

    first = run(spec)
    assert first.scores.source["estimator"] == "combine"
    assert first.scores.unit == "nats/token"
    assert run(spec).computed == 0
    # A tuple in Python is the same question.
    settings = {"estimators": ("weight_mse", "output_mse"), "plans": 6}
    same = mp.StudySpec.load(
        tmp_path / "study.toml", storage=spec.storage, estimator="combine", estimator_settings=settings
    )
    first.store.create_study(same.name, same.question())  # raises for another question
    assert mp.StudySpec.from_question(first.store.study("tiny-llama").spec, spec.storage).question() == spec.question()
