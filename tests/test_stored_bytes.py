"""Predicted bytes are the bytes of the written file, for odd models in every format; what is written reads back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.exports.native import WEIGHTS, Native, payload_bytes
from mpsearch.format import Format, all_formats
from mpsearch.hardware.bytes import Bytes
from mpsearch.layer import Layer, Layers
from mpsearch.model.evidence import Calibration
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.quantize import TORCH_DTYPES, fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.format_cases import same_bits

torch.set_num_threads(1)
MODELS = 48
WIDTHS = (1, 3, 7, 20, 32, 33, 64, 96, 128, 256, 512)
JOINED = ("int4-channel@int8-token", "int3-channel@int8-tensor-static", "bf16@int8-tensor-asym-static", "fp32@nvfp4")
FALLBACK = ("int8-channel", "bf16")


class Noise(nn.Module):
    """Runs a part on numbers of its own, so that any two parts fit into one model."""

    def __init__(self, part: nn.Module, *shape: int) -> None:
        super().__init__()
        self.part = part
        words = isinstance(part, nn.Embedding)
        noise = torch.randint(0, part.num_embeddings, shape) if words else torch.randn(shape)  # type: ignore[arg-type]
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        noise = self.get_buffer("noise")
        found: Tensor = self.part(noise if not noise.is_floating_point() else noise.to(x.dtype) * (1 + x.mean()))
        return found.square().mean()


class Experts(nn.Module):
    """Weights of many experts in two tensors, and one vector for each."""

    def __init__(self, experts: int, width: int, inner: int, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        self.gate_up = nn.Parameter(torch.randn((experts, width, inner) if turned else (experts, inner, width)))
        self.scale = nn.Parameter(torch.ones(experts, inner))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate_up if self.is_transposed else self.gate_up.mT
        return (x @ weight) * self.scale[:, None]


class Tied(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.num_embeddings = words

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(x.long().abs() % self.num_embeddings))
        return found


class Odd(nn.Module):
    """Tensors that are no layer's weight: vectors, buffers of three types, one of them infinite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.randn(width))
        self.register_buffer("mask", torch.arange(width) % 2 == 0)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("limits", torch.tensor([float("-inf"), float("nan"), 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x) * self.gain * self.get_buffer("mask")
        return found


class Parts(nn.Module):
    """Runs parts side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts])


def zoo(seed: int) -> Parts:
    """A few parts of every kind, of odd shapes, scales and number types."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    makers = [linear, one_row, turned, conv1d, conv2d, grouped, depthwise, conv3d, embedding, tied, experts, shared]
    parts = [maker(draw) for maker in draw.sample(makers, 6)]
    width = draw.choice(WIDTHS)
    module = Parts(*parts, Noise(Odd(width), 4, width))
    for parameter in module.parameters():
        parameter.data *= draw.choice([0.02, 1.0, 30.0])
    for part in module.parts:
        part.to(TORCH_DTYPES[draw.choice(["float32", "float16", "bfloat16"])])
    return module


def calibrated(module: Parts, name: str) -> Model:
    model = mp.wrap(module, loss=lambda m, b: m(b[0]).sum(), logits=lambda m, b: m(b[0])[None], name=name)
    model.calibrate([(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))])
    return model


def linear(draw: random.Random) -> nn.Module:
    width = draw.choice(WIDTHS)
    return Noise(nn.Linear(width, draw.choice([2, 5, 9, 32]), bias=draw.random() < 0.5), 6, width)


def one_row(draw: random.Random) -> nn.Module:
    width = draw.choice(WIDTHS)
    return Noise(nn.Linear(width, 1, bias=False), 6, width)


def turned(draw: random.Random) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    width = draw.choice(WIDTHS)
    return Noise(Conv1D(draw.choice([1, 4, 11]), width), 3, width)


def conv1d(draw: random.Random) -> nn.Module:
    return Noise(nn.Conv1d(width := draw.choice([1, 5, 32]), 4, 3), 2, width, 8)


def conv2d(draw: random.Random) -> nn.Module:
    return Noise(nn.Conv2d(width := draw.choice([1, 5, 32, 64]), 3, draw.choice([1, 2, 3])), 2, width, 5, 5)


def grouped(draw: random.Random) -> nn.Module:
    return Noise(nn.Conv2d(width := 2 * draw.choice([1, 3, 32]), 4, 3, groups=2, bias=False), 2, width, 4, 4)


def depthwise(draw: random.Random) -> nn.Module:
    return Noise(nn.Conv2d(width := draw.choice([1, 6]), width, 3, groups=width), 2, width, 4, 4)


def conv3d(draw: random.Random) -> nn.Module:
    return Noise(nn.Conv3d(width := draw.choice([1, 4]), 3, (1, 2, 3)), 1, width, 3, 3, 3)


def embedding(draw: random.Random) -> nn.Module:
    return Noise(nn.Embedding(draw.choice([1, 13]), draw.choice(WIDTHS)), 2, 6)


def tied(draw: random.Random) -> nn.Module:
    return Noise(Tied(draw.choice([2, 17]), draw.choice(WIDTHS)), 2, 6)


def experts(draw: random.Random) -> nn.Module:
    width = draw.choice(WIDTHS)
    return Noise(Experts(3, width, draw.choice([2, 5, 32]), draw.random() < 0.5), 3, 2, width)


def shared(draw: random.Random) -> nn.Module:
    """One module in two places."""
    one = nn.Linear(width := draw.choice(WIDTHS), width)
    return Noise(nn.Sequential(one, nn.Tanh(), one), 4, width)


@lru_cache(maxsize=1)
def formats() -> tuple[Format, ...]:
    """All formats of weights that something can be rounded to, and some that round inputs as well."""
    found = [fmt for formats in all_formats().values() for fmt in formats]
    taken = [fmt for fmt in found if not fmt.refuses(Layer("fc", "linear", (4, 3840)))]
    return (*taken, *(Format.parse(text) for text in JOINED))


def fits(fmt: Format, layer: Layer) -> bool:
    # One Hessian for all rows is more than a layer's kind can promise; a convolution's is told from its module.
    return not fmt.refuses(layer) and not (fmt.needs and layer.kind != "linear")


@lru_cache(maxsize=1)
def assignments() -> tuple[tuple[Layers, dict[str, Format]], ...]:
    """For each zoo its layers, and for each layer the format, of those that fit, that was used least so far."""
    used: Counter[Format] = Counter()
    found = []
    for seed in range(MODELS):
        layers, taken = find_layers(calibrated(zoo(seed), "zoo")), {}
        for layer in layers:
            taken[layer.name] = min((fmt for fmt in formats() if fits(fmt, layer)), key=lambda fmt: used[fmt])
            used[taken[layer.name]] += 1
        found.append((layers, taken))
    return tuple(found)


def expected(model: Model, layer: Layer, fmt: Format) -> Tensor:
    evidence = Calibration.of(model).evidence(layer, fmt.weight)
    return fake_quantize(model.weight(layer.name), fmt, layer.row_axes, evidence=evidence)


def check(model: Model, plan: BitPlan, folder: Path) -> None:
    Native().write(plan, folder, model)
    assert payload_bytes(folder / WEIGHTS) == plan.bytes
    stored = load_file(folder / WEIGHTS)
    assert sum(tensor.nbytes for tensor in stored.values()) == plan.bytes
    assert plan.bytes == sum(kept.stored_bytes for kept in plan.layers.excluded) + sum(
        sum(plan.formats[layer.name].itemised_bytes(layer).values()) for layer in plan.layers
    )
    back, weights = Native().read(folder)
    assert back == plan
    for layer in plan.layers:
        rounded = expected(model, layer, plan.formats[layer.name])
        assert same_bits(weights[layer.tensor], rounded), f"{layer.name} {plan.formats[layer.name]}"
        for other in layer.shared:
            assert weights[f"{other}.weight"] is weights[layer.tensor]


@pytest.mark.parametrize("seed", range(MODELS))
def test_predicted_bytes_are_the_file_and_read_back(seed: int, tmp_path: Path) -> None:
    model = calibrated(zoo(seed), f"zoo {seed}")
    layers, taken = assignments()[seed]
    assert find_layers(model) == layers
    plan = BitPlan(layers, taken, {"name": model.name, "digest": model.digest})
    check(model, plan, tmp_path)
    # The price of the model as it is stored is what it takes now.
    assert sum(layer.stored_bytes for layer in layers) + layers.excluded_bytes == stored_bytes(zoo(seed))


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a checkpoint: each tensor once."""
    state = {value.data_ptr() if value.numel() else name: value for name, value in module.state_dict().items()}
    return sum(value.nbytes for value in state.values())


def test_the_models_use_every_format_and_every_kind_of_layer() -> None:
    used: Counter[str] = Counter()
    kinds: Counter[Any] = Counter()
    for layers, taken in assignments():
        used.update(str(fmt) for fmt in taken.values())
        kinds.update(layer.kind for layer in layers)
        kinds.update("shared" for layer in layers if layer.shared)
        kinds.update(f"axis {layer.row_axes}" for layer in layers)
        kinds.update(layer.dtype for layer in layers)
        kinds.update(f"kept {kept.dtype}" for kept in layers.excluded)
        kinds.update(f"{len(layer.shape)} axes" for layer in layers)
        kinds.update("one row" for layer in layers if layer.rows == 1)
        kinds.update("one column" for layer in layers if layer.columns == 1)
    assert set(used) == {str(fmt) for fmt in formats()}
    assert set(kinds) == {
        *("linear", "conv", "embedding", "expert", "shared", "one row", "one column"),
        *("2 axes", "3 axes", "4 axes", "5 axes", "axis (0,)", "axis (1,)", "axis (0, 1)", "axis (0, 2)"),
        *("float32", "float16", "bfloat16", "kept float32", "kept float16", "kept bfloat16", "kept int64", "kept bool"),
    }


@pytest.mark.parametrize("fmt", formats(), ids=str)
def test_uniform_plans_fall_back_where_a_layer_refuses(fmt: Format, tmp_path: Path) -> None:
    model = everything()
    fallback = [Format.parse(text) for text in FALLBACK]
    layers = find_layers(model)
    if fmt.needs:
        layers = Layers(tuple(x for x in layers if x.kind == "linear"), layers.excluded, layers.unit)
    plan = BitPlan.uniform(layers, fmt, fallback, {"name": model.name, "digest": model.digest})
    took = [layer for layer in layers if plan.formats[layer.name] == fmt]
    assert took
    assert all(fmt.refuses(layer) for layer in layers if layer not in took)
    check(model, plan, tmp_path)
    # The cost table of the search says the same.
    table = Bytes().cost(layers, [fmt, *fallback])
    cells: Mapping[Format, int] = {one: place for place, one in enumerate([fmt, *fallback])}
    row = {decision.name: i for i, decision in enumerate(layers.decisions)}
    total = sum(table.value[row[layer.tie or layer.name], cells[plan.formats[layer.name]]] for layer in layers)
    assert total + table.fixed == plan.bytes


@lru_cache(maxsize=1)
def everything() -> Model:
    """One model with parts that wide formats take, and one that few take."""
    torch.manual_seed(0)
    module = Parts(
        Noise(nn.Linear(256, 5), 4, 256),
        Noise(nn.Linear(33, 4, bias=False), 4, 33),
        Noise(nn.Conv2d(32, 3, 3), 1, 32, 4, 4),
        Noise(nn.Embedding(5, 128), 2, 3),
        Noise(Experts(2, 256, 3, False), 2, 2, 256),
        Noise(Odd(5), 2, 5),
    )
    return calibrated(module, "everything")
