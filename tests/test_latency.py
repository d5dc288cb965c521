"""What plans cost on hardware: latency, serving memory, traffic, energy; and studies under such budgets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpsearch as mp
from mpsearch.budget import Budget
from mpsearch.cli.main import run
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.format import Format
from mpsearch.hardware.calls import decision_calls, kernels, layer_calls, refuses
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.engines.roofline import Roofline
from mpsearch.hardware.in_memory import activation_bytes, cache_bytes, read_bytes, weight_bytes
from mpsearch.hardware.kernel import Kernel, KernelTime
from mpsearch.hardware.latency import Latency, predicted
from mpsearch.hardware.memory import CHUNK, Memory
from mpsearch.hardware.profile import Correction, Profile, Whole
from mpsearch.hardware.traffic import Energy, Traffic, read_energy
from mpsearch.layer import Excluded, Layer, Layers, decisions
from mpsearch.registry import make
from mpsearch.workload import Step
from tests.conftest import study_settings

ORT = make("engines", "onnxruntime")
LAYERS = Layers(
    (
        Layer("embed", "embedding", (96, 64), shared=("lm_head",)),
        Layer("q", "linear", (64, 64), tie="qk", macs=64 * 64),
        Layer("k", "linear", (32, 64), tie="qk", macs=32 * 64),
        Layer("down", "linear", (64, 128), macs=64 * 128),
        Layer("attn.k_cache", "kv_cache", (2, 16)),
        Layer("attn.v_cache", "kv_cache", (2, 16)),
    ),
    (Excluded("norm.weight", (64,), "bfloat16", "1-D norm or bias vector"),),
)
MENU = [Format.parse(text) for text in ("int4-g32", "int8-g64", "int3-g64", "bf16", "kv-bf16", "kv-int8-token")]


def microseconds(kernel: Kernel) -> float:
    """A made-up time that tells every kernel from every other."""
    bits = Format.parse(kernel.format).bits
    return kernel.rows * 1.0 + kernel.columns * 0.1 + bits * 1000.0 + kernel.tokens * 0.01 + (kernel.kind == "linear")


def profile_of(steps: list[Step], wholes: tuple[Whole, ...] = (), width: float = 0.0) -> Profile:
    wanted = kernels(LAYERS.decisions, MENU, steps, ORT)
    times = []
    for kernel in wanted:
        seconds = microseconds(kernel) * 1e-6
        times.append(KernelTime(kernel, seconds, seconds * (1 - width), seconds * (1 + width), 9))
    return Profile("onnxruntime", times=tuple(times), wholes=wholes)


# --- which kernels run


def test_logits_are_those_of_the_last_token() -> None:
    head = Layer("lm_head", "linear", (96, 64), macs=96 * 64)
    step = Step(128, 0, 2)
    assert [kernel.tokens for _, kernel in layer_calls(head, MENU[0], step)] == [2]
    assert [(kernel.kind, kernel.tokens) for _, kernel in layer_calls(LAYERS[0], MENU[0], step)] == [
        ("embedding", 256), ("linear", 2),
    ]  # fmt: skip
    assert [kernel.tokens for _, kernel in layer_calls(LAYERS[3], MENU[0], step)] == [256]
    assert layer_calls(LAYERS[4], MENU[4], step) == []


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    assert layer_calls(Layer("fc", "linear", (8, 64), macs=2 * 8 * 64), MENU[0], Step(1))[0][0] == 2.0


def test_fused_siblings_are_one_product_and_others_are_not() -> None:
    row = LAYERS.decisions[1]
    assert [kernel.rows for _, kernel in decision_calls(row, MENU[0], Step(1), fuses=True)] == [96]
    assert [kernel.rows for _, kernel in decision_calls(row, MENU[0], Step(1), fuses=False)] == [64, 32]


@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_experts_run_as_often_as_tokens_are_sent_to_them(tokens: int) -> None:
    layer = Layer("experts", "expert", (8, 16, 4), out_axis=1, macs=2 * 64)
    ((active, kernel),) = layer_calls(layer, Format.parse("bf16"), Step(tokens))
    drawn = np.random.default_rng(0)
    chosen = [
        len({int(e) for _ in range(tokens) for e in drawn.choice(8, 2, replace=False)})
        for _ in range(400 if tokens < 100 else 3)
    ]
    assert active == pytest.approx(np.mean(chosen), rel=0.03)
    assert kernel.rows == 16
    assert active * kernel.tokens >= 2 * tokens


def test_what_an_engine_cannot_run_is_said() -> None:
    part = Layer("fc", "linear", (64, 64)).part((0, 32))
    assert "runs whole layers" in refuses(part, MENU[0], ORT)
    assert "not 3" in refuses(LAYERS[3], MENU[2], ORT)
    assert "keeps KV caches in 32 bits" in refuses(LAYERS[4], MENU[5], ORT)
    assert refuses(LAYERS[4], MENU[4], ORT) == ""
    assert "convolutions" in refuses(Layer("c", "conv", (8, 4, 3, 3)), Format.parse("bf16"), ORT)
    assert refuses(Layer("c", "conv", (8, 4, 3, 3)), Format.parse("bf16"), make("engines", "table")) == ""


# --- latency


def test_latency_is_the_sum_of_what_runs() -> None:
    step = Step(1, 512)
    table = Latency(profile_of([step]), "tpot", "at context 512").cost(LAYERS, MENU)
    j = {str(fmt): k for k, fmt in enumerate(MENU)}
    embed, qk, down = (table.value[i] * 1e6 for i in range(3))
    assert embed[j["int4-g32"]] == pytest.approx(
        microseconds(Kernel("embedding", 96, 64, "int4-g32", 1)) + microseconds(Kernel("linear", 96, 64, "int4-g32", 1))
    )
    assert qk[j["int8-g64"]] == pytest.approx(
        sum(microseconds(Kernel("linear", rows, 64, "int8-g64", 1)) for rows in (64, 32))
    )
    assert down[j["bf16"]] == pytest.approx(microseconds(Kernel("linear", 64, 128, "bf16", 1)))
    assert np.isnan(table.value[:3, j["int3-g64"]]).all()
    assert table.value[3:, j["kv-bf16"]].tolist() == [0.0, 0.0]
    assert np.isnan(table.value[3:, j["kv-int8-token"]]).all()
    assert table.resource == "tpot at context 512"
    assert (table.unit, table.kind, table.fixed) == ("s", "measured", 0.0)
    assert table.reference == pytest.approx(float(np.nansum(table.value[:3, j["bf16"]])))
    assert any("not 3" in reason for reason in table.source["refused"])


def test_a_request_adds_its_passes_up() -> None:
    steps = [Step(8), Step(1, 10)]
    profile = profile_of(steps)
    whole = Latency(profile, "latency", "at prompt 8, output 5").cost(LAYERS, MENU)
    first = Latency(profile, "ttft", "at prompt 8").cost(LAYERS, MENU)
    later = Latency(profile, "tpot", "at context 10").cost(LAYERS, MENU)
    np.testing.assert_allclose(whole.value, first.value + 4 * later.value)


def test_runs_of_the_whole_model_correct_the_sum() -> None:
    step = Step(1, 512)
    base = Latency(profile_of([step], width=0.1), "tpot", "at context 512").cost(LAYERS, MENU)
    wholes = tuple(Whole(step, "", t, 2e-3 + 1.5 * t, 0.0, 0.0) for t in (1e-3, 2e-3, 4e-3))
    table = Latency(profile_of([step], wholes, 0.1), "tpot", "at context 512").cost(LAYERS, MENU)
    np.testing.assert_allclose(table.value, 1.5 * base.value)
    assert table.fixed == pytest.approx(2e-3)
    choice = [0, 1, 3, 4, 4]
    seconds, error = predicted(table, choice)
    plain, plain_error = predicted(base, choice)
    assert seconds == pytest.approx(2e-3 + 1.5 * plain)
    assert error == pytest.approx(1.5 * plain_error)
    assert plain_error == pytest.approx(0.2 * plain / 3.92)
    assert table.source["margin"] == pytest.approx(1.0)
    rough = [replace(run, seconds=run.seconds * factor) for run, factor in zip(wholes, (1.1, 0.9, 1.1), strict=True)]
    wide = Latency(profile_of([step], tuple(rough), 0.1), "tpot", "at context 512").cost(LAYERS, MENU)
    correction = Correction.fit(rough)
    assert wide.source["margin"] == correction.margin == pytest.approx(1 + 10.66 * correction.residual, rel=1e-3)
    np.testing.assert_allclose(wide.value, correction.slope * base.value)
    assert Budget.parse("tpot <= 1 s at context 512").limit(wide) == pytest.approx(1.0 / correction.margin)
    assert predicted(wide, choice)[0] == pytest.approx(correction.intercept + correction.slope * plain)
    assert predicted(wide, choice)[1] >= correction.residual * predicted(wide, choice)[0]
    # Runs at another context say nothing of this one, and a plain sum beside them would look far too fast.
    with pytest.raises(InputError, match="no whole model was run for this pass: 1 tokens at context 64") as caught:
        Latency(profile_of([Step(1, 64)], wholes), "tpot", "at context 64").cost(LAYERS, MENU)
    assert caught.value.code == "E434"


def test_a_missing_time_is_a_hole_in_the_table_not_a_missing_kernel() -> None:
    profile = profile_of([Step(1, 512)])
    with pytest.raises(InputError, match="E434") as caught:
        Latency(profile, "ttft", "at prompt 7").cost(LAYERS, MENU)
    assert "'embed'" in str(caught.value)
    assert "at 7 tokens" in caught.value.because
    assert "at 1 tokens" in caught.value.because


def test_a_kernel_that_crashed_is_not_offered() -> None:
    profile = profile_of([Step(1, 512)])
    down = Kernel("linear", 64, 128, "int4-g32", 1)
    broken = profile.merged([KernelTime(down, status="crashed", reason="killed by SIGSEGV")])
    table = Latency(broken, "tpot", "at context 512").cost(LAYERS, MENU)
    assert math.isnan(table.value[2, 0])
    assert [[2, 0]] in table.source["refused"].values()


def test_tables_that_name_layers_go_before_shapes() -> None:
    def timed(seconds: float) -> KernelTime:
        return KernelTime(Kernel("linear", 0, 0, "bf16", 1), seconds, seconds, seconds, 1)

    named = {("qk", "bf16", 1): timed(5.0), ("embed", "bf16", 1): timed(1.0), ("down", "bf16", 1): timed(2.0)}
    table = Latency(Profile("table", layers=named), "tpot", "at context 9").cost(LAYERS, MENU)
    assert table.value[:3, 3].tolist() == [1.0, 5.0, 2.0]  # a decision's time is not counted once for each layer
    members = {("q", "bf16", 1): timed(5.0), ("k", "bf16", 1): timed(6.0), **named}
    del members["qk", "bf16", 1]
    table = Latency(Profile("table", layers=members), "tpot", "at context 9").cost(LAYERS, MENU)
    assert table.value[1, 3] == 11.0
    del members["down", "bf16", 1]
    with pytest.raises(InputError, match="first 'down'"):
        Latency(Profile("table", layers=members), "tpot", "at context 9").cost(LAYERS, MENU)


# --- memory, traffic, energy


def test_memory_counts_everything_once() -> None:
    table = Memory("at context 100, batch 4").cost(LAYERS, MENU)
    rows = LAYERS.decisions
    for i, row in enumerate(rows):
        for j, fmt in enumerate(MENU):
            if not math.isnan(table.value[i, j]):
                weights = sum(fmt.bytes(x) for x in row.layers if x.kind != "kv_cache")
                caches = sum(4 * sum(fmt.cache_bytes(x, 100).values()) for x in row.layers if x.kind == "kv_cache")  # type: ignore[attr-defined]
                assert table.value[i, j] == weights + caches
    assert table.value[3, 4] == 4 * 100 * 2 * 16 * 2
    assert table.source["kept"] == 128
    assert table.source["activations"] == activation_bytes(list(LAYERS), 4 * 100, 4, 16)
    assert table.fixed == table.source["kept"] + table.source["activations"]
    assert table.kind == "modelled"


def test_an_engine_keeps_weights_its_own_way() -> None:
    embed, down = LAYERS[0], LAYERS[3]
    int4 = Format.parse("int4-g32")
    assert weight_bytes(down, int4, ORT) == 64 * 128 // 2 + 64 * 4 * 4  # fp32 scales
    assert weight_bytes(down, Format.parse("bf16"), ORT) == 4 * 64 * 128
    assert weight_bytes(embed, int4, ORT) == 2 * (96 * 64 // 2 + 96 * 2 * 4)  # looked up and multiplied apart
    assert weight_bytes(embed, int4, None) == int4.bytes(embed)
    assert cache_bytes(LAYERS[4], MENU[4], 10, 3, ORT) == 3 * 10 * 32 * 4
    assert cache_bytes(LAYERS[4], MENU[4], 10, 3, None) == 3 * 10 * 32 * 2
    profile = Profile("onnxruntime")
    apart = Layers(LAYERS.items[:4], LAYERS.excluded)
    table = Memory("at context 10", profile, tuple(LAYERS.items[4:])).cost(apart, MENU)
    assert table.source["caches"] == 2 * 10 * 32 * 4
    assert table.source["kept"] == 4 * 64


def test_measured_activations_go_before_modelled_ones() -> None:
    step = Step(1, 10, 2)
    run = Whole(step, "", 1.0, 1.0, 1.0, 1.0, weights=1000, held=51_000)
    table = Memory("at context 10, batch 2", Profile("onnxruntime", wholes=(run,))).cost(LAYERS, MENU)
    caches = 2 * 2 * 10 * 32 * 4
    assert table.source["activations"] == 50_000 - caches
    assert (table.source["activations are"], table.kind) == ("measured", "measured")
    elsewhere = Memory("at context 11, batch 2", Profile("onnxruntime", wholes=(run,))).cost(LAYERS, MENU)
    assert elsewhere.source["activations"] == table.source["activations"]  # no jump between neighbours
    small = replace(run, held=1000)
    assert (
        Memory("at context 10, batch 2", Profile("onnxruntime", wholes=(small,))).cost(LAYERS, MENU).kind == "modelled"
    )


def test_long_prompts_are_taken_in_chunks() -> None:
    short, long = (Memory(f"at context {n}").cost(LAYERS, MENU).source["activations"] for n in (CHUNK, 100 * CHUNK))
    assert short == long


def test_traffic_reads_each_weight_once_and_caches_as_long_as_they_are() -> None:
    table = Traffic("at context 100").cost(LAYERS, MENU)
    assert table.value[2, 0] == MENU[0].bytes(LAYERS[3])
    assert table.value[3, 4] == 100 * 32 * 2
    assert table.kind == "modelled"
    alone = Layer("embed", "embedding", (96, 64))
    assert read_bytes(alone, MENU[3], Step(1, 100), None) == 64 * 2
    assert Traffic("at context 100").cost(LAYERS, MENU).fixed == 128
    with_caches = Traffic("at context 100", caches=tuple(LAYERS.items[4:])).cost(LAYERS, MENU)
    assert with_caches.fixed == 128 + 2 * 100 * 32 * 2


def test_energy_follows_the_users_table(tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    path.write_text("format,pj_per_mac,pj_per_byte\nint4-g32,0.5,10\nbf16,2,10\n", encoding="utf-8")
    prices = read_energy(path)
    table = Energy("at context 10", prices).cost(LAYERS, MENU)
    assert table.value[2, 0] == pytest.approx(1e-12 * (0.5 * 64 * 128 + 10 * MENU[0].bytes(LAYERS[3])))
    assert math.isnan(table.value[2, 1])
    for text in (
        "format,pj_per_mac\nbf16,1\n",
        "format,pj_per_mac,pj_per_byte\nbf16,-1,0\n",
        "format,pj_per_mac,pj_per_byte\nbf16,x,0\n",
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="E433"):
            read_energy(path)
    with pytest.raises(InputError, match="E101"):
        read_energy(tmp_path / "none.csv")


def test_a_roofline_is_bound_by_bytes_or_by_operations() -> None:
    roof = Roofline(bandwidth=1e9, peak=1e12, peak8=4e12, launch=1e-6)
    few, many = (roof.model(Kernel("linear", 1000, 1000, "int8-channel", tokens)).seconds for tokens in (1, 10_000))
    assert few == pytest.approx((1_002_000 + 4000) / 1e9 + 1e-6)
    assert many == pytest.approx(max(2e10 / 1e12, (1_002_000 + 4e7) / 1e9) + 1e-6)
    fast = Roofline(bandwidth=1e15, peak=1e12, peak8=4e12)
    pair = fast.model(Kernel("linear", 1000, 1000, "int8-channel@int8-token", 10**6)).seconds
    alone = fast.model(Kernel("linear", 1000, 1000, "int8-channel", 10**6)).seconds
    assert alone == pytest.approx(4 * pair)
    assert Roofline(1e9, 1e12).model(Kernel("linear", 64, 64, "bf16", 1)).low == Roofline(1e9, 1e12).model(
        Kernel("linear", 64, 64, "bf16", 1)
    ).seconds  # fmt: skip


# --- studies


@pytest.fixture(scope="module", autouse=True)
def kernels_are_timed_briefly() -> Iterator[None]:
    """What is timed is real; how well is shown elsewhere."""
    from functools import partial

    from mpsearch import profiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiled, "Timekeeper", partial(profiled.Timekeeper, clock=Clock(limit=0.2)))
        patch.setattr(profiled, "Runner", partial(profiled.Runner, clock=Clock(limit=0.5)))
        yield


@pytest.fixture(scope="module")
def served(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A study under memory and time at once, with real kernels."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("served")
    settings = study_settings(
        small_llama, folder, formats=["int2-g64", "int3-g64", "int4-g64", "int8-g64"], estimator="weight_mse",
        budgets=["memory <= 3 MiB at context 64", "tpot <= 1 s at context 64"], points=0,
    )  # fmt: skip
    study = mp.study(**settings)
    study.run()
    return study, folder


def test_a_study_keeps_memory_and_time_at_once(served: tuple[Any, Path]) -> None:
    study, _ = served
    plan = study.plans[0].plan
    tables = {table.resource: table for table in study.costs}
    for budget in study.budgets:
        table = tables[budget.priced_by]
        assert plan.cost[budget.priced_by] <= budget.limit(table)
        columns = {name: j for j, name in enumerate(table.formats)}
        cells = [(i, columns[str(plan.formats[r.layers[0].name])]) for i, r in enumerate(plan.layers.decisions)]
        total = math.fsum(float(table.value[cell]) for cell in cells) + table.fixed
        assert plan.cost[budget.priced_by] == pytest.approx(total, rel=1e-12)
    assert plan.source["costs"] == {
        "weights": "exact", "bops": "modelled", "memory at context 64": "modelled", "tpot at context 64": "measured",
    }  # fmt: skip
    assert not any(layer.kind == "kv_cache" for layer in plan.layers)
    assert tables["memory at context 64"].source["caches"] == 2 * 2 * 64 * 32 * 4


def test_formats_without_a_kernel_are_not_offered_and_said(served: tuple[Any, Path]) -> None:
    study, _ = served
    assert all("int3" not in str(fmt) for item in study.plans for fmt in item.plan.formats.values())
    assert any(n.code == "W131" and "int3-g64 is not offered" in n.message for n in study.notices)
    assert not any(item.label.startswith("uniform int3") for item in study.plans)
    assert any(item.label.startswith("uniform int4-g64") for item in study.plans)


def test_a_format_is_without_kernel_only_where_no_decision_has_one() -> None:
    from mpsearch.planning import Planner
    from mpsearch.spec import StudySpec

    layers = Layers((Layer("embed", "embedding", (96, 64)), Layer("fc", "linear", (64, 64), macs=64 * 64)))
    formats = ("int2-g64", "int3-g64", "int8-g64")
    steps = [Step(1, 512), Step(8)]
    wanted = kernels(layers.decisions, [Format.parse(text) for text in (*formats, "bf16")], steps, ORT)
    profile = Profile("onnxruntime", times=tuple(KernelTime(kernel, 1e-6, 1e-6, 1e-6, 9) for kernel in wanted))
    budgets = ("tpot <= 1 s at context 512", "ttft <= 1 s at prompt 8")
    spec = StudySpec(model="given", calibration="given", formats=formats, budgets=budgets)
    planner = Planner(spec, layers, {}, profile=profile)
    # The embedding has no 2 bits under either budget; the linear layer has.
    assert [str(fmt) for fmt in planner.without_kernel] == ["int3-g64"]
    none = Planner(StudySpec(model="given", calibration="given", formats=("int3-g64",), budgets=budgets), layers, {})
    with pytest.raises(InputError, match="kernels of 4, 8 bits here, not 3") as caught:
        _ = Planner(none.spec, layers, {}, profile=profile).mask
    assert caught.value.code == "E130"


def test_stored_times_serve_other_budgets(served: tuple[Any, Path]) -> None:
    study, _ = served
    fast = study.plan("tpot <= 1 s at context 64")
    same = study.plan("tpot <= 1 s at context 32")
    assert same.formats == fast.formats  # the kernels of a token are the same; attention is in neither
    with pytest.raises(InfeasibleError, match="the fastest allowed plan needs") as caught:
        study.plan("tpot <= 1 us at context 64")
    assert caught.value.code == "E201"
    # All that cannot be met are named, not only the first.
    with pytest.raises(InfeasibleError, match="2 budgets cannot be met") as caught:
        study.plan("tpot <= 1 us at context 64", "weights <= 1 bits")
    assert "'tpot <= 1 us" in caught.value.because
    assert "'weights <= 1 bits'" in caught.value.because
    with pytest.raises(InputError, match="E434"):
        study.plan("ttft <= 1 s at prompt 128")
    least = study.plan("memory <= 3 MiB at context 64", goal="tpot at context 64", most_loss=1e9)
    assert least.cost["tpot at context 64"] <= fast.cost["tpot at context 64"] * (1 + 1e-12)


def test_a_second_run_times_nothing(served: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.hardware.bench import Bench

    study, _ = served
    monkeypatch.setattr(Bench, "time", lambda *_: pytest.fail("a kernel was timed again"))
    before = study.plans[0].plan.key
    study.run()
    assert study.plans[0].plan.key == before


def test_solve_says_where_each_figure_is_from(served: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    study, _ = served
    assert run(["solve", study.name, "--storage", study.spec.storage]) == 0
    out = capsys.readouterr().out
    assert "activations modelled" in out
    assert "measured kernels added up, without attention, norms and calls" in out
    assert run(["solve", study.name, "--storage", study.spec.storage, "-b", "tpot <= 1 us at context 64"]) == 4
    assert "fastest allowed plan" in capsys.readouterr().err


def test_a_study_that_timed_nothing_says_how_to(small_llama: Path, tmp_path: Path) -> None:
    study = mp.study(**study_settings(small_llama, tmp_path, estimator="weight_mse", points=0))
    study.run()
    with pytest.raises(InputError, match="has timed no kernels") as caught:
        study.plan("tpot <= 1 ms at context 64")
    assert caught.value.code == "E420"
    with pytest.raises(InputError, match="no table of energy"):
        study.plan("energy <= 1 mJ at context 64")
    roomy = study.plan("memory <= 3 MiB at context 64")
    assert roomy.cost["memory at context 64"] <= 3 * 2**20


def test_a_study_keeps_its_table_of_energy(small_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    rows = ["int2-g64,0.3,10", "int3-g64,0.4,10", "int4-g64,0.5,10", "int8-channel,1,10", "bf16,2,10", "kv-bf16,2,10"]
    path.write_text("\n".join(["format,pj_per_mac,pj_per_byte", *rows]), encoding="utf-8")
    settings = study_settings(small_llama, tmp_path, estimator="weight_mse", points=0, energy=str(path))
    study = mp.study(**{**settings, "budgets": ["energy <= 1 mJ at context 64"]})
    study.run()
    before = study.plan("energy <= 0.01 mJ at context 64").assignment
    path.unlink()
    assert study.plan("energy <= 0.01 mJ at context 64").assignment == before


def test_profiles_travel(small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    listed = tmp_path / "layers.json"
    assert run(["layers", str(small_llama), "--json"]) == 0
    listed.write_text(capsys.readouterr().out, encoding="utf-8")
    command = [
        "profile",
        str(listed),
        "-f",
        "int2-g64",
        "-f",
        "int8-g64",
        "-w",
        "tpot at context 64",
        "--limit",
        "0.05",
    ]
    assert run([*command, "--limit", "0.05", "--out", str(out), "-q"]) == 0
    profile = Profile.from_json(json.loads(out.read_text(encoding="utf-8")))
    assert profile.identity["version onnxruntime"]
    assert {time.kernel.tokens for time in profile.times} == {1}
    settings = study_settings(
        small_llama, tmp_path, formats=["int2-g64", "int8-g64"], estimator="weight_mse", points=0,
        budgets=["tpot <= 1 s at context 64"], engine=f"file:{out}",
    )  # fmt: skip
    study = mp.study(**settings)
    study.run()
    assert any(n.code == "W434" and "that of the named table" in n.message for n in study.notices)
    assert study.profile == profile


def test_profiling_loads_neither_torch_nor_a_database(small_llama: Path, tmp_path: Path) -> None:
    listed = tmp_path / "layers.json"
    listed.write_text(json.dumps(mp.layers(str(small_llama)).to_json()), encoding="utf-8")
    code = (
        "import sys; from mpsearch.cli.main import run; "
        f"code = run(['profile', {str(listed)!r}, '-f', 'int8-g64', '-w', 'tpot', '--limit', '0.02', '-q', "
        f"'--out', {str(tmp_path / 'p.json')!r}]); "
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'ray', 'scipy'} & set(sys.modules); "
        "print(code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_targets_are_listed_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listed["engines"]} >= {"onnxruntime", "torch", "openvino", "roofline", "table"}
    for row in listed["resources"]:
        assert str(Budget.parse(row["budget"]))
    assert run(["targets"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_decisions_are_those_of_the_layers() -> None:
    assert [row.name for row in decisions(LAYERS)] == ["embed", "qk", "down", "attn.k_cache", "attn.v_cache"]


# --- whole models


@pytest.fixture(scope="module")
def whole(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study whose latency is corrected by runs of the whole model."""
    folder = tmp_path_factory.mktemp("whole")
    settings = study_settings(
        small_llama, folder, formats=["int2-g64", "int4-g64", "int8-g64"], estimator="weight_mse", points=0,
        budgets=["tpot <= 1 s at context 16", "memory <= 1 GiB at context 16"], engine="onnxruntime:wholes=3",
    )  # fmt: skip
    study = mp.study(**settings)
    study.run()
    return study


def test_a_study_runs_whole_models_and_corrects_by_them(whole: Any) -> None:
    step = Step(1, 16)
    runs = [run for run in whole.profile.wholes if run.step == step]
    assert [run.label for run in runs] == ["fastest", "random 1", "slowest"]
    assert runs[0].table < runs[2].table
    assert all(run.seconds > 0 and run.weights > 0 and run.held > 0 for run in runs)
    table = next(table for table in whole.costs if table.resource == "tpot at context 16")
    assert table.source["passes"][0]["correction"]["runs"] == 3
    correction = whole.profile.correction(step)
    assert table.fixed == pytest.approx(correction.intercept)
    budget = Budget.parse("tpot <= 1 s at context 16")
    assert budget.limit(table) == pytest.approx(1.0 / correction.margin)
    memory = next(table for table in whole.costs if table.resource == "memory at context 16")
    assert memory.kind == "measured"
    assert not any(notice.code == "W431" for notice in whole.notices)


def test_whole_runs_are_kept(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.hardware.whole import OnnxRuntimeWholes

    monkeypatch.setattr(OnnxRuntimeWholes, "run", lambda *_: pytest.fail("a whole model was run again"))
    whole.run()
    assert len(whole.profile.wholes) == 3


def test_measure_compares_what_was_predicted(whole: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["measure", whole.name, "--storage", whole.spec.storage, "--limit", "0.5"]
    assert run([*command, "--latency", "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["tpot <= 1 s at context 16"]["note"] == "kept"
    time_row = rows["1 tokens at context 16"]
    assert time_row["low"] <= time_row["measured"] <= time_row["high"]
    assert time_row["off"] == pytest.approx(time_row["predicted"] / time_row["measured"] - 1)
    size = rows["weights, 1 tokens at context 16"]
    assert abs(size["off"]) < 0.2
    assert rows["memory at context 16"]["measured"] > size["measured"]
    assert run(command) == 2
    assert "--latency" in capsys.readouterr().err
    assert run([*command, "--latency"]) == 0
    assert "corrected by 3 runs" in capsys.readouterr().out.replace("\n", " ")


def test_a_study_on_another_machine_is_not_mixed_in(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.hardware.bench import Bench

    true = Bench.identity
    monkeypatch.setattr(Bench, "identity", lambda self: {**true(self), "version onnxruntime": "0.1"})
    monkeypatch.setattr(Bench, "time", lambda self, kernel, stream=0: KernelTime(kernel, 1e-6, 1e-6, 1e-6, 1))
    from mpsearch.hardware.whole import OnnxRuntimeWholes, WholeTime

    fake = WholeTime(Step(1, 16), 1.0, 1.0, 1.0, 1, weights_bytes=1, held_bytes=2)
    monkeypatch.setattr(OnnxRuntimeWholes, "run", lambda *_: fake)
    with pytest.raises(InputError, match="E430") as caught:
        whole.run()
    assert "version onnxruntime" in caught.value.because


def test_a_run_that_ends_badly_leaves_the_sum_as_it_is(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpsearch.hardware.whole import OnnxRuntimeWholes, WholeTime

    bad = WholeTime(Step(1, 16), status="crashed", reason="killed by SIGSEGV")
    monkeypatch.setattr(OnnxRuntimeWholes, "run", lambda *_: bad)
    settings = study_settings(
        small_llama, tmp_path, formats=["int4-g64", "int8-g64"], estimator="weight_mse", points=0,
        budgets=["tpot <= 1 s at context 16"],
    )  # fmt: skip
    study = mp.study(**settings)
    study.run()
    (notice,) = [notice for notice in study.notices if notice.code == "W431"]
    assert "killed by SIGSEGV" in notice.message
    assert not study.profile.wholes


def test_other_engines_run_no_whole_models_and_say_so() -> None:
    from mpsearch.wholes import Runner

    with pytest.raises(InputError, match="torch runs single kernels here"):
        next(Runner("", "").runs(Profile("torch"), {Step(1): {}}))


def test_latency_is_a_target_of_the_library() -> None:
    table = mp.cost(LAYERS, ["int8-g64", "bf16", "kv-bf16"], "latency:onnxruntime", workload="ttft at prompt 3")
    assert table.resource == "ttft at prompt 3"
    assert (table.value[:3, :2] > 0).all()
    assert table.kind == "measured"
    assert (table.spread[:3, :2] >= 0).all()
    with pytest.raises(InputError, match="workload 'weights'"):
        mp.cost(LAYERS, ["bf16"], "latency:onnxruntime", workload="weights")
