"""The NNCF export: passes in an order that NNCF can run, exact names, and a script that leaves all else alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpsearch.exports.nncf import PASSES, Nncf, mode
from mpsearch.format import Format, all_formats
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.reference_libraries import quiet_import

HOSTILE = ("a.*b", 'quo"te', "na\\me", "schicht_ä_層", "x" * 300, "../up", "a\nb", "a", "a.b")


def plan_of(formats: Mapping[str, str]) -> BitPlan:
    """A plan of linear layers of 64 by 64, of which the last is an embedding."""
    last = list(formats)[-1]
    layers = Layers(tuple(Layer(name, "embedding" if name == last else "linear", (64, 64)) for name in formats))
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


MIXED = {
    "layers.10.up": "int3-g32", "layers.9.up": "int3-g32", "layers.9.q": "int4-g32", "layers.9.k": "int4-channel-asym",
    "layers.9.v": "int8-channel", "layers.9.o": "bf16", "layers.9.gate": "nf4-b64", "layers.9.down": "mxfp4",
    "layers.10.q": "nvfp4", "layers.10.k": "int2-channel", "layers.10.v": "fp8-e4m3-channel", "layers.10.o": "fp32",
    "layers.10.gate": "fp8-e4m3-g32", "layers.10.down": "mxfp8-e4m3", "embed": "int8-channel-asym",
}  # fmt: skip


def read_format(each: Mapping[str, Any]) -> str:
    """The format of a pass, by NNCF's names of its modes."""
    name, size = each["mode"], each.get("group_size", -1)
    if name in ("MXFP4", "MXFP8_E4M3", "NVFP4"):
        assert size == (16 if name == "NVFP4" else 32)
        return str(name).lower().replace("_", "-")
    shared = "channel" if size == -1 else f"b{size}" if name == "NF4" else f"g{size}"
    if name.startswith("INT"):
        return f"{name[:4].lower()}-{shared}" + ("-asym" if name.endswith("_ASYM") else "")
    return f"{name.lower().replace('_', '-')}-{shared}"


class TestNncf(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Nncf:
        return Nncf()

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of(MIXED)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "five": "int5-g32", "grouped": "int8-g32", "inputs": "int4-g32@int8-token", "three": "int3-g32-asym",
            "k": "q4_K", "one": "int3-g32", "two": "int3-g64", "also": "int3-g32", "embed": "bf16",
        }  # fmt: skip
        return plan_of(formats), ["five", "grouped", "inputs", "three", "k", "two"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        passes = json.loads((folder / PASSES).read_text(encoding="utf-8"))
        found = dict(passes["plain"])
        for each in passes["compress"]:
            for name in each["weights"]:
                assert name not in found
                found[name] = read_format(each)
        return {name.removesuffix(".weight"): text for name, text in found.items()}


def test_passes_by_hand() -> None:
    formats = {"b": "int3-g32", "a": "int8-channel", "d": "int4-g32-full", "c": "int4-g32", "e": "fp16"}
    rest = {"ratio": 1.0, "all_layers": True}
    assert json.loads(Nncf().texts(plan_of(formats))[PASSES]) == {
        "compress": [
            {"mode": "INT8_SYM", "weights": ["a.weight"]},
            {"mode": "INT4_SYM", "group_size": 32, **rest, "weights": ["c.weight", "d.weight"]},
            {"mode": "INT3_SYM", "group_size": 32, **rest, "weights": ["b.weight"]},
        ],
        "plain": {"e.weight": "fp16"},
    }


def test_eight_bits_come_first_and_three_last() -> None:
    modes = [each["mode"] for each in json.loads(Nncf().texts(plan_of(MIXED))[PASSES])["compress"]]
    assert set(modes[:2]) == {"INT8_SYM", "INT8_ASYM"}
    assert modes[-1] == "INT3_SYM"
    assert len(modes) == len(MIXED) - 3


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_what_is_not_refused_has_a_mode(kind: str) -> None:
    layer, held = Layer("a", kind, (64, 512)), 0
    for formats in all_formats().values():
        for fmt in formats:
            if not Nncf().refuses(BitPlan(Layers((layer,)), {"a": fmt})):
                assert (mode(fmt) is None) == (fmt.weight.family == "plain"), fmt
                held += 1
    assert held >= 16


def test_one_int3_of_another_group_is_refused_by_name() -> None:
    found = Nncf().refuses(plan_of({"a": "int3-g32", "b": "int3-channel", "c": "int3-g32-full", "d": "fp32"}))
    assert found == [
        "b: int3-channel does not go with int3-g32: NNCF makes int3 in one pass, the last; allowed int3-g32"
    ]


def test_names_of_any_kind_are_data(tmp_path: Path) -> None:
    plan = plan_of(dict.fromkeys(HOSTILE, "int4-g32"))
    Nncf(source='/a "b"\n\\c').write(plan, tmp_path / "out")
    passes = json.loads((tmp_path / "out" / PASSES).read_text(encoding="utf-8"))
    assert sorted(passes["compress"][0]["weights"]) == sorted(f"{name}.weight" for name in HOSTILE)
    script = (tmp_path / "out" / "run.py").read_text(encoding="utf-8")
    compile(script, "run.py", "exec")
    assert not any(name in script for name in HOSTILE if len(name) > 3)


# --- the script, with OpenVINO itself and a stand-in for NNCF that notes what it is asked for


def model_of(names: Sequence[str], shape: tuple[int, int] = (8, 4)) -> Any:
    """A model that multiplies by each weight in turn, named as the converter names them, and one Gather of none."""
    ov = quiet_import("openvino")
    ops = quiet_import("openvino.opset13")
    x = ops.parameter([-1, shape[1]], np.float32, name="x")
    found = []
    for number, name in enumerate(names):
        weight = ops.constant(np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape) / 7 + number)
        weight.set_friendly_name(name)
        product = ops.matmul(x, weight, False, True)
        product.set_friendly_name(f"node of {name}")
        found.append(product)
    return ov.Model([ops.result(product) for product in found], [x])


@pytest.fixture
def script(tmp_path: Path) -> ModuleType:
    """The exported script, as a module."""
    Nncf().write(plan_of({"a.b": "int4-g32", "axb": "int8-channel", "z": "bf16", "e": "fp32"}), tmp_path / "export")
    spec = importlib.util.spec_from_file_location("exported_run", tmp_path / "export" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("a.b", "axb", "z", "e")


def folder_of(path: Path, names: Sequence[str] = NAMES, shape: tuple[int, int] = (64, 64)) -> Path:
    """A folder with a converted model."""
    path.mkdir()
    made = model_of([f"self.{name}.weight" for name in names], shape)
    quiet_import("openvino").save_model(made, path / "openvino_model.xml", compress_to_fp16=False)
    return path


def test_the_script_asks_for_exactly_the_planned_layers(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compress_weights(model: Any, **settings: Any) -> Any:
        asked.append({**settings, "ignored_scope": settings["ignored_scope"].names, "mode": settings["mode"].name})
        return model

    modes = Enum("modes", ["INT8_SYM", "INT4_SYM"])
    stand_in = SimpleNamespace(
        compress_weights=compress_weights,
        CompressWeightsMode=modes,
        IgnoredScope=lambda names: SimpleNamespace(names=names),
    )
    monkeypatch.setitem(sys.modules, "nncf", stand_in)
    source = folder_of(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", str(source), "--out", str(tmp_path / "out")])
    script.main()
    node = "node of self.{}.weight".format
    assert asked == [
        {"mode": "INT8_SYM", "ignored_scope": [node("a.b"), node("e"), node("z")]},
        {
            "mode": "INT4_SYM", "ignored_scope": [node("axb"), node("e"), node("z")], "group_size": 32, "ratio": 1.0,
            "all_layers": True,
        },
    ]  # fmt: skip
    saved = quiet_import("openvino").Core().read_model(tmp_path / "out" / "openvino_model.xml")
    kinds = {x.get_friendly_name(): x.get_element_type().get_type_name() for x in saved.get_ops()}
    assert {name: kinds[f"self.{name}.weight"] for name in NAMES} == {
        "a.b": "f32",
        "axb": "f32",
        "z": "bf16",
        "e": "f32",
    }
    with pytest.raises(SystemExit, match="holds files; nothing was written"):
        script.main()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_plain_weights_are_stored_in_their_type(script: ModuleType, kind: str, dtype: torch.dtype) -> None:
    core, model = quiet_import("openvino").Core(), model_of(["self.w.weight"])
    constant = script.users(model)["self.w.weight"][0]
    expected = torch.from_numpy(np.array(constant.data)).to(dtype).float().numpy()
    script.store_plain(constant, kind)
    ready = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_array_equal(ready([np.eye(4, dtype=np.float32)])[0], expected.T)


def test_the_script_stops_at_what_it_does_not_find(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", SimpleNamespace())
    for number, (source, said) in enumerate(
        [
            (folder_of(tmp_path / "less", NAMES[:3]), "no weight of this name: e.weight"),
            (
                folder_of(tmp_path / "other", shape=(32, 64)),
                r"a.b.weight: the converted model has \[32, 64\], the plan",
            ),
        ]
    ):
        out = tmp_path / f"out{number}"
        monkeypatch.setattr(sys, "argv", ["run.py", "--model", str(source), "--out", str(out)])
        with pytest.raises(SystemExit, match=said):
            script.main()
        assert not out.exists()
