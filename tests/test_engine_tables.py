"""Tables of engines that read compressed-tensors: what each loads, as its source or a run of it says."""

from __future__ import annotations

import pytest

from mpsearch.capabilities import capabilities
from mpsearch.exports.ct_config import notes
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan

LINEAR = Layer("l", "linear", (256, 256), dtype="bfloat16")
EMBEDDING = Layer("e", "embedding", (256, 256), dtype="bfloat16")
GRAINS = ("tensor", "channel", "g32", "g64", "g128")
INTEGERS = [f"int{b}-{g}{m}" for b in (2, 3, 4, 8) for g in GRAINS for m in ("", "-asym", "-full")]
FLOATS = ["fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-b128x128", "fp8-e4m3-g32", "mxfp4", "mxfp8-e4m3", "nvfp4"]


def held(engine: str, text: str, layer: Layer = LINEAR) -> bool:
    return not capabilities(engine).refuses(layer, Format.parse(text))


@pytest.mark.parametrize("layer", [LINEAR, EMBEDDING])
def test_transformers_holds_what_it_loads_by_default(layer: Layer) -> None:
    seen = set()
    for text in [*INTEGERS, *FLOATS, "mxfp6-e2m3"]:
        plan = BitPlan(Layers((layer,)), {layer.name: Format.parse(text)})
        loads = not any("does not load by default" in note for note in notes(plan))
        seen.add(loads)
        assert held("transformers", text, layer) == loads, text
    assert seen == ({True, False} if layer is LINEAR else {False})


@pytest.mark.parametrize(
    ("engine", "yes", "no"),
    [
        (
            "vllm",
            ["int3-g64", "int4-g128-asym", "int8-channel@int8-token-asym", "int4-g32@int8-token", "fp8-e4m3-channel",
             "fp8-e4m3-b128x128@fp8-e4m3-token", "mxfp4@mxfp4", "nvfp4"],
            ["int8-tensor-asym", "int8-g64@int8-token", "int8-channel-asym@int8-token", "fp8-e4m3-g32", "mxfp6-e2m3",
             "nf4-b64"],
        ),
        (
            "sglang",
            ["int4-g128", "int8-channel", "int4-g64-asym", "int8-tensor@int8-tensor-asym-static", "fp8-e4m3", "nvfp4"],
            ["int3-g64", "int5-channel", "mxfp4", "mxfp8-e4m3", "int8-g64@int8-token"],
        ),
        (
            "tensorrt-llm",
            ["fp8-e4m3-channel@fp8-e4m3-token", "nvfp4", "mxfp4"],
            ["int4-g128", "int8-channel@int8-token", "fp8-e4m3@fp8-e4m3-tensor", "mxfp8-e4m3", "mxfp4@mxfp4"],
        ),
    ],
)  # fmt: skip
def test_engines(engine: str, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not held(engine, text)] == []
    assert [text for text in no if held(engine, text)] == []


def test_embeddings_are_held_where_engines_read_them() -> None:
    assert held("vllm", "int8-channel", EMBEDDING)
    assert not held("vllm", "int3-channel", EMBEDDING)
    assert not held("vllm", "int4-channel-asym", EMBEDDING)
    assert not any(held(engine, "int8-channel", EMBEDDING) for engine in ("sglang", "tensorrt-llm", "transformers"))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm"])
def test_layers_that_engines_fuse_have_one_format(engine: str) -> None:
    layers = Layers(tuple(Layer(f"a.{x}_proj", "linear", (256, 256)) for x in ("gate", "up")))
    texts = {"a.gate_proj": "nvfp4", "a.up_proj": "fp8-e4m3-channel@fp8-e4m3-token"}
    (line,) = capabilities(engine).violations(BitPlan(layers, {n: Format.parse(t) for n, t in texts.items()}))
    assert "loads these as one" in line
