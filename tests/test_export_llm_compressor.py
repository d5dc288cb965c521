"""The llm-compressor export: a recipe of exact names that reads as YAML, refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsearch.exports.llm_compressor import LlmCompressor
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.reference_libraries import quiet_import
from tests.test_export_gptqmodel import HOSTILE, made

MIXED = {
    "model.embed_tokens": "int8-channel", "attn.q_proj": "int4-g32-asym", "attn.k_proj": "int4-g32-asym",
    "attn.v_proj": "int4-g32-asym", "attn.o_proj": "int3-channel", "mlp.gate_proj": "int5-tensor",
    "mlp.up_proj": "int5-tensor", "mlp.down_proj": "bf16", "lm_head": "bf16",
}  # fmt: skip


def modifiers(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipe as the library reads it: as YAML."""
    read = quiet_import("yaml").safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert list(read) == ["quant_stage"]
    found: dict[str, dict[str, Any]] = read["quant_stage"]["quant_modifiers"]
    return found


class TestLlmCompressor(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> LlmCompressor:
        return LlmCompressor()

    @pytest.fixture
    def plan(self) -> BitPlan:
        return made(MIXED)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        up, gate = Layer("mlp.up_proj", "linear", (64, 64)), Layer("mlp.gate_proj", "linear", (64, 64))
        formats = {
            Layer("code", "linear", (64, 64)): "nf4-b64",
            Layer("static", "linear", (64, 64)): "int8-channel@int8-tensor-static",
            Layer("six", "linear", (64, 64)): "mxfp6-e2m3",
            Layer("uneven", "linear", (64, 96)): "int4-g64",
            Layer("turned", "linear", (64, 64), 1): "int4-g32",
            Layer("cache", "kv_cache", (2, 16)): "kv-int8-token",
            Layer("cast", "linear", (64, 64)): "bf16",
            up: "int4-g32",
            gate: "int8-g32",
            Layer("Linear", "linear", (64, 64)): "int4-g32",
            Layer("re:.*", "linear", (64, 64)): "int4-g32",
        }
        plan = BitPlan(Layers(tuple(formats)), {layer.name: Format.parse(text) for layer, text in formats.items()})
        return plan, [layer.name for layer in formats if layer != gate]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        (modifier,) = modifiers(folder).values()
        found = dict.fromkeys(modifier["ignore"], "bf16")
        for group in modifier["config_groups"].values():
            weights = group["weights"]
            grain = f"g{weights['group_size']}" if weights["strategy"] == "group" else weights["strategy"]
            for name in group["targets"]:
                assert name not in found
                found[name] = f"int{weights['num_bits']}-{grain}{'' if weights['symmetric'] else '-asym'}"
        return {layer.name: found.pop(layer.name) for layer in plan.layers}


def test_the_recipe_is_what_llm_compressor_documents(tmp_path: Path) -> None:
    kept = (Excluded("router.weight", (4, 64), "bfloat16", "router"),)
    formats = {"a": "int4-g32-mse", "b": "int8-channel-full@int8-token", "c": "int4-g32-gptq", "lm_head": "bf16"}
    LlmCompressor().write(made(formats, kept=kept), tmp_path)
    ignore = ["lm_head", "router"]
    number = {"type": "int", "symmetric": True}
    assert modifiers(tmp_path) == {
        "QuantizationModifier": {
            "ignore": ignore,
            "config_groups": {
                "group_0": {
                    "targets": ["a"],
                    "weights": {
                        "num_bits": 4, **number, "strategy": "group", "group_size": 32, "dynamic": False,
                        "observer": "memoryless_mse",
                    },
                },
                "group_1": {
                    "targets": ["b"],
                    "weights": {"num_bits": 8, **number, "strategy": "channel", "dynamic": False},
                    "input_activations": {"num_bits": 8, **number, "strategy": "token", "dynamic": True},
                },
            },
        },
        "GPTQModifier": {
            "block_size": 128, "dampening_frac": 0.01, "actorder": None, "ignore": ignore,
            "config_groups": {
                "gptq_0": {
                    "targets": ["c"],
                    "weights": {"num_bits": 4, **number, "strategy": "group", "group_size": 32, "dynamic": False},
                },
            },
        },
    }  # fmt: skip
    assert json.loads((tmp_path / "run.json").read_text()) == {"calibrated": True, "modules": ["a", "b", "c"]}


def test_a_shared_weight_is_refused_when_it_is_quantised(tmp_path: Path) -> None:
    layer = Layer("embed", "embedding", (64, 64), dtype="bfloat16", shared=("head",))
    (line,) = LlmCompressor().refuses(BitPlan(Layers((layer,)), {"embed": Format.parse("int8-channel")}))
    assert line.startswith("embed: int8-channel is not held by llm-compressor here: it shares its weight with head")
    layers = Layers((layer, Layer("fc", "linear", (64, 64))))
    plan = BitPlan(layers, {"embed": Format.parse("bf16"), "fc": Format.parse("int4-g32")})
    LlmCompressor().write(plan, tmp_path)
    assert modifiers(tmp_path)["QuantizationModifier"]["ignore"] == ["embed", "head"]


@pytest.mark.parametrize(
    "text",
    ["int3-g32", "int8-tensor-asym", "int4-channel-full@int8-token-asym", "fp8-e4m3", "fp8-e4m3-b32x32",
     "fp8-e4m3-channel@fp8-e4m3-token", "mxfp4", "mxfp8-e4m3", "nvfp4"],
)  # fmt: skip
def test_compressed_tensors_reads_every_scheme(text: str, tmp_path: Path) -> None:
    LlmCompressor().write(made({"fc": text}), tmp_path)
    (group,) = modifiers(tmp_path)["QuantizationModifier"]["config_groups"].values()
    read = quiet_import("compressed_tensors.quantization").QuantizationScheme.model_validate(group)
    assert read.targets == ["fc"]
    assert read.weights.num_bits == Format.parse(text).weight.bits
    assert (read.input_activations is None) == ("@" not in text)


def test_calibrated_formats_ask_for_data(tmp_path: Path) -> None:
    plan = made({"fc": "int4-g32-gptq"})
    LlmCompressor().write(plan, tmp_path / "out")
    assert any("--tokens" in note for note in LlmCompressor().notes(plan))
    run = [sys.executable, str(tmp_path / "out" / "run.py"), "--model", "x", "--out", "nothing"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("the plan was measured with GPTQ: give calibration data")


def test_hostile_names_read_back_from_yaml(tmp_path: Path) -> None:
    names = [name for name in HOSTILE if not name.startswith("re:")]
    LlmCompressor().write(made(dict.fromkeys(names, "int4-g32")), tmp_path / "out")
    (group,) = modifiers(tmp_path / "out")["QuantizationModifier"]["config_groups"].values()
    assert sorted(group["targets"]) == sorted(names)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "out"}
    (line,) = LlmCompressor().refuses(made({"fc\x85": "int4-g32"}))
    assert "names that cannot be printed" in line
