"""The Quark export: a rule with an exact name for each layer, the rest excluded by name."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsearch.exports.quark import Quark
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import HOSTILE, plan_of

PLAN = {
    "l.0.a": "int4-g64-full", "l.0.b": "int8-channel-full", "l.0.c": "fp8-e4m3", "l.0.d": "mxfp4",
    "l.9.a": "int4-g128-asym", "l.9.b": "fp8-e4m3@fp8-e4m3-tensor-static", "l.10.a": "fp8-e4m3-channel",
    "l.10.b": "mxfp6-e3m2", "lm_head": "bf16",
}  # fmt: skip


def rules(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "quark_config.json").read_text(encoding="utf-8"))
    return body


def named(rule: Mapping[str, Any]) -> str:
    """Name of the format that a rule means, from the library's own words."""
    weight = rule["weight"]
    if weight["scale_format"] == "e8m0":
        return {"fp4": "mxfp4", "fp6_e3m2": "mxfp6-e3m2"}[weight["dtype"]]
    grain = {"per_tensor": "", "per_channel": "-channel", "per_group": f"-g{weight['group_size']}"}[weight["qscheme"]]
    if weight["dtype"] == "fp8_e4m3":
        return f"fp8-e4m3{grain}{'@fp8-e4m3-tensor-static' if rule['input_tensors'] else ''}"
    return f"{weight['dtype'].removeprefix('u')}{grain}-{'full' if weight['symmetric'] else 'asym'}"


class TestQuark(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Quark:
        return make("exporters", "quark")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of(PLAN)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {"a": "int4-g64", "b": "int3-g64-full", "c": "int8-channel", "d": "nvfp4", "e": "int4-channel-asym"}
        return plan_of({**wrong, "x.embed": "int4-g64-full", "fine": "int4-g64-full"}), [*"abcde", "x.embed"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = rules(folder)
        found = {name: named(rule) for name, rule in body["layer_quant_config"].items()}
        return {**found, **dict.fromkeys(body["exclude"], "bf16")}


def test_what_is_written_for_a_layer(tmp_path: Path) -> None:
    """The rule is what the library's own Int4PerGroupSpec(ch_axis=-1, group_size=64) writes."""
    make("exporters", "quark").write(plan_of({"a": "int4-g64-full", "head": "bf16"}), tmp_path)
    body = rules(tmp_path)
    assert body["exclude"] == ["head"]
    assert not any(body["global_quant_config"].values())
    assert body["layer_quant_config"]["a"] == {
        "input_tensors": None, "output_tensors": None, "bias": None, "target_device": None,
        "weight": {
            "dtype": "int4", "is_dynamic": False, "qscheme": "per_group", "observer_cls": "PerGroupMinMaxObserver",
            "ch_axis": -1, "group_size": 64, "symmetric": True, "round_method": "half_even", "scale_type": "float",
            "scale_format": None, "scale_calculation_mode": None, "mx_element_dtype": None,
        },
    }  # fmt: skip


def test_every_name_matches_its_own_layer_and_no_other(tmp_path: Path) -> None:
    formats = {name: "bf16" if place % 2 else "int4-g64-full" for place, name in enumerate(HOSTILE)}
    make("exporters", "quark").write(plan_of(formats), tmp_path)
    body = rules(tmp_path)
    for patterns, kept in ((body["layer_quant_config"], False), (body["exclude"], True)):
        hits = [[name for name in HOSTILE if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns]
        assert sorted(name for [name] in hits) == sorted(n for n in HOSTILE if (formats[n] == "bf16") == kept)
