"""The torchao export: its configuration is torchao's, each module is named once, and torchao makes the plan of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mpsearch.exports.torchao import TorchAo, config
from mpsearch.exports.verify import verify
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.quantize import fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.reference_libraries import quiet_import
from tests.test_export_compressed_tensors import make, planned

HOSTILE = ("a.*b", 'quo"te', "na\\me", "schicht_ä_层", "x" * 300, "../up", "a\nb")


def plan_of(formats: Mapping[str, str], kept: Sequence[str] = ()) -> BitPlan:
    """A plan of linear layers of 64 by 64."""
    layers = Layers(
        tuple(Layer(name, "linear", (64, 64)) for name in formats),
        tuple(Excluded(name, (64,), "float32", "1-D") for name in kept),
    )
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


def entries(plan: BitPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TorchAo().texts(plan)["torchao.json"])["_data"]["fqn_to_config"]
    return found


def read_format(entry: dict[str, Any] | None) -> str:
    """Read a format from an entry, by torchao's names of its settings."""
    if entry is None:
        return "fp32"
    data = entry["_data"]
    weight = {key.removeprefix("weight_"): value for key, value in data.items()}
    grain = weight["granularity"][0] if isinstance(weight["granularity"], list) else weight["granularity"]
    size = grain["_data"].get("group_size")
    shared = {"PerTensor": "tensor", "PerGroup": f"g{size}"}.get(grain["_type"], "channel")
    inputs = {
        "Int8DynamicActivationIntxWeightConfig": "@int8-token-asym",
        "Int8DynamicActivationInt8WeightConfig": "@int8-token",
        "Float8DynamicActivationFloat8WeightConfig": "@fp8-e4m3-token",
    }.get(entry["_type"], "")
    dtype = weight.get("dtype", {"_data": "int8"})["_data"]
    if dtype.startswith("float8"):
        return f"fp8-{dtype[7:11]}{'' if shared == 'tensor' else '-' + shared}{inputs}"
    grid = {"SYMMETRIC": "-full", "ASYMMETRIC": "-asym"}.get(weight.get("mapping_type", {}).get("_data"), "")
    return f"{dtype}-{shared}{grid}{inputs}"


class TestTorchAo(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> TorchAo:
        return TorchAo()

    @pytest.fixture
    def plan(self) -> BitPlan:
        texts = (
            "int4-g32", "int3-channel-full", "int2-g16-asym", "int8-tensor", "fp8-e4m3", "fp8-e5m2-g32", "fp32",
            "int4-g32@int8-token-asym", "int8-channel@int8-token", "fp8-e4m3-channel@fp8-e4m3-token",
        )  # fmt: skip
        return plan_of({f"layers.{i}.fc": text for i, text in enumerate(texts)})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "code": "nf4-b64", "half": "bf16", "inputs": "int4-g32@int8-token", "blocks": "fp8-e4m3-b32x32",
            "re:.*": "int4-g32", "_default": "int4-g32",
        }  # fmt: skip
        return plan_of(formats), list(formats)[:4] + sorted(list(formats)[4:])

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        whole = json.loads((folder / "torchao.json").read_text())
        return {name: read_format(entry) for name, entry in whole["_data"]["fqn_to_config"].items()}


def test_an_entry_is_what_torchao_writes_of_its_own_configuration() -> None:
    ao = quiet_import("torchao.quantization")
    core = quiet_import("torchao.core.config")
    made = ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=ao.PerGroup(32), mapping_type=ao.MappingType.SYMMETRIC
    )
    ours = config(Format.parse("int4-g32-full-mse"))
    assert ours is not None
    theirs = core.config_to_dict(made)
    # What is left out has torchao's default.
    assert [ours[key] for key in ("_type", "_version")] == [theirs[key] for key in ("_type", "_version")]
    assert {**theirs["_data"], **ours["_data"]} == theirs["_data"]
    whole = TorchAo().texts(plan_of({"a.q_proj": "int4-g32-full", "b": "fp32"}))["torchao.json"]
    read = core.config_from_dict(json.loads(whole))
    assert read.fqn_to_config == {"a.q_proj": made, "b": None}


@pytest.mark.parametrize("text", ["int4-g32", "int3-channel-full", "int2-g16-asym", "int8-channel"])
def test_torchao_rounds_near_our_rounding(text: str) -> None:
    core = quiet_import("torchao.core.config")
    quantize = quiet_import("torchao.quantization").quantize_
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    before = model[0].weight.detach().clone()
    quantize(model, core.config_from_dict(config(Format.parse(text))), filter_fn=lambda m, _: m is model[0])
    theirs = model[0].weight.dequantize().float()
    ours = fake_quantize(before, Format.parse(text), 0)
    step = 2 * before.abs().max() / (2 ** Format.parse(text).bits - 1)
    # One code apart at most: their zero points and the ends of their grids may lie beside ours.
    assert (theirs - ours).abs().max() <= 1.1 * step
    # The grid of -full is the same, but for codes beside a tie.
    if text.endswith("-full"):
        assert ((theirs - ours).abs() > 1e-2 * step).float().mean() < 0.01
    wrong = fake_quantize(before, Format.parse("int2-tensor"), 0)
    assert (theirs - wrong).abs().mean() > (theirs - ours).abs().mean()


def test_fused_names_stand_beside_parts_that_are_alike() -> None:
    alike = {f"layers.0.attn.{x}_proj": "int4-g32" for x in "qkv"}
    split = {"layers.0.mlp.gate_proj": "int4-g32", "layers.0.mlp.up_proj": "int8-channel"}
    plan = plan_of({**alike, **split, "head": "fp32"})
    found = entries(plan)
    assert found["layers.0.attn.qkv_proj"] == found["layers.0.attn.q_proj"] == config(Format.parse("int4-g32"))
    assert "layers.0.mlp.gate_up_proj" not in found
    assert found["head"] is None
    assert any("would not find them: layers.0.mlp" in note for note in TorchAo().notes(plan))
    # A model that has such a module itself keeps its own entry.
    own = entries(plan_of({**alike, "layers.0.attn.qkv_proj": "int8-channel"}))
    assert own["layers.0.attn.qkv_proj"] == config(Format.parse("int8-channel"))


def test_biases_are_left_alone_by_name() -> None:
    found = entries(plan_of({"fc": "int4-g32"}, ["fc.bias", "norm.weight", "other.bias"]))
    assert list(found) == ["fc", "fc.bias"]
    assert found["fc.bias"] is None


def test_hostile_names_stay_names() -> None:
    plan = plan_of(dict.fromkeys(HOSTILE, "int4-g32"))
    assert set(entries(plan)) == set(HOSTILE)
    read = quiet_import("torchao.core.config").config_from_dict(json.loads(TorchAo().texts(plan)["torchao.json"]))
    matches = quiet_import("torchao.quantization").fqn_matches_fqn_config
    assert all(matches(name, read) for name in HOSTILE)
    assert not any(matches(name, read) for name in ("aXXb", "x" * 299, "up", "a"))
    unnamed = plan_of({"": "int4-g32"})
    assert "the model itself has no name" in TorchAo().refuses(unnamed)[0]


def test_torchao_makes_the_plan_of_a_model_that_shares_its_head(tmp_path: Path) -> None:
    from mpsearch.model.model import load_model

    folder = make(tmp_path / "mo'del", architecture="Qwen2", tie=True)
    formats = {"embed": "int8-channel", "o_proj": "int3-g16-asym", "gate": "fp8-e4m3-channel", "up": "fp8-e4m3-channel"}
    plan = planned(load_model(folder), {**formats, "1.mlp.down": "fp32"}, "int4-g32-full")
    TorchAo(source=str(folder)).write(plan, tmp_path / "out")
    # One layer in other bits is found; everything else is as planned.
    file = tmp_path / "out" / "torchao.json"
    changed = json.loads(file.read_text())
    name = "model.layers.0.mlp.down_proj"
    changed["_data"]["fqn_to_config"][name] = config(Format.parse("int5-g16-asym"))
    file.write_text(json.dumps(changed))
    found = verify("torchao", plan, tmp_path / "out", str(folder))
    assert {(x.tensor, x.what) for x in found.differences} == {
        (f"{name}.weight", what) for what in ("bits", "group", "symmetric", "levels")
    }
    # The head is stored apart from the embedding.
    assert found.tensors == len(plan.layers) + len(plan.layers.excluded) + 1
    assert found.kl is not None
    assert found.kl[0] == pytest.approx(found.kl[1], rel=0.5)
