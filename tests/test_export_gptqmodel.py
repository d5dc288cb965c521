"""The GPTQModel export: one rule per layer, read by GPTQModel's own order; refused by name; names are only data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsearch.exports.gptqmodel import GptqModel
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite

BLOCK = "model.layers.0."
FORMATS = {
    "model.embed_tokens": "bf16", f"{BLOCK}self_attn.q_proj": "int4-g32", f"{BLOCK}self_attn.k_proj": "int4-g32-mse",
    f"{BLOCK}self_attn.v_proj": "int4-g32-full", f"{BLOCK}self_attn.o_proj": "int8-channel",
    f"{BLOCK}mlp.gate_proj": "int3-g32", f"{BLOCK}mlp.up_proj": "int2-g32-asym", f"{BLOCK}mlp.down_proj": "bf16",
    "lm_head": "bf16",
}  # fmt: skip
HOSTILE = (
    "a.b", "axb", "a+b", "a.*", "(a|b)", "[a-z]", "a$", "^a", "a\\d", 'quo"te', "it's", "../../up", "x{2}", "пример",
    "a b#c", "-:a", "+:a", "re:a", "{{a}}", "n" * 300, "😀",
)  # fmt: skip


def made(formats: Mapping[str, str], dtype: str = "bfloat16", kept: tuple[Excluded, ...] = ()) -> BitPlan:
    kinds = {"model.embed_tokens": "embedding"}
    layers = tuple(Layer(name, kinds.get(name, "linear"), (64, 64), dtype=dtype) for name in formats)
    return BitPlan(Layers(layers, kept), {name: Format.parse(text) for name, text in formats.items()})


def resolved(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What GPTQModel takes for a module: negative rules first, then the first that matches from the start."""
    rules = sorted(config["dynamic"].items(), key=lambda item: not item[0].startswith("-:"))
    for pattern, override in rules:
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else override
    return config


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantize_config.json").read_text("utf-8"))
    return found


class TestGptqModel(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> GptqModel:
        return GptqModel()

    @pytest.fixture
    def plan(self) -> BitPlan:
        formats = {**FORMATS, f"{BLOCK}self_attn.k_proj": "int4-g32", f"{BLOCK}self_attn.v_proj": "int4-g32"}
        return made(formats)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            Layer("code", "linear", (64, 64)): "nf4-b64",
            Layer("five", "linear", (64, 64)): "int5-g32",
            Layer("rows", "linear", (61, 64)): "int4-g32",
            Layer("uneven", "linear", (64, 96)): "int4-g64",
            Layer("turned", "linear", (64, 64), 1): "int4-g32",
            Layer("inputs", "linear", (64, 64)): "int8-channel@int8-token",
            Layer("embed", "embedding", (64, 64)): "int8-channel",
            Layer("keys", "kv_cache", (2, 16)): "kv-int8-token",
            Layer("cast", "linear", (64, 64)): "bf16",
        }
        plan = BitPlan(
            Layers((*formats, Layer("fc", "linear", (64, 64)))),
            {**{layer.name: Format.parse(text) for layer, text in formats.items()}, "fc": Format.parse("int4-g32")},
        )
        return plan, [layer.name for layer in formats]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        config, found = read(folder), {}
        for layer in plan.layers:
            rule = resolved(config, layer.name)
            if rule is None:
                found[layer.name] = "bf16"
                continue
            grain = "channel" if rule["group_size"] == -1 else f"g{rule['group_size']}"
            found[layer.name] = f"int{rule['bits']}-{grain}{'' if rule['sym'] else '-asym'}"
        return found


def test_the_file_is_what_gptqmodel_documents(tmp_path: Path) -> None:
    GptqModel().write(made({"model.layers.0.fc": "int4-g32", "lm_head": "bf16"}), tmp_path)
    assert read(tmp_path) == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "act_group_aware": False, "lm_head": False,
        "dynamic": {
            "-:^lm_head$": {},
            r"+:^model\.layers\.0\.fc$": {"bits": 4, "group_size": 32, "sym": True},
        },
    }  # fmt: skip
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "dtype": "bfloat16", "calibrated": False, "layers": ["model.layers.0.fc"],
    }  # fmt: skip


def test_layers_of_one_format_have_the_fused_name_that_vllm_looks_up(tmp_path: Path) -> None:
    GptqModel().write(made(FORMATS), tmp_path)
    config = read(tmp_path)
    # How scales are found is no part of the rule; gate and up differ, so that no name stands for both.
    assert config["dynamic"][r"+:^model\.layers\.0\.self_attn\.qkv_proj$"] == {"bits": 4, "group_size": 32, "sym": True}
    assert not any("gate_up_proj" in pattern for pattern in config["dynamic"])
    (note,) = (note for note in GptqModel().notes(made(FORMATS)) if "gate_up_proj" in note)
    assert note.startswith("vLLM and SGLang read the base format for these")
    plain = made({**FORMATS, **{f"{BLOCK}mlp.{name}_proj": "bf16" for name in ("gate", "up")}})
    GptqModel().write(plain, tmp_path / "plain")
    assert read(tmp_path / "plain")["dynamic"][r"-:^model\.layers\.0\.mlp\.gate_up_proj$"] == {}


def test_what_the_library_would_touch_is_said(tmp_path: Path) -> None:
    kept = (Excluded("model.layers.0.gate.weight", (4, 64), "bfloat16", "router"),)
    GptqModel().write(made({"fc": "int4-g32", "lm_head": "int8-g32"}, kept=kept), tmp_path)
    config = read(tmp_path)
    assert config["lm_head"] is True
    assert resolved(config, "model.layers.0.gate") is None
    assert resolved(config, "lm_head") == {"bits": 8, "group_size": 32, "sym": True}


def test_calibrated_formats_ask_for_data(tmp_path: Path) -> None:
    plan = made({"fc": "int4-g32-gptq"})
    GptqModel(source="a 'folder'").write(plan, tmp_path / "out")
    assert any("--tokens" in note for note in GptqModel().notes(plan))
    run = [sys.executable, str(tmp_path / "out" / "run.py"), "--out", "nothing"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("the plan was measured with GPTQ: give calibration data")


def test_one_number_type_and_something_to_do() -> None:
    layers = (
        Layer("a", "linear", (64, 64), dtype="bfloat16"),
        Layer("b", "linear", (64, 64), dtype="bfloat16"),
        Layer("c", "linear", (64, 64), dtype="float16"),
    )
    plan = BitPlan(Layers(layers), dict.fromkeys("abc", Format.parse("int4-g32")))
    assert GptqModel().refuses(plan) == [
        "c: stored in float16; GPTQModel loads a model in one number type, here bfloat16; allowed bfloat16"
    ]
    assert GptqModel().refuses(made({"a": "bf16"})) == ["a: GPTQModel needs a layer to quantise"]


def test_hostile_names_match_themselves_alone(tmp_path: Path) -> None:
    chosen = {name: f"int{(2, 3, 4, 8)[i % 4]}-g32" for i, name in enumerate(HOSTILE)}
    GptqModel().write(made(chosen), tmp_path / "out")
    config = read(tmp_path / "out")
    for name, text in chosen.items():
        rule = resolved(config, name)
        assert rule is not None
        assert rule["bits"] == int(text[3])
        for other in (f"{name}x", f"x{name}", f"{name}.a"):
            assert resolved(config, other) is config
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "out"}
    (line,) = GptqModel().refuses(made({"fc\n": "int4-g32"}))
    assert line.startswith(r"'fc\n': GPTQModel is not told of names that cannot be printed")
