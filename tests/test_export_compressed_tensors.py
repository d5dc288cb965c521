"""The compressed-tensors export: loaded by transformers, its weights are ours bit for bit, its bytes as predicted."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.exports import compressed_tensors, ct_tensors
from mpsearch.exports.compressed_tensors import CompressedTensors
from mpsearch.exports.ct_config import layout, notes, scheme
from mpsearch.exports.native import payload_bytes
from mpsearch.exports.shards import INDEX
from mpsearch.format import Format, all_formats
from mpsearch.formats.activation import Activation
from mpsearch.hardware.bytes import Bytes
from mpsearch.hardware.containers import refuses, stored_bytes
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.activations import Range, scale_and_zero
from mpsearch.model.apply import applied, quantized_weight
from mpsearch.model.checkpoint import read_header
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.model.quantize import TORCH_DTYPES, fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite, contents
from tests.reference_libraries import quiet_import

#: Logits of a model with the same weights; 0 was seen.
SAME = 1e-5
TOKENS = {"input_ids": torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))}
ENDS = {"embed": "fp32", "lm_head": "fp32"}
HALF = {"embed": "bf16", "lm_head": "bf16"}


def make(folder: Path, dtype: str = "float32", architecture: str = "Llama", tie: bool = False) -> Path:
    """Write a small random model whose tensors are larger than a group in every direction."""
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.1,
        tie_word_embeddings=tie,
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(TORCH_DTYPES[dtype]).save_pretrained(folder)
    return folder


def planned(model: Model, formats: Mapping[str, str], other: str = "int4-g32") -> BitPlan:
    """A plan that gives each layer the format of the first key that its name holds."""
    layers = find_layers(model)
    chosen = {
        layer.name: Format.parse(next((text for key, text in formats.items() if key in layer.name), other))
        for layer in layers
    }
    return BitPlan(layers, chosen, {"name": "small", "digest": model.digest})


def load(folder: Path, **settings: Any) -> Any:
    """Load a folder as transformers does, and see that it took every tensor and missed none."""
    import transformers

    quiet_import("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report.values()), report
    return module


def dense(folder: Path, out: Path) -> Any:
    """Let the library's own converter make a folder dense, and load that."""
    entry = quiet_import("compressed_tensors.entrypoints.convert")
    module = quiet_import("compressed_tensors.entrypoints.convert.converters.ct_dequantizer")
    converter = module.CompressedTensorsDequantizer(str(folder), dtype=torch.float32)
    entry.convert_checkpoint(str(folder), str(out), converter, max_workers=1)
    return load(out, dtype=torch.float32)


def logits_of(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(**TOKENS, use_cache=False).logits.float()
    return found


def simulated(model: Model, plan: BitPlan) -> Tensor:
    with applied(model, {layer: plan.formats[layer.name] for layer in plan.layers}), torch.no_grad():
        return model.logits(TOKENS)


def off(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def weights_off(module: Any, model: Model, plan: BitPlan) -> dict[str, float]:
    """Format -> largest difference of a weight, relative to the largest of its tensor; after a forward pass."""
    found: dict[str, float] = {}
    for layer in plan.layers:
        fmt = plan.formats[layer.name]
        ours = quantized_weight(model, layer, fmt.weight)
        for name in (layer.name, *layer.shared):
            theirs = module.get_submodule(name).weight.detach().float()
            found[str(fmt)] = max(found.get(str(fmt), 0.0), off(theirs, ours))
    return found


def header(folder: Path) -> dict[str, Any]:
    return {name: entry for file in folder.glob("*.safetensors") for name, entry in read_header(file).items()}


def sizes(folder: Path, module: str) -> dict[str, int]:
    """Part -> bytes of the tensors of a module."""
    found = {}
    for name, entry in header(folder).items():
        if name.rpartition(".")[0] == module and not name.endswith(".bias"):
            start, end = entry["data_offsets"]
            found[name.rpartition(".")[2]] = end - start
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llama16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "llama16", "bfloat16")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "tied", "bfloat16", tie=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "qwen", architecture="Qwen2")


# --- the suite of all exporters


def read_format(folder: Path, module: str) -> str:
    """Read the format of a module from what is in the folder: scheme from the config, widths from the tensors."""
    found = header(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = [group for group in config["config_groups"].values() if module in group["targets"]]
    if not groups:
        assert module in config["ignore"]
        return {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}[found[f"{module}.weight"]["dtype"]]
    (group,) = groups
    assert module not in config["ignore"]
    assert group["format"] == "pack-quantized"
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        rows, columns = file.get_tensor(f"{module}.weight_shape").tolist()
    words = found[f"{module}.weight_packed"]["shape"]
    bits = group["weights"]["num_bits"]
    assert words == [rows, -(-columns * bits // 32)]
    scales = found[f"{module}.weight_scale"]["shape"]
    grain = {"channel": "channel", "tensor": "tensor", "group": f"g{columns // scales[-1]}"}[
        group["weights"]["strategy"]
    ]
    asym = "" if group["weights"]["symmetric"] else "-asym"
    assert (f"{module}.weight_zero_point" in found) == bool(asym)
    return f"int{bits}-{grain}{asym}"


class TestCompressedTensors(ExporterSuite):
    @pytest.fixture
    def exporter(self, llama: Path) -> CompressedTensors:
        return CompressedTensors(source=str(llama))

    @pytest.fixture
    def plan(self, llama: Path) -> BitPlan:
        formats = {**ENDS, "q_proj": "int3-g16", "k_proj": "int3-g16", "v_proj": "int3-g16", "mlp": "int5-channel-asym"}
        return planned(load_model(llama), formats, "int8-tensor")

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        up, gate = Layer("mlp.up_proj", "linear", (8, 64)), Layer("mlp.gate_proj", "linear", (8, 64))
        cut = Layer("cut", "linear", (8, 64))
        formats = {
            Layer("code", "linear", (8, 64)): "nf4-b64",
            Layer("turned", "linear", (8, 64), 1): "int4-g8",
            Layer("conv", "conv", (8, 4, 3)): "int4-channel",
            Layer("experts", "expert", (2, 8, 64), 1): "int4-g32",
            Layer("inputs", "linear", (8, 64)): "nvfp4@nvfp4",
            Layer("uneven", "linear", (8, 64)): "int4-g7",
            cut.part((0, 4)): "int4-g32",
            cut.part((4, 8)): "int8-channel",
            Layer("keys", "kv_cache", (2, 16)): "kv-int8-token",
            up: "int4-g32",
            gate: "bf16",
        }
        plan = BitPlan(Layers(tuple(formats)), {layer.name: Format.parse(text) for layer, text in formats.items()})
        return plan, [layer.name for layer in formats if layer != gate]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        return {layer.name: read_format(folder, layer.name) for layer in plan.layers}


def test_every_layer_of_a_fused_matrix_is_named() -> None:
    layers = tuple(Layer(f"attn.{name}_proj", "linear", (8, 64)) for name in "qkv")
    formats = dict(zip((layer.name for layer in layers), ("int4-g32", "int4-g64", "int4-g32-mse"), strict=True))
    plan = BitPlan(Layers(layers), {name: Format.parse(text) for name, text in formats.items()})
    (line,) = CompressedTensors().refuses(plan)
    assert line.startswith("attn.q_proj: ")
    assert all(f"{name} {text}" in line for name, text in formats.items())
    # A layer that cannot be held at all is named for that, and not compared.
    formats["attn.k_proj"] = "nf4-b64"
    (line,) = CompressedTensors().refuses(BitPlan(Layers(layers), {n: Format.parse(t) for n, t in formats.items()}))
    assert line.startswith("attn.k_proj: compressed-tensors holds integers")
    # How scales were found is no part of how they are stored.
    formats["attn.k_proj"] = "int4-g32-gptq"
    assert CompressedTensors().refuses(BitPlan(Layers(layers), {n: Format.parse(t) for n, t in formats.items()})) == []


def test_a_name_that_the_file_needs_twice_is_refused() -> None:
    kept = (Excluded("fc.weight_scale", (3,), "float32", "buffer"),)
    plan = BitPlan(Layers((Layer("fc", "linear", (8, 64)),), kept), {"fc": Format.parse("int4-g32")})
    (line,) = CompressedTensors().refuses(plan)
    assert line.startswith("fc.weight_scale: the file needs a tensor 'fc.weight_scale'")


# --- transformers loads it


MIXED = {
    "q_proj": "int3-g64", "k_proj": "int3-g64", "v_proj": "int3-g64", "o_proj": "int8-tensor-asym",
    "gate": "int5-channel-mse", "up": "int5-channel", "0.mlp.down": "int6-g32-full", "1.mlp.down": "int2-g16",
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_transformers_has_our_weights_and_logits(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = load_model(folder)
    plan = planned(model, {**ENDS, **MIXED})
    CompressedTensors(source=str(folder)).write(plan, tmp_path)
    assert notes(plan) == []
    module = load(tmp_path)
    assert off(logits_of(module), simulated(model, plan)) <= SAME
    assert set(weights_off(module, model, plan).values()) == {0.0}
    stored = header(tmp_path)
    for kept in plan.layers.excluded:
        assert stored[kept.name]["dtype"] == "F32"
        assert torch.equal(module.state_dict()[kept.name], model.module.state_dict()[kept.name])
    assert sum(kept.name.endswith("bias") for kept in plan.layers.excluded) == (6 if name == "qwen" else 0)


def test_a_wrong_scale_is_seen(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama)
    plan = planned(model, ENDS)
    CompressedTensors(source=str(llama)).write(plan, tmp_path)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + header(tmp_path)[name]["data_offsets"][0]
    # The lowest bit of the second byte of an exponent: one scale of 192 is halved or doubled.
    data[start + 3] ^= 1
    file.write_bytes(bytes(data))
    assert off(logits_of(load(tmp_path)), simulated(model, plan)) > 10 * SAME


def test_bf16_models_keep_fp16_scales_unless_the_loader_rounds_them(llama16: Path, tmp_path: Path) -> None:
    model = load_model(llama16)
    plan = planned(model, HALF | {"mlp": "int8-channel"})
    CompressedTensors(source=str(llama16)).write(plan, tmp_path)
    assert header(tmp_path)["model.layers.0.mlp.up_proj.weight_scale"]["dtype"] == "F16"
    module = load(tmp_path, dtype=torch.float32)
    assert off(logits_of(module), simulated(model, plan)) <= SAME
    assert set(weights_off(module, model, plan).values()) == {0.0}
    # In bf16 the scale moves by up to 2**-8 of itself, and so does the product when it is rounded again.
    module = load(tmp_path)
    assert module.dtype == torch.bfloat16
    assert off(logits_of(module), simulated(model, plan)) <= 0.03
    moved = weights_off(module, model, plan)
    assert moved["bf16"] == 0
    assert all(0 < moved[text] <= 2**-7 for text in ("int4-g32", "int8-channel"))


def test_blocks_of_small_floats_load_beside_bf16(llama16: Path, tmp_path: Path) -> None:
    model = load_model(llama16)
    formats = {"q_proj": "mxfp4", "k_proj": "mxfp4", "v_proj": "mxfp4", "o_proj": "mxfp6-e2m3", "0.mlp": "nvfp4"}
    plan = planned(model, HALF | formats, "mxfp8-e4m3")
    CompressedTensors(source=str(llama16)).write(plan, tmp_path)
    assert notes(plan) == []
    module = load(tmp_path)
    assert off(logits_of(module), simulated(model, plan)) <= 0.03
    moved = weights_off(module, model, plan)
    # The steps of NVFP4 are no bf16 numbers, and the library unpacks to bf16.
    assert 0 < moved.pop("nvfp4") <= 2**-8
    assert set(moved.values()) == {0.0}


@pytest.mark.parametrize("text", ["int4-g32-asym", "int3-channel-asym", "int4-g32", "fp8-e4m3-channel"])
def test_one_scheme_for_all_loads_dequantised_embeddings_too(text: str, tied: Path, tmp_path: Path) -> None:
    import transformers

    model = load_model(tied)
    plan = planned(model, {}, text)
    CompressedTensors(source=str(tied)).write(plan, tmp_path)
    assert "CompressedTensorsConfig(dequantize=True)" in "".join(notes(plan))
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert {"lm_head", "model.embed_tokens"} < set(config["quantization_config"]["config_groups"]["group_0"]["targets"])
    module = load(
        tmp_path, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    # Unpacked in the scale's own type; fp8's fp32 scales were rounded to bf16 as they were stored, and unpack to it.
    bound = 2**-10 if text.startswith("int") else 2**-7
    assert max(weights_off(module, model, plan).values()) <= bound
    assert off(logits_of(module), simulated(model, plan)) <= 4 * bound


def test_a_tied_head_stays_tied_where_it_is_not_quantised(tied: Path, tmp_path: Path) -> None:
    model = load_model(tied)
    plan = planned(model, HALF)
    CompressedTensors(source=str(tied)).write(plan, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert {"lm_head", "model.embed_tokens"} == set(config["quantization_config"]["ignore"])
    assert "lm_head.weight" not in header(tmp_path)
    module = load(tmp_path, dtype=torch.float32)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert off(logits_of(module), simulated(model, plan)) <= SAME


EVERYTHING = {
    "embed": "int3-channel-asym", "q_proj": "int4-g32-asym", "k_proj": "int4-g32-asym", "v_proj": "int4-g32-asym",
    "o_proj": "nvfp4", "0.mlp.gate": "mxfp4", "0.mlp.up": "mxfp4", "1.mlp.gate": "fp8-e4m3-b16x32",
    "1.mlp.up": "fp8-e4m3-b16x32", "0.mlp.down": "fp8-e4m3", "1.mlp.down": "int7-g32-asym-mse",
    "lm_head": "int5-channel-asym",
}  # fmt: skip


def test_the_library_itself_reads_every_format_in_one_folder(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama)
    plan = planned(model, EVERYTHING)
    CompressedTensors(source=str(llama)).write(plan, tmp_path / "out")
    assert "own convert_checkpoint makes it dense" in "".join(notes(plan))
    module = dense(tmp_path / "out", tmp_path / "dense")
    moved = weights_off(module, model, plan)
    assert 0 < moved.pop("nvfp4") <= 2**-8
    assert set(moved.values()) == {0.0}
    assert off(logits_of(module), simulated(model, plan)) <= 0.01


# --- rounded inputs and calibration


def calibrated(folder: Path, formats: Mapping[str, str], other: str) -> tuple[Model, BitPlan]:
    model = load_model(folder)
    plan = planned(model, formats, other)
    model.calibrate([TOKENS], list(plan.layers))
    return model, plan


def their_grid(x: Tensor, fmt: Activation, axis: int, seen: Range | None) -> Tensor:
    """Round as compressed-tensors does: one code more below zero, and the zero point before the rounding."""
    half = 2 ** (fmt.bits - 1)
    if seen is None:
        scale, zero = x.abs().amax(-1, keepdim=True) / (half - 0.5), torch.zeros(())
    else:
        scale, zero = scale_and_zero(seen, fmt)
        zero = zero - half if fmt.asymmetric else zero
    return (torch.clamp(torch.round(x / scale + zero), -half, half - 1) - zero) * scale


@pytest.mark.parametrize(
    "text",
    [
        "fp8-e4m3-channel@fp8-e4m3-token",
        "fp8-e4m3@fp8-e4m3-tensor-static",
        "int8-channel@int8-tensor-static",
        "int8-channel-asym@int8-tensor-asym-static",
        "int8-channel@int8-token",
        "int4-g32@int8-token",
        "int4-channel-gptq",
        "int4-g32-gptq",
    ],
)
def test_rounded_inputs_and_calibrated_formats(
    text: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = calibrated(llama, ENDS, text)
    CompressedTensors().write(plan, tmp_path, model)
    module = load(tmp_path)
    # Ours and theirs differ by the grid of inputs, and by it alone.
    assert off(logits_of(module), simulated(model, plan)) <= (0.05 if "@int8" in text else SAME)
    assert bool(notes(plan)) == ("@int8" in text)
    if "@int8" in text:
        monkeypatch.setattr("mpsearch.model.apply.round_input", their_grid)
        assert off(logits_of(module), simulated(model, plan)) <= SAME
    assert set(weights_off(module, model, plan).values()) == {0.0}
    layer = next(layer for layer in plan.layers if layer.name.endswith("down_proj"))
    assert sizes(tmp_path, layer.name) == stored_bytes(plan.formats[layer.name], layer, "compressed-tensors")


def test_data_is_asked_for_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    plan = planned(load_model(llama), ENDS, "int4-g32-gptq")
    with pytest.raises(InputError, match="calibration data") as caught:
        CompressedTensors(source=str(llama)).write(plan, tmp_path / "out")
    assert caught.value.code == "E422"
    assert list(tmp_path.iterdir()) == []


# --- bytes, names, packing


GRAINS = [f"{grain}{grid}" for grain in ("tensor", "channel", "g16") for grid in ("", "-asym")]
TEXTS = [
    *(f"int{bits}-{grain}" for bits in range(2, 9) for grain in GRAINS),
    "int4-g16-full", "fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-g16", "fp8-e4m3-b16x32", "mxfp4", "mxfp6-e2m3",
    "mxfp8-e4m3", "nvfp4", "int8-channel@int8-token", "int4-g16-asym@int8-token", "int8-tensor-asym@int8-tensor",
    "fp8-e4m3-channel@fp8-e4m3-token", "int4-channel@fp8-e4m3-token", "mxfp4@mxfp4", "bf16", "fp16", "fp32",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(33, 96), (5, 160)])
def test_tensors_take_the_predicted_bytes_part_by_part(dtype: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(TORCH_DTYPES[dtype])
    layer = Layer("fc", "linear", shape, dtype=dtype, shared=("head",))
    tested = 0
    for text in TEXTS:
        fmt = Format.parse(text)
        if refuses(fmt, layer, "compressed-tensors"):
            continue
        made = ct_tensors.tensors(weight, layer, fmt)
        found = {spec.name: (spec.dtype, spec.shape) for spec in ct_tensors.specs(layer, fmt)}
        assert {name: (value.dtype, tuple(value.shape)) for name, value in made.items()} == found
        total: dict[str, int] = {}
        for name, value in made.items():
            part = name.rpartition(".")[2]
            total[part] = total.get(part, 0) + value.nbytes
        predicted = stored_bytes(fmt, layer, "compressed-tensors")
        assert sum(total.values()) == sum(predicted.values())
        if scheme(fmt) is not None:
            assert total == predicted
        tested += 1
    assert tested >= 55


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_the_file_takes_what_the_target_predicts(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    plan = planned(load_model(folder), EVERYTHING)
    CompressedTensors(source=str(folder)).write(plan, tmp_path)
    wanted = list(dict.fromkeys(plan.formats.values()))
    # A tie of q, k and v is one decision, and one row.
    table = Bytes("compressed-tensors").cost(list(plan.layers), wanted)
    rows = [(row.layers[0].name, costs) for row, costs in zip(plan.layers.decisions, table.value, strict=True)]
    predicted_all = sum(costs[wanted.index(plan.formats[first])] for first, costs in rows)
    assert payload_bytes(tmp_path / "model.safetensors") == predicted_all + plan.layers.excluded_bytes
    for layer in plan.layers:
        predicted = stored_bytes(plan.formats[layer.name], layer, "compressed-tensors")
        modules = (layer.name, *layer.shared)
        assert all(sizes(tmp_path, module) == {part: size // len(modules) for part, size in predicted.items()}
                   for module in modules)  # fmt: skip


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 7), (33, 160), (64, 32)])
def test_words_are_those_of_the_library(bits: int, shape: tuple[int, int]) -> None:
    helpers = quiet_import("compressed_tensors.compressors.pack_quantized.helpers")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    layer = Layer("fc", "linear", shape)
    fmt = Format.parse(f"int{bits}-channel-asym")
    made = ct_tensors.tensors(weight, layer, fmt)
    codes = helpers.unpack_from_int32(made["fc.weight_packed"], bits, torch.Size(shape))
    zeros = helpers.unpack_from_int32(made["fc.weight_zero_point"], bits, torch.Size((shape[0], 1)), packed_dim=0)
    assert torch.equal((codes.float() - zeros.float()) * made["fc.weight_scale"], fake_quantize(weight, fmt))
    assert torch.equal(helpers.pack_to_int32(codes, bits), made["fc.weight_packed"])
    assert torch.equal(helpers.pack_to_int32(zeros, bits, packed_dim=0), made["fc.weight_zero_point"])


def test_the_config_is_one_of_the_librarys_and_names_every_module_once(llama: Path, tmp_path: Path) -> None:
    quantization = quiet_import("compressed_tensors.quantization")
    infer = quiet_import("compressed_tensors.compressors.format").infer_module_format
    plan = planned(load_model(llama), {**EVERYTHING, "embed": "fp32", "1.mlp.down": "int8-channel@int8-token"})
    CompressedTensors(source=str(llama)).write(plan, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    read = quantization.QuantizationConfig.model_validate(written)
    targets = [name for group in read.config_groups.values() for name in group.targets]
    assert sorted([*targets, *written["ignore"]]) == sorted(layer.name for layer in plan.layers)
    assert written["ignore"] == ["model.embed_tokens"]
    assert written["format"] == "mixed-precision"
    for group in read.config_groups.values():
        assert list(group.targets) == sorted(group.targets)
        assert infer(nn.Linear, group).value == group.format


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("bf16", "fp16", "fp32")])
def test_schemes_are_those_of_the_library(text: str) -> None:
    quantization = quiet_import("compressed_tensors.quantization")
    infer = quiet_import("compressed_tensors.compressors.format").infer_module_format
    fmt = Format.parse(text)
    read = quantization.QuantizationScheme.model_validate({"targets": ["fc"], **(scheme(fmt) or {})})
    assert infer(nn.Linear, read).value == layout(fmt)


# --- files


def test_large_tensors_are_rounded_a_few_rows_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(load_model(llama), {**EVERYTHING, "embed": "fp16"})
    CompressedTensors(source=str(llama)).write(plan, tmp_path / "whole")
    monkeypatch.setattr(ct_tensors, "CHUNK", 200)
    CompressedTensors(source=str(llama)).write(plan, tmp_path / "pieces")
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


def test_a_large_model_comes_in_several_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(llama)
    plan = planned(model, ENDS, "int3-g32")
    monkeypatch.setattr(compressed_tensors, "LIMIT", 20_000)
    files = CompressedTensors(source=str(llama)).write(plan, tmp_path)
    assert tmp_path / INDEX in files
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    for entry in header(tmp_path).values():
        width = {"F32": 4, "I32": 4, "I64": 8}[entry["dtype"]]
        assert entry["data_offsets"][0] % width == 0
    assert off(logits_of(load(tmp_path)), simulated(model, plan)) <= SAME


def test_a_model_and_its_folder_give_the_same_files(llama16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama16, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "evil.py").write_text("")
    model = load_model(folder)
    plan = planned(model, HALF, "int4-g16-asym")
    CompressedTensors(source=str(folder)).write(plan, tmp_path / "a")
    CompressedTensors().write(plan, tmp_path / "b", model)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {"tokenizer.json", "generation_config.json"} < set(contents(tmp_path / "a"))
    assert "evil.py" not in contents(tmp_path / "a")


def test_a_folder_with_other_names_for_its_tensors_is_loaded_whole(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    plan = planned(model, {**ENDS, "experts": "fp32"})
    CompressedTensors(source=str(tmp_path / "model")).write(plan, tmp_path / "out")
    assert off(logits_of(load(tmp_path / "out")), simulated(model, plan)) <= SAME


def test_a_model_made_in_python_needs_no_folder(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model(transformers.Qwen2ForCausalLM(config).bfloat16(), tokens=True)
    plan = planned(model, HALF)
    CompressedTensors().write(plan, tmp_path, model)
    module = load(tmp_path)
    assert module.dtype == torch.bfloat16
    assert off(logits_of(load(tmp_path, dtype=torch.float32)), simulated(model, plan)) <= SAME


def test_a_plan_of_plain_formats_is_an_ordinary_checkpoint(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama)
    plan = planned(model, {"mlp": "fp32"}, "bf16")
    CompressedTensors(source=str(llama)).write(plan, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert header(tmp_path)["lm_head.weight"]["dtype"] == "BF16"
    assert off(logits_of(load(tmp_path)), simulated(model, plan)) <= SAME


# --- what is wrong is said


def test_errors_name_what_is_missing(llama: Path, qwen: Path, tmp_path: Path) -> None:
    plan = planned(load_model(llama), ENDS)
    for exporter, model, code, words in (
        (CompressedTensors(), None, "E101", "no model was given"),
        (CompressedTensors(source=str(tmp_path / "nowhere")), None, "E101", "not found"),
        (CompressedTensors(source=str(qwen)), None, "E302", "for another model than"),
        (CompressedTensors(), SimpleNamespace(module=nn.Linear(4, 4)), "E302", "the model has none: another model"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            exporter.write(plan, tmp_path / "out", model)
        assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_16_bits_cannot_hold_is_refused() -> None:
    weight = torch.full((2, 64), 1e-6, dtype=torch.float16)
    layer = Layer("fc", "linear", (2, 64), dtype="float16")
    with pytest.raises(InputError, match=r"layer 'fc': a scale of .* is stored as float16") as caught:
        ct_tensors.tensors(weight, layer, Format.parse("fp8-e4m3"))
    assert caught.value.code == "E421"


@pytest.mark.parametrize("text", [str(fmt) for family in all_formats().values() for fmt in family])
def test_every_format_is_either_refused_or_has_a_scheme(text: str) -> None:
    fmt = Format.parse(text)
    layers: tuple[Layer, ...] = (
        *(Layer(f"attn.{name}_proj", "linear", (256, 256)) for name in "qkv"),
        Layer("embed", "embedding", (8, 256)),
    )
    plan = BitPlan(Layers(layers), dict.fromkeys((layer.name for layer in layers), fmt))
    named = [line.partition(":")[0] for line in CompressedTensors().refuses(plan)]
    held = [layer for layer in layers if not refuses(fmt, layer, "compressed-tensors")]
    assert named == [layer.name for layer in layers if layer not in held]
    assert all(ct_tensors.specs(layer, fmt) for layer in held)


def test_the_command_line_writes_it(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(load_model(llama), {"embed": "int8-channel", "lm_head": "fp32"})
    plan.save(tmp_path / "plan.json")
    line = ["export", str(tmp_path / "plan.json"), "--to", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert run(line) == 3
    assert "--model" in capsys.readouterr().err
    assert run([*line, "--model", str(llama)]) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "out" / "model.safetensors") in out
    assert "note: transformers 5.23 does not load by default: quantised embeddings ('model.embed_tokens'" in err
