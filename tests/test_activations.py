"""Rounding of activations: against a scalar oracle, against other libraries, and inside a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.errors import InputError
from mpsearch.exports.native import Native, payload_bytes
from mpsearch.format import Format, join, parse_formats
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer, Layers
from mpsearch.model.activations import Range, pack_range, round_input, scale_and_zero, seen_in
from mpsearch.model.apply import applied
from mpsearch.model.evidence import Calibration, channel_axis
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.quantize import fake_quantize
from mpsearch.plan import BitPlan
from tests.reference_libraries import quiet_import

LAWS = settings(max_examples=60, deadline=None)
GRAINS = ("token", "tensor", "channel", "g4")
ELEMENTS = {
    "fp8-e4m3": ml_dtypes.float8_e4m3fn,
    "fp8-e5m2": ml_dtypes.float8_e5m2,
    "fp6-e3m2": ml_dtypes.float6_e3m2fn,
    "fp6-e2m3": ml_dtypes.float6_e2m3fn,
    "fp4-e2m1": ml_dtypes.float4_e2m1fn,
}
INTEGERS = [f"int{bits}-{grain}{asym}" for bits in (2, 3, 4, 8) for grain in GRAINS for asym in ("", "-asym")]
FLOATS = [f"{number}-{grain}" for number in ELEMENTS for grain in GRAINS]
BLOCKS = ["mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2", "mxint8", "nvfp4"]


def read(text: str) -> Activation:
    found = Activation.read(text)
    assert found is not None
    return found


def same(ours: Tensor, theirs: Any) -> None:
    """The same numbers of the same type; -0 and 0 count as one."""
    theirs = torch.as_tensor(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    wrong = (ours != theirs).nonzero()
    assert not len(wrong), f"{len(wrong)} differ, first {wrong[0].tolist()}"


def shared_by(fmt: Activation, tokens: int, channels: int) -> np.ndarray:
    """Number of the scale of each (token, channel)."""
    token, channel = np.indices((tokens, channels))
    if fmt.grain == "token":
        return token
    if fmt.grain == "tensor":
        return np.zeros_like(token)
    return channel if fmt.grain == "channel" else token * channels + channel // fmt.group


def oracle(x: np.ndarray, fmt: Activation, seen: np.ndarray | None = None) -> np.ndarray:
    """The documented rule, one scale at a time, in numpy; ``seen``: what a static range was taken from."""
    single, result = np.float32, np.empty_like(x)
    owner = shared_by(fmt, *x.shape)
    whose = owner if seen is None else shared_by(fmt, *seen.shape)
    for number in np.unique(owner):
        values, source = x[owner == number], (x if seen is None else seen)[whose == number]
        low, high, zero = source.min(), source.max(), single(0)
        if fmt.number not in ELEMENTS and fmt.asymmetric:
            top, bottom = single(2**fmt.bits - 1), single(0)
            low, high = min(low, single(0)), max(high, single(0))
            scale = (high - low) / top
        else:
            integer = fmt.number not in ELEMENTS
            top = single(2 ** (fmt.bits - 1) - 1) if integer else single(ml_dtypes.finfo(ELEMENTS[fmt.number]).max)
            bottom = -top
            scale = max(high, -low) / top
        if scale == 0:
            scale = single(1)
        if fmt.asymmetric:
            zero = np.clip(np.rint(-low / scale), bottom, top)
        with np.errstate(over="ignore"):
            ratio = values / scale
        if fmt.number in ELEMENTS:
            codes = np.clip(ratio, bottom, top).astype(ELEMENTS[fmt.number]).astype(single)
        else:
            codes = np.clip(np.rint(ratio) + zero, bottom, top) - zero
        result[owner == number] = codes * scale
    return result


inputs = st.tuples(st.integers(1, 4), st.sampled_from([4, 12])).flatmap(
    lambda shape: arrays.arrays(
        np.float32,
        shape,
        elements=st.one_of(
            st.floats(-(2.0**20), 2.0**20, width=32), st.integers(-16, 16).map(lambda n: n / 2), st.just(0.0)
        ),
    )
)


@LAWS
@given(x=inputs, text=st.sampled_from([*INTEGERS, *FLOATS]))
def test_follows_the_documented_rule(x: np.ndarray, text: str) -> None:
    given_x = torch.from_numpy(x.copy())
    same(round_input(given_x, read(text)), oracle(x, read(text)))
    assert np.array_equal(given_x.numpy(), x)


@LAWS
@given(x=inputs, seen=inputs, text=st.sampled_from([*INTEGERS, *FLOATS]))
def test_a_static_range_is_that_of_the_calibration_data(x: np.ndarray, seen: np.ndarray, text: str) -> None:
    if "-tensor" not in text and "-channel" not in text:
        return
    fmt = read(f"{text}-static")
    seen = np.resize(seen, (3, x.shape[1])).astype(np.float32)
    found = seen_in(torch.from_numpy(seen[2:]), fmt.grain, seen_in(torch.from_numpy(seen[:2]), fmt.grain, None))
    same(round_input(torch.from_numpy(x), fmt, seen=found), oracle(x, fmt, seen))


EVERY = [*INTEGERS, *FLOATS, *BLOCKS]


@pytest.mark.parametrize("text", EVERY)
def test_zeros_constants_outliers_and_the_ends_of_float32(text: str) -> None:
    fmt = read(text)
    assert not round_input(torch.zeros(3, 64), fmt).any()
    constant = round_input(torch.full((3, 64), 0.7), fmt)
    # One step away at the worst; block scales are powers of two, so their largest number can saturate.
    assert torch.allclose(constant, torch.tensor(0.7), rtol=0.26)
    outlier = torch.linspace(-1, 1, 192).reshape(3, 64).clone()
    outlier[1, 7] = 1e30
    rounded = round_input(outlier, fmt)
    assert torch.isfinite(rounded).all()
    assert rounded[1, 7] > 0.49e30
    if fmt.grain in ("token", "group", "block") and text != "nvfp4":
        assert torch.equal(rounded[0], round_input(outlier[:1], fmt)[0])
    for size in (1e-44, 1e-40, 1e38):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5) * size
        assert torch.isfinite(round_input(x, fmt)).all()


@pytest.mark.parametrize("text", EVERY)
def test_shape_type_strides_and_the_argument_itself(text: str) -> None:
    fmt = read(text)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    turned = x.permute(1, 0, 2)
    before = x.clone()
    rounded = round_input(turned, fmt)
    same(rounded, round_input(turned.contiguous(), fmt))
    assert torch.equal(x, before)
    assert rounded.data_ptr() != x.data_ptr()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = turned.to(dtype)
        same(round_input(narrow, fmt), round_input(narrow.float(), fmt).to(dtype))
    for empty in (torch.zeros(0, 64), torch.zeros(2, 0, 64)):
        assert round_input(empty, fmt).shape == empty.shape


@pytest.mark.parametrize("text", [x for x in [*INTEGERS, *FLOATS] if "-asym" not in x])
def test_symmetric_formats_are_odd_follow_powers_of_two_and_err_by_half_a_step(text: str) -> None:
    fmt = read(text)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) ** 3
    once = round_input(x, fmt)
    same(round_input(-x, fmt), -once)
    same(round_input(x * 64, fmt), once * 64)
    if text.startswith("int"):
        owner = shared_by(fmt, 5, 64)
        for number in np.unique(owner):
            part = x[torch.from_numpy(owner == number)]
            step = float(part.abs().max()) / (2 ** (fmt.bits - 1) - 1)
            error = (once[torch.from_numpy(owner == number)] - part).abs().max()
            assert error <= 0.5 * step * (1 + 1e-5)


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_format_is_the_same_as_for_weights_with_a_token_for_a_row(text: str) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3)) ** 3
    same(round_input(x, read(text)), fake_quantize(x.reshape(6, 64), Format.parse(text)).reshape(x.shape))


@pytest.mark.parametrize(("convolution", "sizes"), [(nn.Conv1d, (5,)), (nn.Conv2d, (5, 3)), (nn.Conv3d, (5, 3, 2))])
@pytest.mark.parametrize("text", ["int4-token", "int4-token-asym", "fp8-e4m3-token", "int8-tensor", "int3-channel"])
def test_the_channels_of_a_convolution(convolution: Any, sizes: tuple[int, ...], text: str) -> None:
    fmt, module = read(text), convolution(4, 6, 1)
    x = torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(4))
    rows = x.movedim(1, -1).reshape(-1, 4)
    expected = torch.from_numpy(oracle(rows.numpy(), fmt)).reshape(2, *sizes, 4).movedim(-1, 1)
    same(round_input(x, fmt, channel_axis(module)), expected)
    if fmt.grain == "token":
        same(round_input(x[0], fmt, channel_axis(module)), expected[0])


# What other libraries do.


def samples() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(5)
    normal = torch.randn(8, 64, generator=noise)
    return {
        "normal": normal,
        "cubed": normal**3,
        "student": normal / torch.randn(8, 64, generator=noise).abs().clamp(min=1e-3),
        "constant": torch.full((8, 64), -0.3),
        "zero": torch.zeros(8, 64),
        "huge": normal * 1e30,
        "denormal": normal * 1e-39,
        "bfloat16": normal.bfloat16(),
    }


def compressed_tensors_dynamic(x: Tensor, **settings: Any) -> Tensor:
    quantization = quiet_import("compressed_tensors.quantization")
    forward = quiet_import("compressed_tensors.quantization.lifecycle.forward")
    helpers = quiet_import("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(dynamic=True, **settings)
    # A token is what the first two axes name there.
    sequences = x.unsqueeze(0)
    scale, zero = helpers.compute_dynamic_scales_and_zp(sequences, args, nn.Module())
    found: Tensor = forward.fake_quantize(sequences, scale, zero, args)
    return found[0]


@pytest.mark.parametrize("kind", ["normal", "cubed", "student", "constant", "zero", "huge"])
@pytest.mark.parametrize("grain", ["token", "tensor"])
def test_fp8_agrees_bit_for_bit_with_compressed_tensors(kind: str, grain: str) -> None:
    x = samples()[kind]
    theirs = compressed_tensors_dynamic(x, num_bits=8, type="float", strategy=grain, symmetric=True)
    same(round_input(x, read(f"fp8-e4m3-{grain}")), theirs)


def test_fp8_of_bfloat16_differs_from_compressed_tensors_by_their_scales_type_alone() -> None:
    # They find and keep the scale in the input's own type, we in float32.
    x = samples()["bfloat16"]
    theirs = compressed_tensors_dynamic(x, num_bits=8, type="float", strategy="token", symmetric=True)
    scale = x.abs().amax(1, keepdim=True) / 448.0
    assert scale.dtype == torch.bfloat16
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    same(theirs, codes.to(torch.bfloat16) * scale)
    assert not torch.equal(theirs, round_input(x, read("fp8-e4m3-token")))


@pytest.mark.parametrize("kind", ["normal", "cubed", "student", "constant", "huge"])
def test_int8_differs_from_compressed_tensors_by_their_longer_grid_alone(kind: str) -> None:
    # They divide by 127.5 and use -128 as well; the largest number is then half a step off when it is positive.
    x = samples()[kind]
    theirs = compressed_tensors_dynamic(x, num_bits=8, type="int", strategy="token", symmetric=True)
    scale = x.abs().amax(1, keepdim=True) / 127.5
    same(theirs, (x / scale).round().clamp(-128, 127) * scale)
    ours = round_input(x, read("int8-token"))
    assert not torch.equal(theirs, ours)
    peak = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(ours.gather(1, peak), x.gather(1, peak), rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "cubed", "student"])
def test_asymmetric_int8_of_compressed_tensors_moves_ties_only(kind: str) -> None:
    # They add the zero point, which has an odd parity here and there, before they round: halves go the other way.
    x = samples()[kind]
    theirs = compressed_tensors_dynamic(x, num_bits=8, type="int", strategy="token", symmetric=False)
    ours = round_input(x, read("int8-token-asym"))
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    ratio = x / scale
    tie = (ratio - ratio.floor() - 0.5).abs() < 1e-4
    near = (-low / scale - (-low / scale).floor() - 0.5).abs() < 1e-4
    alike = (theirs - ours).abs() <= 1e-5 * scale
    assert bool((alike | tie | near).all())
    assert alike.float().mean() > 0.99


@pytest.mark.parametrize("kind", ["normal", "cubed", "student", "constant", "huge", "bfloat16"])
def test_int8_per_token_against_torchao(kind: str) -> None:
    # They multiply by 1 / scale where we divide, and keep the scale of bfloat16 in bfloat16.
    quiet_import("torchao")
    utils = quiet_import("torchao.quantization.utils")
    x = samples()[kind]
    codes, scale = utils._quantize_activation_per_token_absmax(x)
    scale = scale.reshape(-1, 1)
    wanted = x.float().abs().amax(1, keepdim=True) / 127
    assert torch.equal(scale, wanted.to(x.dtype))
    product = torch.round(x * (1.0 / scale)).clamp(-127, 127)
    assert torch.equal(codes.float(), product.float())
    ours = round_input(x.float(), read("int8-token"))
    if kind == "bfloat16":
        assert not torch.equal(codes * scale.float(), ours)
        return
    ratio = x / scale
    tie = (ratio - ratio.floor() - 0.5).abs() < 1e-4
    assert bool(((codes * scale == ours) | tie).all())


def test_torchao_never_takes_a_scale_below_an_epsilon() -> None:
    # Its least scale is 1e-5: what is smaller than half of that is lost there, and kept here.
    utils = quiet_import("torchao.quantization.utils")
    x = torch.full((1, 4), 1e-6)
    codes, _ = utils._quantize_activation_per_token_absmax(x)
    assert not codes.any()
    assert torch.allclose(round_input(x, read("int8-token")), x)


# The grammar.


@pytest.mark.parametrize("text", [*EVERY, "int8-tensor-static", "int5-channel-asym-static", "fp6-e2m3-tensor-static"])
def test_a_name_reads_as_it_prints(text: str) -> None:
    assert str(read(text)) == text
    pair = Format.parse(f"int4-g64@{text}")
    assert (str(pair), Format.parse(str(pair))) == (f"int4-g64@{text}", pair)
    assert pair.weight == Format.parse("int4-g64")
    assert pair.activation == read(text)
    assert pair.bits == 4
    assert pair.calibrated == text.endswith("-static")


def test_all_examples_read() -> None:
    assert [str(read(text)) for text in Activation.examples] == list(Activation.examples)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("int5-token", 5), ("fp8-e5m2-tensor", 8), ("fp6-e3m2-token", 6), ("fp4-e2m1-g32", 4), ("mxfp8-e4m3", 8),
     ("mxfp4", 4), ("mxint8", 8), ("nvfp4", 4)],
)  # fmt: skip
def test_bits_of_a_code(text: str, bits: int) -> None:
    assert read(text).bits == bits


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("int4-g64@int9-token", "E110", "9-bit integers have no grid here; allowed 2 to 8"),
        ("int4-g64@int1-token", "E110", "allowed 2 to 8"),
        ("int4-g64@fp8-e4m3-token-asym", "E110", "floats have a sign"),
        ("int4-g64@int8-g0", "E110", "a group of 0 channels"),
        ("int4-g64@int8-g-4", "E110", "a group of -4 channels"),
        ("int4-g64@int8-token-static", "E110", "cannot be known beforehand"),
        ("int4-g64@int8-g8-static", "E110", "cannot be known beforehand"),
        ("int4-g64@16", "E110", "nothing is rounded after the @; write int4-g64"),
        ("int4-g64@", "E110", "nothing is rounded after the @"),
        ("int4-g64@int8-tokn", "E109", "did you mean 'int8-token'"),
        ("int4-g64@int8", "E109", "is not known"),
        ("int4-g64@int8-token@int8-token", "E109", "is not known"),
        ("int4-g64@nf4", "E109", "is not known"),
        ("kv-int8-token@int8-token", "E110", "is not a format of weights"),
        ("int99@int8-token", "E109", "int99"),
    ],
)
def test_what_is_no_format_is_refused_with_the_reason(text: str, code: str, says: str) -> None:
    with pytest.raises(InputError) as found:
        Format.parse(text)
    assert found.value.code == code
    assert says in f"{found.value.message} {found.value.advice}"


@pytest.mark.parametrize(
    ("layer", "text", "says"),
    [
        (Layer("e", "embedding", (8, 64)), "int8-token", "token numbers"),
        (Layer("x", "expert", (4, 8, 64), 1), "int8-token", "cannot be reached"),
        (Layer("c", "conv", (8, 64, 3, 3)), "int8-g32", "convolution"),
        (Layer("c", "conv", (8, 64, 3, 3)), "mxfp8-e4m3", "convolution"),
        (Layer("c", "conv", (8, 64, 3, 3)), "int8-channel-static", "convolution"),
        (Layer("fc", "linear", (8, 48)), "int8-g32", "48 input channels cannot be cut into groups of 32"),
        (Layer("fc", "linear", (8, 48)), "mxfp8-e4m3", "48 input channels cannot be cut into groups of 32"),
        (Layer("fc", "linear", (8, 40)), "nvfp4", "40 input channels cannot be cut into groups of 16"),
        (Layer("k", "kv_cache", (2, 64)), "int8-token", "begin with kv-"),
    ],
)
def test_what_a_layer_cannot_take(layer: Layer, text: str, says: str) -> None:
    assert says in Format.parse(f"int8-channel@{text}").refuses(layer)
    if layer.kind != "kv_cache":
        assert not Format.parse("int8-channel").refuses(layer)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Layer("c", "conv", (8, 64, 3, 3)), "int8-token"),
        (Layer("c", "conv", (8, 64, 3, 3)), "int8-channel"),
        (Layer("c", "conv", (8, 64, 3, 3)), "int8-tensor-static"),
        (Layer("fc", "linear", (8, 48)), "nvfp4"),
        (Layer("fc", "linear", (8, 48)), "int8-g16"),
        (Layer("fc", "linear", (48, 8), 1), "int8-g16"),
    ],
)
def test_what_a_layer_can_take(layer: Layer, text: str) -> None:
    assert not Format.parse(f"int8-channel@{text}").refuses(layer)


def test_the_weight_of_a_pair_speaks_first() -> None:
    fmt = Format.parse("int4-g128@int8-g32")
    assert "weights per output channel" in fmt.refuses(Layer("fc", "linear", (8, 48)))


def test_a_menu_joins_every_weight_with_every_activation() -> None:
    weights = parse_formats(["int4-g64", "int8-channel@int8-token"])
    found = [str(fmt) for fmt in join(weights, ["int8-token", "16", "fp8-e4m3-token"])]
    assert found == ["int4-g64@int8-token", "int4-g64@fp8-e4m3-token", "int4-g64", "int8-channel@int8-token"]
    with pytest.raises(InputError, match="given twice"):
        join(weights, ["16", "16"])


# In a model.


class Twice(nn.Module):
    """Calls one linear by keyword, and another module that shares its weight by position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.second(self.first(input=x).tanh() * 50))
        return found


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.down = nn.Conv1d(6, 5, 2, stride=2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.conv(x).tanh().flatten(2)).mean(-1))


def logits(module: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = module(batch)
    return found


def toy(module: Callable[[], nn.Module], *shape: int) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(6)
    model = Model(module(), logits=logits)
    return model, [torch.randn(*shape) for _ in range(3)]


def hooks_of(model: Model) -> int:
    return sum(len(x._forward_pre_hooks) + len(x._forward_hooks) for x in model.module.modules())


@torch.no_grad()
def test_applied_rounds_weights_and_inputs_and_puts_everything_back() -> None:
    model, batches = toy(Twice, 5, 8)
    layers = find_layers(model, batches)
    assert [layer.name for layer in layers] == ["first", "last"]
    assert layers[0].shared == ("second",)
    before, weights = model.logits(batches[0]), {n: p.clone() for n, p in model.module.named_parameters()}
    formats = {layers[0]: Format.parse("int4-channel@int8-token"), layers[1]: Format.parse("int8-g4@fp8-e4m3-tensor")}
    with applied(model, formats):
        found = model.logits(batches[0])
        assert hooks_of(model) == 3
    shared = fake_quantize(weights["first.weight"], Format.parse("int4-channel"))
    last = fake_quantize(weights["last.weight"], Format.parse("int8-g4"))
    x = nn.functional.linear(round_input(batches[0], read("int8-token")), shared).tanh() * 50
    x = nn.functional.linear(round_input(x, read("int8-token")), shared, weights["second.bias"])
    x = nn.functional.linear(round_input(x, read("fp8-e4m3-tensor")), last, weights["last.bias"])
    assert torch.equal(found, x)
    assert hooks_of(model) == 0
    assert torch.equal(model.logits(batches[0]), before)
    assert model.module.get_parameter("first.weight") is model.module.get_parameter("second.weight")


@torch.no_grad()
def test_everything_is_put_back_after_an_error_too() -> None:
    model, batches = toy(Twice, 5, 8)
    before, layers = model.logits(batches[0]), find_layers(model, batches)
    with pytest.raises(ZeroDivisionError), applied(model, {layers[0]: Format.parse("int2-channel@int2-token")}):
        raise ZeroDivisionError
    assert hooks_of(model) == 0
    assert torch.equal(model.logits(batches[0]), before)


@torch.no_grad()
def test_the_inputs_of_convolutions_in_a_model() -> None:
    model, batches = toy(Picture, 2, 4, 6, 6)
    layers = {layer.name: layer for layer in find_layers(model, batches)}
    formats = {layers["conv"]: Format.parse("int8-channel@int4-token"), layers["down"]: Format.parse("fp32@int3-token")}
    with applied(model, formats):
        found = model.logits(batches[0])
    module: Any = model.module
    weight = fake_quantize(module.conv.weight, Format.parse("int8-channel"))
    x = round_input(batches[0], read("int4-token"), 1)
    x = nn.functional.conv2d(x, weight, module.conv.bias, padding=1).tanh().flatten(2)
    x = module.down(round_input(x, read("int3-token"), 1))
    assert torch.equal(found, module.head(x.mean(-1)))


STATIC = ["int8-tensor-static", "int8-channel-static", "int8-tensor-asym-static", "int4-channel-asym-static",
          "fp8-e4m3-tensor-static", "fp8-e4m3-channel-static"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("text", STATIC)
def test_static_ranges_come_from_all_calibration_batches_and_all_modules_of_a_weight(text: str) -> None:
    model, batches = toy(Twice, 5, 8)
    batches[2] = batches[2] * 10
    layer = find_layers(model, batches)[0]
    model.calibrate(batches)
    fmt = read(text)
    seen: list[Tensor] = []
    for batch in batches:
        seen += [batch, model.module.first(batch).tanh() * 50]
    whole = torch.cat(seen).numpy()
    with applied(model, {layer: Format.parse(f"fp32@{text}")}):
        found = model.logits(batches[0])
    module: Any = model.module
    x = torch.from_numpy(oracle(batches[0].numpy(), fmt, whole))
    x = torch.from_numpy(oracle((module.first(x).tanh() * 50).numpy(), fmt, whole))
    assert torch.equal(found, module.last(module.second(x)))


def test_a_static_format_without_calibration_data_says_so() -> None:
    model, batches = toy(Twice, 5, 8)
    layer = find_layers(model, batches)[0]
    with (
        pytest.raises(InputError, match="there is none") as found,
        applied(model, {layer: Format.parse("int8-channel@int8-tensor-static")}),
    ):
        pass
    assert found.value.code == "E422"
    assert hooks_of(model) == 0


def test_a_layer_that_the_calibration_data_never_calls_has_no_range() -> None:
    class Idle(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(8, 8)

    model, batches = toy(Idle, 5, 8)
    model.calibrate(batches)
    with pytest.raises(InputError, match="never calls it"):
        Calibration.of(model).input_range(Layer("idle", "linear", (8, 8)), read("int8-tensor-static"))


def test_other_calibration_data_gives_other_ranges() -> None:
    model, batches = toy(Twice, 5, 8)
    layer, fmt = find_layers(model, batches)[1], read("int8-tensor-static")
    model.calibrate(batches)
    first = Calibration.of(model).input_range(layer, fmt)
    model.calibrate(batches)
    assert Calibration.of(model).input_range(layer, fmt) is first
    model.calibrate([batch * 100 for batch in batches])
    assert Calibration.of(model).input_range(layer, fmt).high != first.high


@pytest.mark.parametrize("text", STATIC)
def test_native_export_stores_the_scales_of_inputs(text: str, tmp_path: Path) -> None:
    model, batches = toy(Twice, 5, 8)
    layers = find_layers(model, batches)
    model.calibrate(batches)
    fmt = Format.parse(f"int4-channel@{text}")
    plan = BitPlan(layers, dict.fromkeys((layer.name for layer in layers), fmt), {"name": "toy", "digest": "0"})
    Native().write(plan, tmp_path / "out", model)
    assert payload_bytes(tmp_path / "out" / "weights.safetensors") == plan.bytes
    _, tensors = Native().read(tmp_path / "out")
    activation = fmt.activation
    assert isinstance(activation, Activation)
    for layer in layers:
        with torch.no_grad():
            seen = Calibration.of(model).input_range(layer, activation)
        scale, zero = scale_and_zero(seen, activation)
        assert torch.equal(tensors[f"{layer.tensor}.input_scales"], scale.reshape(-1))
        if activation.asymmetric:
            assert torch.equal(tensors[f"{layer.tensor}.input_zero_points"], zero.reshape(-1).to(torch.uint8))
        packed = {part: len(held) for part, held in pack_range(seen, activation).items()}
        assert packed == activation.itemised_bytes(layer)
        assert torch.equal(tensors[layer.tensor], fake_quantize(model.weight(layer.name), fmt))


def test_a_dynamic_format_costs_nothing_to_store() -> None:
    layer = Layer("fc", "linear", (8, 64), macs=512)
    assert Format.parse("int4-g64@int8-token").bytes(layer) == Format.parse("int4-g64").bytes(layer)
    assert mp.cost(Layers((layer,)), ["int4-g64@int8-token", "int4-g64"], "bops").value.tolist() == [[16384.0, 32768.0]]


def test_the_range_of_a_static_zero_input() -> None:
    zero = Range(torch.zeros(()), torch.zeros(()))
    for text in STATIC:
        rounded = round_input(torch.zeros(2, 4), read(text), seen=zero)
        assert not rounded.any()
