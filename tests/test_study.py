"""Studies: the whole line, resuming, keeping budgets, bad questions."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.spec import StudySpec
from mpsearch.studying import Study
from tests.conftest import study_settings


def plan_bytes(study: Study) -> bytes:
    return json.dumps(study.plans[0].plan.to_json(), sort_keys=True).encode()


@pytest.fixture(scope="module")
def finished(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = mp.study(**study_settings(small_llama, tmp_path_factory.mktemp("study"), random=2))
    study.run()
    return study


def test_the_plan_keeps_its_budget_and_beats_or_equals_nothing_silently(finished: Study) -> None:
    plan = finished.plans[0].plan
    assert plan.bytes <= 4 * plan.layers.weights // 8
    assert plan.predicted.bound is not None
    assert plan.predicted.gap is not None
    assert plan.predicted.gap <= 1e-9
    assert plan.source["status"] == "optimal"
    assert plan.predicted.spread is not None
    labels = {m.label.split()[0] for m in finished.measurements}
    assert labels == {"mixed", "uniform", "random"}
    assert {m.label for m in finished.measurements} >= {f"uniform {f}" for f in finished.spec.formats}
    assert all(m.spread > 0 and m.metrics["cross_entropy"].value > 0 for m in finished.measurements)


def test_the_fused_layers_of_a_plan_agree(finished: Study) -> None:
    for decision in finished.plans[0].plan.layers.decisions:
        assert len({finished.plans[0].plan.formats[layer.name] for layer in decision.layers}) == 1


def test_a_second_run_computes_nothing(finished: Study) -> None:
    again = Study(finished.spec, finished.store)
    front = again.run()
    assert again.computed == 0
    assert front.key == finished.front.key
    assert plan_bytes(again) == plan_bytes(finished)


def test_one_and_two_workers_give_the_same_bytes(finished: Study, small_llama: Path, tmp_path: Path) -> None:
    other = mp.study(**study_settings(small_llama, tmp_path, random=2, workers=2))
    other.run()
    assert other.computed > 30
    assert plan_bytes(other) == plan_bytes(finished)
    key = [(m.label, m.plan, m.loss, m.spread) for m in other.measurements]
    assert key == [(m.label, m.plan, m.loss, m.spread) for m in finished.measurements]
    assert other.scores.value.tobytes() == finished.scores.value.tobytes()


@pytest.mark.parametrize("estimator", [name for name in registry.names("estimators") if name != "divergence"])
def test_every_estimator_runs_in_a_study_and_resumes(small_llama: Path, tmp_path: Path, estimator: str) -> None:
    study = mp.study(**study_settings(small_llama, tmp_path, estimator=estimator, points=0))
    study.run()
    assert study.computed > 5
    plan = plan_bytes(study)
    by_batch = registry.load("estimators", estimator).by == "batch"
    cells = sqlite3.connect(tmp_path / "results.db")
    with cells:
        kept = cells.execute("SELECT count(*) FROM cell").fetchone()[0]
        # What a run leaves that was killed: whole batches, or single cells.
        last = "batch = (SELECT max(batch) FROM cell)" if by_batch else "layer < 'model.layers.1'"
        assert 0 < cells.execute(f"DELETE FROM cell WHERE {last}").rowcount < kept
        cells.execute("DELETE FROM value WHERE kind = 'scores'")
    cells.close()
    again = Study(study.spec, study.store)
    again.run()
    assert again.computed > 0
    assert plan_bytes(again) == plan


def test_solving_loads_neither_torch_nor_the_model(finished: Study) -> None:
    code = (
        "import sys; from mpsearch.cli.main import run;"
        f"code = run(['solve', 'small', '--budget', 'weights <= 3.5 bits', '--storage', {finished.spec.storage!r}]);"
        "print(code, [m for m in ('torch', 'transformers', 'ray', 'alembic', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "bits per weight" in done.stdout


def test_other_budgets_are_solved_on_stored_scores(finished: Study) -> None:
    sizes = [finished.plan(f"weights <= {bits} bits").bytes for bits in ("3", "3.5", "5", "8.5")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    losses = [finished.plan(f"weights <= {bits} bits").loss or 0.0 for bits in ("3", "3.5", "5", "8.5")]
    assert losses == sorted(losses, reverse=True)
    both = finished.plan("weights <= 5 bits", "bops <= 20 %")
    assert both.cost["bops"] <= 0.2 * finished.costs[1].reference
    assert both.source["budgets"] == ["weights <= 5 bits", "bops <= 20 %"]


def test_a_budget_above_the_model_needs_no_search(small_llama: Path, tmp_path: Path) -> None:
    study = mp.study(**study_settings(small_llama, tmp_path, budgets=["weights <= 1 GB"]))
    front = study.run()
    assert "W112" in [notice.code for notice in study.notices]
    assert {str(fmt) for fmt in study.plans[0].plan.formats.values()} == {"bf16"}
    assert front[0].loss == pytest.approx(0.0, abs=1e-7)


def test_an_infeasible_budget_is_refused_before_scoring(small_llama: Path, tmp_path: Path) -> None:
    study = mp.study(**study_settings(small_llama, tmp_path, budgets=["weights <= 2 bits"]))
    with pytest.raises(mp.InfeasibleError) as found:
        study.run()
    assert found.value.code == "E201"
    assert study.computed == 1
    smallest = found.value.advice.partition("<= ")[2].partition(" bits")[0]
    assert mp.study(**study_settings(small_llama, tmp_path, name="b", budgets=[f"weights <= {smallest} bits"])).run()


def test_pins_hold_and_cost(small_llama: Path, tmp_path: Path) -> None:
    study = mp.study(
        **study_settings(
            small_llama,
            tmp_path,
            pins={"*.0.self_attn.k_proj": "int8-channel", "model.embed_tokens": "bf16"},
            budgets=["weights <= 14 bits"],
        )
    )
    study.run()
    formats = study.plans[0].plan.formats
    assert str(formats["model.layers.0.self_attn.q_proj"]) == "int8-channel"
    assert str(formats["model.embed_tokens"]) == "bf16"
    assert "bf16" not in {str(f) for name, f in formats.items() if name != "model.embed_tokens"}
    with pytest.raises(mp.InfeasibleError) as found:
        study.plan("weights <= 4 bits")
    assert "pinned" in found.value.because


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"pins": {"*.mpl.*": "int8-channel"}}, "E120", "matches no layer"),
        ({"pins": {"*.q_proj": "int8-channel", "*.k_proj": "int4-g64"}}, "E121", "one decision"),
        ({"formats": ["int4-g48"]}, "E130", "cannot be cut into groups of 48"),
        ({"estimator": "hesian_trace"}, "E107", "did you mean 'hessian_trace'"),
        ({"estimator": {"name": "fisher", "drws": 2}}, "E107", "no setting 'drws'"),
        ({"length": 500}, "E504", "64 tokens"),
    ],
)
def test_questions_that_do_not_fit_the_model(
    small_llama: Path, tmp_path: Path, changes: Any, code: str, words: str
) -> None:
    with pytest.raises(mp.MpsearchError) as found:
        mp.study(**{**study_settings(small_llama, tmp_path), **changes}).run()
    assert found.value.code == code
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"budgte": ["4 bits"]}, "E103", "did you mean 'budgets'"),
        ({"model": ""}, "E106", "'model' is missing"),
        ({"budgets": []}, "E111", "empty"),
        ({"budgets": ["nan"]}, "E111", "nan"),
        ({"seed": 2**63}, "E113", "64 bits"),
        ({"seed": -1}, "E113", "-1"),
        ({"tokens": "many"}, "E113", "must be int"),
        ({"formats": ["int1-channel"]}, "E110", "1 bit"),
        ({"pins": {"x": "int4_g64"}}, "E109", "pin 'x'"),
        ({"name": "a\0b"}, "E114", "character 2"),
    ],
)
def test_questions_that_make_no_sense(small_llama: Path, tmp_path: Path, changes: Any, code: str, words: str) -> None:
    with pytest.raises(mp.MpsearchError) as found:
        mp.study(**{**study_settings(small_llama, tmp_path), **changes}).run()
    assert found.value.code == code
    assert words in str(found.value)


def test_a_name_with_another_question_is_refused(finished: Study) -> None:
    settings = {**finished.spec.question(), "budgets": ["weights <= 3 bits"], "storage": finished.spec.storage}
    with pytest.raises(mp.StorageError) as found:
        mp.study(**settings).run()
    assert found.value.code == "E140"
    assert "budgets" in str(found.value)


FILE = """
name = "file"
model = "{model}"
calibration = "stdlib:calibration"
budgets = ["weights <= 4 bits"]
{more}
"""


@pytest.mark.parametrize(
    ("more", "code", "where"),
    [
        ("budgte = 3", "E103", ":6"),
        ('name = "again"', "E104", ":6:"),
        ("formats = [", "E102", ""),
        ('formats = ["int4-g64", "int1-channel"]', "E110", ":6"),
        ("tokens = 010", "E102", ":6:"),
    ],
)
def test_study_files_name_the_line(tmp_path: Path, more: str, code: str, where: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(FILE.format(model="m", more=more))
    with pytest.raises(mp.InputError) as found:
        StudySpec.load(file)
    assert found.value.code == code
    assert f"study.toml{where}" in found.value.where


def test_a_missing_study_file_offers_the_closest(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("")
    with pytest.raises(mp.InputError, match="did you mean 'study"):
        StudySpec.load(tmp_path / "stduy.toml")


def test_paths_start_from_the_file(small_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(FILE.format(model=os.path.relpath(small_llama, tmp_path), more=""))
    assert StudySpec.load(file).model == str(small_llama.resolve())


def test_a_module_of_any_kind_can_be_searched() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model = mp.wrap(module, logits=lambda m, x: m(x))
    found = mp.search(
        model,
        [torch.randn(8, 64) for _ in range(8)],
        "weights <= 5 bits",
        formats=["int2-g32", "int4-g32", "int8-channel"],
        points=2,
    )
    assert found.plan.bits <= 5
    assert found.front
    assert found.study.computed > 0


def killed_run(settings: dict[str, Any], seconds: float) -> bool:
    """Run a study in a process of its own, kill it after some time, and say whether it was still running."""
    code = "import json, sys, mpsearch as mp; mp.study(**json.loads(sys.argv[1])).run()"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(settings)], start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    assert process.returncode == 0
    return False


def rows_of(database: Path) -> tuple[set[Any], set[Any]]:
    if not database.exists():
        return set(), set()
    connection = sqlite3.connect(database)
    try:
        cells = connection.execute("SELECT scope, layer, format, batch, value FROM cell").fetchall()
        values = connection.execute("SELECT kind, key FROM value").fetchall()
    except sqlite3.OperationalError:
        return set(), set()
    finally:
        connection.close()
    assert len(cells) == len({row[:4] for row in cells})
    assert len(values) == len(set(values))
    return set(cells), set(values)


def test_killed_studies_go_on_where_they_were(finished: Study, small_llama: Path, tmp_path: Path) -> None:
    """Kill a run three times at random moments; benchmarks/kill_study.py does it thirty times."""
    settings = study_settings(small_llama, tmp_path, random=2)
    dice = random.Random(3)
    cells: set[Any] = set()
    values: set[Any] = set()
    start = time.monotonic()
    for _ in range(3):
        if not killed_run(settings, dice.uniform(5.0, 9.0)):
            break
        now_cells, now_values = rows_of(tmp_path / "results.db")
        assert cells <= now_cells
        assert values <= now_values
        cells, values = now_cells, now_values
    assert time.monotonic() - start > 5
    study = mp.study(**settings)
    study.run()
    assert plan_bytes(study) == plan_bytes(finished)
    assert cells <= rows_of(tmp_path / "results.db")[0]
