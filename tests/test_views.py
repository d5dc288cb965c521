"""Steps, explanations, differences, breakdowns, agreement and the verdict: the numbers that every picture shares."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpsearch as mp
from mpsearch.cli.compare import _total
from mpsearch.cli.looks import Pen, front_plot
from mpsearch.cli.options import open_study
from mpsearch.errors import InputError
from mpsearch.front import Measurement, ParetoFront
from mpsearch.layer import Layer, Layers
from mpsearch.planning import Labelled
from mpsearch.plot.notebook import front_html
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.testing.views import pretended
from mpsearch.verdict import NEARLY_EQUAL, best_uniform, is_uniform, verdict
from mpsearch.views.agreement import agreement, correlation, of_decisions
from mpsearch.views.breakdown import UNDECIDED, breakdown
from mpsearch.views.curves import curves
from mpsearch.views.difference import BARS, difference
from mpsearch.views.judge import Judge
from mpsearch.views.packed import packed
from mpsearch.views.points import PlanRow, Points
from mpsearch.views.steps import MIB, Ladder
from mpsearch.views.study_view import Limit, StudyView
from mpsearch.views.why import matching, why, whys
from mpsearch.views.worth import worth
from tests.stored_views import store_view

FORMATS = ("int2-g64", "int4-g64", "int8-channel")


def made_view(
    loss: Any, error: Any = 0.01, *, layers: Layers | None = None, plans: Any = None, **changes: Any
) -> StudyView:
    """A study of a few layers with given scores: (decisions, 3); plans by numbers of formats."""
    value = np.array(loss, dtype=np.float64)
    found = layers or Layers(tuple(Layer(f"h.{i}.fc", "linear", (64, 64)) for i in range(len(value))))
    rows = tuple(row.name for row in found.decisions)
    status: Any = tuple(tuple("ok" if math.isfinite(x) else "not_observed" for x in row) for row in value)
    spread = np.where(np.isfinite(value), np.broadcast_to(error, value.shape), np.nan)
    scores = SensitivityTable(rows, FORMATS, value, spread, "nats/token", status, source={"estimator": "fisher"})
    made = []
    for n, choice in enumerate(plans if plans is not None else [[0] * len(found)]):
        formats = {x.name: mp.Format.parse(FORMATS[j]) for x, j in zip(found, choice, strict=True)}
        plan = mp.BitPlan(found, formats, {"digest": "d"})
        cost = {"weights": plan.bytes}
        label = "uniform x" if n else "mixed"
        names = tuple(map(str, formats.values()))
        made.append(PlanRow(str(n), plan.assignment, label, names, {"loss": None, "cost": cost}))
    points = Points.of(made, [], formats=FORMATS)
    return replace(StudyView("toy", "complete", found, points, (), scores, model={"digest": "d"}), **changes)


def test_steps_are_the_next_scored_formats_by_bytes() -> None:
    view = made_view([[3.0, 1.0, 0.5], [2.0, math.nan, 1.5], [1.0, 1.2, 0.1]])
    ladder = Ladder.of(view)
    up = ladder.steps(np.array([0, 0, 0]), "up")
    # int4 of the second has no score: its step goes on to int8. The third would get worse by a step up.
    assert up.column.tolist() == [1, 2, 1]
    np.testing.assert_allclose(up.gain, [2.0, 0.5, -0.2])
    assert up.rank.tolist() == [1, 2, 3]
    sizes = [mp.Format.parse(name).bytes(view.layers[0]) for name in FORMATS]
    assert up.bytes.tolist() == [sizes[1] - sizes[0], sizes[2] - sizes[0], sizes[1] - sizes[0]]
    down = ladder.steps(np.array([2, 2, 1]), "down")
    assert down.column.tolist() == [1, 0, 0]
    np.testing.assert_allclose(down.gain, [-0.5, -0.5, 0.2])
    assert not ladder.steps(np.array([2, 2, 2]), "up").there.any()


def test_noise_is_within_two_standard_errors_of_the_difference() -> None:
    view = made_view([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0]], [[0.04, 0.04, 0], [0.03, 0.03, 0]])
    noise = Ladder.of(view).steps(np.array([0, 0]), "up").noise
    assert noise.tolist() == [True, False]


def test_a_score_below_zero_counts_as_its_error_everywhere() -> None:
    view = made_view([[0.2, -0.1, -0.3]], 0.05)
    assert Ladder.of(view).loss.tolist() == [[0.2, 0.05, 0.05]]
    found = why(view, None, "h.0.fc")
    assert [option.loss for option in found.options] == [0.2, 0.05, 0.05]
    assert found.flags == ("estimated below zero, so its error counts: int4-g64, int8-channel",)


def test_totals_are_those_that_are_stored_for_plans_of_all_kinds() -> None:
    view = pretended(200, 40, 5)
    ladder = Ladder.of(view)
    for i in range(len(view.points)):
        choice = ladder.choice(view.plan(i))
        assert ladder.total(choice) == view.points.predicted[i]
        assert choice.tolist() == view.points.choice[i][list(view.leads)].tolist()


def test_kv_caches_count_the_bytes_of_their_own_table() -> None:
    layers = Layers((Layer("h.0.fc", "linear", (64, 64)), Layer("h.0.kv", "kv_cache", (2, 64))))
    table = CostTable(
        ("h.0.fc", "h.0.kv"), FORMATS, np.array([[0.0] * 3, [1e3, 2e3, 4e3]]), np.zeros((2, 3)), "bytes",
        "kv at context 8", "exact",
    )  # fmt: skip
    view = made_view([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1]], layers=layers, plans=[[0, 0]], costs=(table,))
    up = Ladder.of(view).steps(np.array([0, 0]), "up")
    assert up.bytes[1] == 1000
    assert up.rate[1] == pytest.approx(0.5 / (1000 / MIB))


def test_why_names_the_step_its_price_and_what_else_decides() -> None:
    layers = Layers(
        (
            Layer("h.0.q", "linear", (64, 64), tie="h.0.qk"),
            Layer("h.0.k", "linear", (64, 64), tie="h.0.qk"),
            Layer("head", "linear", (64, 64), shared=("embed",)),
        )
    )
    rules = {"bars": {"h.*": ["int2-g64"]}, "floors": {"head": "int4-g64"}}
    view = made_view(
        [[3.0, 1.0, 0.5], [2.0, math.nan, 1.5]],
        layers=layers,
        plans=[[1, 1, 0]],
        pins={"head": "int2-g64"},
        provenance={"study": {"rules": rules}},
    )
    found = why(view, None, "h.0.k")
    assert (found.layer, found.decision, found.layers) == ("h.0.q", "h.0.qk", ("h.0.q", "h.0.k"))
    assert (found.up and found.up.format, found.down and found.down.format) == ("int8-channel", "int2-g64")
    assert found.share == pytest.approx(1 / 3)
    assert found.flags == ("tied: 2 layers take one format", "barred by a rule: int2-g64")
    head = why(view, None, "head")
    assert head.flags == (
        "shared: the same tensor as embed", "pinned to int2-g64", "at least, by a rule: int4-g64",
        "not observed: int4-g64",
    )  # fmt: skip
    assert [option.status for option in head.options] == ["ok", "not_observed", "ok"]
    json.dumps([found.to_json(), head.to_json()], allow_nan=False)


def test_why_prices_budgets_in_units_that_people_read() -> None:
    view = pretended(40, 16, 4)
    tpot = next(table for table in view.costs if table.resource.startswith("tpot"))
    condition = tpot.resource.removeprefix("tpot").strip()
    plan = view.plan(0)
    budget = f"tpot <= 5 ms {condition or 'at context 512'}"
    prices = [{"budget": "weights <= 4 bits", "price": 1e-7}, {"budget": budget, "price": 0.0}]
    found = why(view, replace(plan, source={"prices": prices}), "lm_head").prices
    assert found[0].price == pytest.approx(1e-7 * MIB)
    assert (found[0].unit, found[0].binds) == ("nats/token per MiB", True)
    assert (found[1].per, found[1].binds, found[1].price) == ("ms", False, 0.0)
    weights = view.costs[0]
    assert found[0].left == pytest.approx((4 * weights.weights // 8 - plan.cost["weights"]) / MIB)


def test_why_says_which_estimator_would_choose_otherwise() -> None:
    loss = [[1.0, 0.1, 0.01]] * 6
    view = made_view(loss, 0.001, plans=[[1] * 6])
    assert view.scores is not None
    swapped = view.scores.value.copy()
    swapped[0] *= 100
    swapped[1] *= 0.01
    other = replace(view.scores, value=swapped, source={"estimator": "divergence"})
    found = whys(replace(view, others=(other,)), None, list(view.layers.decisions))
    assert [one.opinions[0].says for one in found] == ["more bits", "fewer bits", "the same", "the same", "the same",
                                                      "the same"]  # fmt: skip
    assert any("divergence would give it more bits" in line for line in found[0].sentences)


def test_why_refuses_what_is_not_there() -> None:
    view = pretended(20, 16, 4)
    with pytest.raises(InputError, match="did you mean 'lm_head'") as wrong:
        why(view, None, "lm_hed")
    assert wrong.value.code == "E120"
    with pytest.raises(InputError, match=r"matches \d+ decisions") as wrong:
        why(view, None, "*q_proj")
    assert wrong.value.code == "E120"
    assert len(matching(view, "*q_proj")) > 1
    with pytest.raises(InputError) as wrong:
        why(StudyView("empty", "running", Layers(()), Points.of([], [])), None, "x")
    assert wrong.value.code in ("E120", "E143")


@pytest.mark.parametrize("layers", [1, 16, 200])
def test_a_waterfall_adds_up_exactly(layers: int) -> None:
    view = pretended(30, layers, 5)
    last = len(view.points) - 1
    for i, j in [(0, last), (last, 0), (3, 3), (1, 2)]:
        found = difference(view.plan(i), view.plan(j), view)
        bars = found.waterfall
        assert bars[0].start == found.first.predicted == view.points.predicted[i]
        assert bars[-1].end == found.second.predicted == view.points.predicted[j]
        assert all(a.end == b.start for a, b in itertools.pairwise(bars))
        assert len(bars) <= BARS
        effects = [abs(change.loss or 0.0) for change in found.changes]
        assert effects == sorted(effects, reverse=True)
        assert found.same == int((view.points.choice[i] == view.points.choice[j]).sum())
        assert sum(change.bytes for change in found.changes) == found.second.bytes - found.first.bytes
        json.dumps(found.to_json(), allow_nan=False)


def test_differences_without_scores_still_know_the_bytes() -> None:
    view = pretended(30, 16, 4)
    a, b = view.plan(2), view.plan(9)
    assert [(x.before, x.after, x.bytes) for x in sorted(difference(a, b).changes, key=lambda x: x.decision)] == [
        (x.before, x.after, x.bytes) for x in sorted(difference(a, b, view).changes, key=lambda x: x.decision)
    ]
    assert difference(a, b).waterfall == ()
    with pytest.raises(InputError) as wrong:
        difference(a, pretended(20, 8, 4).plan(0))
    assert wrong.value.code == "E302"


def test_measured_differences_are_paired_by_sequence() -> None:
    view = pretended(20, 16, 4)
    noise = np.random.default_rng(0).normal(1.0, 0.5, 64)
    runs = [
        Measurement(view.plan(i).assignment, f"p{i}", float(np.mean(noise + i)), 0.06, "nats/token",
                    {"weights": view.points.cost["weights"][i]}, data={"text": "v"}, samples=tuple(noise + i))
        for i in (0, 1)
    ]  # fmt: skip
    found = difference(view.plan(0), view.plan(1), replace(view, measured=tuple(runs)))
    assert found.measured is not None
    assert found.measured[0] == pytest.approx(1.0)
    assert found.measured[1] < 1e-9


def test_a_breakdown_adds_up_by_kind_and_by_block() -> None:
    view = pretended(20, 60, 5)
    for i in range(5):
        plan = view.plan(i)
        for found in breakdown(view, plan):
            for parts in (found.kinds, found.blocks):
                exact = sum((Fraction(part.amount) for part in parts), Fraction(0))
                if found.resource == "weights":
                    assert exact == plan.bytes
                assert float(exact) == pytest.approx(found.total, rel=1e-12)
        assert [found.resource.split(" ")[0] for found in breakdown(view, plan)] == ["weights", "tpot"]
    layers = Layers((Layer("fc", "linear", (64, 64)),), mp.layers(_norm()).excluded)
    kinds = breakdown(made_view([[1.0, 0.5, 0.1]], layers=layers), made_view([[1.0, 0.5, 0.1]], layers=layers).plan(0))
    assert kinds[0].kinds[-1].name == UNDECIDED


def _norm() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def test_agreement_is_spearmans_with_an_interval() -> None:
    from scipy.stats import spearmanr

    view = pretended(200, 40, 5)
    found = agreement(view)[0]
    there = view.points.measured
    expected = spearmanr(view.points.predicted[there], view.points.loss[there]).statistic
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.count == there.sum()
    assert found.low < found.value < found.high
    assert correlation("a", "b", np.arange(3.0), np.arange(3.0)) is None
    assert correlation("a", "b", np.arange(9.0), np.ones(9)) is None
    assert view.scores is not None
    noisy = replace(view.scores, value=view.scores.value * 2, source={"estimator": "other"})
    pairs = [(one.first, one.second) for one in agreement(replace(view, others=(noisy,)))]
    assert pairs == [("fisher", "measured"), ("other", "measured"), ("fisher", "other")]


def measured_as(view: StudyView, label: str, i: int, loss: float, samples: Any = ()) -> Measurement:
    cost = {"weights": float(view.points.cost["weights"][i])}
    return Measurement(view.points.keys[i], label, loss, 0.01, "nats/token", cost, data={"text": "v"}, samples=samples)


@pytest.mark.parametrize(
    ("uniform", "outcome"), [(1.0, "pays"), (0.501, "no difference"), (0.2, "does not pay"), (None, "no rival")]
)
def test_worth_judges_by_the_interval(uniform: float | None, outcome: str) -> None:
    view = made_view([[3.0, 1.0, 0.5], [2.0, 1.8, 1.5]], plans=[[1, 0], [0, 0]])
    runs = [measured_as(view, "mixed", 0, 0.5)]
    if uniform is not None:
        runs.append(measured_as(view, "uniform x", 1, uniform))
    found = worth(replace(view, measured=tuple(runs)))
    assert found.outcome == outcome
    if uniform is not None:
        assert found.gain is not None
        assert found.gain.value == pytest.approx(uniform - 0.5)
        assert found.gain.high == pytest.approx(uniform - 0.5 + 1.96 * math.hypot(0.01, 0.01))
    json.dumps(found.to_json(), allow_nan=False)


def test_worth_finds_what_limits_and_what_to_try() -> None:
    layers = Layers(tuple(Layer(f"h.{i}.{x}", "linear", (64, 64), tie=f"h.{i}.qk") for i in range(4) for x in "qk"))
    loss = [[3.0, 1.0, 0.9]] + [[0.1, 0.05, 0.049]] * 3
    question = {"formats": list(FORMATS), "tokens": 1000}
    view = made_view(loss, 0.02, layers=layers, plans=[[2] * 8], provenance={"study": question})
    found = worth(replace(view, measured=(measured_as(view, "mixed", 0, 0.5),)))
    kinds = {item.what: item for item in found.limits}
    assert set(kinds) == {"largest", "ties", "layer", "noise", "slack"}
    assert kinds["layer"].layers == ("h.0.qk",)
    assert kinds["ties"].sentence.startswith("4 of 4 decisions tie layers (q/k)")
    lines = [one.line for one in found.next]
    assert 'formats = ["int2-g64", "int4-g64", "int8-channel", "bf16"]' in lines
    assert "tokens = 4000" in lines
    assert "mpsearch why toy h.0.q" in lines
    assert "mpsearch why toy h.0.q --storage a.db" in [one.line for one in found.at(" --storage a.db").next]
    assert "tokens = 4000" in [one.line for one in found.at(" --storage a.db").next]


def test_worth_of_a_study_that_has_only_begun() -> None:
    begun = StudyView("a b", "running", Layers(()), Points.of([], []))
    assert (begun.worth.outcome, begun.worth.next[0].line) == ("no plan", "mpsearch watch 'a b'")
    bare = made_view([[3.0, 1.0, 0.5]])
    assert worth(replace(bare, scores=None)).outcome == "not measured"


def test_a_stored_study_gives_the_same_view(tmp_path: Path) -> None:
    view = pretended(40, 16, 4)
    assert view.scores is not None
    other = replace(view.scores, value=view.scores.value * 3, source={"estimator": "divergence"})
    url = store_view(view, tmp_path / "a.db", "made up", others=(other,))
    study = open_study("made up", url, read_only=True)
    try:
        found = study.view
        assert study.scores.source["estimator"] == "fisher"
    finally:
        study.store.close()
    np.testing.assert_array_equal(found.points.loss, view.points.loss)
    assert [table.source["estimator"] for table in found.others] == ["divergence"]
    ours, theirs = why(view, 0, "lm_head"), why(found, 0, "lm_head")
    assert (ours.up, ours.down, ours.options) == (theirs.up, theirs.down, theirs.options)
    assert packed(found)["worth"] == found.worth.to_json()
    assert found.worth.gain == view.worth.gain
    assert mp.why is why
    assert found.points.sources[0] == found.plan(0).source


def test_limits_of_budgets_are_those_of_the_view() -> None:
    assert Limit("weights <= 1 MiB", "weights", 2.0**20).limit == MIB


def _with_prices(view: StudyView, i: int, budget: str, price: float) -> mp.BitPlan:
    return replace(view.plan(i), source={"prices": [{"budget": budget, "price": price}]})


def test_a_price_is_told_as_a_slope_and_promises_no_saving() -> None:
    view = pretended(40, 16, 4)
    found = why(view, _with_prices(view, 0, "weights <= 4 bits", 1e-7), "lm_head")
    (told,) = [line for line in found.sentences if line.startswith("Budget")]
    assert told == (
        f"Budget weights <= 4 bits binds: the price at this budget is {1e-7 * MIB:.3g} nats/token per MiB, for small "
        "changes."
    )


def test_what_hinders_a_step_up_is_said_only_where_it_is_known() -> None:
    view = made_view([[3.0, 1.0, 0.5], [2.0, 1.7, 1.5]], 0.001, plans=[[0, 0]], costs=())
    table = CostTable(
        tuple(row.name for row in view.layers.decisions), FORMATS, view.sizes, np.zeros((2, 3)), "bytes", "weights",
        "exact", 0.0, 0.0, view.weights,
    )  # fmt: skip
    view = replace(view, costs=(table,))
    size = view.plan(0).bytes
    step = int(view.sizes[0, 1] - view.sizes[0, 0])

    def told(left: int, price: float, **changes: Any) -> str:
        plan = _with_prices(view, 0, f"weights <= {size + left} B", price)
        plan = replace(plan, predicted=replace(plan.predicted, cost={"weights": float(size)}))
        found = why(replace(view, **changes), plan, "h.0.fc")
        return next(line for line in found.sentences if line.startswith("Next step up"))

    assert "It does not fit: 9.5" in told(10, 1e-6)
    assert told(step, 1e-6).endswith("per MiB, rank 1 of 2).")
    assert told(step, 1.0).endswith("A MiB is worth more elsewhere.")
    assert told(10, 1e-6, pins={"h.0.fc": "int2-g64"}).endswith("The study rules it out: pinned to int2-g64.")
    rules = {"study": {"rules": {"bars": {"h.0.*": ["int4-g64"]}}}}
    assert told(step, 1e-6, provenance=rules).endswith("The study rules it out: barred by a rule: int4-g64.")
    rules = {"study": {"rules": {"bars": {"h.0.*": ["int2-g64"]}}}}
    assert "rules it out" not in told(step, 1e-6, provenance=rules)


def test_the_rival_of_every_plan_is_the_one_of_the_verdict() -> None:
    view = pretended(200, 16, 5)
    points = view.points
    loss, size = points.loss.copy(), points.cost["weights"].copy()
    first, second, *_ = [i for i, group in enumerate(points.groups) if group == "uniform"]
    loss[first], size[3] = math.nan, math.nan
    vendor = replace(view.measured[0], label="uniformly great by vendor", loss=1e-9, cost={"weights": 1.0})
    runs = [m for m in view.measured if m.plan != points.keys[first]]
    points = replace(points, loss=loss, cost={**points.cost, "weights": size})
    for i, found in enumerate(packed(replace(view, points=points))["points"]["rival"]):
        expected = best_uniform([vendor, *runs], NEARLY_EQUAL * size[i]) if math.isfinite(size[i]) else None
        assert (None if found is None else points.keys[found]) == (None if expected is None else expected.plan)
    assert points.rival[second] is not None
    assert points.rival[3] is None
    assert [is_uniform(label) for label in points.labels] == [group == "uniform" for group in points.groups]


def test_an_error_that_is_not_known_is_not_written_as_nan() -> None:
    view = pretended(20, 16, 4)
    plans = [view.plan(0), view.plan(1)]
    runs = [replace(view.measured[0], plan=one.assignment, label="mixed", spread=math.nan, samples=()) for one in plans]
    found = difference(plans[0], plans[1], replace(view, measured=tuple(runs)))
    assert found.measured is not None
    assert not any("nan" in line for line in [*found.sentences, *_total(found)])
    assert not any("nan" in line for line in verdict(Labelled("mixed", plans[0]), runs))


def test_curves_of_kv_caches_have_the_bytes_of_their_own_table() -> None:
    layers = Layers((Layer("h.0.fc", "linear", (64, 64)), Layer("h.0.kv", "kv_cache", (2, 64))))
    table = CostTable(
        ("h.0.fc", "h.0.kv"), FORMATS, np.array([[0.0] * 3, [1e3, 2e3, 4e3]]), np.zeros((2, 3)), "bytes",
        "kv at context 8", "exact",
    )  # fmt: skip
    view = made_view([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1]], layers=layers, plans=[[0, 0]], costs=(table,))
    assert [point["bytes"] for point in curves(view)["decisions"][1]["points"]] == [1e3, 2e3, 4e3]
    assert [point["bytes"] for point in curves(view)["decisions"][0]["points"]] == view.sizes[0].tolist()


def test_a_plan_at_the_end_of_its_menu_has_no_estimator_against_it() -> None:
    view = pretended(20, 32, 4)
    assert view.scores is not None
    scores = replace(view.scores, value=np.abs(view.scores.value), spread=np.zeros_like(view.scores.spread))
    for name in (view.points.formats[0], view.points.formats[-1]):
        formats = {layer.name: mp.Format.parse(name) for layer in view.layers}
        judge = Judge(view, scores, mp.BitPlan(view.layers, formats, view.model))
        assert {judge.says(i) for i in range(len(view.layers.decisions))} == {"the same"}


def test_a_judge_finds_no_fault_with_a_plan_that_is_best_by_its_scores() -> None:
    view = made_view([[8.0, 4.0, 3.9], [4.0, 1.0, 0.9], [2.0, 1.8, 1.7]], 0.0, plans=[[1, 1, 0]])
    assert view.scores is not None
    judge = Judge(view, view.scores, view.plan(0))
    assert [judge.says(i) for i in range(3)] == ["the same"] * 3
    other = replace(view.scores, value=np.array([[8.0, 4.0, 3.9], [4.0, 1.0, 0.9], [200.0, 1.8, 1.7]]))
    assert [Judge(view, other, view.plan(0)).says(i) for i in range(3)] == ["the same", "fewer bits", "more bits"]


def test_the_interval_of_two_estimators_is_of_decisions_not_of_cells() -> None:
    generator = np.random.default_rng(1)
    found = []
    for _ in range(60):
        first, second = np.exp(generator.normal(0, 1, (2, 25)))
        scale = 4.0 ** -np.arange(2, 7)
        one = of_decisions("a", "b", first[:, None] * scale, second[:, None] * scale)
        assert one is not None
        found.append(one)
    mean = np.mean([one.value for one in found])
    assert sum(one.low <= mean <= one.high for one in found) >= 53
    again = of_decisions("a", "b", first[:, None] * scale, second[:, None] * scale)
    assert again == found[-1]


def test_the_scale_of_a_plot_says_where_its_rows_are() -> None:
    view = pretended(60, 16, 4)
    rows = [line.split() for line in front_plot(view, Pen(80))[1:15]]
    told = {y: float(row[0]) for y, row in enumerate(rows) if row[0] != "│" and not row[0].startswith("│")}
    low, high = math.log10(told[13]), math.log10(told[0])
    assert math.log10(told[7]) == pytest.approx(high + (low - high) * 7 / 13, abs=0.01)


def test_amounts_in_notebooks_have_a_unit() -> None:
    run = Measurement("p", "mixed", 0.1, 0.01, "nats/token", {"weights": 5.0, "bops": 3e9})
    assert ">3 GBOP<" in front_html(ParetoFront((run,), (), "bops"))
