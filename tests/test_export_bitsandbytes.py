"""The bitsandbytes export: one format, and a list by which transformers leaves alone what it should and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from mpsearch.exports.bitsandbytes import BitsAndBytes
from mpsearch.exports.skip_lists import skip_list, skips
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.quantize import fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.reference_libraries import quiet_import


def plan_of(formats: Mapping[str, str], kept: Sequence[Excluded] = ()) -> BitPlan:
    """A plan of linear layers of 64 by 64."""
    layers = Layers(tuple(Layer(name, "linear", (64, 64)) for name in formats), tuple(kept))
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


def settings(plan: BitPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BitsAndBytes().texts(plan)["bitsandbytes.json"])
    return found


class TestBitsAndBytes(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> BitsAndBytes:
        return BitsAndBytes()

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of({"layers.1.fc": "nf4-b64-dq256", "layers.11.fc": "fp32", "fc": "fp32", "head": "nf4-b64-dq256"})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "a": "nf4-b64", "b": "nf4-b64", "blocks": "nf4-b128", "four": "int4-g32", "weights": "int8-channel",
            "float": "fp4-e2m1-g64", "half": "bf16", "eight": "int8-channel@int8-token", "nested": "nf4-b64-dq256",
        }  # fmt: skip
        return plan_of(formats), ["blocks", "four", "weights", "float", "half", "eight", "nested"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "bitsandbytes.json").read_text())["quantization_config"]
        read = BitsAndBytesConfig(**body)
        text = "int8-channel@int8-token"
        if read.load_in_4bit:
            text = f"{read.bnb_4bit_quant_type}-b64{'-dq256' if read.bnb_4bit_use_double_quant else ''}"
        skip = read.llm_int8_skip_modules
        return {x.name: text if should_convert_module(x.name, skip) else "fp32" for x in plan.layers}


def test_settings_are_those_of_the_plan() -> None:
    kept = (Excluded("router.weight", (8, 64), "float32", "router"), Excluded("norm.weight", (64,), "float32", "1-D"))
    found = settings(plan_of({"fc": "nf4-b64", "lm_head": "fp32"}, kept))
    assert found == {
        "quantization_config": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "llm_int8_skip_modules": ["lm_head", "router"],
        },
        "quantised": ["fc"],
    }
    eight = settings(plan_of({"fc": "int8-channel@int8-token"}))["quantization_config"]
    # An empty list stays one: without any the head would be left alone.
    assert eight == {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": []}


def test_a_head_that_shares_the_embedding_is_left_alone_by_its_own_name() -> None:
    embed = Layer("embed", "embedding", (64, 64), shared=("lm_head",))
    layers = Layers((embed, Layer("fc", "linear", (64, 64))))
    plan = BitPlan(layers, {"embed": Format.parse("fp32"), "fc": Format.parse("nf4-b64")})
    assert settings(plan)["quantization_config"]["llm_int8_skip_modules"] == ["embed", "lm_head"]
    quantised = BitPlan(layers, dict.fromkeys(("embed", "fc"), Format.parse("nf4-b64")))
    (line,) = BitsAndBytes().refuses(quantised)
    assert line.startswith("embed: nf4-b64 is not held by bitsandbytes for this embedding layer")


HOSTILE = (
    "fc",
    "a.fc",
    "layers.1",
    "layers.11",
    "layers.1.fc",
    "q.*",
    "qu'o\"te",
    "a(b",
    "层",
    "x" * 300,
    "^fc$",
    "a|fc",
)


@pytest.mark.parametrize("left", [set(HOSTILE[::2]), set(HOSTILE[1::2]), set(HOSTILE), set(), {"fc"}, {"q.*", "a(b"}])
def test_lists_leave_alone_what_they_should_and_nothing_else(left: set[str]) -> None:
    entries = skip_list(left, set(HOSTILE) - left)
    assert {name for name in HOSTILE if not should_convert_module(name, entries)} == left
    assert all(
        skips(name, entry) == (not should_convert_module(name, [entry])) for name in HOSTILE for entry in entries
    )


def test_a_name_that_ends_as_another_is_no_plain_entry() -> None:
    # The plain name would take "a.fc" with it.
    assert not should_convert_module("a.fc", ["fc"])
    assert skip_list(["fc"], ["a.fc"]) == ["^fc$"]
    assert should_convert_module("a.fc", ["^fc$"])


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b64-dq256"])
def test_bitsandbytes_rounds_as_we_do(text: str) -> None:
    functional = quiet_import("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    chosen = settings(plan_of({"fc": text}))["quantization_config"]
    codes, state = functional.quantize_4bit(
        weight, quant_type=chosen["bnb_4bit_quant_type"], blocksize=64,
        compress_statistics=chosen["bnb_4bit_use_double_quant"],
    )  # fmt: skip
    theirs = functional.dequantize_4bit(codes, state)
    ours = fake_quantize(weight, Format.parse(text), 0)
    largest = float((theirs - ours).abs().max())
    assert largest <= (1e-6 if text == "nf4-b64" else 2e-2)
    assert float((theirs - fake_quantize(weight, Format.parse("nf4-b128"), 0)).abs().max()) > 10 * largest


def test_the_script_compiles_and_knows_the_model() -> None:
    text = BitsAndBytes(source='/m/it\'s "ä"').texts(plan_of({"fc": "nf4-b64"}))["run.py"]
    scope: dict[str, Any] = {"__name__": "run", "__file__": "run.py"}
    exec(compile(text, "run.py", "exec"), scope)
    assert scope["SOURCE"] == '/m/it\'s "ä"'
    with pytest.raises(SystemExit, match="usage: python"):
        scope["main"]([])
