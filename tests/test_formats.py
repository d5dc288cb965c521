"""Every format of every family keeps the laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.format import Format, Joined, all_formats
from mpsearch.formats.gguf_types import LATTICES
from mpsearch.formats.integer import Integer
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence
from mpsearch.model.packing import pack, unpack
from mpsearch.model.quantize import dequantize, fake_quantize, quantize
from mpsearch.testing import format_cases as samples
from mpsearch.testing import formats as suite

torch.set_num_threads(1)
ALL = all_formats()
#: What we can price but not round to.
PRICED = [fmt for fmt in ALL["gguf"] if str(fmt) in LATTICES]
LAWS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def is_odd(fmt: Format) -> bool:
    """Whether the grid of a built-in format is symmetric."""
    if isinstance(fmt, Integer):
        return fmt.grid == ""
    return fmt.family in ("plain", "fp", "mx", "nvfp4", "ternary") or str(fmt) == "q8_0"


# --- the suite on all families


def checks_of(fmt: Format) -> list[Callable[[Format], None]]:
    if fmt.family == "kv":
        return [suite.check_format]
    if fmt in PRICED:
        return [suite.check_name]
    return [*suite.CHECKS, *([suite.check_odd] if is_odd(fmt) else [])]


@pytest.mark.parametrize(
    ("fmt", "law"),
    [
        pytest.param(fmt, law, id=f"{fmt}-{law.__name__}")
        for formats in ALL.values()
        for fmt in formats
        for law in checks_of(fmt)
    ],
)
def test_keeps_the_laws(fmt: Format, law: Callable[[Format], None]) -> None:
    law(fmt)


def test_no_family_is_left_out() -> None:
    assert list(ALL) == list(registry.names("formats"))
    assert set(registry.BUILT_IN["formats"]) <= set(ALL)
    for family, formats in ALL.items():
        assert formats, family
        assert {fmt.family for fmt in formats} == {family}
        assert [str(fmt) for fmt in formats][: len(type(formats[0]).examples)] == list(type(formats[0]).examples)


@pytest.mark.parametrize("fmt", PRICED, ids=str)
def test_what_is_priced_only_refuses_every_layer_and_says_so(fmt: Format) -> None:
    layer = Layer("fc", "linear", (4, 256))
    assert "priced only" in fmt.refuses(layer)
    assert all(fmt.refuses(other) for other in samples.shapes())
    assert fmt.bytes(layer) > 0
    with pytest.raises(InputError, match=r"E130.*priced only"):
        fake_quantize(torch.ones(4, 256), fmt)


@pytest.mark.parametrize("family", list(ALL))
def test_zeros_are_positive_zeros(family: str) -> None:
    """But for GGUF's, whose scale can be -0; there llama.cpp's bits are what counts."""
    for fmt in ALL[family]:
        for layer, weight in [] if family in ("kv", "gguf") else samples.cases(fmt):
            weight.select(layer.row_axes[-1], 0).zero_()
            found = samples.rounded(fmt, layer, weight).select(layer.row_axes[-1], 0)
            assert samples.same_bits(found, torch.zeros_like(found)), fmt


@pytest.mark.parametrize("family", list(ALL))
def test_more_bits_take_no_fewer_bytes(family: str) -> None:
    suite.check_family(ALL[family])


def test_more_bits_take_no_fewer_bytes_in_all_integers() -> None:
    grains = [f"{grain}{grid}" for grain in ("tensor", "channel", "g5", "g64") for grid in ("", "-asym", "-full")]
    suite.check_family([Format.parse(f"int{bits}-{grain}") for bits in range(2, 9) for grain in grains])


# --- random formats of all families


def numbered(pattern: str, *choices: list[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.sampled_from(one) for one in choices)).map(lambda found: pattern.format(*found))


GRAINS = ["tensor", "channel", "g1", "g3", "g8", "g32"]
RANDOM: Mapping[str, st.SearchStrategy[str]] = {
    "int": numbered("int{}-{}{}{}", list("2345678"), GRAINS, ["", "-asym", "-full"], ["", "-mse", "-gptq"]),
    "fp": numbered(
        "fp{}{}{}",
        ["8-e4m3", "8-e5m2", "6-e2m3", "6-e3m2", "4-e2m1"],
        ["", "-channel", "-g1", "-g7", "-g32", "-b2x3", "-b128x128"],
        ["", "-mse"],
    ),
    "nf": numbered("nf{}-b{}{}", list("234"), ["16", "32", "128"], ["", "-dq16", "-dq256"]),
    "ternary": numbered("ternary-{}", GRAINS),
    "codebook": numbered("codebook{}-{}{}", list("234"), ["tensor", "channel", "g24"], ["", "-fisher"]),
}


def texts(family: str) -> st.SearchStrategy[str]:
    """Names of a family: of a grammar with many, any of them; else those that it shows."""
    return RANDOM.get(family, st.sampled_from([str(fmt) for fmt in ALL[family] if fmt not in PRICED]))


WEIGHT_FAMILIES = [family for family in ALL if family != "kv"]
any_format = st.sampled_from(WEIGHT_FAMILIES).flatmap(texts).map(Format.parse)


def unit(fmt: Format) -> int:
    """The smallest width that a format takes."""
    return next(n for n in range(1, 1025) if not fmt.refuses(Layer("fc", "linear", (2, n))))


@st.composite
def weights(draw: st.DrawFn, numbers: st.SearchStrategy[float]) -> tuple[Format, Tensor]:
    fmt = draw(any_format)
    width = unit(fmt)
    shape = (draw(st.integers(1, 4)), width * draw(st.integers(1, max(1, min(40 // width, 5)))))
    values = draw(arrays.arrays(np.float32, shape, elements=numbers, fill=numbers))
    return fmt, torch.from_numpy(values.copy())


anything = st.floats(allow_nan=False, allow_infinity=False, width=32)
size = st.floats(0.125, 64, width=32)
plain = st.one_of(st.just(0.0), size, size.map(lambda x: -x))


def evidence(fmt: Format, weight: Tensor) -> Evidence:
    return samples.evidence(fmt, Layer("fc", "linear", tuple(weight.shape)))


@LAWS
@given(case=weights(anything))
def test_codes_stand_for_what_is_measured_whatever_the_numbers(case: tuple[Format, Tensor]) -> None:
    fmt, weight = case
    before, known = weight.clone(), evidence(fmt, weight)
    try:
        made = quantize(weight, fmt, evidence=known)
    except InputError:
        for act in (quantize, fake_quantize):
            with pytest.raises(InputError, match="E421"):
                act(weight, fmt, evidence=known)
        return
    found = fake_quantize(weight, fmt, evidence=known)
    assert torch.isfinite(found).all()
    assert samples.same_bits(dequantize(made), found)
    assert samples.same_bits(weight, before)


@LAWS
@given(case=weights(plain))
def test_packed_bytes_are_those_of_the_price(case: tuple[Format, Tensor]) -> None:
    fmt, weight = case
    layer, made = Layer("fc", "linear", tuple(weight.shape)), quantize(weight, fmt, evidence=evidence(fmt, weight))
    packed = pack(made, fmt)
    assert {name: part.nbytes for name, part in packed.items()} == fmt.itemised_bytes(layer)
    back = unpack(packed, fmt, layer)
    assert list(back.parts) == list(made.parts)
    for name, part in made.parts.items():
        assert samples.same_bits(back.parts[name], part), name


@LAWS
@given(case=weights(plain), power=st.integers(-3, 3))
def test_scales_with_powers_of_two(case: tuple[Format, Tensor], power: int) -> None:
    fmt, weight = case
    # What GPTQ feeds on can be small enough for a scale among fp16's subnormals; GGUF's NVFP4 has few scales at all.
    assume(not str(fmt).endswith("-gptq") and str(fmt) != "gguf-nvfp4")
    if fmt.family == "gguf":
        # The fp16 number of a K-type is up to 4096 times smaller than the largest weight, and the search for it, as
        # llama.cpp's own, multiplies up to eight weights.
        weight = weight * 16.0
    known = evidence(fmt, weight)
    once = fake_quantize(weight, fmt, evidence=known)
    assert torch.equal(fake_quantize(weight * 2.0**power, fmt, evidence=known), once * 2.0**power)


@LAWS
@given(case=weights(plain))
def test_rounding_twice_changes_nothing_where_the_family_says_so(case: tuple[Format, Tensor]) -> None:
    fmt, weight = case
    assume(fmt.idempotent)
    once = fake_quantize(weight, fmt, evidence=evidence(fmt, weight))
    assert samples.same_bits(fake_quantize(once, fmt, evidence=evidence(fmt, weight)), once)


@LAWS
@given(case=weights(plain))
def test_symmetric_grids_are_odd(case: tuple[Format, Tensor]) -> None:
    fmt, weight = case
    assume(is_odd(fmt))
    known = evidence(fmt, weight)
    assert torch.equal(fake_quantize(-weight, fmt, evidence=known), -fake_quantize(weight, fmt, evidence=known))


@LAWS
@given(
    text=st.sampled_from(WEIGHT_FAMILIES).flatmap(texts),
    ending=st.sampled_from(["-", "-x", "0", " ", "@", "-asym-asym"]),
)
def test_names_read_back_and_others_do_not(text: str, ending: str) -> None:
    fmt = Format.parse(text)
    assert Format.parse(str(fmt)) == fmt
    try:
        other = Format.parse(str(fmt) + ending)
    except InputError:
        with pytest.raises(InputError, match=r"E109|E110"):
            Format.parse(str(fmt) + ending)
    else:
        assert other != fmt


# --- names


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("int1-channel", "E110", "1 bit has no symmetric integer grid; allowed 2 to 8"),
        ("int9-channel", "E110", "9 bits is not an integer format here; allowed 2 to 8"),
        ("int4-g0", "E110", "a group of 0 weights is impossible"),
        ("int4-g-5", "E110", "a group of -5 weights is impossible"),
        ("fp4-e2m1-g0", "E110", "a group of 0 weights is impossible"),
        ("fp8-e3m4", "E110", "'fp8-e3m4' is not a small float; allowed fp8-e4m3"),
        ("fp8-e4m3-b0x128", "E110", "a block of 0 by 128 weights is impossible"),
        ("mxfp5", "E110", "not in the MX standard (blocks of 32); allowed mxfp4"),
        ("nvfp8", "E110", "allowed nvfp4"),
        ("nf4-b0", "E110", "blocks of 0 are not known; allowed 16, 32, 64"),
        ("nf5-b64", "E110", "NormalFloat has 2, 3 or 4 bits, not 5"),
        ("ternary-g0", "E110", "impossible"),
        ("codebook1-channel", "E110", "a code book has 2 to 8 bits here, not 1"),
        ("codebook9-channel", "E110", "a code book has 2 to 8 bits here, not 9"),
        ("kv-int8-token-g0", "E110", "a group of 0 is impossible"),
        ("kv-int9-token", "E110", "9 bits"),
        ("kv-int8", "E109", "not a format of KV caches"),
        ("int4-g128@", "E110", "nothing is rounded after the @"),
        ("int4-g128@16", "E110", "write int4-g128"),
        ("int4-g128@int9-token", "E110", "9-bit integers have no grid here"),
        ("int4-g128@int8-tokn", "E109", "did you mean 'int8-token'?"),
        ("kv-int8-token@int8-token", "E110", "is not a format of weights"),
        ("int4-g128@int8-token@int8-token", "E109", "is not known"),
        ("int4-g12x", "E109", "did you mean 'int4-g128'?"),
        ("mxpf4", "E109", "did you mean 'mxfp4'?"),
        ("nf-4-b64", "E109", "did you mean 'nf4-b64'?"),
        ("q4-K", "E109", "did you mean 'q4_K'?"),
        ("int4", "E109", "is not known"),
        ("INT4-G128", "E109", "is not known"),
        ("", "E109", "format '' is not known"),
    ],
)
def test_unknown_and_impossible_names(text: str, code: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Format.parse(text)
    assert caught.value.code == code
    assert f"'{text}'" in caught.value.message or text.partition("@")[2] in caught.value.message
    assert message in str(caught.value)


# --- weights with their inputs

ACTIVATIONS = [
    registry.load("activations", name).read(text)
    for name in registry.names("activations")
    for text in registry.load("activations", name).examples
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", ["bf16", "int4-g32", "int4-g32-gptq", "mxfp8-e4m3"])
def test_joined_formats_price_and_round_as_their_weight(activation: Format, weight: str) -> None:
    fmt = Format.parse(f"{weight}@{activation}")
    assert str(fmt) == f"{weight}@{activation}"
    assert Format.parse(str(fmt)) == fmt
    assert (fmt.weight, fmt.activation, fmt.needs) == (Format.parse(weight), activation, Format.parse(weight).needs)
    layer = Layer("fc", "linear", (6, 384))
    assert not fmt.refuses(layer)
    ours, inputs = fmt.weight.itemised_bytes(layer), activation.itemised_bytes(layer)
    assert fmt.itemised_bytes(layer) == {**ours, **inputs}
    assert set(ours).isdisjoint(inputs)
    assert bool(inputs) == getattr(activation, "static", False)
    known, numbers = samples.evidence(fmt, layer), samples.normal(6, 384)
    assert samples.same_bits(
        fake_quantize(numbers, fmt, evidence=known), fake_quantize(numbers, fmt.weight, evidence=known)
    )
    assert "embedding reads token numbers" in fmt.refuses(Layer("e", "embedding", (6, 384)))
    assert isinstance(fmt, Joined)
