"""The Model Optimizer export: all quantisers off, then one exact name each, and what the checkpoint must say."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mpsearch.exports.modelopt import ModelOpt
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import HOSTILE, plan_of, script

PLAN = {
    "l.0.a": "int4-g64", "l.0.b": "int8-channel", "l.0.c": "fp8-e4m3", "l.0.d": "nvfp4", "l.9.a": "int4-g128",
    "l.10.b": "int8-channel@int8-tensor-static", "lm_head": "bf16",
    "l.10.c": "fp8-e4m3@fp8-e4m3-tensor-static",
}  # fmt: skip
#: What the quantisers mean, in the library's own words.
READ = {
    (8, 0, None): "int8-channel", (8, 0, "fixed"): "int8-channel@int8-tensor-static", ((4, 3), None, None): "fp8-e4m3",
    ((4, 3), None, "fixed"): "fp8-e4m3@fp8-e4m3-tensor-static",
}  # fmt: skip


class TestModelOpt(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> ModelOpt:
        return make("exporters", "modelopt")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of(PLAN)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {
            "a": "int3-g64",
            "b": "int4-g64-asym",
            "c": "int8-g64",
            "d": "int4-channel",
            "e": "nf4-b64",
            "f": "fp32",
        }
        return plan_of({**wrong, "x.embed": "int8-channel", "fine": "int4-g64", "z": "fp8-e4m3-channel"}), [
            *"abcdef",
            "x.embed",
            "z",
        ]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        entries = script(folder)["quantisers"]()
        assert entries[0] == {"quantizer_name": "*", "enable": False}
        found = {name: {} for name in plan.formats}  # type: dict[str, dict[str, dict]]
        for entry in entries[1:]:
            layer, _, part = entry["quantizer_name"].rpartition(".")
            found[layer][part] = entry["cfg"]
        return {name: self.named(parts) for name, parts in found.items()}

    def named(self, parts: Mapping[str, Mapping]) -> str:  # type: ignore[type-arg]
        if not parts:
            return "bf16"
        weight, inputs = parts["weight_quantizer"], parts.get("input_quantizer")
        blocks = weight.get("block_sizes")
        if blocks:
            return "nvfp4" if weight["num_bits"] == (2, 1) else f"int{weight['num_bits']}-g{blocks[-1]}"
        how = None if inputs is None else "dynamic" if inputs.get("block_sizes") else "fixed"
        return READ[(weight["num_bits"], weight["axis"], how)]


def test_what_is_written_for_two_layers(tmp_path: Path) -> None:
    make("exporters", "modelopt").write(plan_of({"a": "int4-g64", "b": "int8-channel", "head": "bf16"}), tmp_path)
    assert json.loads((tmp_path / "quant_cfg.json").read_text(encoding="utf-8")) == [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "a.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 64}}, "enable": True},
        {"quantizer_name": "b.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}, "enable": True},
    ]
    assert json.loads((tmp_path / "hf_quant_config.json").read_text(encoding="utf-8")) == {
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ", "group_size": 64}, "b": {"quant_algo": "W8A16"}},
        }
    }


def test_one_format_is_no_mixture(tmp_path: Path) -> None:
    make("exporters", "modelopt").write(plan_of({"a": "int8-channel", "b": "int8-channel"}), tmp_path)
    body = json.loads((tmp_path / "hf_quant_config.json").read_text(encoding="utf-8"))
    assert body["quantization"]["quant_algo"] == "W8A16"


def test_layers_that_engines_join_must_be_alike() -> None:
    plan = plan_of({"l.0.q_proj": "int4-g64", "l.0.k_proj": "int4-g64", "l.0.v_proj": "int8-channel"})
    found = make("exporters", "modelopt").refuses(plan)
    assert len(found) == 1
    assert "one format" in found[0]


def test_every_name_matches_its_own_layer_and_no_other(tmp_path: Path) -> None:
    make("exporters", "modelopt").write(plan_of(dict.fromkeys(HOSTILE, "int4-g64")), tmp_path)
    patterns = [e["quantizer_name"] for e in script(tmp_path)["quantisers"]()[1:]]
    names = [f"{name}.weight_quantizer" for name in HOSTILE]
    hits = {pattern: [name for name in names if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns}
    assert sorted(found for [found] in hits.values()) == sorted(names)


def test_fixed_scales_of_inputs_need_tokens(tmp_path: Path) -> None:
    exporter = make("exporters", "modelopt")
    exporter.write(plan_of({"a": "fp8-e4m3@fp8-e4m3-tensor-static"}), tmp_path / "fixed")
    with pytest.raises(SystemExit, match="--tokens"):
        script(tmp_path / "fixed")["tokens_of"](None)
    exporter.write(plan_of({"a": "fp8-e4m3"}), tmp_path / "none")
    assert script(tmp_path / "none")["tokens_of"](None) is None
