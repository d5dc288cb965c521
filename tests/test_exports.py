"""The native export: written to the byte, read back as planned, refused by name, never outside its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpsearch.errors import InputError, UnsafeError
from mpsearch.exports.folder import MANIFEST, VERIFIED, write_folder
from mpsearch.exports.native import PLAN, WEIGHTS, Native, payload_bytes
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.quantize import TORCH_DTYPES, fake_quantize
from mpsearch.plan import BitPlan, Predicted
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite

torch.set_num_threads(1)


class Net(nn.Module):
    """A layer of each kind, a weight that two modules share, and tensors that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 20)
        self.conv = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.odd = nn.Linear(7, 5)
        self.wide = nn.Linear(20, 9, bias=False)
        self.turned = nn.Linear(12, 20, bias=False)
        self.head = nn.Linear(20, 11, bias=False)
        self.norm = nn.LayerNorm(20)
        self.head.weight = self.embed.weight
        self.register_buffer("limits", torch.tensor([float("-inf"), float("nan")]))


FORMATS = {
    "embed": "int3-g5-asym",
    "conv": "int5-g9",
    "odd": "int3-channel",
    "wide": "int8-tensor-asym",
    "turned": "int2-g4",
}
KINDS = {"embed": "embedding", "conv": "conv"}


def net_and_plan(formats: Mapping[str, str] = FORMATS) -> tuple[SimpleNamespace, BitPlan]:
    """A model whose memory is float32 and whose checkpoint is of four number types, and a plan for it."""
    torch.manual_seed(0)
    net = Net()
    dtypes = {"norm.weight": "bfloat16", "norm.bias": "float16", "odd.bias": "float64", "limits": "float32"}
    stored = {**dtypes, **{f"{name}.weight": "bfloat16" for name in formats}}
    with torch.no_grad():
        for name, dtype in stored.items():
            if name != "limits":
                net.get_parameter(name).copy_(torch.randn(net.get_parameter(name).shape).to(TORCH_DTYPES[dtype]))
    layers = tuple(
        Layer(
            name,
            KINDS.get(name, "linear"),
            tuple(net.get_submodule(name).weight.shape),  # type: ignore[union-attr, arg-type]
            1 if name == "turned" else 0,
            "bfloat16",
            shared=("head",) if name == "embed" else (),
        )
        for name in formats
    )
    shapes = {**dict(net.named_parameters()), "limits": net.get_buffer("limits")}
    kept = tuple(Excluded(name, tuple(shapes[name].shape), dtype, "1-D") for name, dtype in dtypes.items())
    plan = BitPlan(
        Layers(layers, kept),
        {name: Format.parse(text) for name, text in formats.items()},
        {"name": "net", "digest": "d"},
        Predicted(0.25, 0.01, "nats/token", 0.24, 0.04, {"weights": 1000.0, "bops": 1.5}),
        {"study": "s", "budgets": ["weights <= 4 bits"]},
    )
    return SimpleNamespace(module=net), plan


class TestNative(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Native:
        return make("exporters", "native")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return net_and_plan()[1]

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        layers = Layers(
            (Layer("a", "linear", (2, 10)), Layer("b", "linear", (2, 8))),
            (Excluded("b.weight.payload", (3,), "float32", "1-D"), Excluded("__metadata__", (1,), "float32", "1-D")),
        )
        plan = BitPlan(layers, dict.fromkeys("ab", Format.parse("int4-g8")))
        return plan, ["a", "b.weight.payload", "__metadata__"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        back, weights = Native().read(folder)
        assert (back, weights) == (plan, {})
        return {name: str(fmt) for name, fmt in back.formats.items()}


UNIFORM = [
    *(
        f"int{bits}-{grain}{asym}"
        for bits in (2, 3, 5, 8)
        for grain in ("tensor", "channel", "g1")
        for asym in ("", "-asym")
    ),
    "bf16",
    "fp16",
    "fp32",
]


@pytest.mark.parametrize("formats", [FORMATS, *(dict.fromkeys(FORMATS, text) for text in UNIFORM)])
def test_native_weights_have_the_bytes_of_the_plan_and_read_back(formats: dict[str, str], tmp_path: Path) -> None:
    model, plan = net_and_plan(formats)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    Native().write(plan, tmp_path, model)
    assert payload_bytes(tmp_path / WEIGHTS) == plan.bytes
    back, weights = Native().read(tmp_path)
    assert back == plan
    for layer in plan.layers:
        weight = model.module.get_parameter(layer.tensor)
        expected = fake_quantize(weight, plan.formats[layer.name], layer.out_axis)
        assert torch.equal(weights[layer.tensor].view(torch.int32), expected.view(torch.int32))
    assert weights["head.weight"] is weights["embed.weight"]
    for kept in plan.layers.excluded:
        assert weights[kept.name].dtype == TORCH_DTYPES[kept.dtype]
        expected = before[kept.name].to(weights[kept.name].dtype)
        assert torch.equal(weights[kept.name].isnan(), expected.isnan())
        assert torch.equal(weights[kept.name].nan_to_num(), expected.nan_to_num())
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_native_floats_are_plain_tensors(tmp_path: Path) -> None:
    model, plan = net_and_plan(dict.fromkeys(FORMATS, "bf16"))
    Native().write(plan, tmp_path, model)
    stored = load_file(tmp_path / WEIGHTS)
    assert set(stored) == {layer.tensor for layer in plan.layers} | {kept.name for kept in plan.layers.excluded}
    assert torch.equal(stored["turned.weight"], model.module.turned.weight.detach().bfloat16())


def test_native_stores_kept_tensors_that_are_views_of_one(tmp_path: Path) -> None:
    model, plan = net_and_plan()
    whole = torch.arange(12.0).reshape(3, 4)
    model.module.register_buffer("left", whole[:, :2])
    model.module.register_buffer("right", whole[:, 1:3])
    kept = tuple(Excluded(name, (3, 2), "float32", "a table") for name in ("left", "right"))
    plan = BitPlan(Layers(plan.layers.items, kept), plan.formats)
    Native().write(plan, tmp_path, model)
    _, weights = Native().read(tmp_path)
    assert torch.equal(weights["left"], whole[:, :2])
    assert torch.equal(weights["right"], whole[:, 1:3])


def test_native_stores_the_numbers_of_a_plain_float_format_from_any_memory(tmp_path: Path) -> None:
    # Through the model's own bfloat16 the float16 numbers would be rounded twice.
    net = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    plan = BitPlan(Layers((Layer("", "linear", (4, 4)),)), {"": Format.parse("fp16")})
    Native().write(plan, tmp_path, SimpleNamespace(module=net))
    assert torch.equal(load_file(tmp_path / WEIGHTS)["weight"], net.weight.detach().half())


@pytest.mark.parametrize(
    ("layers", "kept", "text"),
    [
        ([("other", (5, 7))], [], "the plan has a tensor 'other.weight', the model has none"),
        ([("odd", (7, 5))], [], r"'odd.weight' has shape \(5, 7\), in the plan \(7, 5\)"),
        ([("odd", (5, 7))], [("norm.weight", (3,), "float32")], r"'norm.weight' has shape \(20,\)"),
        ([("odd", (5, 7))], [("odd.bias", (5,), "bfloat16")], "'odd.bias' holds numbers that bfloat16 cannot"),
    ],
)
def test_native_refuses_another_model(
    layers: list[tuple[str, tuple[int, ...]]], kept: list[tuple[str, tuple[int, ...], str]], text: str, tmp_path: Path
) -> None:
    model, _ = net_and_plan()
    with torch.no_grad():
        model.module.odd.bias.fill_(1 / 3)
    found = Layers(
        tuple(Layer(name, "linear", shape) for name, shape in layers),
        tuple(Excluded(name, shape, dtype, "1-D") for name, shape, dtype in kept),
    )
    plan = BitPlan(found, {name: Format.parse("int4-channel") for name, _ in layers})
    with pytest.raises(InputError, match=text) as caught:
        Native().write(plan, tmp_path / "out", model)
    assert caught.value.code == "E302"
    assert list(tmp_path.iterdir()) == []


def test_native_names_the_layer_whose_weights_are_not_finite(tmp_path: Path) -> None:
    model, plan = net_and_plan()
    with torch.no_grad():
        model.module.wide.weight[2, 3] = float("inf")
    with pytest.raises(InputError, match=r"layer 'wide': 1 of 180 weights is not finite \(first \[2, 3\] = inf\)"):
        Native().write(plan, tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data[:-1], "E404"),
        (lambda data: data[:5], "E404"),
        (lambda data: b"", "E404"),
        (lambda data: b"\xff" * 7 + b"\x7f" + data[8:], "E404"),
        (lambda data: data[:8] + b"[" + data[9:], "E404"),
        (lambda data: data.replace(b'"wide.weight.scales"', b'"wide.weight.scalez"'), "E304"),
        (lambda data: re.sub(rb'"plan":"\w{4}', b'"plan":"zzzz', data), "E302"),
    ],
)
def test_native_refuses_broken_weights(change: Any, code: str, tmp_path: Path) -> None:
    model, plan = net_and_plan()
    Native().write(plan, tmp_path, model)
    damage(tmp_path, WEIGHTS, change)
    with pytest.raises(InputError) as caught:
        Native().read(tmp_path)
    assert caught.value.code == "E304"
    # Files that were copied out of their export have no manifest beside them, and are read with care as well.
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(InputError) as caught:
        Native().read(tmp_path)
    assert caught.value.code == code
    if code == "E404":
        with pytest.raises(InputError, match=r"is cut|is not one of safetensors"):
            payload_bytes(tmp_path / WEIGHTS)


def test_native_refuses_a_broken_plan(tmp_path: Path) -> None:
    model, plan = net_and_plan()
    Native().write(plan, tmp_path, model)
    (tmp_path / MANIFEST).unlink()
    damage(tmp_path, PLAN, lambda data: data.replace(b"int2-g4", b"int3-g4"))
    with pytest.raises(InputError, match="the digest does not match"):
        Native().read(tmp_path)
    (tmp_path / PLAN).unlink()
    with pytest.raises(InputError, match="cannot be read") as caught:
        Native().read(tmp_path)
    assert caught.value.code == "E101"


def test_an_export_that_was_cut_short_is_told_and_can_be_replaced(tmp_path: Path) -> None:
    def crash(path: Path) -> None:
        raise OSError("power")

    with pytest.raises(OSError, match="power"):
        write_folder(tmp_path, "native", {PLAN: lambda path: write_file(path, "{}"), WEIGHTS: crash}, False)
    assert json.loads((tmp_path / MANIFEST).read_text())["files"] == {PLAN: None, WEIGHTS: None}
    with pytest.raises(InputError, match="not the file that was exported"):
        Native().read(tmp_path)
    model, plan = net_and_plan()
    Native(force=True).write(plan, tmp_path, model)
    assert Native().read(tmp_path)[0] == plan


def test_a_replacement_that_was_cut_short_keeps_count_of_the_earlier_files(tmp_path: Path) -> None:
    def crash(path: Path) -> None:
        raise OSError("power")

    model, plan = net_and_plan()
    Native().write(plan, tmp_path, model)
    with pytest.raises(OSError, match="power"):
        write_folder(tmp_path, "native", {PLAN: crash}, True)
    assert set(json.loads((tmp_path / MANIFEST).read_text())["files"]) == {PLAN, WEIGHTS}
    Native(force=True).write(plan, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {PLAN, MANIFEST}


def test_force_removes_what_it_no_longer_writes_unless_it_was_edited(tmp_path: Path) -> None:
    model, plan = net_and_plan()
    Native().write(plan, tmp_path, model)
    Native(force=True).write(plan, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    Native(force=True).write(plan, tmp_path, model)
    (tmp_path / WEIGHTS).write_text("mine")
    Native(force=True).write(plan, tmp_path)
    assert (tmp_path / WEIGHTS).read_text() == "mine"


def test_a_users_file_that_is_called_like_a_proof_stays(tmp_path: Path) -> None:
    _, plan = net_and_plan()
    (tmp_path / VERIFIED).write_text("mine")
    with pytest.raises(InputError, match="holds 1 file"):
        Native().write(plan, tmp_path)
    Native(force=True).write(plan, tmp_path)
    assert (tmp_path / VERIFIED).read_text() == "mine"


@pytest.mark.parametrize("name", ["../victim", "/tmp/mpsearch-victim", "a/../../victim", "x\0y"])
def test_a_manifest_cannot_reach_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"files": {name: None}}))
    with pytest.raises(UnsafeError) as caught:
        Native(force=True).write(net_and_plan()[1], folder)
    assert caught.value.code == "E803"
    assert (tmp_path / "victim").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000])
def test_a_broken_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError) as caught:
        Native(force=True).write(net_and_plan()[1], tmp_path)
    assert caught.value.code == "E304"


def test_links_do_not_lead_out_and_a_file_is_no_folder(tmp_path: Path) -> None:
    plan = net_and_plan()[1]
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PLAN).symlink_to(tmp_path / "victim")
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"files": {PLAN: None}}))
    with pytest.raises(UnsafeError):
        Native(force=True).write(plan, tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine"
    with pytest.raises(InputError, match="is a file, not a folder"):
        Native().write(plan, tmp_path / "victim")
