"""NormalFloat beside bitsandbytes, ternary weights, and code books beside plain k-means."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence
from mpsearch.model.codecs import codebook, normal_float
from mpsearch.model.packing import pack
from mpsearch.model.quantize import dequantize, fake_quantize, quantize
from mpsearch.testing.formats import CHECKS, check_constants, check_family, check_format, same_bits
from tests.reference_libraries import quiet_import

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"
LAWS = settings(max_examples=80, deadline=None)


def table(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def bnb() -> Any:
    return quiet_import("bitsandbytes.functional")


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NORMAL = randn(24, 512)
INPUTS: dict[str, Tensor] = {
    "normal": NORMAL,
    "heavy-tailed": NORMAL**3,
    "student": randn(24, 512, seed=4) / NORMAL.abs().sqrt(),
    "constant": torch.full((8, 256), 0.37),
    "negative constant": torch.full((8, 256), -0.37),
    "zero": torch.zeros(4, 256),
    "some blocks zero": NORMAL * (torch.arange(512) // 64 % 2),
    "huge": NORMAL * 1e30,
    "largest": NORMAL.clamp(-1, 1) * 3e38,
    "small": NORMAL * 1e-30,
    "bf16": NORMAL.bfloat16(),
    "fp16": NORMAL.half(),
}


# --- NormalFloat ------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_table() -> None:
    made = table("nf4")
    assert list(normal_float.numbers(4)) == made["nf4"]
    for bits in (2, 3):
        assert normal_float.numbers(bits) == pytest.approx(made[f"nf{bits}_computed"], abs=1e-12)
        assert 0.0 in normal_float.numbers(bits)
        assert list(normal_float.numbers(bits)) == sorted(normal_float.numbers(bits))


def test_numbers_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(normal_float.numbers(4)), bnb().get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(normal_float.dynamic_map()), bnb().create_dynamic_map())


def test_bits_per_weight_are_those_of_the_table() -> None:
    rows = {row["format"]: row["bpw"] for row in table("effective_bits")["rows"]}
    layer = Layer("x", "linear", (4096, 4096))
    said = {
        "NF4 block64 fp32 absmax": "nf4-b64",
        "NF4 double quant (QLoRA)": "nf4-b64-dq256",
        "NF3 double quant (LQ-LoRA nf3)": "nf3-b64-dq256",
    }
    # LQ-LoRA's other settings keep absmaxes in 2 to 8 bits and bf16, which no layout here says.
    assert {name for name in rows if name.startswith("NF")} == set(said)
    for name, text in said.items():
        # The table leaves out the mean: 32 bits of a tensor.
        mean = 32 / layer.weights if "dq" in text else 0
        assert float(Format.parse(text).effective_bits(layer)) == rows[name] + mean
    examples = {row["format"]: row["bytes"] for row in table("effective_bits")["exact_bytes_examples"]}
    assert Format.parse("nf4-b64-dq256").bytes(layer) == examples["NF4 double quant block64/256, fp32 2nd level"] + 4


def halves(packed: Tensor, shape: torch.Size) -> Tensor:
    """The codes that bitsandbytes packed, the first of two in the high half of a byte."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(shape)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_nf4_is_bitsandbytes_to_the_bit(block: int, kind: str) -> None:
    weight, fmt = INPUTS[kind], Format.parse(f"nf4-b{block}")
    packed, state = bnb().quantize_4bit(weight, blocksize=block, quant_type="nf4")
    made = quantize(weight, fmt)
    assert torch.equal(made.parts["payload"], halves(packed, weight.shape))
    assert same_bits(made.parts["absmax"].reshape(-1), state.absmax)
    assert same_bits(fake_quantize(weight, fmt), bnb().dequantize_4bit(packed, state))


def test_ties_go_down() -> None:
    numbers = torch.tensor(normal_float.NF4)
    ties = torch.cat([(numbers[:-1] + numbers[1:]) / 2, torch.ones(1), torch.zeros(48)]).reshape(1, 64)
    made = quantize(ties, Format.parse("nf4-b64"))
    assert made.parts["payload"][0, :16].tolist() == list(range(16))
    packed, _ = bnb().quantize_4bit(ties, blocksize=64, quant_type="nf4")
    assert torch.equal(made.parts["payload"], halves(packed, ties.shape))


def test_blocks_below_1e38_become_zeros_here_and_not_there() -> None:
    weight = NORMAL * 1e-40
    assert not fake_quantize(weight, Format.parse("nf4-b64")).any()
    assert bool((quantize(weight, Format.parse("nf4-b64")).parts["payload"] == normal_float.NF4.index(0.0)).all())
    packed, state = bnb().quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = bnb().dequantize_4bit(packed, state)
    assert bool(theirs.any())
    assert float(theirs.abs().max()) < 1e-38


@pytest.mark.parametrize("kind", INPUTS)
def test_double_quantization_is_bitsandbytes_but_for_its_mean(kind: str) -> None:
    weight, fmt, lib = INPUTS[kind], Format.parse("nf4-b64-dq256"), bnb()
    plain = quantize(weight, Format.parse("nf4-b64")).parts["absmax"].reshape(-1)
    made = quantize(weight, fmt)
    packed, state = lib.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(made.parts["payload"], halves(packed, weight.shape))
    # Theirs is a float32 sum, which is infinite for the largest numbers.
    if kind == "largest":
        assert bool(torch.isinf(state.offset))
    else:
        torch.testing.assert_close(made.parts["nested_mean"][0], state.offset, rtol=1e-6, atol=0)
    # From our mean on: what is rounded, by the rule that its CPU kernel has for float64, which looks nothing up.
    centred = plain - made.parts["nested_mean"]
    if bool(centred.any()):
        codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
            centred.double(), lib.create_dynamic_map(), 256
        )
        assert torch.equal(made.parts["absmax"].reshape(-1), codes)
        assert same_bits(made.parts["nested_absmax"], nested)
    # And how it is read.
    inner = lib.QuantState(
        made.parts["nested_absmax"], code=lib.create_dynamic_map(), blocksize=256, dtype=torch.float32
    )
    outer = lib.QuantState(
        made.parts["absmax"].reshape(-1),
        weight.shape,
        state.code,
        64,
        "nf4",
        weight.dtype,
        made.parts["nested_mean"],
        inner,
    )
    assert torch.equal(dequantize(made), lib.dequantize_4bit(packed, outer))


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "student", "bf16"])
def test_double_quantization_is_as_near_as_the_lookup_of_bitsandbytes(kind: str) -> None:
    weight, lib = INPUTS[kind], bnb()
    packed, state = lib.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize(weight, Format.parse("nf4-b64-dq256")).parts
    codes = ours["absmax"].reshape(-1)
    # Its CPU kernel cuts -1 to 1 into 65536 cells; numbers of one cell get one code.
    apart = codes != state.absmax
    levels = torch.tensor(normal_float.dynamic_map())
    assert float(apart.float().mean()) < 0.1
    steps = (levels[codes[apart].long()] - levels[state.absmax[apart].long()]).abs()
    assert not steps.numel() or float(steps.max()) < 0.015
    found, theirs = fake_quantize(weight, Format.parse("nf4-b64-dq256")), lib.dequantize_4bit(packed, state)
    ours_lost, lost = ((x.float() - weight.float()).square().sum() for x in (found, theirs))
    assert float(ours_lost) <= float(lost) * 1.001


def test_double_quantization_of_equal_blocks_is_exact() -> None:
    for value in (0.37, -2.0, 1e30):
        weight = torch.full((3, 128), value)
        assert torch.equal(fake_quantize(weight, Format.parse("nf4-b64-dq256")), weight)


def test_the_largest_numbers_stay_finite() -> None:
    for small in range(1, 12):
        weight = torch.full((24, 128), 3.4e38)
        weight[:, ::3] = 0
        weight[:small] = 1.0
        # Some of these means round the absmax of the other rows up, past the end of float32.
        assert bool(torch.isfinite(fake_quantize(weight, Format.parse("nf4-b64-dq256"))).all()), small


@pytest.mark.parametrize("text", ["nf4-b64", "nf3-b32", "nf2-b16"])
def test_without_double_quantization_rounding_again_changes_nothing(text: str) -> None:
    for kind, weight in INPUTS.items():
        once = fake_quantize(weight, Format.parse(text))
        assert same_bits(fake_quantize(once, Format.parse(text)), once), kind


def test_doubly_quantized_rounding_again_with_the_stored_absmaxes_changes_nothing() -> None:
    fmt = Format.parse("nf4-b64-dq256")
    weight = INPUTS["heavy-tailed"] + 3 * NORMAL
    parts = quantize(weight, fmt).parts
    levels, spread = torch.tensor(normal_float.dynamic_map()), parts["nested_absmax"].repeat_interleave(256)
    absmax = levels[parts["absmax"].long().reshape(-1)] * spread[: parts["absmax"].numel()] + parts["nested_mean"]
    assert float(absmax.min()) > 0
    values = fake_quantize(weight, fmt).reshape(-1, 64)
    again = normal_float._nearest(values, absmax, normal_float.numbers(4))
    assert torch.equal(again.reshape(weight.shape), parts["payload"])


@LAWS
@given(
    weight=arrays.arrays(np.float32, (3, 32), elements=st.floats(-60000, 60000, width=32)).map(torch.from_numpy),
    bits=st.sampled_from([2, 3, 4]),
    power=st.integers(-20, 20),
)
def test_normal_floats_are_the_nearest_of_their_block(weight: Tensor, bits: int, power: int) -> None:
    fmt, levels = Format.parse(f"nf{bits}-b16"), torch.tensor(normal_float.numbers(bits), dtype=torch.float64)
    weight = weight * (weight.abs() > 1e-20)
    found = fake_quantize(weight, fmt).double().reshape(-1, 16, 1)
    wide = weight.double().reshape(-1, 16, 1)
    absmax = wide.abs().amax(1, keepdim=True)
    least = (wide - levels * absmax).abs().amin(-1, keepdim=True)
    assert bool(((wide - found).abs() <= least + 1e-6 * absmax).all())
    assert torch.equal(fake_quantize(weight * 2.0**power, fmt), fake_quantize(weight, fmt) * 2.0**power)


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b16-dq16", "nf3-b32-dq64", "nf2-b128"])
def test_normal_floats_keep_every_law(text: str) -> None:
    check_format(Format.parse(text))


@pytest.mark.parametrize(("rows", "columns", "blocks"), [(3, 128, 6), (5, 4096, 320), (8, 2048, 256), (257, 64, 257)])
def test_the_last_blocks_of_blocks_may_be_short(rows: int, columns: int, blocks: int) -> None:
    fmt, layer = Format.parse("nf4-b64-dq256"), Layer("x", "linear", (rows, columns))
    assert fmt.itemised_bytes(layer) == {
        "payload": rows * columns // 2,
        "absmax": blocks,
        "nested_absmax": 4 * math.ceil(blocks / 256),
        "nested_mean": 4,
    }
    packed = pack(quantize(randn(rows, columns), fmt), fmt)
    assert {name: part.nbytes for name, part in packed.items()} == fmt.itemised_bytes(layer)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nf5-b64", "2, 3 or 4 bits, not 5"),
        ("nf4-b65", "blocks of 65 are not known; allowed 16, 32, 64"),
        ("nf4-b64-dq0", "blocks of 0 are not known"),
        ("ternary-g0", "a group of 0 weights is impossible; allowed 1 and more"),
        ("codebook1-channel", "2 to 8 bits here, not 1"),
        ("codebook9-channel", "2 to 8 bits here, not 9"),
        ("codebook4-g16", "a code book of 16 numbers for 16 weights; allowed g17 and up"),
        ("codebook2-g0", "for 0 weights"),
    ],
)
def test_impossible_names_say_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Format.parse(text)
    assert caught.value.code == "E110"


@pytest.mark.parametrize(
    "text", ["nf4", "nf4-channel", "nf4-b64-dq", "ternary", "ternary-b64", "codebook4", "codebook4-b64"]
)
def test_other_names_are_not_known(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Format.parse(text)
    assert caught.value.code == "E109"


def test_blocks_must_fit_into_a_row() -> None:
    fmt = Format.parse("nf4-b64")
    assert fmt.refuses(Layer("x", "linear", (64, 96))).endswith("cannot be cut into blocks of 64; use b32, b16")
    assert fmt.refuses(Layer("x", "linear", (64, 100))).endswith("use int4-channel")


# --- ternary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ternary-channel", "ternary-tensor", "ternary-g32", "ternary-g3"])
def test_ternary_ones_keep_every_law(text: str) -> None:
    check_format(Format.parse(text), odd=True)


def test_ternary_known_answer() -> None:
    fmt = Format.parse("ternary-channel")
    # The mean is 1: 0.5 lies on the tie and goes to the even 0, 1.5 and what lies above go to 1.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.75, -0.75, 0.25, 2.25]])
    made = quantize(weight, fmt)
    assert made.parts["scales"].tolist() == [[1.0]]
    assert made.parts["payload"].tolist() == [[0, 0, 1, -1, 1, -1, 0, 1]]
    packed = pack(made, fmt)
    assert packed["payload"].tolist() == [0b00_10_01_01, 0b10_01_00_10]
    assert dequantize(made).tolist() == [[0, 0, 1, -1, 1, -1, 0, 1]]


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "student", "constant", "zero", "bf16"])
def test_ternary_is_bitnet_with_an_fp16_scale(kind: str) -> None:
    weight = INPUTS[kind].float()
    found = fake_quantize(weight, Format.parse("ternary-tensor"))
    mean = weight.abs().mean().clamp_(min=1e-5)
    codes = (weight / mean).round().clamp(-1, 1)
    near_tie = ((weight / mean).abs() - 0.5).abs() < 1e-3
    assert bool((found.sign() == codes)[~near_tie].all())
    torch.testing.assert_close(found[~near_tie], (codes * mean)[~near_tie], rtol=2**-11, atol=0)


@LAWS
@given(
    weight=arrays.arrays(np.float32, (2, 12), elements=st.floats(-64, 64, width=32)).map(torch.from_numpy),
    power=st.integers(-3, 3),
)
def test_ternary_scales_with_powers_of_two(weight: Tensor, power: int) -> None:
    weight = weight + 0.125 * weight.sign()
    fmt = Format.parse("ternary-g4")
    assert torch.equal(fake_quantize(weight * 2.0**power, fmt), fake_quantize(weight, fmt) * 2.0**power)


def test_ternary_refuses_what_fp16_cannot_scale() -> None:
    with pytest.raises(InputError, match=r"weights reach 1e\+30; the fp16 scale of ternary-channel ends at 65504"):
        fake_quantize(torch.full((1, 4), 1e30), Format.parse("ternary-channel"))


def test_two_bits_hold_four_codes_a_byte() -> None:
    layer = Layer("x", "linear", (4096, 4096))
    assert float(Format.parse("ternary-g128").effective_bits(layer)) == 2 + 16 / 128
    assert Format.parse("ternary-tensor").bytes(layer) == 4096 * 1024 + 2


# --- code books -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["codebook4-channel", "codebook3-channel-fisher", "codebook2-g16", "codebook2-g32-fisher"]
)
def test_code_books_keep_every_law(text: str) -> None:
    check_format(Format.parse(text))


def test_a_code_book_of_a_tensor_keeps_every_law_but_zeros_in_some_rows() -> None:
    for law in CHECKS:
        if law is not check_constants:
            law(Format.parse("codebook3-tensor"))
    assert not fake_quantize(torch.zeros(3, 8), Format.parse("codebook3-tensor")).any()


def lost(weight: Tensor, text: str, importance: Tensor | None = None) -> Tensor:
    apart = (
        fake_quantize(weight, Format.parse(text), evidence=Evidence(importance=importance)).double() - weight.double()
    )
    return (apart.square() * (1.0 if importance is None else importance.double())).sum(-1)


def best_cuts(row: list[float], k: int) -> float:
    """The least sum of squares of a row cut into k runs: every way is tried."""
    ordered, least = sorted(row), math.inf
    for cuts in combinations(range(1, len(row)), k - 1):
        ends = [0, *cuts, len(row)]
        runs = [np.array(ordered[a:b]) for a, b in pairwise(ends)]
        least = min(least, sum(float(((run - run.mean()) ** 2).sum()) for run in runs))
    return least


def test_centroids_are_near_the_best_there_are() -> None:
    weight = torch.cat([randn(20, 11), randn(20, 11, seed=5) ** 3])
    best = [best_cuts(row, 4) for row in weight.double().tolist()]
    found = lost(weight, "codebook2-channel").tolist()
    # fp16 moves a centroid by at most 2^-11 of it.
    assert all(a >= b * 0.999 for a, b in zip(found, best, strict=True))
    assert sum(found) <= 1.25 * sum(best)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "student", "bf16"])
def test_code_books_are_no_worse_than_an_even_grid(kind: str, bits: int) -> None:
    weight = INPUTS[kind].float()
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    even = (((weight - low) / step).round() * step + low - weight).double().square().sum(-1)
    found = lost(weight, f"codebook{bits}-channel")
    assert bool((found <= even * 1.001).all())
    assert float(found.sum()) < 0.8 * float(even.sum())


def test_centroids_are_the_means_of_the_weights_nearest_to_them() -> None:
    weight, counts = randn(6, 300), torch.rand(6, 300, generator=torch.Generator().manual_seed(1))
    for weights in (None, counts):
        found = codebook.centroids(weight, 8, weights)
        assert torch.equal(found, found.sort(-1).values)
        owner = torch.searchsorted(((found[:, :-1] + found[:, 1:]) / 2).float(), weight)
        heap = torch.ones(6, 300, dtype=torch.float64) if weights is None else weights.double()
        total = torch.zeros(6, 8, dtype=torch.float64).scatter_add_(1, owner, heap)
        moment = torch.zeros(6, 8, dtype=torch.float64).scatter_add_(1, owner, heap * weight.double())
        torch.testing.assert_close(moment / total, found, rtol=1e-9, atol=1e-9)


def test_importance_draws_centroids_to_the_weights_that_matter() -> None:
    weight = randn(8, 256)
    importance = (weight.abs() > 1.5).float() * 100 + 0.01
    weighed = lost(weight, "codebook3-channel-fisher", importance).sum()
    apart = fake_quantize(weight, Format.parse("codebook3-channel")).double() - weight.double()
    assert float(weighed) < 0.5 * float((apart.square() * importance).sum())


def test_equal_or_missing_importance_changes_nothing() -> None:
    weight = randn(4, 128)
    plain = fake_quantize(weight, Format.parse("codebook3-channel"))
    for value in (1.0, 0.25, 0.0):
        same = torch.full((4, 128), value)
        assert torch.equal(
            fake_quantize(weight, Format.parse("codebook3-channel-fisher"), evidence=Evidence(importance=same)), plain
        )
    some = torch.ones(4, 128)
    some[0] = 0
    mixed = fake_quantize(weight, Format.parse("codebook3-channel-fisher"), evidence=Evidence(importance=some))
    assert torch.equal(mixed, plain)


@LAWS
@given(
    values=st.lists(st.integers(-2000, 2000).map(float), min_size=1, max_size=8),
    picks=st.lists(st.integers(0, 7), min_size=20, max_size=20),
    unit=st.sampled_from([1.0, 2.0**-10, 2.0**3]),
)
def test_few_values_are_kept_exactly(values: list[float], picks: list[int], unit: float) -> None:
    weight = torch.tensor([[values[n % len(values)] for n in picks]]) * unit
    for text in ("codebook3-channel", "codebook3-tensor", "codebook4-g20"):
        assert torch.equal(fake_quantize(weight, Format.parse(text)), weight)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "constant", "zero", "some blocks zero", "bf16", "fp16"])
def test_code_books_of_rounded_weights_change_nothing(kind: str) -> None:
    for text in ("codebook4-channel", "codebook2-g128"):
        once = fake_quantize(INPUTS[kind], Format.parse(text))
        assert same_bits(fake_quantize(once, Format.parse(text)), once)


def test_lots_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = randn(7, 96), torch.rand(7, 96, generator=torch.Generator().manual_seed(2))
    texts = ("codebook3-channel-fisher", "codebook2-g32-fisher")
    whole = [fake_quantize(weight, Format.parse(text), evidence=Evidence(importance=importance)) for text in texts]
    monkeypatch.setattr(codebook, "_LOT", {"cpu": 200})
    for text, expected in zip(texts, whole, strict=True):
        assert torch.equal(
            fake_quantize(weight, Format.parse(text), evidence=Evidence(importance=importance)), expected
        )


def test_code_books_refuse_what_fp16_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"weights reach 1e\+30; the fp16 numbers of codebook4-channel end at 65504"):
        fake_quantize(torch.full((1, 40), 1e30), Format.parse("codebook4-channel"))


def test_more_bits_take_no_fewer_bytes() -> None:
    check_family([Format.parse(f"codebook{bits}-{grain}") for bits in range(2, 9) for grain in ("channel", "tensor")])
    check_family([Format.parse(f"nf{bits}-b64{nested}") for bits in (2, 3, 4) for nested in ("", "-dq256")])
