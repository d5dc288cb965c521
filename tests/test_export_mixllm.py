"""The MixLLM export: the output channels of 4 and of 8 bits, as its searcher lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpsearch.exports.mixllm import MixLlm
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import script, stand_in

FOUR, EIGHT = "int4-g128-asym", "int8-g128"
WHOLE = Layer("model.layers.0.up", "linear", (256, 256), dtype="bfloat16")


def cut(formats: Mapping[str, str]) -> BitPlan:
    """A layer in three parts, whole layers of these formats, and a head that is left alone."""
    parts = [WHOLE.part((0, 8)), WHOLE.part((8, 250)), WHOLE.part((250, 256))]
    others = [Layer(name, "linear", (128, 256), dtype="bfloat16") for name in (*formats, "lm_head")]
    chosen = dict(zip([part.name for part in parts], (EIGHT, FOUR, EIGHT), strict=True))
    named = {name: Format.parse(text) for name, text in {**chosen, **formats, "lm_head": "bf16"}.items()}
    return BitPlan(Layers((*parts, *others)), named)


class TestMixLlm(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> MixLlm:
        return make("exporters", "mixllm")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return cut({"model.layers.0.q": FOUR, "model.layers.10.q": EIGHT})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {
            "model.layers.0.a": "int4-g128", "model.layers.0.b": "int5-g128-asym", "model.layers.0.c": "bf16",
            "proj": FOUR,
        }  # fmt: skip
        return cut(wrong), [*wrong]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        layers = script(folder)["read"]("linear_config_map.json")["layers"]
        found = {}
        for layer in plan.layers:
            widths = layers.get(layer.owner, {})
            first, end = layer.channels or (0, layer.rows)
            held = [bits for bits, how in widths.items() if {*range(first, end)} <= {*how["indices"]}]
            found[layer.name] = {"4": FOUR, "8": EIGHT}[held[0]] if held else "bf16"
        return found


def test_columns_of_their_own_are_refused() -> None:
    part, rest = WHOLE.part(None, (0, 128)), WHOLE.part(None, (128, 256))
    plan = BitPlan(Layers((part, rest)), {part.name: Format.parse(FOUR), rest.name: Format.parse(EIGHT)})
    found = make("exporters", "mixllm").refuses(plan)
    assert [line.split(": ")[1] for line in found] == ["MixLLM gives bits to output channels, not to their columns"] * 2


def test_all_inputs_are_rounded_or_none(tmp_path: Path) -> None:
    def whole(formats: Sequence[str]) -> BitPlan:
        layers = [Layer(f"model.layers.{n}.q", "linear", (128, 256)) for n in range(len(formats))]
        chosen = {layer.name: Format.parse(text) for layer, text in zip(layers, formats, strict=True)}
        return BitPlan(Layers(tuple(layers)), chosen)

    exporter = make("exporters", "mixllm")
    found = exporter.refuses(whole([f"{FOUR}@int8-g128", EIGHT]))
    assert found == ["model.layers.1.q: leaves inputs alone, and MixLLM rounds all inputs or none"]
    exporter.write(whole([f"{FOUR}@int8-g128", f"{EIGHT}@int8-g128"]), tmp_path)
    body = script(tmp_path)["read"]("linear_config_map.json")
    assert body["inputs"] == {"bit_width": 8, "group_size": 128, "asymmetric": False}


def test_the_script_makes_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the constructors of MixLLM's quantizer.py; every channel is in one list, as its verify asks."""
    seen: dict[str, Any] = {}

    class Config:
        def __init__(self, shares: Any, weights: Any, inputs: Any) -> None:
            seen.update(shares=shares, weights=weights, inputs=inputs)
            self.linear_config_map: dict[str, Any] = {}

        def save(self, path: str) -> None:
            seen["saved"] = {name: how.widths for name, how in self.linear_config_map.items()}

    def verify(widths: Mapping[int, Any], shape: Sequence[int]) -> None:
        assert sorted(i for how in widths.values() for i in how["indices"]) == list(range(shape[0]))

    def quant(widths: Mapping[int, Any]) -> Any:
        return SimpleNamespace(widths=widths, verify=lambda shape: verify(widths, shape))

    for name in ("mixllm", "mixllm.quantization"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "mixllm.quantization.quantizer", MixLLMConfig=Config, QuantConfig=quant)
    make("exporters", "mixllm", source="m").write(cut({"model.layers.0.q": FOUR}), tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py", "--out", "map.pt"])
    script(tmp_path)["main"]()
    shared = {"gptq": True, "clip_shrink": False, "group_size": 128}
    assert seen["shares"] == {8: 50, 4: 50}
    assert seen["weights"] == {8: {**shared, "asymmetric": False}, 4: {**shared, "asymmetric": True}}
    assert seen["inputs"] is None
    assert seen["saved"]["model.layers.0.up"][8]["indices"] == [*range(8), *range(250, 256)]
    assert [*seen["saved"]["model.layers.0.q"]] == [4]
