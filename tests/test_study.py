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
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch import registry, rivals
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


def test_rules_hold_on_stored_scores_and_cost(finished: Study) -> None:
    def plan(**changes: Any) -> mp.BitPlan:
        return Study(replace(finished.spec, **changes), finished.store).plan("weights <= 4 bits")

    def taken(plan: mp.BitPlan) -> Counter[str]:
        return Counter(str(plan.formats[row.layers[0].name]) for row in plan.layers.decisions)

    free = plan()
    common, count = taken(free).most_common(1)[0]
    ruled = plan(rules={"at_most": {common: count - 2}})
    assert taken(ruled)[common] <= count - 2
    assert free.predicted.loss is not None
    assert ruled.predicted.loss is not None
    assert ruled.predicted.loss > free.predicted.loss
    for name in ("pins", "ties"):
        with pytest.raises(mp.InputError, match="key of its own"):
            plan(rules={name: {}} if name == "pins" else {name: []})
    with pytest.raises(mp.InputError, match="E213"):
        plan(rules={"at_most": {common: "two"}})


def test_no_plan_of_a_study_breaks_its_rules(finished: Study) -> None:
    def planner(**changes: Any) -> Any:
        study = Study(replace(finished.spec, **changes), finished.store)
        return study._planner(study.budgets)

    ruled = planner(rules={"at_most": {"int2-g64": 1}})
    random = [item.plan for item in rivals.random(ruled, finished.scores, ruled.asked, 5)]
    assert random
    for plan in random:
        taken = [str(plan.formats[row.layers[0].name]) for row in plan.layers.decisions]
        assert taken.count("int2-g64") <= 1
    labels = {item.label for item in rivals.uniform(ruled)}
    assert "uniform int2-g64" not in labels
    assert "uniform int4-g64" in labels
    assert "uniform int2-g64" in {item.label for item in rivals.uniform(planner())}
    large = replace(finished.budgets[0], amount=finished.budgets[0].amount * 8)
    assert planner().holds_all([large]) is not None
    assert ruled.holds_all([large]) is None


def test_a_cautious_plan_expects_no_less_loss_and_has_less_at_the_worst(finished: Study) -> None:
    sure = Study(replace(finished.spec, cautious=3.0), finished.store)
    free, careful = finished.plan("weights <= 3 bits"), sure.plan("weights <= 3 bits")
    columns = list(finished.scores.formats)

    def at_worst(plan: mp.BitPlan) -> float:
        cells = [(i, columns.index(str(plan.formats[r.layers[0].name]))) for i, r in enumerate(plan.layers.decisions)]
        return sum(finished.scores.value[cell] + 3.0 * finished.scores.spread[cell] for cell in cells)

    assert free.predicted.loss is not None
    assert careful.predicted.loss is not None
    assert careful.predicted.loss >= free.predicted.loss
    assert at_worst(careful) <= at_worst(free) * (1 + 1e-12)


def test_doubts_name_decisions_of_the_study(finished: Study) -> None:
    names = {row.name for row in finished.survey.layers.decisions}
    plan = finished.plan("weights <= 3 bits")
    found = finished.doubts("weights <= 3 bits", by=1e9)
    assert {doubt.row for doubt in found} <= names
    assert found
    for doubt in found:
        row = next(row for row in plan.layers.decisions if row.name == doubt.row)
        assert str(plan.formats[row.layers[0].name]) == doubt.chosen != doubt.other
    assert len(finished.doubts("weights <= 3 bits", by=1e-9)) <= len(found)


def test_the_smallest_plan_within_a_loss_mirrors_the_least_loss_within_a_size(finished: Study) -> None:
    within = finished.plan("weights <= 3 bits")
    assert within.predicted.loss is not None
    smallest = finished.plan(goal="weights", most_loss=within.predicted.loss * (1 + 1e-12))
    assert smallest.bytes <= within.bytes
    assert smallest.predicted.loss == pytest.approx(within.predicted.loss, rel=1e-9)  # less would be no optimum above
    assert smallest.source["goal"] == {"least": "weights", "most_loss": within.predicted.loss * (1 + 1e-12)}
    looser = finished.plan(goal="weights", most_loss=within.predicted.loss * 2)
    assert looser.bytes < smallest.bytes
    assert looser.predicted.loss is not None
    assert looser.predicted.loss <= within.predicted.loss * 2


def test_another_goal_keeps_the_budgets_that_are_given_with_it(finished: Study) -> None:
    within = finished.plan("weights <= 3 bits")
    assert within.predicted.loss is not None
    most = within.predicted.loss * 1.5
    free = finished.plan(goal="bops", most_loss=most)
    assert free.cost["bops"] <= within.cost["bops"]
    smallest = finished.plan(goal="weights", most_loss=most).bytes
    kept = finished.plan(f"weights <= {smallest} B", goal="bops", most_loss=most)
    assert kept.bytes == smallest <= free.bytes
    assert kept.cost["bops"] >= free.cost["bops"]


def test_the_worst_decision_can_be_the_goal(finished: Study) -> None:
    table = finished.scores

    def worst(plan: mp.BitPlan) -> float:
        rows = enumerate(plan.layers.decisions)
        return max(table.value[i, table.formats.index(str(plan.formats[row.layers[0].name]))] for i, row in rows)

    least, fair = finished.plan("weights <= 3 bits"), finished.plan("weights <= 3 bits", goal="worst")
    assert fair.bits <= 3
    assert worst(fair) <= worst(least)


def test_a_loss_that_no_plan_reaches_is_refused_with_the_best_that_is(finished: Study) -> None:
    with pytest.raises(mp.InfeasibleError, match="predicted to lose at most 1e-30") as caught:
        finished.plan(goal="weights", most_loss=1e-30)
    assert caught.value.code == "E203"
    assert "the best within the budgets is predicted to lose" in caught.value.because
    with pytest.raises(mp.InputError, match=r"no goal 'weigths'.*weights"):
        finished.plan(goal="weigths", most_loss=1.0)
    with pytest.raises(mp.InputError, match="needs the most loss"):
        finished.plan(goal="weights")


def test_budgets_that_clash_say_what_each_could_be(small_llama: Path, tmp_path: Path) -> None:
    rules = {"at_most": {"int2-channel": 0}}
    settings = {"formats": ["int2-channel", "int8-channel"], "points": 0, "estimator": "weight_mse", "rules": rules}
    study = mp.study(**study_settings(small_llama, tmp_path, **settings, budgets=["weights <= 6 bits"]))
    with pytest.raises(mp.InfeasibleError, match="under the rules") as caught:
        study.run()
    assert caught.value.code == "E203"
    least = float(str(caught.value).split("weights <= 6 bits could be ")[1].split(" ")[0])
    assert 8 < least < 9
    study = mp.study(
        **study_settings(small_llama, tmp_path, **settings, budgets=[f"weights <= {least} bits"], name="b")
    )
    study.run()
    assert study.plans


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
    assert "2 pinned decisions cost" in found.value.because
    assert found.value.because.index("'model.embed_tokens'") < found.value.because.index("{q,k,v}_proj")
    uniform = next(x.plan for x in study.plans if x.label == "uniform int4-g64")
    assert {str(uniform.formats[f"model.layers.{i}.self_attn.q_proj"]) for i in (0, 1)} == {"int8-channel", "int4-g64"}


def test_a_format_that_fits_no_layer_is_said_to(small_llama: Path, tmp_path: Path) -> None:
    study = mp.study(
        **study_settings(
            small_llama, tmp_path, formats=["int4-g64", "int4-g48", "int8-channel"], points=0, budgets=["5 bits"]
        )
    )
    study.run()
    assert [n.message[:8] for n in study.notices if n.code == "W131"] == ["int4-g48"]
    assert "uniform int4-g48" not in {m.label for m in study.measurements}


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
        ({"name": "a\0b"}, "E114", "U+0000"),
        ({"budgets": 4.25}, "E113", "4.25"),
        ({"formats": 4}, "E113", "'formats'"),
        ({"ties": [1, 2]}, "E113", "'ties'"),
        ({"ties": "atuo"}, "E113", "atuo"),
        ({"pins": {"a": 4}}, "E113", "'pins'"),
        ({"solver": "ilpp"}, "E107", "did you mean 'ilp'"),
        ({"validation": "stdlib:calibration"}, "E505", "the same text"),
        ({"validation_tokens": 32}, "E504", "no spread"),
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


def kill_run(settings: dict[str, Any], cells: int) -> None:
    """Run a study in a process of its own, and kill it once the database holds so many cells."""
    code = "import json, sys, mpsearch as mp; mp.study(**json.loads(sys.argv[1])).run()"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(settings)], start_new_session=True)
    while len(rows_of(Path(settings["storage"]))[0]) < cells:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    """Kill a run three times in the middle; benchmarks/chaos does it hundreds of times at any moment."""
    settings = study_settings(small_llama, tmp_path, random=2)
    dice = random.Random(3)
    cells: set[Any] = set()
    values: set[Any] = set()
    for _ in range(3):
        kill_run(settings, len(cells) + dice.randint(1, 6))
        now_cells, now_values = rows_of(tmp_path / "results.db")
        assert cells < now_cells
        assert values <= now_values
        cells, values = now_cells, now_values
    study = mp.study(**settings)
    study.run()
    assert plan_bytes(study) == plan_bytes(finished)
    assert cells <= rows_of(tmp_path / "results.db")[0]
    assert 0 < study.computed < finished.computed


def text_of(seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(str(dice.randrange(1000)) for _ in range(4000))


def test_a_changed_text_is_another_text_even_in_one_process(small_llama: Path, tmp_path: Path) -> None:
    """What a process remembers of a file must not stand for what the file says now."""
    text = tmp_path / "validation.txt"
    text.write_text(text_of(1))
    settings = study_settings(
        small_llama, tmp_path, validation=str(text), points=0, formats=["int3-g64", "int8-channel"]
    )
    first = mp.study(**{**settings, "name": "one"})
    first.run()
    text.write_text(text_of(2))
    second = mp.study(**{**settings, "name": "two"})
    second.run()
    assert second.measurements[0].loss != first.measurements[0].loss
    fresh = mp.study(**{**settings, "storage": str(tmp_path / "fresh.db")})
    fresh.run()
    assert [m.loss for m in fresh.measurements] == [m.loss for m in second.measurements]
    with pytest.raises(mp.InputError) as found:
        mp.study(**{**settings, "name": "one"}).run()
    assert found.value.code == "E142"
    assert "validation was" in found.value.because


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def search_toy(storage: Path, **changes: Any) -> Any:
    torch.manual_seed(1)
    batches = [torch.randn(8, 64) for _ in range(8)]
    settings = {"formats": ["int2-g32", "int4-g32", "int8-channel"], "points": 0, "storage": str(storage), **changes}
    model = mp.wrap(toy(), logits=settings.pop("logits", lambda m, x: m(x)), name="toy")
    return mp.search(model, batches, settings.pop("budget", "weights <= 5 bits"), **settings)


def test_another_function_is_another_model(tmp_path: Path) -> None:
    first = search_toy(tmp_path / "toy.db", name="a")
    second = search_toy(tmp_path / "toy.db", name="b", logits=lambda m, x: 3 * m(x))
    assert second.study.computed > 0
    assert second.front[0].loss > 2 * first.front[0].loss


def test_ties_of_a_module_are_kept_apart(tmp_path: Path) -> None:
    tied = search_toy(tmp_path / "toy.db", name="a", ties=[["0", "2"]])
    free = search_toy(tmp_path / "toy.db", name="b", ties="none")
    assert [len(x.study.survey.layers.decisions) for x in (tied, free)] == [1, 2]


def test_a_budget_that_norms_in_32_bits_break_is_searched(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    batches = [torch.randn(8, 16) for _ in range(8)]
    model = mp.wrap(module, logits=lambda m, x: m(x))
    found = mp.search(model, batches, "weights <= 16 bits", formats=["int4-channel", "bf16"], points=0)
    assert found.plan.bits <= 16


def test_a_format_that_breaks_the_model_leaves_a_gap_not_a_ruin(small_llama: Path, tmp_path: Path) -> None:
    def explosive(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # Infinite as soon as the first layer is not exactly itself.
        moved = (module[0].weight - original).abs().max() > 0.05
        return module(x) / (0.0 if moved else 1.0)

    original = toy()[0].weight.detach().clone()
    found = search_toy(tmp_path / "toy.db", logits=explosive, budget="weights <= 7 bits")
    assert found.study.store.study("toy").state == "gaps"
    assert "W511" in [notice.code for notice in found.study.notices]
    assert str(found.plan.formats["0"]) != "int2-g32"
    assert found.study.scores.status[0][0] == "non_finite"


def test_what_is_within_the_noise_does_not_draw_bits_away() -> None:
    import numpy as np

    from mpsearch.layer import Layer, Layers
    from mpsearch.planning import Planner
    from mpsearch.tables import SensitivityTable

    layers = Layers((Layer("a", "linear", (8, 8)), Layer("b", "linear", (8, 8))))
    formats = ("int2-channel", "int4-channel", "int8-channel")
    spec = StudySpec(model="m", calibration="c", formats=formats, budgets=("weights <= 16 bits",))
    value = np.array([[-3.1, -0.3, -0.01], [3.0, 0.3, 0.01]])
    scores = SensitivityTable(("a", "b"), formats, value, 1.3 * np.abs(value), "nats/token")
    plan = Planner(spec, layers, {}).mixed(scores, [mp.Budget.parse("weights <= 15 bits")])
    assert {str(f) for f in plan.formats.values()} == {"int8-channel"}
    assert plan.predicted.spread == pytest.approx(1.3 * 0.02)
    uniform = next(x for x in rivals.uniform(Planner(spec, layers, {})) if x.label == "uniform int8-channel")
    assert Planner(spec, layers, {}).predict(scores, uniform.plan).loss == pytest.approx(plan.loss)


def test_decisions_without_any_score_stay_in_the_largest_format() -> None:
    import numpy as np

    from mpsearch.layer import Layer, Layers
    from mpsearch.planning import Planner
    from mpsearch.tables import SensitivityTable

    layers = Layers((Layer("a", "linear", (8, 8)), Layer("b", "linear", (8, 8))))
    spec = StudySpec(model="m", calibration="c", formats=("int2-channel", "int8-channel"), budgets=("9 bits",))
    value = np.array([[np.nan, np.nan], [3.0, 0.3]])
    status = (("not_observed", "not_observed"), ("ok", "ok"))
    scores = SensitivityTable(("a", "b"), spec.formats, value, np.abs(value), "nats/token", status)  # type: ignore[arg-type]
    planner = Planner(spec, layers, {})
    # Kept in the largest format, though the smallest would have let the other have more.
    kept = planner.mixed(scores, [mp.Budget.parse("weights <= 7 bits")])
    assert [str(fmt) for fmt in kept.formats.values()] == ["int8-channel", "int2-channel"]
    assert planner.unscored(scores) == [(0, 1)]
    with pytest.raises(mp.InputError, match="E211") as found:
        planner.mixed(scores, [mp.Budget.parse("weights <= 5 bits")])
    assert "'a'" in found.value.message


def test_what_is_stopped_on_a_study_that_has_ended_leaves_it_so(finished: Study) -> None:
    with pytest.raises(KeyboardInterrupt), finished.session():  # noqa: PT012
        assert finished.status.state == "running"
        raise KeyboardInterrupt
    assert finished.status.state == "complete"
    assert finished.submit() == finished.name
    assert finished.status.state == "complete"
    with pytest.raises(mp.MpsearchError, match="nothing to cancel"):
        finished.cancel()
    assert finished.status.wanted == "run"
