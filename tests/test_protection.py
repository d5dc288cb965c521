"""Protecting layers with spikes: the rule, what it pins in a study, and whether it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mpsearch as mp
from mpsearch.layer import Layer, Layers
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.protection import Rule
from mpsearch.spec import StudySpec
from tests.test_spikes import BATCHES, plant
from tests.tiny_models import tiny

PLANTED = {"model.layers.1.mlp.down_proj": "bf16", "model.layers.3.mlp.down_proj": "bf16"}
FORMAT = "int4-g16@int8-tensor"


@pytest.fixture(scope="module")
def planted() -> Model:
    model = tiny(layers=4)
    plant(model, 1, 5, 60.0)
    plant(model, 3, 40, 60.0)
    return model


def uniform(model: Model, fmt: str) -> dict[str, str]:
    layers = find_layers(model, BATCHES)
    return {x.name: "bf16" if x.kind == "embedding" else fmt for x in layers}


def test_exactly_the_planted_layers_are_protected(planted: Model) -> None:
    assert mp.protect(planted, BATCHES) == PLANTED
    assert mp.protect(planted, BATCHES, threshold=1e6) == {}
    assert mp.protect(planted, BATCHES, format="int8-channel") == dict.fromkeys(PLANTED, "int8-channel")
    # Fused layers are one decision, and are protected together.
    everything = mp.protect(planted, BATCHES, threshold=0.5)
    assert set(everything) == {row.name for row in find_layers(planted, BATCHES).decisions} - {"model.embed_tokens"}


def test_protecting_spikes_helps_where_inputs_are_rounded_by_tensor(planted: Model) -> None:
    plan = uniform(planted, FORMAT)
    found = mp.ablate(planted, plan, mp.protect(planted, BATCHES), BATCHES)
    assert found.verdict == "helps"
    assert found.change < -3 * found.spread < 0
    assert found.unit == "nats/token"
    assert found.change == pytest.approx(found.protected.loss - found.unprotected.loss)
    rows = 2 * 64 * 48
    assert found.bytes == 2 * rows - (rows // 2 + rows // 16 * 2)
    # Paired: the same sequences in both.
    assert len(found.protected.samples) == len(found.unprotected.samples) == 4


def test_what_does_not_help_is_said(planted: Model) -> None:
    plan = {name: fmt if name in PLANTED else "bf16" for name, fmt in uniform(planted, "int8-channel").items()}
    worse = mp.ablate(planted, plan, dict.fromkeys(PLANTED, "int2-channel"), BATCHES)
    assert worse.verdict == "does not help"
    assert worse.change > 0
    assert worse.bytes < 0
    # fp32 and bf16 weights of a layer hardly differ: the change is smaller than its error, or it is none.
    same = mp.ablate(planted, {**uniform(planted, "int8-channel"), "lm_head": "fp32"}, {"lm_head": "bf16"}, BATCHES)
    assert abs(same.change) < 1e-4
    one = mp.ablate(planted, plan, dict.fromkeys(PLANTED, "int2-channel"), [{"input_ids": torch.ones(1, 9).long()}])
    assert one.verdict == "within noise"  # one sequence has no error


def test_a_plan_may_be_given_as_a_plan_and_decisions_by_name(planted: Model) -> None:
    layers = find_layers(planted, BATCHES)
    plan = mp.BitPlan(layers, {name: mp.Format.parse(fmt) for name, fmt in uniform(planted, "int4-channel").items()})
    fused = layers.decisions[1]
    assert len(fused.layers) == 3
    by_decision = mp.ablate(planted, plan, {fused.name: "bf16"}, BATCHES)
    by_layer = mp.ablate(planted, plan, {fused.layers[0].name: "bf16"}, BATCHES)
    assert by_decision.change == by_layer.change
    assert by_decision.verdict == "helps"


def test_what_cannot_be_checked_is_refused(planted: Model) -> None:
    plan = uniform(planted, FORMAT)
    for protection, code in (
        ({}, "E113"),
        ({"lm_head": FORMAT}, "E113"),
        ({"lm_heat": "bf16"}, "E120"),
        ({"lm_head": "kv-int8-token"}, "E130"),
    ):
        with pytest.raises(mp.InputError, match=code):
            mp.ablate(planted, plan, protection, BATCHES)
    with pytest.raises(mp.InputError, match="E302"):
        mp.ablate(planted, {"lm_head": FORMAT}, PLANTED, BATCHES)
    with pytest.raises(mp.InputError, match="E501"):
        mp.protect(planted, [])
    for threshold in (0.0, float("nan"), "6", True):
        with pytest.raises(mp.InputError, match="E113"):
            mp.protect(planted, BATCHES, threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match="E506"):
        mp.protect(mp.wrap(torch.nn.Linear(2, 2)), [torch.ones(1, 2)])
    with pytest.raises(mp.InputError, match="E130"):
        mp.protect(planted, BATCHES, threshold=0.5, format="int4-g7")


def test_rules_read_back_and_others_are_refused() -> None:
    for text, threshold in (
        ("activation_spikes", 6.68),
        ("activation_spikes > 4", 4.0),
        ("activation_spikes>12.5", 12.5),
    ):
        rule = Rule.parse(text)
        assert rule.threshold == threshold
        assert Rule.parse(str(rule)) == rule
    for text in ("spikes", "activation_spikes < 4", "activation_spikes > many", "activation_spikes > 0", "fisher > 3"):
        with pytest.raises(mp.InputError, match="E113"):
            Rule.parse(text)
        with pytest.raises(mp.InputError, match="E113"):
            StudySpec.of_values(model="m", calibration="c", budgets=("4 bits",), protect=text)


def test_a_layer_stored_in_fp16_keeps_fp16_and_a_fused_one_goes_by_its_worst() -> None:
    layers = Layers((
        Layer("a", "linear", (4, 4), dtype="float16", tie="t"),
        Layer("b", "linear", (4, 4), dtype="float16", tie="t"),
        Layer("c", "linear", (4, 4), dtype="bfloat16"),
    ))  # fmt: skip
    rule, ratios = Rule("activation_spikes", 5.0), {"a": 2.0, "b": 9.0, "c": 5.0}
    pins = rule.pins(layers, ratios)
    assert pins == {"t": "fp16"}  # c is at the threshold, not over it
    assert str(rule.notice(layers, ratios, pins)) == "note[N132] activation_spikes > 5: pins 't' (9) to fp16"
    assert rule.notice(layers, {"c": 3.0}, {}).message == (
        "activation_spikes > 5: no layer is protected; the most is 3 at 'c'"
    )


def test_a_ratio_that_is_not_a_number_protects() -> None:
    layers = Layers((Layer("a", "linear", (4, 4)), Layer("b", "linear", (4, 4)), Layer("c", "linear", (4, 4))))
    rule, ratios = Rule("activation_spikes", 5.0), {"a": 7.0, "b": float("nan"), "c": float("inf")}
    pins = rule.pins(layers, ratios)
    assert set(pins) == {"a", "b", "c"}
    text = rule.notice(layers, ratios, pins).message
    assert text.endswith("pins 'b' (not finite) to bf16, 'c' (not finite) to bf16, 'a' (7) to bf16")


def study(planted: Model, folder: Path, **settings: Any) -> mp.Study:
    from mpsearch.api import study as make

    generator = torch.Generator().manual_seed(4)
    other = torch.randint(1, 61, (4, 11), generator=generator)
    held_out = torch.cat([torch.zeros(4, 1, dtype=torch.long), other], dim=1)
    values: dict[str, Any] = {
        "formats": ("int4-channel", "int8-channel"), "activations": ("int8-tensor",), "budgets": "weights <= 10 bits",
        "points": 0, "estimator": "output_mse", "protect": "activation_spikes",
        "pins": {"model.embed_tokens": "int8-channel"}, "storage": f"sqlite:///{folder / 'study.db'}",
    }  # fmt: skip
    return make(
        "spiky",
        model=planted,
        calibration=BATCHES,
        validation=[{"input_ids": part} for part in held_out.split(2)],
        **{**values, **settings},
    )


def test_a_study_pins_what_it_protects(planted: Model, tmp_path: Path) -> None:
    first = study(planted, tmp_path)
    first.run()
    for item in first.plans:
        assert {name: str(item.plan.formats[name]) for name in PLANTED} == PLANTED, item.label
    (notice,) = [x for x in first.notices if x.code == "N132"]
    assert all(f"'{name}'" in notice.message for name in PLANTED)
    assert "activation_spikes > 6.68: pins" in notice.message
    assert first.protected == PLANTED
    # From the store alone, and again without computing anything.
    assert {str(first.plan("weights <= 11 bits").formats[name]) for name in PLANTED} == {"bf16"}
    again = study(planted, tmp_path)
    again.run()
    assert again.computed == 0
    assert [x for x in again.notices if x.code == "N132"] == [notice]


def test_pins_of_the_user_go_before_protection(planted: Model, tmp_path: Path) -> None:
    mine = {"model.layers.1.mlp.down_proj": "int8-channel"}
    made = study(planted, tmp_path, pins={**mine, "model.embed_tokens": "int8-channel"})
    made.run()
    formats = made.plans[0].plan.formats
    assert str(formats["model.layers.1.mlp.down_proj"]) == "int8-channel"
    assert str(formats["model.layers.3.mlp.down_proj"]) == "bf16"
    (notice,) = [x for x in made.notices if x.code == "N132"]
    assert "layers.1" not in notice.message


def test_a_study_without_a_rule_asks_the_same_question_as_before() -> None:
    spec = StudySpec.of_values(model="m", calibration="c", budgets=("4 bits",))
    assert "protect" not in spec.question()
    asked = StudySpec.of_values(model="m", calibration="c", budgets=("4 bits",), protect="activation_spikes > 3")
    assert asked.question()["protect"] == "activation_spikes > 3"
    assert StudySpec.from_question(asked.question(), "sqlite://") == StudySpec.of_values(
        model="m", calibration="c", budgets=("4 bits",), protect="activation_spikes > 3", storage="sqlite://"
    )
