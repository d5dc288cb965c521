"""Bytes in the checkpoint formats of others, against the libraries that write them and a table of known figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.format import Format, all_formats
from mpsearch.formats.gguf_types import BLOCKS
from mpsearch.hardware.bytes import Bytes
from mpsearch.hardware.containers import CONTAINERS, kept_bytes, refuses, stored_bytes
from mpsearch.layer import Excluded, Layer, Layers
from tests.conftest import DATA
from tests.reference_libraries import quiet_import

SQUARE = Layer("fc", "linear", (4096, 4096), dtype="float16")

# --- every row of the table of effective bits

TABLE = json.loads((DATA / "effective_bits.json").read_text())["rows"]
# Row -> (format, container, bytes that we store and the row leaves out).
PLAIN_INTEGERS = {
    f"int{b}_{kind}_g{g}_fp16scale{zero}": (f"int{b}-g{g}{grid}", "native", 0)
    for b in (2, 3, 4, 8)
    for g in (32, 64, 128)
    for kind, zero, grid in (("sym", "", ""), ("asym", f"_int{b}zero", "-asym"))
}
ROWS: Mapping[str, tuple[str, str, int]] = {
    **PLAIN_INTEGERS,
    "GPTQ/AutoGPTQ int4 g128 (fp16 scales, packed int4 qzeros, int32 g_idx per input row, d_out=4096)": (
        "int4-g128-asym",
        "gptq",
        0,
    ),
    "AWQ int4 g128 (fp16 scales, packed int4 qzeros)": ("int4-g128-asym", "awq", 0),
    "int8 per-channel d_in=4096 fp16 scale": ("int8-channel", "native", 0),
    "fp8_e4m3 per-tensor fp32 scale, numel=4096*4096": ("fp8-e4m3", "native", 0),
    "fp8_e4m3 128x128 block fp32 scale (DeepSeek-style)": ("fp8-e4m3-b128x128", "native", 0),
    "NF4 block64 fp32 absmax": ("nf4-b64", "native", 0),
    # The row leaves out the mean of the scales, which bitsandbytes stores in 4 bytes.
    "NF4 double quant (QLoRA)": ("nf4-b64-dq256", "native", 4),
    "NF3 double quant (LQ-LoRA nf3)": ("nf3-b64-dq256", "native", 4),
    "MXFP4": ("mxfp4", "native", 0),
    "MXFP6": ("mxfp6-e2m3", "native", 0),
    "MXFP8": ("mxfp8-e4m3", "native", 0),
    "MXINT8": ("mxint8", "native", 0),
    # The row itself names the fp32 scale of the tensor as what it leaves out.
    "NVFP4 (block 16 e4m3 scale; + 32/numel tensor scale)": ("nvfp4", "native", 4),
    **{
        f"GGUF {name.removeprefix('gguf-').upper() if name[0] in 'giqt' else name}": (name, "gguf", 0)
        for name in BLOCKS
        if name not in ("q4_1", "q5_1")
    },
}
NOT_OFFERED = {
    "int4_asym_g128_fp16scale_fp16zero": "zero points have as many bits as the codes, not 16 (HQQ's layout)",
    "LQ-LoRA cheapest config b=2,b0=2,b1=bf16,B0=64,B1=256": "scales of scales have 8 bits, not 2 (LQ-LoRA's search)",
    "LQ-LoRA dearest config b=8,b0=8,b1=fp32,B0=16,B1=16": "NormalFloat has 2 to 4 bits, not 8 (LQ-LoRA's search)",
    "HIGGS grid n codes, dim p, fp16 scale per 1024-Hadamard group: n=256,p=2": "no vector grids, no rotations",
    "balanced n-bit (BitsFusion) b=1": "codes take whole bits: ternary-channel stores 2",
    "balanced n-bit (BitsFusion) b=2": "codes take whole bits: 5 levels need 3",
}


def test_every_row_is_a_format_or_says_why_not() -> None:
    names = [row["format"] for row in TABLE]
    assert len(names) == len(set(names)) == 64
    assert set(names) == set(ROWS) | set(NOT_OFFERED)
    assert not set(ROWS) & set(NOT_OFFERED)
    assert all(NOT_OFFERED.values())


@pytest.mark.parametrize("row", [row for row in TABLE if row["format"] in ROWS], ids=lambda row: row["format"])
def test_effective_bits(row: Mapping[str, Any]) -> None:
    text, container, more = ROWS[row["format"]]
    fmt = Format.parse(text)
    # Types that are only priced are refused by `stored_bytes`; their price is the block table's.
    found = fmt.bytes(SQUARE) if fmt.refuses(SQUARE) else sum(stored_bytes(fmt, SQUARE, container).values())
    assert found == math.prod(SQUARE.shape) * Fraction(row["bpw"]) / 8 + more


EXAMPLES = {
    "GGUF Q4_K": ("q4_K", "gguf", 0),
    "GGUF Q6_K (row len 11008 = 43*256)": ("q6_K", "gguf", 0),
    "MXFP4": ("mxfp4", "native", 0),
    "NVFP4 incl fp32 tensor scale": ("nvfp4", "native", 0),
    "AWQ int4 g128": ("int4-g128", "awq", 0),
    "NF4 double quant block64/256, fp32 2nd level": ("nf4-b64-dq256", "native", 4),
}


def test_examples_of_exact_bytes() -> None:
    examples = json.loads((DATA / "effective_bits.json").read_text())["exact_bytes_examples"]
    assert [example["format"] for example in examples] == list(EXAMPLES)
    for example in examples:
        text, container, more = EXAMPLES[example["format"]]
        layer = Layer("fc", "linear", tuple(example["tensor"]))
        assert sum(stored_bytes(Format.parse(text), layer, container).values()) == example["bytes"] + more


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        # Read from files that GPTQModel 7.7 wrote for a Llama of 256 by 512.
        ("int4-g64", (256, 256), 4.4375),
        ("int3-g64", (512, 256), 3.359375),
        ("int8-channel", (256, 512), 8.171875),
    ],
)
def test_gptq_files_of_gptqmodel(text: str, shape: tuple[int, int], bits: float) -> None:
    layer = Layer("fc", "linear", shape, dtype="float16")
    assert 8 * sum(stored_bytes(Format.parse(text), layer, "gptq").values()) == bits * math.prod(shape)


# --- compressed-tensors writes it itself


def scheme(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Any:
    quantization = quiet_import("compressed_tensors.quantization")
    args = quantization.QuantizationArgs
    return quantization.QuantizationScheme(
        targets=["Linear"], weights=args(**weights), input_activations=args(**inputs) if inputs else None
    )


def integer_args(fmt: Any) -> dict[str, Any]:
    size = {"group_size": fmt.group} if fmt.granularity == "group" else {}
    return {"num_bits": fmt.bits, "symmetric": not fmt.asymmetric, "strategy": fmt.granularity, **size}


FLOATS: Mapping[str, dict[str, Any]] = {
    "fp8-e4m3": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8-e4m3-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8-e4m3-b16x32": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "mxfp6-e2m3": {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32},
    "mxfp8-e4m3": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
INTEGERS = [
    f"int{bits}-{grain}{grid}"
    for bits in range(2, 9)
    for grain in ("tensor", "channel", "g32")
    for grid in ("", "-asym")
]
INPUTS: Mapping[str, dict[str, Any]] = {
    "int8-token": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "int8-tensor-static": {"num_bits": 8, "strategy": "tensor"},
    "int8-tensor-asym-static": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    "fp8-e4m3-token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8-e4m3-tensor-static": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
}
JOINED = [
    "int8-channel@int8-token",
    "int4-g32-asym@int8-token",
    "int8-channel-asym@int8-tensor-static",
    "int8-tensor@int8-tensor-asym-static",
    "int4-channel@fp8-e4m3-token",
    "fp8-e4m3@fp8-e4m3-tensor-static",
    "fp8-e4m3-channel@fp8-e4m3-token",
    "nvfp4@nvfp4",
]


def written(fmt: Format, module: nn.Module) -> dict[str, int]:
    """Let compressed-tensors compress a module; name -> bytes of what it would save."""
    weight = fmt.weight
    weights = FLOATS[str(weight)] if str(weight) in FLOATS else integer_args(weight)
    made = scheme(weights, INPUTS[str(fmt.activation)] if fmt.activation else None)
    lifecycle = quiet_import("compressed_tensors.quantization.lifecycle.initialize")
    compressors = quiet_import("compressed_tensors.compressors")
    kind = quiet_import("compressed_tensors.compressors.format").infer_module_format(type(module), made)
    lifecycle.initialize_module_for_quantization(module, made)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("scale"):
                value.fill_(0.5)
    state = compressors.BaseCompressor.get_value_from_registry(kind.value).compress(dict(module.state_dict()), made)
    return {name: value.nbytes for name, value in state.items() if name != "bias"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("text", [*INTEGERS, *FLOATS, *JOINED])
@pytest.mark.parametrize("shape", [(5, 96), (48, 64), (33, 160)])
def test_compressed_tensors_writes_what_we_say(text: str, shape: tuple[int, int], dtype: str) -> None:
    fmt = Format.parse(text)
    module = nn.Linear(shape[1], shape[0]).to(getattr(torch, dtype))
    layer = Layer("fc", "linear", shape, dtype=dtype)
    assert stored_bytes(fmt, layer, "compressed-tensors") == written(fmt, module)


@pytest.mark.parametrize("text", ["int4-g32", "int8-channel-asym", "fp8-e4m3-channel"])
def test_compressed_tensors_writes_embeddings(text: str) -> None:
    layer = Layer("embed", "embedding", (30, 64), dtype="bfloat16")
    found = stored_bytes(Format.parse(text), layer, "compressed-tensors")
    assert found == written(Format.parse(text), nn.Embedding(30, 64).bfloat16())
    # A tied head is a module of its own there.
    tied = Layer("embed", "embedding", (30, 64), dtype="bfloat16", shared=("head",))
    assert stored_bytes(Format.parse(text), tied, "compressed-tensors") == {k: 2 * size for k, size in found.items()}


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_of_compressed_tensors(bits: int) -> None:
    helpers = quiet_import("compressed_tensors.compressors.pack_quantized.helpers")
    for rows, columns in ((1, 1), (3, 7), (5, 33), (2, 64), (7, 100)):
        packed = helpers.pack_to_int32(torch.zeros(rows, columns, dtype=torch.int8), bits)
        layer = Layer("fc", "linear", (rows, columns), dtype="bfloat16")
        found = stored_bytes(Format.parse(f"int{bits}-channel"), layer, "compressed-tensors")
        assert found["weight_packed"] == packed.nbytes


@pytest.mark.parametrize("text", list(BLOCKS))
def test_gguf_sizes(text: str) -> None:
    kind = gguf.GGMLQuantizationType[BLOCKS_TO_TYPES.get(text, text.upper())]
    for shape in ((1, 256), (7, 1024)):
        layer = Layer("fc", "linear", shape)
        rows, size = gguf.quant_shape_to_byte_shape(shape, kind)
        assert Format.parse(text).bytes(layer) == rows * size
        if not Format.parse(text).refuses(layer):
            assert stored_bytes(Format.parse(text), layer, "gguf") == {"payload": rows * size}


BLOCKS_TO_TYPES = {"gguf-mxfp4": "MXFP4", "gguf-nvfp4": "NVFP4"}


# --- what they cannot hold


@pytest.mark.parametrize(
    ("text", "container", "layer", "reason"),
    [
        ("int5-g32", "gptq", Layer("a", "linear", (64, 64)), "gptq holds 2, 3, 4, 8 bits, not int5-g32"),
        ("int4-g32", "gptq", Layer("a", "linear", (60, 64)), "gptq packs 32 rows and columns together"),
        ("int4-g7", "gptq", Layer("a", "linear", (64, 60)), "60 weights per output channel cannot be cut"),
        ("int4-tensor", "gptq", Layer("a", "linear", (64, 64)), "not per tensor; use int4-channel"),
        ("int4-g32", "gptq", Layer("a", "embedding", (64, 64)), "holds linear layers, not embedding layers; use bf16"),
        ("int4-g32@int8-token", "gptq", Layer("a", "linear", (64, 64)), "gptq rounds no inputs; use int4-g32"),
        ("bf16@int8-token", "gptq", Layer("a", "linear", (64, 64)), "gptq rounds no inputs; use bf16"),
        ("nf4-b64", "gptq", Layer("a", "linear", (64, 64)), "gptq holds integers, bf16, fp16 and fp32, not nf4-b64"),
        ("int3-g32", "awq", Layer("a", "linear", (64, 64)), "awq holds 4 bits, not int3-g32"),
        ("int4-g32", "awq", Layer("a", "linear", (60, 64)), "awq packs 8 output channels in a word; 60 do not fit"),
        ("int4-g32", "awq", Layer("a", "conv", (8, 32, 1, 1)), "awq holds linear layers, not conv layers"),
        ("nf4-b64", "compressed-tensors", Layer("a", "linear", (64, 64)), "holds integers, fp8-e4m3, mxfp4,"),
        ("fp8-e5m2", "compressed-tensors", Layer("a", "linear", (64, 64)), "not fp8-e5m2"),
        ("int4-g32", "compressed-tensors", Layer("a", "conv", (8, 32, 1, 1)), "not conv layers; use bf16"),
        ("int4-g32", "compressed-tensors", Layer("a", "linear", (64, 64), 1), "not transposed linear layers"),
        ("int4-g32", "compressed-tensors", Layer("a", "expert", (2, 64, 64), 1), "not expert layers"),
        ("int4-g64", "gguf", Layer("a", "linear", (64, 64)), "gguf holds its own types"),
        ("int4-g32", "gguf", Layer("a", "linear", (8, 32)), "gguf holds its own types (q4_K, q8_0, …), not int4-g32"),
        ("int8-channel@int8-channel-static", "compressed-tensors", Layer("a", "linear", (64, 64)), "has no scheme for"),
        ("nvfp4@int8-token", "compressed-tensors", Layer("a", "linear", (64, 64)), "has no scheme for"),
        ("q4_0@int8-token", "gguf", Layer("a", "linear", (64, 64)), "gguf rounds no inputs; use q4_0"),
        ("q4_K", "gguf", Layer("a", "linear", (64, 64)), "cannot be cut into blocks of 256"),
        ("int4-g32", "native", Layer("a", "linear", (64, 60)), "cannot be cut into groups of 32"),
    ],
)
def test_what_a_container_cannot_hold_has_a_reason(text: str, container: str, layer: Layer, reason: str) -> None:
    fmt = Format.parse(text)
    assert reason in refuses(fmt, layer, container)
    with pytest.raises(InputError, match="E301") as caught:
        stored_bytes(fmt, layer, container)
    assert "layer 'a'" in str(caught.value)
    assert np.isnan(Bytes(container).cost([layer], [fmt]).value).all()


@pytest.mark.parametrize("container", list(CONTAINERS))
@pytest.mark.parametrize("family", list(all_formats()))
def test_every_format_is_priced_or_refused_in_every_container(family: str, container: str) -> None:
    layers = [
        Layer("a", "linear", (64, 512), dtype="bfloat16"),
        Layer("b", "embedding", (64, 512), shared=("c",)),
        Layer("c", "conv", (32, 32, 3, 3)),
        Layer("d", "expert", (2, 32, 512), 1),
        Layer("e", "linear", (512, 64), 1),
        Layer("f", "kv_cache", (2, 64)),
    ]
    for fmt in all_formats()[family]:
        for layer in layers:
            if not refuses(fmt, layer, container):
                sizes = stored_bytes(fmt, layer, container)
                assert all(type(size) is int and size > 0 for size in sizes.values())
                assert bool(sizes) == (layer.kind != "kv_cache")
    for text in ("bf16", "fp16", "fp32"):
        assert stored_bytes(Format.parse(text), layers[2], container) == Format.parse(text).itemised_bytes(layers[2])


def test_unknown_container() -> None:
    with pytest.raises(InputError, match=r"no container 'gtpq'; did you mean 'gptq'\?"):
        Bytes("gtpq")


# --- as targets


def test_targets_by_name() -> None:
    for name in ("gptq", "awq", "compressed-tensors", "gguf"):
        assert f"bytes@{name}" in registry.names("targets")
        assert registry.make("targets", f"bytes@{name}") == Bytes(name)
    assert registry.make("targets", "bytes") == Bytes("native") == registry.make("targets", "bytes", container="native")
    with pytest.raises(InputError, match="did you mean 'bytes@gptq'"):
        registry.make("targets", "bytes@gtpq")


def test_cost_tables_follow_the_container() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(4, 4, 3), nn.LayerNorm(64))
    model = mp.wrap(module, logits=lambda m, b: b, name="odd")
    formats = ["int4-g32", "int5-g32", "q4_0", "bf16"]
    tables = {name: mp.cost(model, formats, f"bytes@{name}") for name in ("gptq", "awq", "compressed-tensors", "gguf")}
    linear = {name: table.value[0].tolist() for name, table in tables.items()}
    nan, whole = np.nan, 8192.0
    expected = {
        "gptq": [2048 + 64 + 256 + 256.0, nan, nan, whole],
        "awq": [2048 + 64 + 256.0, nan, nan, whole],
        "compressed-tensors": [2048 + 512 + 16.0, 2560 + 512 + 16.0, nan, whole],
        "gguf": [nan, nan, 2304.0, whole],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(linear[name], row)
        assert np.isnan(tables[name].value[1, :3]).all()
        assert tables[name].source == {"target": f"bytes@{name}"}
        assert (tables[name].unit, tables[name].resource, tables[name].reference) == ("bytes", "weights", 2.0 * 4436)
    kept = 4 * (64 + 4 + 64 + 64)
    assert {table.fixed for table in tables.values()} == {float(kept)}


def test_kept_vectors_have_32_bits_in_gguf() -> None:
    layers = Layers(
        (Layer("a", "linear", (4, 4)),), (Excluded("n", (8,), "bfloat16", ""), Excluded("m", (2, 8), "float16", ""))
    )
    fixed = {name: Bytes(name).cost(layers, [Format.parse("bf16")]).fixed for name in CONTAINERS}
    assert fixed == {**dict.fromkeys(CONTAINERS, 48.0), "gguf": 64.0, "onnxruntime": 96.0}
    assert kept_bytes(layers.excluded[1], "gguf") == 32
