"""Every exporter and every feature of a plan: written, or refused with the name of the layer. No cell crashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpsearch import registry
from mpsearch.capabilities import capabilities, targets
from mpsearch.errors import InputError
from mpsearch.exports.proof_run import proofs
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan

EXPORTERS = registry.names("exporters")
#: These quantise every linear layer, so that one that is left alone is what they refuse.
WHOLE = ("mct", "mixllm")
#: What runs on a GPU alone: written from its source, with stand-ins in its tests.
NOT_RUN = ("mixllm",)
#: These write tensors, and so need the model.
WRITERS = ("compressed-tensors", "gguf", "onnxruntime")
MODEL = {"name": "small", "digest": "0" * 64, "architecture": "LlamaForCausalLM"}
Q, K, V, GATE, UP, DOWN, OUT = (
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj",
                 "mlp.down_proj", "self_attn.o_proj")
)  # fmt: skip
EMBED, HEAD = "model.embed_tokens", "lm_head"
FEATURES: dict[str, dict[str, str]] = {
    **{text: {DOWN: text} for text in (
        "int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int7-g64", "int8-g64", "int4-g32", "int4-g128",
        "int4-g256", "int4-g16", "int4-channel", "int8-channel", "int8-tensor", "int4-g64-asym", "int8-channel-asym",
        "int4-g64-full", "int4-g64-mse", "int4-g64-gptq", "nf4-b64", "nf4-b64-dq256", "fp8-e4m3", "fp8-e4m3-channel",
        "fp8-e4m3-b128x128", "fp8-e5m2", "fp6-e3m2", "mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "mxint8", "nvfp4",
        "ternary-channel", "codebook4-channel", "q4_K", "q6_K", "q8_0", "q4_0", "iq4_xs", "iq2_xxs", "fp16", "fp32",
        "int8-channel@int8-token", "int8-channel@int8-tensor-static", "int4-g64@int8-token", "fp8-e4m3@fp8-e4m3-token",
        "mxfp8-e4m3@mxfp8-e4m3", "nvfp4@nvfp4",
    )},
    "embedding int8": {EMBED: "int8-channel"},
    "embedding int4 group": {EMBED: "int4-g64"},
    "embedding q8_0": {EMBED: "q8_0"},
    "head int8": {HEAD: "int8-channel"},
    "head int4 group": {HEAD: "int4-g64"},
    "q, k and v apart": {Q: "int4-g64", K: "int8-g64", V: "int8-g64"},
    "gate and up apart": {GATE: "int4-g64", UP: "int8-g64"},
    "only some layers": {Q: "int4-g64", K: "int4-g64", V: "int4-g64"},
    "every linear layer int8": dict.fromkeys((Q, K, V, OUT, GATE, UP, DOWN, HEAD), "int8-channel"),
    "every linear layer int4": dict.fromkeys((Q, K, V, OUT, GATE, UP, DOWN, HEAD), "int4-channel"),
    "every linear layer int8, inputs too": dict.fromkeys((Q, K, V, OUT, GATE, UP, DOWN), "int8-channel@int8-tensor"),
    "every linear layer for MCT": dict.fromkeys(
        (Q, K, V, OUT, GATE, UP, DOWN, HEAD), "int4-channel-full@int8-tensor-static"
    ),
    "every linear layer for MixLLM": dict.fromkeys((Q, K, V, OUT, GATE, UP, DOWN), "int4-g128-asym"),
    "two bits in one model": {DOWN: "int8-g64", OUT: "int4-g64"},
}  # fmt: skip


def layers_of(prefix: str = "") -> Layers:
    shapes = {
        Q: (256, 256),
        K: (128, 256),
        V: (128, 256),
        OUT: (256, 256),
        GATE: (512, 256),
        UP: (512, 256),
        DOWN: (256, 512),
    }
    linear = [Layer(prefix + name, "linear", shape, dtype="bfloat16", macs=1) for name, shape in shapes.items()]
    ends = [
        Layer(prefix + EMBED, "embedding", (512, 256), dtype="bfloat16"),
        Layer(prefix + HEAD, "linear", (512, 256), dtype="bfloat16", macs=1),
    ]
    kept = (Excluded(prefix + "model.norm.weight", (256,), "bfloat16", "1-D norm or bias vector"),)
    return Layers((ends[0], *linear, ends[1]), kept)


def plan_of(feature: dict[str, str], layers: Layers | None = None) -> BitPlan:
    layers = layers or layers_of()
    return BitPlan(layers, {x.name: Format.parse(feature.get(x.name, "bf16")) for x in layers}, MODEL)


def make(name: str) -> Any:
    return registry.make("exporters", name)


def written(exporter: Any, name: str, plan: BitPlan, folder: Path) -> Iterator[Path]:
    """Files of an export; of exporters that write tensors nothing, for there is no model."""
    if name not in WRITERS:
        yield from exporter.write(plan, folder)


@pytest.mark.parametrize("name", EXPORTERS)
def test_no_cell_crashes_and_none_is_silent(name: str, tmp_path: Path) -> None:
    exporter, outcomes = make(name), {}
    for number, (feature, formats) in enumerate(FEATURES.items()):
        plan = plan_of(formats)
        refusals = list(exporter.refuses(plan))
        outcomes[feature] = bool(refusals)
        for line in refusals:
            named = list(plan.formats) if name in WHOLE or len(formats) == 1 else formats
            assert any(line.startswith(f"{layer}:") or f"'{layer}'" in line for layer in named), (feature, line)
        if refusals:
            with pytest.raises(InputError) as caught:
                exporter.write(plan, tmp_path / f"out{number}")
            assert caught.value.code == "E301"
            assert not (tmp_path / f"out{number}").exists()
        else:
            files = list(written(exporter, name, plan, tmp_path / f"out{number}"))
            assert all(path.resolve().is_relative_to(tmp_path / f"out{number}") for path in files)
            assert files or name in WRITERS
    assert not all(outcomes.values()), "it holds nothing"
    assert any(outcomes.values()) or name == "native", "it refuses nothing"


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name in targets()])
def test_the_table_is_what_the_exporter_goes_by(name: str) -> None:
    """What a search for the target may choose, the exporter takes."""
    able, exporter = capabilities(name), make(name)
    for feature, formats in FEATURES.items():
        if not able.violations(plan_of(formats)):
            assert list(exporter.refuses(plan_of(formats))) == [], feature


@pytest.mark.parametrize("name", EXPORTERS)
def test_parts_and_caches_are_held_or_refused_by_name(name: str) -> None:
    layer = Layer(DOWN, "linear", (256, 512), dtype="bfloat16")
    parts = Layers((layer.part((0, 128)), layer.part((128, 256))))
    plan = BitPlan(parts, {parts[0].name: Format.parse("int4-g64"), parts[1].name: Format.parse("int8-g64")}, MODEL)
    found = list(make(name).refuses(plan))
    assert name == "native" or any(DOWN in line for line in found)
    cache = Layer("model.layers.0.self_attn.k_cache", "kv_cache", (2, 64), dtype="bfloat16")
    layers = Layers((*layers_of(), cache))
    formats = {x.name: Format.parse("kv-int8-token" if x is cache else "bf16") for x in layers}
    found = list(make(name).refuses(BitPlan(layers, formats, MODEL)))
    assert name in ("native", "modelopt") or any("k_cache" in line for line in found)


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name not in WRITERS])
@pytest.mark.parametrize("prefix", ["../up/", "a.*b|c+(", "naïve.層.", "x" * 300 + ".", "quote\"'\\.", "line\nbreak."])
def test_hostile_names_stay_in_the_folder(name: str, prefix: str, tmp_path: Path) -> None:
    layers = layers_of(prefix)
    for text in ("int4-g64", "int8-channel", "int4-g64-asym", "nf4-b64", "fp8-e4m3-b128x128", "q8_0", "int4-channel"):
        plan = BitPlan(layers, {x.name: Format.parse(text if DOWN in x.name else "bf16") for x in layers}, MODEL)
        exporter = make(name)
        if exporter.refuses(plan):
            with pytest.raises(InputError, match="E301"):
                exporter.write(plan, tmp_path / "in" / text)
            continue
        for path in exporter.write(plan, tmp_path / "in" / text):
            assert path.resolve().is_relative_to(tmp_path / "in" / text)
            if path.suffix == ".py":
                compile(path.read_text(encoding="utf-8"), str(path), "exec")
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=30)
@given(st.data(), st.sampled_from([name for name in EXPORTERS if name in targets()]))
def test_random_plans_within_the_table_are_taken_and_others_named(data: st.DataObject, name: str) -> None:
    texts = sorted({text for feature in FEATURES.values() for text in feature.values()})
    formats = {layer.name: data.draw(st.sampled_from([*texts, "bf16", "bf16"])) for layer in layers_of()}
    able, plan = capabilities(name), plan_of(formats)
    held = {layer.name: formats[layer.name] for layer in plan.layers
            if not able.refuses(layer, Format.parse(formats[layer.name]))}  # fmt: skip
    found = list(make(name).refuses(plan))
    for layer in plan.layers:
        if layer.name not in held:
            assert any(layer.name in line for line in found), (layer.name, formats[layer.name], found)
    # What is left is held; layers that must be equal are made so.
    for names in able.groups(plan.layers):
        same = {held.get(names[0], "bf16")}
        for layer_name in names:
            held[layer_name] = next(iter(same))
    rest = plan_of(held)
    # A tool that quantises may refuse a plan that leaves it nothing to do.
    if not able.violations(rest) and name not in WHOLE and any(text != "bf16" for text in held.values()):
        assert list(make(name).refuses(rest)) == []


@pytest.mark.parametrize("name", EXPORTERS)
def test_an_export_is_a_value_with_a_force(name: str) -> None:
    exporter = make(name)
    assert exporter == make(name)
    assert "force" in {field.name for field in fields(exporter)}
    assert replace(exporter, force=True) != exporter


def test_every_exporter_has_a_table_and_a_proof_or_says_why() -> None:
    without = {name for name in EXPORTERS if name not in targets()}
    assert without == {"native"}, "a target whose abilities a search cannot read"
    assert {name for name in EXPORTERS if name not in proofs()} <= {"native", *NOT_RUN}
