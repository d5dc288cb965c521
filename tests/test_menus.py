"""Menus of weights, activations and KV caches: what is offered where, budgets of caches, and stored studies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch import registry, rivals
from mpsearch.api import Found
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.format import Format
from mpsearch.hardware.kv_bytes import KvBytes
from mpsearch.layer import Layer, Layers
from mpsearch.planning import Planner
from mpsearch.spec import StudySpec
from mpsearch.studying import Study
from tests.conftest import study_settings
from tests.tiny_models import tiny, tokens

BATCHES = [{"input_ids": part} for part in tokens(24, 16)["input_ids"].split(4)]
MENU: Mapping[str, Any] = {
    "formats": ["int4-g16", "int8-channel"],
    "activations": ["int8-token", "int4-token"],
    "kv": ["kv-int8-token", "kv-int4-token", "kv-int2-token", "kv-fp16"],
}
# 8 tokens, 2 layers, keys and values of 2 heads with 16 channels and a 2-byte scale.
INT8, INT4, INT2 = (8 * 4 * 2 * (16 * bits // 8 + 2) for bits in (8, 4, 2))


def spec(**changes: Any) -> StudySpec:
    values = {"model": "m", "calibration": "c", "budgets": ["weights <= 6 bits"], **MENU, **changes}
    return StudySpec.of_values(**values)


def planner(**changes: Any) -> Planner:
    """A planner of an embedding, a linear, a convolution, and two caches."""
    layers = Layers((
        Layer("embed", "embedding", (16, 64)),
        Layer("fc", "linear", (64, 64), macs=4096),
        Layer("conv", "conv", (8, 16, 2, 2), macs=512),
        Layer("k_cache", "kv_cache", (2, 16)),
        Layer("v_cache", "kv_cache", (2, 16)),
    ))  # fmt: skip
    return Planner(spec(**changes), layers, {"name": "m", "digest": "0"})


def offered(made: Planner) -> dict[str, list[str]]:
    """Layer -> the formats that may be chosen for it."""
    names = [str(fmt) for fmt in made.formats]
    return {
        row.name: [name for name, free in zip(names, mask, strict=True) if free == 0]
        for row, mask in zip(made.layers.decisions, made.mask, strict=True)
    }


def test_a_menu_without_16_rounds_every_input_that_can_be_rounded() -> None:
    pairs = ["int4-g16@int8-token", "int4-g16@int4-token", "int8-channel@int8-token", "int8-channel@int4-token"]
    assert offered(planner()) == {
        "embed": ["int4-g16", "int8-channel"],
        "fc": pairs,
        "conv": pairs,
        "k_cache": list(MENU["kv"]),
        "v_cache": list(MENU["kv"]),
    }


def test_16_leaves_inputs_as_they_are() -> None:
    found = offered(planner(activations=["int8-token", "16"]))
    assert found["fc"] == ["int4-g16@int8-token", "int4-g16", "int8-channel@int8-token", "int8-channel"]
    assert found["embed"] == ["int4-g16", "int8-channel"]
    assert offered(planner(activations=["16"]))["fc"] == ["int4-g16", "int8-channel"]
    assert offered(planner(activations=[]))["fc"] == ["int4-g16", "int8-channel"]


def test_weights_alone_stay_where_no_activation_of_the_menu_fits() -> None:
    found = offered(planner(activations=["int8-g16"]))
    assert found["fc"] == ["int4-g16@int8-g16", "int8-channel@int8-g16"]
    assert found["conv"] == ["int4-g16", "int8-channel"]


def test_pairs_and_lists_of_activations_go_together() -> None:
    found = offered(planner(formats=["int4-g16", "bf16@fp8-e4m3-token"]))
    assert found["fc"] == ["int4-g16@int8-token", "int4-g16@int4-token", "bf16@fp8-e4m3-token"]
    # An embedding has no input to round, so what is a pair only cannot be given to it.
    assert found["embed"] == ["int4-g16"]


def test_no_list_of_caches_decides_none() -> None:
    made = planner(kv=[])
    assert [str(fmt) for fmt in made.menu if fmt.family == "kv"] == []
    assert not spec(kv=[]).setup.caches
    assert spec().setup.caches


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"formats": ["kv-int8-token"]}, "E110", 'write kv = ["kv-int8-token"]'),
        ({"kv": ["int8-channel"]}, "E110", "write one like kv-int8-token"),
        ({"kv": ["kv-int8-token", "kv-int8-token"]}, "E108", "given twice"),
        ({"activations": ["int8-token", "int8-token"]}, "E108", "given twice"),
        ({"activations": ["int8-tokn"]}, "E109", "did you mean 'int8-token'"),
        ({"activations": ["kv-int8-token"]}, "E109", "is not known"),
        ({"budgets": ["kv <= 1 MiB"]}, "E111", "at context"),
        ({"kv": [8]}, "E113", "list of texts"),
        ({"pins": {"*k_cache": "kv-int8"}}, "E109", "pin '*k_cache'"),
    ],
)
def test_wrong_menus_are_refused_with_the_reason(changes: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(InputError) as found:
        spec(**changes)
    assert found.value.code == code
    assert says in f"{found.value.message} {found.value.advice}"


def test_pins_on_caches_and_on_pairs() -> None:
    made = planner(pins={"*k_cache": "kv-int8-token", "fc": "int8-channel@fp8-e4m3-token"})
    assert offered(made)["k_cache"] == ["kv-int8-token"]
    assert offered(made)["v_cache"] == list(MENU["kv"])
    assert offered(made)["fc"] == ["int8-channel@fp8-e4m3-token"]
    with pytest.raises(InputError, match="begin with kv-"):
        _ = planner(pins={"*_cache": "int8-channel"}).pins
    with pytest.raises(InputError, match="is for KV caches"):
        _ = planner(pins={"fc": "kv-int8-token"}).pins


def test_costs_come_for_every_context_that_a_budget_names() -> None:
    made = planner(
        budgets=["kv <= 1 MiB at context 100", "kv <= 9 MiB at context 100, batch 8", "kv <= 2 MiB at context 100"]
    )
    resources = [table.resource for table in made.costs]
    assert resources == ["weights", "bops", "kv at context 100", "kv at context 100, batch 8"]
    assert [t.resource for t in planner(length=32).costs] == ["weights", "bops", "kv at context 32"]


def test_a_budget_of_caches_that_are_not_decided_says_so() -> None:
    asked = spec(kv=[], budgets=["kv <= 1 MiB at context 8"])
    made = Planner(asked, Layers((Layer("fc", "linear", (64, 64)),)), {})
    with pytest.raises(InputError) as found:
        made.check(made.asked)
    assert found.value.code == "E420"
    assert "kv = [" in found.value.advice


def test_uniform_plans_keep_budgets_of_caches_and_bops() -> None:
    kv = f"kv <= {2 * 8 * 2 * (16 + 2)} B at context 8"  # as much as 8 bits per number take
    found = {x.label: x.plan for x in rivals.uniform(planner(budgets=["weights <= 9 bits", kv]))}
    assert list(found) == [
        f"uniform {weight}@{activation} kv-int8-token"
        for weight in ("int4-g16", "int8-channel")
        for activation in ("int8-token", "int4-token")
    ]
    for label, plan in found.items():
        assert plan.formats["fc"] == Format.parse(label.split()[1])
        assert plan.formats["embed"] == plan.formats["fc"].weight
        assert {str(plan.formats[name]) for name in ("k_cache", "v_cache")} == {"kv-int8-token"}
        assert plan.cost["kv at context 8"] <= 2 * 8 * 2 * 18
    # 8-bit weights with 8-bit activations are a quarter of the operations of 16 and 16.
    few = rivals.uniform(planner(budgets=["bops <= 15 %"]))
    assert [x.label.split()[1] for x in few] == [
        "int4-g16@int8-token", "int4-g16@int4-token", "int8-channel@int4-token",
    ]  # fmt: skip


def test_uniform_plans_keep_pins() -> None:
    for item in rivals.uniform(planner(pins={"v_cache": "kv-int2-token", "conv": "bf16"})):
        assert str(item.plan.formats["v_cache"]) == "kv-int2-token"
        assert str(item.plan.formats["k_cache"]) == "kv-fp16"
        assert str(item.plan.formats["conv"]) == "bf16"


# Whole searches.


def search(*budgets: str, **changes: Any) -> Found:
    return mp.search(tiny().module, BATCHES, budgets, **{**MENU, "points": 1, "ties": "none", **changes})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, str]:
    url = f"sqlite:///{tmp_path_factory.mktemp('menus') / 'results.db'}"
    return search("weights <= 7 bits", f"kv <= {INT4} B at context 8", storage=url, name="menus"), url


def test_a_search_over_weights_activations_and_caches(stored: tuple[Found, str]) -> None:
    found, _ = stored
    plan = found.plan
    caches = [layer for layer in plan.layers if layer.kind == "kv_cache"]
    assert len(caches) == 4
    for layer in plan.layers:
        fmt = plan.formats[layer.name]
        assert (fmt.family == "kv") == (layer.kind == "kv_cache")
        assert (fmt.activation is not None) == (layer.kind == "linear")
    exact = sum(KvBytes(context=8).cost([x], [plan.formats[x.name]]).value[0, 0] for x in caches)
    assert plan.cost["kv at context 8"] == exact <= INT4
    assert plan.bytes <= 7 * plan.layers.weights // 8
    for item in found.study.plans:
        assert item.plan.cost["kv at context 8"] <= INT4
    labels = [m.label for m in found.study.measurements]
    assert labels[0] == "mixed"
    assert sum(label.startswith("uniform") for label in labels) == 4
    assert all(label.endswith(" kv-int4-token") for label in labels if label.startswith("uniform"))


def test_the_plan_is_measured_as_a_whole(stored: tuple[Found, str]) -> None:
    found, _ = stored
    held_out = BATCHES[len(BATCHES) * 3 // 4 :]
    again = mp.measure(tiny().module, found.plan, held_out)
    assert again.loss == found.study.measurements[0].loss > 0
    weights = {
        name: fmt.weight if fmt.family != "kv" else Format.parse("kv-fp16") for name, fmt in found.plan.formats.items()
    }
    alone = mp.measure(tiny().module, weights, held_out)
    assert alone.loss < again.loss


def test_a_second_run_computes_nothing(stored: tuple[Found, str]) -> None:
    found, url = stored
    again = search("weights <= 7 bits", f"kv <= {INT4} B at context 8", storage=url, name="menus")
    assert again.study.computed == 0
    assert again.plan == found.plan


def test_other_budgets_are_solved_on_stored_scores_without_torch(stored: tuple[Found, str]) -> None:
    _, url = stored
    budgets = ["weights <= 6 bits", f"kv <= {(INT2 + INT4) // 2} B at context 8", "kv <= 40 % at context 1000, batch 2"]
    code = f"""
import sys, json
sys.modules["torch"] = None
from mpsearch.cli.options import open_study
study = open_study("menus", {url!r})
plan = study.plan(*{budgets!r})
print(json.dumps([plan.to_json(), study.spec.activations, study.spec.kv]))
study.store.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    body, activations, kv = json.loads(done.stdout)
    assert (activations, kv) == (MENU["activations"], MENU["kv"])
    plan = mp.BitPlan.from_json(body)
    assert plan.bytes <= 6 * plan.layers.weights // 8
    assert plan.cost["kv at context 8"] <= (INT2 + INT4) // 2
    assert plan.cost["kv at context 1000, batch 2"] <= 0.4 * 2 * 1000 * 2 * 4 * 2 * 16
    assert {str(f) for f in plan.formats.values() if f.family == "kv"} >= {"kv-int2-token"}


def test_a_budget_below_the_least_names_the_smallest() -> None:
    with pytest.raises(InfeasibleError) as found:
        search("weights <= 7 bits", f"kv <= {INT2 - 1} B at context 8")
    assert found.value.code == "E201"
    assert f"kv <= {INT2} B at context 8" in found.value.advice
    plan = search("weights <= 7 bits", f"kv <= {INT2} B at context 8", points=0).plan
    assert {str(fmt) for fmt in plan.formats.values() if fmt.family == "kv"} == {"kv-int2-token"}


def test_pins_on_caches_in_a_search() -> None:
    found = search(
        "weights <= 7 bits", f"kv <= {(INT8 + INT2) // 2} B at context 8", points=0, pins={"*k_cache": "kv-int8-token"}
    )
    formats = {name.rpartition(".")[2]: str(fmt) for name, fmt in found.plan.formats.items() if fmt.family == "kv"}
    assert formats == {"k_cache": "kv-int8-token", "v_cache": "kv-int2-token"}
    with pytest.raises(InfeasibleError) as refused:
        search("weights <= 7 bits", f"kv <= {INT2} B at context 8", points=0, pins={"*k_cache": "kv-int8-token"})
    assert "2 pinned decisions cost" in refused.value.because


def test_two_budgets_of_caches_are_both_kept() -> None:
    # A group of 8 tokens is complete at 8 and not yet at 7, so one budget cannot stand for the other.
    found = search(
        "weights <= 8 bits", f"kv <= {INT4} B at context 8", "kv <= 99 % at context 7",
        points=0, kv=["kv-int4-channel-g8", "kv-int4-token"],
    )  # fmt: skip
    plan = found.plan
    assert plan.cost["kv at context 7"] <= 0.99 * 7 * 4 * 2 * 16 * 2
    assert {str(fmt) for fmt in plan.formats.values() if fmt.family == "kv"} >= {"kv-int4-token"}


def test_a_budget_that_holds_all_leaves_all_as_it_is_only_if_that_is_on_the_menu() -> None:
    found = search("weights <= 32 bits", points=0, activations=["16", "int8-token"], kv=["kv-bf16", "kv-int8-token"])
    assert {str(fmt) for fmt in found.plan.formats.values()} == {"bf16", "kv-bf16"}
    assert [notice.code for notice in found.study.notices][-1:] == ["W112"]
    assert found.study.measurements[0].loss < 1e-3
    found = search("weights <= 32 bits", points=0, activations=["int8-token"], kv=["kv-int8-token"])
    assert "W112" not in [notice.code for notice in found.study.notices]
    given = {
        str(fmt) for layer in found.plan.layers for fmt in [found.plan.formats[layer.name]] if layer.kind == "linear"
    }
    assert all(text.endswith("@int8-token") for text in given)
    assert {str(found.plan.formats[x.name]) for x in found.plan.layers if x.kind == "kv_cache"} == {"kv-int8-token"}


# Estimators that do not see something say so.

BLIND = {
    "activations": ["hessian_eigenvalue", "lim", "weight_mse"],
    "caches": ["hessian_trace", "output_mse", "weight_mse"],
}


def test_who_sees_what() -> None:
    for what, blind in BLIND.items():
        assert all(what not in registry.load("estimators", name).covers for name in blind)
        assert what in registry.load("estimators", "divergence").covers
    assert "activations" in registry.load("estimators", "output_mse").covers


@pytest.mark.parametrize(("what", "estimator"), [(what, name) for what, names in BLIND.items() for name in names])
def test_blind_estimators_refuse_before_anything_is_stored(what: str, estimator: str, tmp_path: Path) -> None:
    menu = {"activations": ["int8-token"]} if what == "activations" else {"kv": ["kv-int8-token"]}
    formats = ["int8-channel@int8-token"] if what == "activations" else ["int8-channel", "kv-int8-token"]
    able = [x for x in registry.names("estimators") if what in registry.load("estimators", x).covers]
    url = f"sqlite:///{tmp_path / 'results.db'}"
    for attempt in (
        lambda: mp.score(tiny().module, BATCHES, formats, estimator),
        lambda: mp.search(
            tiny().module,
            BATCHES,
            "weights <= 7 bits",
            formats=["int8-channel"],
            estimator=estimator,
            storage=url,
            **menu,
        ),
    ):
        with pytest.raises(InputError) as found:
            attempt()
        assert found.value.code == "E506"
        assert what in found.value.message
        assert found.value.advice == f"estimators that do: {', '.join(able)}"
    with registry.make("stores", "sql", url=url) as store:
        assert store.studies() == []


def test_output_mse_sees_activations() -> None:
    table = mp.score(tiny().module, BATCHES[:2], ["int8-channel", "int8-channel@int2-token"], "output_mse")
    linear = [i for i, name in enumerate(table.layers) if "embed" not in name]
    assert (table.value[linear, 1] > 10 * table.value[linear, 0]).all()


def test_divergence_sees_activations_and_caches() -> None:
    table = mp.score(
        tiny().module, BATCHES[:2], ["int8-channel", "int8-channel@int2-token", "kv-int8-token", "kv-int2-token"]
    )
    for name, row, status in zip(table.layers, table.value, table.status, strict=True):
        if name.endswith("_cache"):
            assert row[3] > row[2] > 0
            assert status[:2] == ("not_offered", "not_offered")
        elif "embed" not in name:
            assert row[1] > row[0] > 0
            assert status[2:] == ("not_offered", "not_offered")


# A format that cannot hold some weights.


class Loud(nn.Module):
    """Weights of 1e6, which no int4 with fp16 scales holds, and a layer behind that makes small numbers of theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.loud = nn.Linear(8, 8, bias=False)
        self.loud.weight.data.mul_(3e6)
        self.soft = nn.Linear(8, 4, bias=False)
        self.soft.weight.data.mul_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.soft(self.loud(x))
        return found


def loud() -> tuple[Any, list[Tensor]]:
    model = mp.wrap(
        Loud(),
        logits=lambda module, x: module(x),
        loss=lambda module, x: nn.functional.cross_entropy(module(x), torch.zeros(len(x), dtype=torch.long)),
    )
    return model, list(torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("estimator", ["divergence", "fisher", "hessian_trace", "output_mse", "weight_mse"])
def test_weights_beyond_a_format_are_a_status_and_not_the_end(estimator: str) -> None:
    # One step of the finite difference cannot be right for weights a million million times apart.
    settings = {"product": "double_backward"} if estimator == "hessian_trace" else {}
    model, batches = loud()
    table = mp.score(model, batches, ["int4-channel", "bf16"], estimator, **settings)
    assert table.layers == ("loud", "soft")
    assert table.status == (("non_finite", "ok"), ("ok", "ok"))
    found = mp.search(
        *loud(),
        "weights <= 14 bits",
        formats=["int4-channel", "bf16"],
        points=2,
        estimator={"name": estimator, **settings},
    )
    assert {name: str(fmt) for name, fmt in found.plan.formats.items()} == {"loud": "bf16", "soft": "int4-channel"}


# Studies that are older than these fields.


def test_questions_of_older_studies_still_load(small_llama: Path, tmp_path: Path) -> None:
    old = StudySpec.of(**study_settings(small_llama, tmp_path))
    question = old.question()
    assert not {"activations", "kv"} & set(question)
    assert StudySpec.from_question(question, old.storage).question() == question
    assert StudySpec.from_question(question, old.storage).kv == ()
    new = StudySpec.of(**study_settings(small_llama, tmp_path, activations="int8-token", kv=["kv-int8-token"]))
    assert new.question()["activations"] == ["int8-token"]
    assert StudySpec.from_question(new.question(), new.storage).question() == new.question()


def test_a_study_of_a_folder_with_activations_and_caches_resumes(small_llama: Path, tmp_path: Path) -> None:
    settings = study_settings(
        small_llama, tmp_path, formats=["int4-g64"], activations=["fp8-e4m3-token"],
        kv=["kv-int8-token", "kv-int4-token-g32"], budgets=["weights <= 9 bits", "kv <= 45 % at context 4096, batch 8"],
        points=0, tokens=128, validation_tokens=128, length=16,
    )  # fmt: skip
    study = mp.study(**settings)
    study.run()
    assert study.computed > 10
    again = Study(study.spec, study.store)
    again.run()
    assert again.computed == 0
    plan = again.plans[0].plan
    assert plan.cost["kv at context 4096, batch 8"] <= 0.45 * 8 * 4096 * 2 * 4 * 32
    study.store.close()


def test_a_codec_of_another_version_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("int4-g64", "int4-g64@int8-token", "kv-int8-token", "nf4-b64")
    assert [Format.parse(name).key for name in names] == list(names)
    monkeypatch.setattr(type(Format.parse("int4-g64")), "version", 2)
    keys = [Format.parse(name).key for name in names]
    assert keys == ["int4-g64 v2", "int4-g64@int8-token v2.1", "kv-int8-token v1.2", "nf4-b64"]
