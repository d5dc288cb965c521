"""The AIMET export: a quantiser for each layer of the plan by its exact name, and for no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mpsearch.exports.aimet import Aimet
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import HOSTILE, plan_of, script


def grain(group: int) -> str:
    return f"g{group}" if group else "channel"


class TestAimet(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Aimet:
        return make("exporters", "aimet")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of({"l.0": "int3-g64-full", "l.1": "int7-channel-asym", "l.2": "int8-channel-full", "head": "bf16"})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {"a": "int4-g64", "b": "fp8-e4m3", "c": "int4-g64-full@int8-token", "d": "nf4-b64"}
        return plan_of({**wrong, "x.embed": "int8-channel-full"}), [*"abcd", "x.embed"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "quantizers.json").read_text(encoding="utf-8"))
        found = {
            name: f"int{how['bits']}-{grain(how['group'])}-{'full' if how['symmetric'] else 'asym'}"
            for name, how in body.items()
        }
        return {name: found.get(name, "bf16") for name in plan.formats}


def test_names_are_data(tmp_path: Path) -> None:
    make("exporters", "aimet").write(plan_of(dict.fromkeys(HOSTILE, "int4-g64-full")), tmp_path)
    read = script(tmp_path)["read"]("quantizers.json")
    assert read == {name: {"bits": 4, "group": 64, "symmetric": True} for name in HOSTILE}


def test_modules_that_share_a_weight_are_all_named(tmp_path: Path) -> None:
    make("exporters", "aimet").write(plan_of({"a": "int4-g64-full"}, shared=("b", "c.d")), tmp_path)
    assert [*script(tmp_path)["read"]("quantizers.json")] == ["a", "b", "c.d"]
