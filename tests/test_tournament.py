"""The tournament of estimators, against what its figures must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.cli.main import run
from mpsearch.front import Measurement
from mpsearch.planning import Labelled
from mpsearch.standings import MARGIN, Drawn, Entry, Predictions, Tournament, judge, spearman
from mpsearch.studying import Study
from mpsearch.testing.estimators import small_classifier

FORMATS = ["int2-channel", "int3-channel", "int4-channel", "int8-channel"]
NAMES = ("weight_mse", "fisher", "divergence", "isolated_loss")


def classifier(store: Path, **settings: Any) -> Study:
    model, batches, _ = small_classifier()
    torch.manual_seed(0)
    model.module.extend([nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)])
    wrapped = mp.wrap(model.module, loss=model._loss, logits=model._logits, name="classifier")
    values = {"formats": FORMATS, "budgets": ["weights <= 12 bits"], "storage": f"sqlite:///{store}", "seed": 3}
    return mp.study(model=wrapped, calibration=batches[:3], validation=batches[3:], **{**values, **settings})


def plan_of(name: str) -> Labelled:
    return Labelled(name, SimpleNamespace(key=name))  # type: ignore[arg-type]


def measured(**losses: list[float]) -> dict[str, Measurement]:
    return {
        name: Measurement(name, name, math.fsum(x) / len(x), 0.0, "nats", {"weights": 1.0}, {}, samples=tuple(x))
        for name, x in losses.items()
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tournament") / "results.db"


@pytest.fixture(scope="module")
def outcome(store: Path) -> Tournament:
    return classifier(store).tournament(NAMES, plans=24, sizes=3)


def test_everyone_is_judged_by_the_same_plans(outcome: Tournament) -> None:
    assert sorted(e.estimator for e in outcome.entries) == sorted(NAMES)
    assert 12 < outcome.plans <= 24  # few decisions: the same plan is drawn again
    assert len(outcome.sizes) == 3
    assert list(outcome.sizes) == sorted(outcome.sizes)
    for entry in outcome.entries:
        assert entry.correlation is not None
        assert -1 <= entry.correlation.low <= entry.correlation.value <= entry.correlation.high <= 1
        assert entry.excess is not None
        assert entry.behind is not None
        assert entry.seconds > 0
        assert entry.why_not == ""
    excess = [entry.excess or 0.0 for entry in outcome.entries]
    assert excess == sorted(excess)
    assert outcome.entries[0].behind == (0.0, 0.0)
    # What is nearly the yardstick itself must rank plans well.
    divergence = next(e for e in outcome.entries if e.estimator == "divergence")
    assert divergence.correlation is not None
    assert divergence.correlation.value > 0.8


def test_the_recommended_one_is_quickest_of_those_that_are_not_worse(outcome: Tournament) -> None:
    chosen = next(e for e in outcome.entries if e.estimator == outcome.recommended)
    assert chosen.behind is not None
    assert chosen.behind[0] < MARGIN
    assert any(f"Recommended for this model: {outcome.recommended}." in text for text in outcome.sentences)


def run_of(name: str, seconds: float, *shares: float) -> tuple[Any, Any, dict[str, Measurement]]:
    runs = measured(**{name: list(shares)})
    return Predictions(name, "nats", {100: [1.0]}, seconds), {100: plan_of(name)}, runs


def standings(*runs: Any, random: float = 9.0) -> Tournament:
    drawn = [Drawn(100, (), (plan_of("random"),))]
    everything = measured(random=[random])
    for _, _, found in runs:
        everything |= found
    return judge([(made, chosen) for made, chosen, _ in runs], drawn, everything, {})


def test_what_cannot_be_told_apart_is_not_taken_for_equal() -> None:
    noisy = run_of("quick", 1.0, 0.5, 3.0, 0.6, 2.5)
    outcome = standings(run_of("slow", 99.0, 1.0, 1.0, 1.0, 1.0), noisy)
    assert outcome.recommended == "slow"
    # Measured well enough to be within the margin.
    near = run_of("quick", 1.0, *[1.01, 1.02] * 8)
    assert standings(run_of("slow", 99.0, *[1.0] * 16), near).recommended == "quick"
    far = run_of("quick", 1.0, *[1.06, 1.07] * 8)
    assert standings(run_of("slow", 99.0, *[1.0] * 16), far).recommended == "slow"


def test_a_quick_one_beats_the_dearest_only_beyond_chance() -> None:
    slow = run_of("slow", 99.0, 1.0, 1.2, 0.9, 1.1)
    assert standings(slow, run_of("quick", 1.0, 0.9, 1.1, 1.0, 1.0)).beaten == ()
    outcome = standings(slow, run_of("quick", 1.0, 0.5, 0.7, 0.4, 0.6))
    assert outcome.beaten == ("quick", "slow")
    assert "quick (1.0 s) beats slow (99.0 s), the dearest." in outcome.sentences
    assert standings(slow, run_of("not so quick", 50.0, 0.5, 0.7, 0.4, 0.6)).beaten == ()


def test_one_alone_is_not_recommended() -> None:
    outcome = standings(run_of("alone", 1.0, 1.0, 1.0))
    assert outcome.recommended == ""
    assert "none is recommended" in outcome.sentences[-1]


def test_who_was_there_before_stays_the_measure(outcome: Tournament, store: Path) -> None:
    alone = classifier(store).tournament(["weight_mse"], plans=24, sizes=3)
    among = next(e for e in outcome.entries if e.estimator == "weight_mse")
    assert alone.entries[0].excess == pytest.approx(among.excess)


def test_no_plan_counts_twice(tmp_path: Path) -> None:
    study = classifier(tmp_path / "few.db", formats=["int2-channel", "int8-channel"])
    outcome = study.tournament(["weight_mse", "fisher"], plans=100, sizes=2)
    # Four decisions of two formats make sixteen plans at most.
    assert outcome.plans <= 16 * 2


def test_an_error_of_one_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any) -> Any:
        raise mp.InputError("E516", "it does not settle")

    monkeypatch.setattr(registry.load("estimators", "fisher"), "score", fail)
    outcome = classifier(tmp_path / "e.db").tournament(["weight_mse", "fisher"], plans=12, sizes=1)
    assert outcome.entries[-1].why_not == "E516: it does not settle"


def test_members_of_a_combination_are_part_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = classifier(tmp_path / "f.db", estimator={"name": "combine", "plans": 6}, points=0)
    study.run()
    study.run()
    assert study.computed == 0
    monkeypatch.setattr(registry.load("estimators", "fisher"), "version", 99)
    study.run()
    assert study.computed >= 3  # its three batches, at least


def test_a_second_one_computes_nothing(outcome: Tournament, store: Path) -> None:
    study = classifier(store)
    again = study.tournament(NAMES, plans=24, sizes=3)
    assert study.computed == 0
    assert again == outcome


def test_who_takes_too_long_scores_fewer_batches(store: Path, tmp_path: Path) -> None:
    study = classifier(tmp_path / "limited.db")
    outcome = study.tournament(["fisher", "weight_mse"], plans=10, sizes=1, limit=1e-9)
    fisher = next(e for e in outcome.entries if e.estimator == "fisher")
    assert fisher.why_not == "1 of 3 batches: all would take too long"
    assert fisher.correlation is not None
    # What was not limited, or divides by cells, is complete; the rest can be had later.
    assert next(e for e in outcome.entries if e.estimator == "weight_mse").why_not == ""
    later = study.tournament(["fisher"], plans=10, sizes=1)
    assert later.entries[0].why_not == ""


def test_plans_of_the_tournament_are_no_part_of_the_study(outcome: Tournament, store: Path) -> None:
    assert classifier(store).measurements == []


def test_who_cannot_take_part_says_why(tmp_path: Path) -> None:
    study = classifier(tmp_path / "a.db", activations=["int8-token", "16"])
    outcome = study.tournament(["zd", "output_mse", "weight_mse"], plans=10, sizes=1)
    weights = next(e for e in outcome.entries if e.estimator == "weight_mse")
    assert weights.correlation is None
    assert weights.excess is None
    assert "does not see activations" in weights.why_not
    assert outcome.entries[-1].excess is None


@pytest.mark.parametrize(("plans", "sizes"), [(9, 1), (19, 5), (10, 0)])
def test_too_few_plans_are_refused(plans: int, sizes: int, tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="E113"):
        classifier(tmp_path / "b.db").tournament(plans=plans, sizes=sizes)


def test_unknown_names_are_refused_before_anything_runs(tmp_path: Path) -> None:
    study = classifier(tmp_path / "c.db")
    with pytest.raises(mp.InputError, match="did you mean 'fisher'"):
        study.tournament(["fischer"])
    assert study.computed == 0


def test_the_figures_of_a_worked_example() -> None:
    drawn = [Drawn(100, (), tuple(plan_of(name) for name in "pqr"))]
    found = [
        (Predictions("good", "nats", {100: [1.0, 2.0, 3.0]}, 9.0), {100: plan_of("a")}),
        (Predictions("quick", "nats", {100: [1.0, 3.0, 2.0]}, 1.0), {100: plan_of("b")}),
        (Predictions("bad", "nats", {100: [3.0, 2.0, 1.0]}, 0.1), {100: plan_of("c")}),
        (Predictions("absent", why_not="no"), {}),
    ]
    runs = measured(p=[2.0, 2.0], q=[3.0, 3.0], r=[4.0, 5.0], a=[1.0, 1.0, 1.0], b=[1.2, 0.9, 0.95], c=[3.0, 3.1, 2.9])
    outcome = judge(found, drawn, runs, {})
    assert [e.estimator for e in outcome.entries] == ["good", "quick", "bad", "absent"]
    good, quick, bad, absent = outcome.entries
    assert good.excess == 0.0
    assert quick.excess == pytest.approx(0.05 / 3)
    assert quick.behind is not None
    assert quick.behind[0] == pytest.approx(0.05 / 3)
    assert bad.excess == pytest.approx(2.0)
    assert [e.correlation.value for e in (good, quick, bad) if e.correlation] == pytest.approx([1.0, 0.5, -1.0])
    assert absent == Entry("absent", why_not="no")
    assert outcome.recommended == "good"  # three samples are too few to call the other as good
    assert outcome.plans == 3


def test_rank_correlation_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        x, y = generator.integers(0, 5, 12).astype(float), generator.normal(size=12)
        assert spearman(x[None], y[None])[0] == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(np.ones((1, 3)), np.arange(3.0)[None])[0] == 0.0


def test_the_command_lists_every_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimators", "--json"]) == 0
    rows = {row["estimator"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == sorted(registry.names("estimators"))
    for row in rows.values():
        assert row["predicts"]
        assert row["cost"]
        assert set(row["needs"]) <= {"data", "loss", "logits"}
        assert "weights" in row["sees"]
    assert rows["zd"]["needs"] == []
    assert run(["estimators"]) == 0
    assert "hessian_trace" in capsys.readouterr().out


def test_the_command_names_a_study_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "d.db"
    classifier(store).store.close()
    assert run(["estimators", "nothing", "--storage", f"sqlite:///{store}"]) == 3
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--only", "fisher"], ["--plans", "20"], ["--limit", "5"]])
def test_options_without_a_study_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimators", *options]) == 2
    assert "name a study" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_is_a_positive_time(limit: float, tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="E113"):
        classifier(tmp_path / "g.db").tournament(limit=limit)
