"""The ONNX export: ONNX Runtime gives our own logits, with and without a cache, and what is wrong is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mpsearch.errors import InputError
from mpsearch.exports import onnx_model
from mpsearch.exports.onnx_model import causal, export_model
from mpsearch.exports.onnxruntime import DATA, MODEL, OnnxRuntimeExport
from mpsearch.exports.verify import Verification, verify
from mpsearch.format import Format
from mpsearch.hardware import onnx_export
from mpsearch.hardware.containers import kept_bytes, stored_bytes
from mpsearch.layer import Layer, Layers
from mpsearch.model.model import Model, load_model
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.test_export_compressed_tensors import make, planned
from tests.tiny_models import tiny

FORMATS = {
    "q_proj": "int4-g32", "k_proj": "int2-g16-asym", "v_proj": "int8-g64", "o_proj": "bf16", "gate": "fp16",
    "down": "int8-g16-asym", "embed": "int4-g32-asym", "lm_head": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and its graph in fp32; no two norms are alike."""
    folder = tmp_path_factory.mktemp("small")
    model = load_model(make(folder / "model"))
    module: Any = model.module
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    module.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")
    export_model(load_model(folder / "model"), folder / "exported.onnx")
    return folder / "model", folder / "exported.onnx"


@pytest.fixture(scope="module")
def model(small: tuple[Path, Path]) -> Model:
    return load_model(small[0])


@pytest.fixture
def write(small: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a plan, from the graph that is there."""

    def written(plan: BitPlan, **settings: Any) -> Path:
        exporter = OnnxRuntimeExport(source=str(small[0]), exported=str(small[1]), **settings)
        exporter.write(plan, tmp_path / "out")
        return tmp_path / "out"

    return written


def tensors(folder: Path) -> dict[str, Any]:
    """All numbers of an exported file, by name."""
    return {x.name: numpy_helper.to_array(x).copy() for x in onnx.load(folder / MODEL).graph.initializer}


def read_format(node: Any, values: Mapping[str, Any]) -> str:
    """The format of a product or look-up, by ONNX Runtime's documents and the file alone."""
    facts = {item.name: item.i for item in node.attribute}
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return f"int{facts['bits']}-g{facts['block_size']}" + ("-asym" if len(node.input) == 4 else "")
    held = next(values[name] for name in node.input if name in values)
    if not (held.view(np.uint32) & 0xFFFF).any():
        return "bf16"
    return "fp16" if (held.astype(np.float16) == held).all() else "fp32"


class TestOnnxRuntimeExport(ExporterSuite):
    @pytest.fixture
    def exporter(self, small: tuple[Path, Path]) -> OnnxRuntimeExport:
        return OnnxRuntimeExport(source=str(small[0]), exported=str(small[1]))

    @pytest.fixture
    def plan(self, model: Model) -> BitPlan:
        return planned(model, FORMATS)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "odd": "int3-g32", "wide": "int4-channel", "bytes": "int8-channel", "full": "int4-g32-full",
            "nf": "nf4-b64", "inputs": "int4-g32@int8-token", "part[0:8]": "int4-g32", "look": "int2-g32",
        }  # fmt: skip
        layers = [
            Layer(name, "embedding" if name == "look" else "linear", (64, 64)) for name in formats if "[" not in name
        ]
        layers.insert(6, Layer("part", "linear", (64, 64)).part((0, 8)))
        plan = BitPlan(Layers(tuple(layers)), {name: Format.parse(text) for name, text in formats.items()})
        return plan, list(formats)

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        graph, values = onnx.load(folder / MODEL).graph, tensors(folder)
        found = {}
        for node in graph.node:
            for layer in plan.layers:
                if any(name.startswith(f"model.{layer.tensor}") for name in node.input):
                    found[layer.name] = read_format(node, values)
        return found


def proved(plan: BitPlan, folder: Path, model: Path, accuracy: int = 1) -> Verification:
    return verify("onnxruntime", plan, folder, str(model), bound=OnnxRuntimeExport(accuracy=accuracy).bound(plan))


def test_the_library_reads_the_plan_and_gives_our_logits_and_bytes(
    small: tuple[Path, Path], model: Model, write: Callable[..., Path]
) -> None:
    plan = planned(model, FORMATS)
    out = write(plan)
    found = proved(plan, out, small[0])
    assert found.differences == ()
    assert found.tensors == 16
    assert found.kl is not None
    assert found.kl[0] == pytest.approx(found.kl[1], rel=1e-3)
    sizes = {name: values.nbytes for name, values in tensors(out).items()}
    for layer in plan.layers:
        held = sum(size for name, size in sizes.items() if name.startswith(f"model.{layer.tensor}"))
        assert held == sum(stored_bytes(plan.formats[layer.name], layer, "onnxruntime").values()), layer.name
    for kept in plan.layers.excluded:
        assert sizes[f"model.{kept.name}"] == kept_bytes(kept, "onnxruntime")
    assert (out / DATA).stat().st_size > 0.9 * found.bytes


def test_rounded_inputs_are_near_and_level_4_says_that_it_is_not_exact(
    small: tuple[Path, Path], model: Model, write: Callable[..., Path]
) -> None:
    plan = planned(model, {**FORMATS, "up_proj": "int8-channel@int8-tensor-asym"})
    found = proved(plan, write(plan), small[0])
    assert found.differences == ()
    fast = planned(model, FORMATS)
    exporter = OnnxRuntimeExport(accuracy=4)
    assert exporter.bound(fast) is None
    assert "was not measured" in exporter.notes(fast)[0]
    out = write(fast, accuracy=4, force=True)
    found = proved(fast, out, small[0], 4)
    assert found.differences == ()
    assert found.largest is not None
    assert 1e-4 < found.largest < 0.1


def spoil(folder: Path, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Change a graph and its numbers, and write both."""
    proto = onnx.load(folder / MODEL)
    held = {x.name: x for x in proto.graph.initializer}
    change(proto.graph, held)
    onnx.save_model(proto, folder / MODEL, save_as_external_data=False)


def scale(graph: Any, held: dict[str, Any]) -> None:
    tensor = held["model.model.layers.1.mlp.up_proj.weight.scales"]
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def swap(graph: Any, held: dict[str, Any]) -> None:
    q, k = (
        next(x for x in graph.node if any(f"layers.0.self_attn.{name}." in y for y in x.input))
        for name in ("q_proj", "o_proj")
    )
    q.input[1], k.input[1] = k.input[1], q.input[1]
    q.input[2], k.input[2] = k.input[2], q.input[2]


def group(graph: Any, held: dict[str, Any]) -> None:
    name = "model.model.layers.0.mlp.up_proj.weight"
    node = next(x for x in graph.node if f"{name}.codes" in x.input)
    codes, scales = (numpy_helper.to_array(held[f"{name}.{part}"]) for part in ("codes", "scales"))
    made = {"codes": codes.reshape(len(codes), -1, 8), "scales": np.repeat(scales, 2, axis=1)}
    for part, values in made.items():
        held[f"{name}.{part}"].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), f"{name}.{part}"))
    next(item for item in node.attribute if item.name == "block_size").i = 16


@pytest.mark.parametrize(
    ("change", "tensor", "what"),
    [
        (scale, "logits", "differ by"),
        (swap, "logits", "differ by"),
        (group, "model.layers.0.mlp.up_proj.weight", "group"),
    ],
)
def test_what_is_wrong_in_a_file_is_noticed(
    change: Callable[[Any, dict[str, Any]], None], tensor: str, what: str, small: tuple[Path, Path], model: Model,
    write: Callable[..., Path],
) -> None:  # fmt: skip
    plan = planned(model, {"embed": "fp32", "lm_head": "fp32"})
    out = write(plan)
    spoil(out, change)
    assert [(x.tensor, x.what) for x in proved(plan, out, small[0]).differences] == [(tensor, what)]


def test_the_script_beside_it_writes_what_the_plan_would(model: Model, write: Callable[..., Path]) -> None:
    plan = planned(model, FORMATS)
    out = write(plan)
    said = subprocess.run(
        [sys.executable, str(out / "run.py"), "--tokens", "3,1,4,1,5", "--new", "6"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = [int(token) for token in said.stdout.split(",")]
    from mpsearch.model.apply import applied

    tokens = [3, 1, 4, 1, 5]
    with applied(model, {layer: plan.formats[layer.name] for layer in plan.layers}), torch.no_grad():
        for _ in range(6):
            tokens.append(int(model.logits({"input_ids": torch.tensor([tokens])})[0, -1].argmax()))
    assert made == tokens[5:]
    assert "tokens/s" in said.stderr


def test_the_graph_says_nothing_of_the_machine_and_has_free_axes(model: Model, write: Callable[..., Path]) -> None:
    out = write(planned(model, FORMATS))
    assert b".py" not in (out / MODEL).read_bytes()
    graph = onnx.load(out / MODEL, load_external_data=False).graph
    axes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*graph.input, *graph.output)
    }
    assert axes["input_ids"] == ["batch", "tokens"]
    assert axes["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert axes["present.0.key"] == ["batch", 2, "total", 16]
    assert axes["logits"] == ["batch", "tokens", 61]


def test_windows_are_found_by_the_models_own_masks() -> None:
    for found, expected in (
        (tiny("Gemma2", sliding_window=6, query_pre_attn_scalar=8), {"full_attention": 0, "sliding_attention": 6}),
        (tiny("Mistral", sliding_window=5), {"": 5}),
        (tiny(), {"": 0}),
    ):
        with onnx_export._eager_attention(found.module):
            assert onnx_model._windows(found) == expected
    assert (causal(3, 2, 2)[0, 0] == 0).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_what_cannot_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no causal language model") as told:
        export_model(Model(torch.nn.Linear(4, 4)), tmp_path / "x.onnx")
    assert told.value.code == "E431"
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="hang on the length"):
        export_model(tiny(rope_parameters=scaled), tmp_path / "x.onnx")
    monkeypatch.setattr(onnx_model, "causal", lambda tokens, past, window: causal(tokens, past, 2))
    with pytest.raises(InputError, match="neither causal nor a sliding window"):
        export_model(tiny(layers=1), tmp_path / "x.onnx")
    with pytest.raises(InputError, match="accuracy = 2") as told:
        OnnxRuntimeExport(accuracy=2)
    assert told.value.code == "E102"
    assert not list(tmp_path.iterdir())


def test_other_models_and_missing_ones_are_refused(small: tuple[Path, Path], model: Model, tmp_path: Path) -> None:
    plan = planned(model, FORMATS)
    with pytest.raises(InputError, match="no model was given") as told:
        OnnxRuntimeExport().write(plan, tmp_path / "out")
    assert told.value.code == "E101"
    # Names of any kind are tensors' names here, and lead nowhere.
    for name in ("../../up", "a.*b", 'quo"te', "x" * 300, "schicht_ä"):
        stranger = BitPlan(Layers((Layer(name, "linear", (64, 64)),)), {name: Format.parse("int4-g32")})
        with pytest.raises(InputError, match="another model") as told:
            OnnxRuntimeExport(source=str(small[0]), exported=str(small[1])).write(stranger, tmp_path / "out")
        assert told.value.code == "E302"
    assert not list(tmp_path.iterdir())


def test_the_plan_and_the_tokenizer_go_along(model: Model, write: Callable[..., Path]) -> None:
    plan = planned(model, FORMATS)
    out = write(plan)
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["digest"] == plan.key
