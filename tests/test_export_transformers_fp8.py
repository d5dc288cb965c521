"""The FP8 export: settings that transformers reads, blocks that fit, and one way with inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizers_utils import should_convert_module

from mpsearch.exports.transformers_fp8 import TransformersFp8
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.quantize import fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite

BLOCKS = "fp8-e4m3-b128x128"


def plan_of(formats: Mapping[str, str], shape: tuple[int, int] = (128, 256)) -> BitPlan:
    layers = Layers(
        tuple(Layer(name, "linear", shape, dtype="bfloat16") for name in formats),
        (Excluded("mlp.gate.weight", (8, 128), "bfloat16", "router"),),
    )
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


def settings(plan: BitPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TransformersFp8().texts(plan)["transformers-fp8.json"])
    return found


class TestTransformersFp8(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> TransformersFp8:
        return TransformersFp8()

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of({"layers.1.fc": BLOCKS, "layers.11.fc": "bf16", "lm_head": "bf16", "a.*b": BLOCKS})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "a": f"{BLOCKS}@fp8-e4m3-g128", "four": "int4-g32", "small": "fp8-e4m3-b64x64",
            "token": f"{BLOCKS}@int8-token",
            "tensor": "fp8-e4m3", "plain": BLOCKS,
        }  # fmt: skip
        return plan_of(formats), list(formats)[1:]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "transformers-fp8.json").read_text())["quantization_config"]
        read = FineGrainedFP8Config(**body)
        rows, columns = read.weight_block_size
        skip = read.modules_to_not_convert
        text = f"fp8-e4m3-b{rows}x{columns}"
        return {x.name: text if should_convert_module(x.name, skip) else "bf16" for x in plan.layers}


def test_settings_name_what_is_left_alone() -> None:
    found = settings(plan_of({"fc": BLOCKS, "lm_head": "bf16"}))
    assert found["quantised"] == ["fc"]
    assert found["quantization_config"] == {
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        # A router's weight is kept out of plans, and transformers would convert it.
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    }


def test_experts_in_one_tensor_are_left_alone_as_their_module() -> None:
    layers = Layers(
        (Layer("mlp.experts.up", "expert", (4, 128, 128), 1), Layer("fc", "linear", (128, 128), dtype="bfloat16"))
    )
    plan = BitPlan(layers, {"mlp.experts.up": Format.parse("fp32"), "fc": Format.parse(BLOCKS)})
    skip = settings(plan)["quantization_config"]["modules_to_not_convert"]
    assert not should_convert_module("mlp.experts", skip)
    assert should_convert_module("fc", skip)


@pytest.mark.parametrize(("shape", "words"), [((100, 128), "100 output channels"), ((128, 130), "130 weights of")])
def test_blocks_that_do_not_fit_are_refused(shape: tuple[int, int], words: str) -> None:
    (line,) = TransformersFp8().refuses(plan_of({"fc": BLOCKS}, shape))
    assert line.startswith(f"fc: {BLOCKS} is not held by transformers' FP8 here: {words}")


def test_transformers_rounds_as_we_do() -> None:
    torch.manual_seed(0)
    weight = nn.Linear(256, 128, bias=False).weight.detach()

    class Quantizer:
        quantization_config = FineGrainedFP8Config(**settings(plan_of({"fc": BLOCKS}))["quantization_config"])

    made = Fp8Quantize(Quantizer()).convert({"fc.weight": weight})
    scales = made["fc.weight_scale_inv"]
    assert scales.shape == (1, 2)
    theirs = made["fc.weight"].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    ours = fake_quantize(weight, Format.parse(BLOCKS), 0)
    # One code beside a tie, of 3 bits after the point.
    apart = (theirs - ours).abs() / weight.abs().max()
    assert apart.max() <= 2**-4
    assert (apart > 1e-6).float().mean() < 0.01
