"""GGUF types: the bytes that ggml writes, the numbers that gguf reads, and the laws of all formats."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.gguf_types import BLOCKS, LATTICES, GgufType
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence, RangeError
from mpsearch.model.codecs import gguf_types
from mpsearch.model.codecs.gguf_types import GgufCodec
from mpsearch.model.packing import pack, unpack
from mpsearch.model.quantize import TORCH_DTYPES, dequantize, fake_quantize, quantize
from tests.gguf_inputs import KINDS, weights

torch.set_num_threads(1)
LAWS = settings(max_examples=60, deadline=None)
DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "ggml_blocks.json").read_text())
ROUNDED = [name for name in BLOCKS if name not in LATTICES]
IN_PYTHON = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "gguf-mxfp4")
K_TYPES = ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K")


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.removeprefix("gguf-").upper()]


def encode(weight: np.ndarray[Any, Any] | Tensor, name: str) -> Tensor:
    rows = weight if isinstance(weight, Tensor) else torch.from_numpy(weight)
    return GgufCodec().encode(rows, GgufType(name), Evidence())["payload"]


def decode(payload: Tensor, name: str) -> Tensor:
    columns = payload.shape[1] // BLOCKS[name].size * BLOCKS[name].weights
    return GgufCodec().decode({"payload": payload}, GgufType(name), columns)


def read_by_gguf(payload: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(payload.numpy(), kind_of(name)))


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_gguf(name: str) -> None:
    block, table = BLOCKS[name], json.loads((DATA / "gguf_bpw.json").read_text())["types"]
    assert (block.weights, block.size) == tuple(gguf.GGML_QUANT_SIZES[kind_of(name)])
    row, layer = table[kind_of(name).name], Layer("fc", "linear", (3, 512))
    assert (block.weights, block.size) == (row["block_size"], row["type_size"])
    assert GgufType(name).itemised_bytes(layer) == {"payload": 3 * 512 // block.weights * block.size}
    assert float(GgufType(name).effective_bits(layer)) == row["bpw"]


@pytest.mark.parametrize("name", BLOCKS)
def test_names_read_in_any_case_and_print_as_llama_cpp_prints_them(name: str) -> None:
    for text in (name, name.upper(), name.lower()):
        fmt = Format.parse(text)
        assert fmt == GgufType(name)
        assert str(fmt) == name
    assert Format.parse(name.upper()).bits == BLOCKS[name].bits
    if name.startswith(("q", "tq", "iq")):
        # The C library's names, in the spelling of the package's type names but for the case of the K.
        assert name.upper() == kind_of(name).name


def test_other_names_are_left_to_others_and_recipes_are_refused() -> None:
    assert all(
        GgufType.read(text) is None for text in ("mxfp4", "nvfp4", "q8_1", "q8_K", "q4_2", "q4-0", "f16", "", "_m")
    )
    for text, instead in (("Q4_K_M", "q4_K"), ("q3_k_xl", "q3_K"), ("IQ4_XS_L", "iq4_xs")):
        with pytest.raises(InputError, match="a mix of types for a whole file") as caught:
            Format.parse(text)
        assert caught.value.code == "E110"
        assert f"use {instead}" in caught.value.advice
    assert str(Format.parse("IQ2_XS")) == "iq2_xs"


@pytest.mark.parametrize(
    ("name", "columns", "reason"),
    [
        ("q4_K", 96, "96 weights per output channel cannot be cut into blocks of 256; use q5_0, as llama.cpp does, or"),
        ("q5_K", 288, "use q5_1, as llama.cpp does, or q8_0"),
        ("q6_K", 32, "use q8_0, as llama.cpp does"),
        ("q2_K", 32, "use q4_0, as llama.cpp does"),
        ("tq2_0", 32, "use q4_0, as llama.cpp does"),
        ("iq4_xs", 32, "use iq4_nl, as llama.cpp does"),
        ("iq2_xxs", 32, "use iq4_nl, as llama.cpp does"),
        ("gguf-nvfp4", 32, "cannot be cut into blocks of 64; use q4_0 or q8_0"),
        ("q8_0", 40, "40 weights per output channel cannot be cut into blocks of 32; use fp16"),
        ("q4_K", 100, "use fp16"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(name: str, columns: int, reason: str) -> None:
    assert reason in GgufType(name).refuses(Layer("fc", "linear", (4, columns)))


def test_what_layers_fit() -> None:
    fmt = GgufType("q4_K")
    assert fmt.refuses(Layer("fc", "linear", (4, 256))) == ""
    assert fmt.refuses(Layer("e", "embedding", (4, 512))) == ""
    assert fmt.refuses(Layer("x", "expert", (2, 4, 256), 1)) == ""
    assert fmt.refuses(Layer("x", "linear", (256, 3), 1)) == ""
    assert "cannot be cut" in fmt.refuses(Layer("x", "linear", (3, 256), 1))
    assert "convolutions in 16 bits" in GgufType("q8_0").refuses(Layer("c", "conv", (32, 32, 3, 3)))
    assert "formats that begin with kv-" in fmt.refuses(Layer("kv", "kv_cache", (2, 256)))


@pytest.mark.parametrize("name", sorted(LATTICES))
def test_lattices_are_priced_and_read_but_not_rounded_to(name: str) -> None:
    fmt, layer = GgufType(name), Layer("fc", "linear", (2, 256))
    assert f"cannot round to {name}" in fmt.refuses(layer)
    assert fmt.bytes(layer) == 2 * BLOCKS[name].size
    assert fmt in set(GgufType("q4_K").catalogue())
    with pytest.raises(InputError, match="it is priced only") as caught:
        quantize(torch.ones(2, 256), fmt)
    assert caught.value.code == "E130"
    with pytest.raises(RangeError, match="cannot round to"):
        encode(torch.ones(2, 256), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROUNDED)
def test_writes_the_bytes_of_ggml(name: str, kind: str) -> None:
    small, large = weights(kind, 1, 512), weights(kind, 64, 1024)
    digests = [hashlib.sha256(x.tobytes()).hexdigest() for x in (small, large)]
    assert digests == RECORDED["inputs_sha256"][kind], "the inputs are others than those recorded"
    if kind not in RECORDED["blocks"][name]:
        assert (name, kind) in {("gguf-nvfp4", "spread over groups of 16"), ("gguf-nvfp4", "spread over groups of 32")}
        return
    assert encode(small[:, :256].copy(), name).numpy().tobytes().hex() == RECORDED["blocks"][name][kind]
    made = encode(large, name).numpy().tobytes()
    assert hashlib.sha256(made).hexdigest() == RECORDED["digests"][name][kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IN_PYTHON)
def test_writes_the_bytes_of_the_gguf_package(name: str, kind: str) -> None:
    weight = weights(kind, 33, 768)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(weight, kind_of(name))
    assert np.array_equal(encode(weight, name).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROUNDED)
def test_reads_what_it_wrote_as_gguf_does(name: str, kind: str) -> None:
    weight = weights(kind, 8, 512)
    if name == "gguf-nvfp4" and np.abs(weight).max() > 2688:
        return
    payload = encode(weight, name)
    assert same_bits(decode(payload, name), read_by_gguf(payload, name))


@pytest.mark.parametrize("name", BLOCKS)
def test_reads_any_bytes_as_gguf_does(name: str) -> None:
    drawn = np.random.default_rng(3).integers(0, 256, (16, 4 * BLOCKS[name].size), np.uint8)
    if name == "gguf-mxfp4":
        # The package itself drops out on exponents that its conversion to float32 cannot hold.
        drawn[:, :: BLOCKS[name].size] %= 250
    payload = torch.from_numpy(drawn)
    ours, theirs = decode(payload, name), read_by_gguf(payload, name)
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert same_bits(ours.masked_fill(nan, 0), theirs.masked_fill(nan, 0))
    assert int((~nan).sum()) > nan.numel() // 2


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_number_type_is_rounded_in_float32(name: str, dtype: str) -> None:
    fmt, weight = GgufType(name), normal(3, 512).to(TORCH_DTYPES[dtype])
    before = weight.clone()
    found = fake_quantize(weight, fmt)
    assert torch.equal(weight, before)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert torch.equal(found, fake_quantize(weight.float(), fmt).to(weight.dtype))
    assert torch.equal(dequantize(quantize(weight, fmt)).view(torch.uint8), found.view(torch.uint8))


@pytest.mark.parametrize("name", ROUNDED)
def test_strides_axes_and_experts(name: str) -> None:
    fmt, weight = GgufType(name), normal(4, 512)
    expected = fake_quantize(weight, fmt)
    assert torch.equal(fake_quantize(weight.T.contiguous(), fmt, 1), expected.T)
    wide = torch.zeros(8, 1024)
    wide[::2, ::2] = weight
    assert torch.equal(fake_quantize(wide[::2, ::2], fmt), expected)
    experts = torch.stack([weight, 2 * weight])
    assert torch.equal(fake_quantize(experts, fmt, (0, 1))[0], expected)
    assert torch.equal(fake_quantize(experts.transpose(1, 2), fmt, (0, 2))[0], expected.T)


@pytest.mark.parametrize("name", ROUNDED)
def test_packing_is_the_file_and_comes_back(name: str) -> None:
    fmt, layer = GgufType(name), Layer("fc", "linear", (5, 768), dtype="bfloat16")
    weight = normal(5, 768).bfloat16()
    made = quantize(weight, fmt)
    packed = pack(made, fmt)
    assert {part: held.nbytes for part, held in packed.items()} == fmt.itemised_bytes(layer)
    assert np.array_equal(packed["payload"], made.parts["payload"].numpy().reshape(-1))
    back = unpack(packed, fmt, layer)
    assert list(back.parts) == ["payload"]
    assert torch.equal(back.parts["payload"], made.parts["payload"])
    assert torch.equal(dequantize(back), fake_quantize(weight, fmt))
    with pytest.raises(InputError, match="payload holds 3 bytes"):
        unpack({"payload": packed["payload"][:3]}, fmt, layer)


@pytest.mark.parametrize("name", ROUNDED)
def test_zeros_stay_zeros_and_constants_stay_near(name: str) -> None:
    fmt = GgufType(name)
    assert bool((fake_quantize(torch.zeros(2, 256), fmt) == 0).all())
    assert bool((fake_quantize(torch.full((2, 256), -0.0), fmt) == 0).all())
    for value in (0.37, -0.37, 3.0):
        found = fake_quantize(torch.full((2, 256), value), fmt)
        near = 0.13 if "fp4" in name else 0.02
        assert float((found / value - 1).abs().max()) < near


@LAWS
@given(name=st.sampled_from(ROUNDED), seed=st.integers(0, 999), first=st.integers(0, 5), count=st.integers(1, 6))
def test_blocks_stand_alone(name: str, seed: int, first: int, count: int) -> None:
    block, weight = BLOCKS[name], normal(1, 1536, seed) ** 3
    part = weight[:, first * 256 : (first + count) * 256]
    whole = encode(weight, name).reshape(-1, block.size)
    each = 256 // block.weights
    assert torch.equal(
        encode(part.contiguous(), name).reshape(-1, block.size), whole[first * each :][: len(part[0]) // block.weights]
    )


@LAWS
@given(name=st.sampled_from(ROUNDED), seed=st.integers(0, 999), power=st.integers(-1, 3))
def test_scales_with_powers_of_two(name: str, seed: int, power: int) -> None:
    weight, fmt = normal(2, 256, seed), GgufType(name)
    assert torch.equal(fake_quantize(weight * 2.0**power, fmt), fake_quantize(weight, fmt) * 2.0**power)


@LAWS
@given(name=st.sampled_from(ROUNDED), seed=st.integers(0, 999), share=st.floats(0, 1), magnitude=st.integers(-160, 8))
def test_is_finite_and_no_further_from_zero_than_the_weights(
    name: str, seed: int, share: float, magnitude: int
) -> None:
    weight = normal(2, 512, seed) ** 5
    weight[torch.rand(2, 512, generator=torch.Generator().manual_seed(seed)) < share] = 0.0
    weight = torch.ldexp(weight.clamp(-100, 100), torch.tensor(magnitude))
    top = float(weight.abs().max())
    if top > 2688 and name == "gguf-nvfp4":
        return
    found = fake_quantize(weight, GgufType(name))
    assert bool(found.isfinite().all())
    # The coarse types may put the widest weight on the next value of their grid.
    assert float(found.abs().max()) <= 1.34 * top + 2.0**-10 * (magnitude > -30) + 2.0**-14


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 127), ("q5_1", 31), ("q4_1", 15), ("q5_0", 16), ("q4_0", 8)])
def test_error_is_at_most_half_a_step(name: str, steps: int) -> None:
    weight = normal(64, 512).reshape(-1, 32)
    found = fake_quantize(weight, GgufType(name))
    offset = name.endswith("_1")
    span = weight.amax(1) - weight.amin(1) if offset else weight.abs().amax(1)
    step = (span / steps).unsqueeze(1)
    error = (found - weight).abs() / step
    # fp16 scales move a value by up to 2**-11 of itself; of q4_0 and q5_0 the far end has no code.
    slack = 0.5 + steps * 2.0**-10
    inside = torch.ones_like(weight, dtype=torch.bool)
    if name in ("q4_0", "q5_0"):
        widest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
        inside = weight * -widest.sign() <= (steps - 1) * step
    assert bool((error[inside] <= slack).all())
    assert float(error.max()) <= 1.0 + slack - 0.5


def test_more_bits_are_nearer_and_searches_beat_their_plain_kin() -> None:
    weight = normal(64, 1024)
    error = {name: float((fake_quantize(weight, GgufType(name)) - weight).square().mean()) for name in ROUNDED}
    for worse, better in (("q2_K", "q3_K"), ("q3_K", "q4_K"), ("q4_K", "q5_K"), ("q5_K", "q6_K"), ("q6_K", "q8_0")):
        assert error[better] < error[worse] / 2
    assert error["q4_K"] < error["q4_0"] * 0.8
    assert error["iq4_nl"] < error["q4_0"] * 0.9
    assert error["iq4_xs"] < error["q4_0"] * 0.9
    assert error["gguf-nvfp4"] < error["gguf-mxfp4"]


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        *((name, 1e38, "its fp16 scales end at 65504") for name in ROUNDED if "fp4" not in name),
        *((name, 1e30, "its fp16 scales end at 65504") for name in ROUNDED if "fp4" not in name),
        ("q4_0", 8.5 * 65520, "weights reach 5.569e+05, too much for q4_0"),
        ("q4_1", -7e4, "its fp16 scales end at 65504"),
        ("q4_K", 7e7, "its fp16 scales end at 65504"),
        ("q6_K", 3e8, "its fp16 scales end at 65504"),
        ("gguf-nvfp4", 2700.0, "2688 is the largest it can hold"),
    ],
)
def test_numbers_beyond_the_scales_are_refused(name: str, value: float, limit: str) -> None:
    weight = normal(2, 256)
    weight[1, 7] = value
    with pytest.raises(InputError) as caught:
        fake_quantize(weight, GgufType(name), name="model.fc")
    assert caught.value.code == "E421"
    assert limit in caught.value.message
    if name != "gguf-nvfp4":
        found = fake_quantize(weight, GgufType("gguf-mxfp4"))
        assert abs(float(found[1, 7]) / value - 1) < 0.34


def test_scales_are_searched_anew_on_every_pass() -> None:
    for name in ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs"):
        assert not GgufType(name).idempotent
        once = fake_quantize(normal(64, 1024) ** 3, GgufType(name))
        assert not torch.equal(fake_quantize(once, GgufType(name)), once)


@LAWS
@given(name=st.sampled_from(("q8_0", "q4_0", "q5_0", "tq1_0", "tq2_0")), seed=st.integers(0, 999))
def test_types_with_one_scale_without_search_are_idempotent(name: str, seed: int) -> None:
    assert GgufType(name).idempotent
    once = fake_quantize(normal(4, 512, seed) ** 3, GgufType(name))
    assert torch.equal(fake_quantize(once, GgufType(name)), once)


@pytest.mark.parametrize("name", ["q4_K", "q8_0", "iq4_xs", "gguf-mxfp4"])
def test_a_tensor_in_pieces_is_the_same_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(7, 768)
    whole = encode(weight, name)
    monkeypatch.setattr(gguf_types, "_PIECE", {"cpu": 1024})
    assert torch.equal(encode(weight, name), whole)
    assert same_bits(decode(whole, name), read_by_gguf(whole, name))


@pytest.mark.parametrize("name", K_TYPES)
def test_is_quick(name: str) -> None:
    weight = normal(512, 2048)
    start = time.perf_counter()
    fake_quantize(weight, GgufType(name))
    # 0.15 s on a free core: 2.5 s for 4096 x 4096.
    assert time.perf_counter() - start < 3.0
