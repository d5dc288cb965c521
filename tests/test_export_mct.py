"""The MCT export: bits by the exact name of a node; what would be quantised against the plan is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpsearch.exports.mct import Mct
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import HOSTILE, plan_of, script, stand_in

INPUT = "@int8-tensor-static"


class TestMct(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Mct:
        return make("exporters", "mct")

    @pytest.fixture
    def plan(self) -> BitPlan:
        chosen = {"l.0": f"int2-channel-full{INPUT}", "l.1": f"int8-channel-full{INPUT}", "embed": "bf16"}
        return plan_of(chosen)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {"a": f"int3-channel-full{INPUT}", "b": "int4-channel-full", "c": f"int4-channel{INPUT}", "d": "bf16"}
        return plan_of({"x.y": f"int4-channel-full{INPUT}", "x_y": f"int4-channel-full{INPUT}", **wrong}), [
            "a",
            "b",
            "c",
            "d",
            "x_y",
        ]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        bits = script(folder)["read"]("bits.json")
        dotted = {name.replace(".", "_"): name for name in plan.formats}
        found = {dotted[name]: f"int{number}-channel-full{INPUT}" for name, number in bits.items()}
        return {name: found.get(name, "bf16") for name in plan.formats}


def test_a_shared_weight_is_refused_by_name() -> None:
    found = make("exporters", "mct").refuses(plan_of({"a": f"int4-channel-full{INPUT}"}, shared=("b",)))
    assert found == ["a: is shared with b, and each of them is a node there"]


def quantised(monkeypatch: pytest.MonkeyPatch, folder: Path, found: Mapping[str, int]) -> tuple[list[Any], Any]:
    """Run the script with a stand-in that quantises these modules to these bits; what it was asked, and the model."""
    asked: list[Any] = []
    parts = [
        (name, SimpleNamespace(weights_quantizers={"weight": SimpleNamespace(num_bits=n)})) for name, n in found.items()
    ]
    made = SimpleNamespace(named_modules=lambda: [("", SimpleNamespace()), *parts])
    width = SimpleNamespace(set_manual_weights_bit_width=lambda *given: asked.extend(given))
    library = "model_compression_toolkit"
    stand_in(monkeypatch, library, get_target_platform_capabilities=dict, ptq=SimpleNamespace(
        pytorch_post_training_quantization=lambda *_, **__: (made, None)))  # fmt: skip
    stand_in(monkeypatch, f"{library}.core", BitWidthConfig=lambda: width, CoreConfig=dict)
    stand_in(monkeypatch, f"{library}.core.common")
    stand_in(monkeypatch, f"{library}.core.common.network_editors", NodeNameFilter=str)
    return asked, script(folder)["quantised"](None, None)


def test_each_node_is_asked_for_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in HOSTILE if "." not in name] + ["a.b"]
    make("exporters", "mct").write(plan_of(dict.fromkeys(names, f"int4-channel-full{INPUT}")), tmp_path)
    asked, _ = quantised(monkeypatch, tmp_path, dict.fromkeys(names, 4))
    assert sorted(asked[0]) == sorted([*names[:-1], "a_b"])
    assert asked[1:] == [[4] * len(names), ["weight"] * len(names)]


@pytest.mark.parametrize("found", [{"a.b": 8, "c": 4}, {"a.b": 4}, {"a.b": 4, "c": 4, "d": 8}])
def test_bits_that_are_not_as_planned_stop_the_script(
    found: Mapping[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("exporters", "mct").write(plan_of(dict.fromkeys(["a.b", "c"], f"int4-channel-full{INPUT}")), tmp_path)
    with pytest.raises(SystemExit, match="not as planned"):
        quantised(monkeypatch, tmp_path, found)
