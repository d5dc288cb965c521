"""Weights of many experts stacked in one tensor: found, rounded, priced, stored and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.exports.native import Native, payload_bytes
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.apply import applied
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.quantize import dequantize, fake_quantize, quantize
from mpsearch.plan import BitPlan
from tests.tiny_models import EXPERTS, tiny_experts, tokens

BATCHES = [{"input_ids": part} for part in tokens(4, 12)["input_ids"].split(2)]
FORMATS = ["int4-g16", "int3-channel-asym", "int8-tensor", "fp8-e4m3-channel", "mxfp4", "nvfp4", "nf4-b32", "bf16"]


def experts_of(model: Model) -> dict[str, Layer]:
    """Last part of the name -> layer."""
    return {x.name.rpartition(".")[2]: x for x in find_layers(model, BATCHES) if x.kind == "expert"}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_stacked_experts_are_layers(architecture: str) -> None:
    model = tiny_experts(architecture)
    found = experts_of(model)
    transposed = architecture == "GptOss"
    shapes = {"gate_up_proj": (4, 96, 64), "down_proj": (4, 64, 48)}
    assert set(found) == set(shapes)
    for name, (experts, rows, columns) in shapes.items():
        layer = found[name]
        assert layer.shape == ((experts, columns, rows) if transposed else (experts, rows, columns))
        assert layer.row_axes == ((0, 2) if transposed else (0, 1))
        assert (layer.rows, layer.columns) == (experts * rows, columns)
        assert layer.tensor == layer.name == f"model.layers.0.mlp.experts.{name}"
        # Each token goes to 2 of the 4 experts.
        assert layer.macs == 2 * rows * columns
    assert not any("experts" in x.name for x in find_layers(model, BATCHES).excluded if "bias" not in x.name)


def test_experts_count_as_routed_without_a_batch_too() -> None:
    assert [x.macs for x in find_layers(tiny_experts("Mixtral")) if x.kind == "expert"] == [2 * 96 * 64, 2 * 64 * 48]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("out_axis", [1, 2])
def test_every_expert_is_rounded_as_it_would_be_alone(text: str, out_axis: int) -> None:
    fmt = Format.parse(text)
    weight = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 8.0, 0.25]).view(
        3, 1, 1
    )
    layer = Layer("x", "expert", tuple(weight.shape), out_axis)
    whole = fake_quantize(weight, fmt, layer.row_axes)
    assert torch.equal(dequantize(quantize(weight, fmt, layer.row_axes)), whole)
    if text in ("int8-tensor", "nvfp4"):
        # One number for all experts together.
        stacked = weight.transpose(1, 2) if out_axis == 2 else weight
        alone = fake_quantize(stacked.reshape(96, 32), fmt).reshape(3, 32, 32)
        assert torch.equal(whole, alone.transpose(1, 2) if out_axis == 2 else alone)
        return
    for expert in range(3):
        assert torch.equal(whole[expert], fake_quantize(weight[expert], fmt, out_axis - 1))


@torch.no_grad()
@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_model_runs_with_rounded_experts_and_gets_its_own_back(architecture: str) -> None:
    model, by_hand = tiny_experts(architecture), tiny_experts(architecture)
    before = model.logits(BATCHES[0])
    formats = {layer: Format.parse("int4-g16") for layer in experts_of(model).values()}
    for layer in formats:
        weight = by_hand.weight(layer.name)
        for expert in range(4):
            weight[expert] = fake_quantize(weight[expert], Format.parse("int4-g16"), layer.out_axis - 1)
    with applied(model, formats):
        found = model.logits(BATCHES[0])
    assert torch.equal(found, by_hand.logits(BATCHES[0]))
    assert not torch.equal(found, before)
    assert torch.equal(model.logits(BATCHES[0]), before)


@pytest.mark.parametrize("architecture", ["Mixtral", "GptOss"])
def test_the_bytes_of_a_plan_are_those_of_the_file(architecture: str, tmp_path: Path) -> None:
    model = tiny_experts(architecture)
    layers = find_layers(model, BATCHES)
    texts = {"expert": "int3-g16-asym", "linear": "int5-channel", "embedding": "bf16"}
    plan = BitPlan(layers, {x.name: Format.parse(texts[x.kind]) for x in layers}, {"name": "tiny", "digest": "0"})
    Native().write(plan, tmp_path / "out", model)
    assert payload_bytes(tmp_path / "out" / "weights.safetensors") == plan.bytes
    again, tensors = Native().read(tmp_path / "out")
    assert again == plan
    for layer in layers:
        rounded = fake_quantize(model.weight(layer.name).detach(), plan.formats[layer.name], layer.row_axes)
        assert torch.equal(tensors[layer.tensor], rounded)


@pytest.mark.parametrize("architecture", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("estimator", ["fisher", "hessian_trace", "weight_mse", "divergence"])
def test_estimators_score_experts(architecture: str, estimator: str) -> None:
    model = tiny_experts(architecture)
    settings: dict[str, Any] = {}
    if estimator == "hessian_trace":
        # Finite differences step over the choice of experts, which has no slope.
        settings = {"product": "double_backward", "probes": 8}
        model.module.config._experts_implementation = "eager"
    table = mp.score(model, BATCHES, ["int2-g16", "int8-g16"], estimator, **settings)
    rows = [i for i, name in enumerate(table.layers) if "experts" in name]
    assert len(rows) == 2
    for i in rows:
        assert table.status[i] == ("ok", "ok")
        assert abs(table.value[i, 0]) > abs(table.value[i, 1]) > 0


def test_output_mse_does_not_see_experts_and_says_so() -> None:
    table = mp.score(tiny_experts("Mixtral"), BATCHES, ["int4-g16"], "output_mse")
    status = {name: row[0] for name, row in zip(table.layers, table.status, strict=True)}
    assert {name.rpartition(".")[2] for name, how in status.items() if how == "not_observed"} == {
        "gate_up_proj",
        "down_proj",
    }
    assert {how for name, how in status.items() if "experts" not in name} == {"ok"}


def test_a_search_decides_experts() -> None:
    found = mp.search(
        tiny_experts("Mixtral").module, BATCHES * 2, "weights <= 6 bits", formats=["int2-g16", "int4-g16", "int8-g16"],
        estimator="weight_mse", points=0,
    )  # fmt: skip
    experts = {name: str(fmt) for name, fmt in found.plan.formats.items() if "experts" in name}
    assert len(experts) == 2
    assert found.plan.bytes <= 6 * found.plan.layers.weights // 8
    assert found.study.measurements[0].loss > 0


class Vision(nn.Module):
    """What a vision transformer learns beside its layers: a token and positions, with a first axis of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([self.token.expand(len(x), 1, 8), x], 1) + self.positions)[:, 0]
        return found


class Patches(nn.Module):
    """The same in a module of its own, with no parts."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x + self.vision.positions)[:, 0]
        return found


@pytest.mark.parametrize(("module", "count", "length"), [(Vision, 2, 4), (Patches, 1, 5)])
def test_what_vision_models_learn_beside_layers_is_no_expert(module: Any, count: int, length: int) -> None:
    model = Model(module(), logits=lambda m, x: m(x))
    found = find_layers(model, [torch.zeros(2, length, 8)])
    assert [layer.name for layer in found] == ["head"]
    kept = [x for x in found.excluded if x.shape[0] == 1]
    assert len(kept) == count
    assert all(x.reason.startswith("no quantiser for") for x in kept)


def test_experts_of_a_module_of_our_own() -> None:
    class Experts(nn.Module):
        pass

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Experts()
            self.inner.weights = nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nc,erc->ner", x, self.inner.weights).flatten(1)

    # Its module is never called, so nothing is known of its multiply-adds; without data it counts all the same.
    found = mp.layers(Stack())
    assert [(x.name, x.kind, x.row_axes, x.macs) for x in found] == [("inner.weights", "expert", (0, 1), 0)]


def test_other_weights_of_three_axes_are_no_experts() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 8, 3)
            self.pair = nn.Bilinear(8, 8, 5)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
            self.bank = nn.Parameter(torch.randn(2, 4, 8))
            self.head = nn.Linear(8, 2)

    assert [layer.name for layer in mp.layers(Mixed())] == ["head"]


class Listed(nn.Module):
    """Linears as a list of experts: each batch is sent to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        shared = x + 0
        both = self.first(shared) + self.second(shared)
        output: Tensor = self.experts[int(x[0, 0])](both * 1)
        return output


@pytest.mark.parametrize("repetition", range(40))
def test_experts_that_are_first_called_by_different_batches_read_no_common_tensor(repetition: int) -> None:
    model = Model(Listed(), logits=lambda m, x: m(x))
    batches = [torch.full((2, 8), float(i)) for i in range(6)]
    found = find_layers(model, batches)
    assert [x.name for x in found if x.tie] == ["first", "second"]
