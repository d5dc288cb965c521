"""Integers: bit for bit beside torchao and compressed-tensors, the rules ``mse`` and ``gptq``, the table of bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.integer import Integer
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence, RangeError
from mpsearch.model.codecs import gptq, integer_mse
from mpsearch.model.codecs.lattice import Grid, Lattice, spanning
from mpsearch.model.quantize import Quantized, dequantize, fake_quantize, quantize
from mpsearch.testing.formats import check_family, check_format
from tests.reference_libraries import quiet_import

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"
LAWS = settings(max_examples=40, deadline=None)
GRIDS = ("", "-full", "-asym")


def table(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def integer(text: str) -> Integer:
    fmt = Integer.read(text)
    assert fmt is not None
    return fmt


def error(weight: Tensor, text: str) -> float:
    return float((fake_quantize(weight, Format.parse(text)).double() - weight.double()).square().sum())


NORMAL = torch.randn(32, 256, generator=torch.Generator().manual_seed(3))
INPUTS: dict[str, Tensor] = {
    "normal": NORMAL,
    "heavy-tailed": NORMAL**3,
    "student": torch.randn(32, 256, generator=torch.Generator().manual_seed(4)) / NORMAL.abs().sqrt(),
    "constant": torch.full((8, 256), 0.37),
    "negative constant": torch.full((8, 256), -0.37),
    "halves": torch.randint(-15, 16, (32, 256), generator=torch.Generator().manual_seed(5)) / 2.0,
    "large": NORMAL * 1e4,
    "small": NORMAL * 1e-5,
    "bf16": NORMAL.bfloat16().float(),
    "zero": torch.zeros(4, 256),
    "denormal": NORMAL * 1e-40,
}


# --- beside other libraries -------------------------------------------------------------------------------------------


def affine(weight: Tensor, fmt: Integer) -> tuple[Tensor, Tensor, Any]:
    """torchao's scales and zero points for our grid, and its rounding by given ones."""
    ao = quiet_import("torchao.quantization.quant_primitives")
    grid = Grid.of(fmt)
    kind = ao.MappingType.ASYMMETRIC if fmt.asymmetric else ao.MappingType.SYMMETRIC
    block = (1, fmt.group)
    # Its smallest scale is put out of the way: it would stand for 0 where we store 0.
    scales, zeros = ao.choose_qparams_affine(
        weight, kind, block, torch.int32, grid.low, grid.high, eps=1e-30, scale_dtype=torch.float16
    )
    return scales, zeros, lambda s, z: ao.quantize_affine(weight, block, s, z, torch.int32, grid.low, grid.high)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("text", [f"int{bits}-g32{grid}" for bits in (2, 3, 4, 8) for grid in GRIDS])
def test_beside_torchao(text: str, kind: str) -> None:
    fmt, weight = integer(text), INPUTS[kind]
    scales, zeros, rounded = affine(weight, fmt)
    made = quantize(weight, fmt).parts
    assert torch.equal(made["scales"], scales)
    step = scales.float().masked_fill(scales == 0, 1.0)
    ours = made["zero_points"].int() if fmt.asymmetric else torch.zeros_like(zeros)
    # Theirs comes from the scale before it is rounded to fp16.
    normal = scales > 2.0**-14
    assert bool(((zeros - ours).abs()[normal] <= 1).all())
    if kind in ("zero", "denormal"):
        assert not rounded(step, ours).masked_fill((scales == 0).repeat_interleave(32, 1), 0).any()
        return
    # By one and the same scale and zero point, only numbers beside a tie differ: it multiplies by 1 / scale.
    theirs = rounded(step, ours)
    differ = theirs != made["payload"].int()
    share = (weight / step.repeat_interleave(32, 1)).remainder(1.0)
    assert bool(((share - 0.5).abs()[differ] < 1e-4).all())
    assert float(differ.float().mean()) < 1e-3
    if not fmt.asymmetric and kind != "bf16":
        assert int(differ.sum()) <= 1


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("text", [f"int{bits}-g32{grid}" for bits in (2, 3, 4, 8) for grid in GRIDS[1:]])
def test_beside_compressed_tensors(text: str, kind: str) -> None:
    ct, fmt, weight = quiet_import("compressed_tensors.quantization"), integer(text), INPUTS[kind]
    args = ct.QuantizationArgs(
        num_bits=fmt.bits, symmetric=not fmt.asymmetric, strategy="group", group_size=32, scale_dtype=torch.float16
    )
    groups = weight.reshape(len(weight), -1, 32)
    scales, zeros = ct.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    made = quantize(weight, fmt).parts
    ours = made["scales"].float()
    # Where ours is 0, theirs is fp16's epsilon: they have no scale of 0.
    assert torch.equal(scales, torch.where(ours == 0, torch.finfo(torch.float16).eps, ours))
    # Their codes lie half a range lower.
    shift = 2 ** (fmt.bits - 1) if fmt.asymmetric else 0
    if not fmt.asymmetric:
        assert not zeros.any()
        assert torch.equal(ct.quantize(weight, scales, zeros, args), made["payload"].float())
        found = ct.fake_quantize(weight, scales, zeros, args)
        assert torch.equal(found, fake_quantize(weight, fmt))
        return
    stored, normal = made["zero_points"].float(), ours > 2.0**-14
    # Theirs comes from the scale before it is rounded to fp16.
    assert bool(((zeros.float() + shift - stored).abs()[normal] <= 1).all())
    codes = ct.quantize(weight, scales, stored - shift, args) + shift
    differ = (codes != made["payload"].float()) & (ours > 0).repeat_interleave(32, 1)
    # They round w / scale + zero, we round w / scale: ties beside an odd zero point go the other way.
    odd = (stored % 2 == 1).repeat_interleave(32, 1)
    share = (weight / scales.repeat_interleave(32, 1)).remainder(1.0)
    assert bool((odd & ((share - 0.5).abs() < 1e-5))[differ].all())
    if kind not in ("halves", "bf16"):
        assert not differ.any()


# --- bits per weight --------------------------------------------------------------------------------------------------

#: Rows of the table that our layouts say, and on which shape.
ROWS: dict[str, tuple[str, tuple[int, int]]] = {
    **{
        f"int{bits}_{kind}_g{group}_fp16scale{f'_int{bits}zero' if kind == 'asym' else ''}": (
            f"int{bits}-g{group}{'-asym' if kind == 'asym' else ''}",
            (512, 1024),
        )
        for bits in (2, 3, 4, 8)
        for kind in ("sym", "asym")
        for group in (32, 64, 128)
    },
    "AWQ int4 g128 (fp16 scales, packed int4 qzeros)": ("int4-g128-asym", (4096, 4096)),
    "int8 per-channel d_in=4096 fp16 scale": ("int8-channel", (512, 4096)),
}
#: Integer rows that no layout here says: zero points of fp16, and GPTQ's index of groups.
UNSAID = {
    "int4_asym_g128_fp16scale_fp16zero",
    "GPTQ/AutoGPTQ int4 g128 (fp16 scales, packed int4 qzeros, int32 g_idx per input row, d_out=4096)",
}


def test_bits_per_weight_are_those_of_the_table() -> None:
    rows = {row["format"]: row["bpw"] for row in table("effective_bits")["rows"]}
    integers = {name for name in rows if "int" in name and name != "MXINT8"}
    assert integers == set(ROWS) | UNSAID
    for name, (text, shape) in ROWS.items():
        assert float(Format.parse(text).effective_bits(Layer("x", "linear", shape))) == rows[name], name
    examples = {row["format"]: row for row in table("effective_bits")["exact_bytes_examples"]}
    awq = examples["AWQ int4 g128"]
    assert Format.parse("int4-g128-asym").bytes(Layer("x", "linear", tuple(awq["tensor"]))) == awq["bytes"]


# --- laws of every format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4-g32", "int8-tensor", "int3-g16-mse", "int2-channel-mse", "int4-g16-gptq"])
def test_symmetric_ones_keep_every_law(text: str) -> None:
    check_format(Format.parse(text), odd=True)


@pytest.mark.parametrize(
    "text",
    ["int4-g32-asym", "int3-channel-full", "int4-g16-full-mse", "int3-channel-asym-mse", "int3-channel-asym-gptq",
     "int4-tensor-full-gptq"],
)  # fmt: skip
def test_the_others_keep_every_law_but_oddness(text: str) -> None:
    check_format(Format.parse(text))


def test_more_bits_take_no_fewer_bytes() -> None:
    check_family(
        [Format.parse(f"int{bits}-{g}{grid}") for bits in range(2, 9) for g in ("g8", "channel") for grid in GRIDS]
    )


# --- least squared error ----------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.just(0.0), st.floats(0.125, 64, width=32), st.floats(-64, -0.125, width=32), st.integers(-9, 9).map(float)
)
groups = arrays.arrays("float32", st.tuples(st.integers(1, 4), st.sampled_from([8, 24])), elements=numbers)
# With the smallest, scales are no normal fp16 numbers, of which not every one has a half.
units = st.sampled_from([1.0, 1e-3, 2.0**-17, 1e-6])


@LAWS
@given(
    weight=groups.map(torch.from_numpy),
    unit=units,
    grid=st.sampled_from(GRIDS),
    grain=st.sampled_from(["g8", "tensor"]),
)
def test_mse_is_never_worse_with_more_bits_nor_than_the_largest_weight(
    weight: Tensor, unit: float, grid: str, grain: str
) -> None:
    weight, last = weight * unit, math.inf
    for bits in range(2, 9):
        found = error(weight, f"int{bits}-{grain}{grid}-mse")
        # Sums of squares are compared in float32.
        assert found <= last * (1 + 1e-5)
        assert found <= error(weight, f"int{bits}-{grain}{grid}") * (1 + 1e-5)
        last = found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS[:2])
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "student", "bf16"])
def test_mse_is_as_good_as_trying_every_scale(kind: str, grid: str, bits: int) -> None:
    weight, fmt = INPUTS[kind].reshape(-1, 128), integer(f"int{bits}-g128{grid}-mse")
    ends, least = Grid.of(fmt), torch.full((len(weight),), math.inf)
    for share in range(1, 401):
        scale = (weight.abs().amax(-1, keepdim=True) / ends.steps * (share / 400)).half().float()
        tried = (weight / scale).round().clamp(ends.low, ends.high) * scale
        least = torch.minimum(least, (tried - weight).square().sum(-1))
    assert error(weight, str(fmt)) <= float(least.sum()) * 1.01
    assert error(weight, str(fmt)) < error(weight, f"int{bits}-g128{grid}")


def test_asymmetric_mse_clips_outliers() -> None:
    weight = INPUTS["heavy-tailed"]
    assert error(weight, "int3-g128-asym-mse") < 0.95 * error(weight, "int3-g128-asym")


def test_mse_does_not_hang_on_the_size_of_its_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("int4-g32-mse", "int3-g32-asym-mse"):
        whole = quantize(NORMAL, Format.parse(text))
        with monkeypatch.context() as patched:
            patched.setattr(integer_mse, "_CHUNK", {"cpu": 96})
            lots = quantize(NORMAL, Format.parse(text))
        assert all(torch.equal(lots.parts[name], part) for name, part in whole.parts.items())


def test_mse_keeps_what_lies_on_a_lattice() -> None:
    weight = torch.tensor([[0.5, -1.5, 3.5, 0.0], [0.25, 0.5, -0.5, 0.0]])
    assert torch.equal(fake_quantize(weight, Format.parse("int4-channel-mse")), weight)
    # What two bits hold, more bits hold: also with a zero point, and where fp16 has no half of the scale.
    for unit in (0.5, 2.0**-24):
        weight = torch.tensor([[-unit, 0.0, unit, 2 * unit]])
        for bits in range(2, 9):
            assert torch.equal(fake_quantize(weight, Format.parse(f"int{bits}-channel-asym-mse")), weight)


@pytest.mark.parametrize("rule", ["", "-mse", "-gptq"])
def test_scales_beyond_fp16_are_refused(rule: str) -> None:
    evidence = Evidence(hessian=torch.eye(4)) if rule == "-gptq" else Evidence()
    with pytest.raises(InputError, match=r"weights reach 1e\+30, so int4-channel.* needs a scale of 1.429e\+29"):
        fake_quantize(torch.full((1, 4), 1e30), Format.parse(f"int4-channel{rule}"), evidence=evidence)


@pytest.mark.parametrize(
    "text", ["int3-g32-asym", "int3-g32-full", "int2-g32-mse", "int3-g32-asym-mse", "int4-g32-gptq"]
)
def test_rounding_again_with_the_stored_scales_changes_nothing(text: str) -> None:
    fmt = integer(text)
    made = quantize(NORMAL, fmt, evidence=Evidence(hessian=hessian(256)))
    zeros = made.parts["zero_points"].float().unsqueeze(-1) if fmt.asymmetric else None
    lattice = Lattice(Grid.of(fmt), made.parts["scales"].unsqueeze(-1), zeros)
    again = lattice.codes(dequantize(made).reshape(32, -1, 32)).reshape(32, -1)
    assert torch.equal(again, made.parts["payload"].float())


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def hessian(columns: int, seed: int = 1) -> Tensor:
    """Of correlated inputs, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs = mixed / columns**0.5 + torch.randn(4 * columns, 1, generator=generator)
    inputs = inputs * torch.logspace(-1, 1, columns)
    found: Tensor = 2 * inputs.T @ inputs / len(inputs)
    return found


def output_error(found: Tensor, weight: Tensor, matrix: Tensor) -> float:
    apart = (found - weight).double()
    return float(((apart @ matrix.double()) * apart).sum()) / 2


def test_gptq_follows_the_worked_example() -> None:
    made = table("obs_gptq_example")
    weight, inputs = (torch.tensor(made[name], dtype=torch.float64) for name in ("W", "X (d x N)"))
    factor = gptq.inverse_factor(torch.tensor(made["H"]), (0.0,))
    scale = torch.tensor(made["H"]).diagonal().mean().sqrt()
    torch.testing.assert_close(factor / scale, torch.tensor(made["cholesky_upper_of_Hinv"]), rtol=1e-3, atol=1e-3)

    class Steps(Lattice):
        """Steps of exactly 0.4, which fp16 does not hold."""

        @property
        def step(self) -> Tensor:
            return torch.tensor(0.4)

        def values(self, codes: Tensor) -> Tensor:
            found: Tensor = codes * 0.4
            return found

    lattice = Steps(Grid(-8, 7, 7.5), torch.ones(2, 1))
    codes, _ = gptq.compensate(weight.float(), factor, lattice, 0, lambda part: lattice)
    found = codes.double() * 0.4
    torch.testing.assert_close(found, torch.tensor(made["Q_gptq"], dtype=torch.float64))
    plain = (weight / 0.4).round().clamp(-8, 7) * 0.4
    assert float(((found - weight) @ inputs).square().sum()) == pytest.approx(made["output_error_gptq"], abs=1e-9)
    assert float(((plain - weight) @ inputs).square().sum()) == pytest.approx(made["output_error_rtn"], abs=1e-9)
    # The losses of the columns add up to the error of the output.
    assert made["sum_losses"] == pytest.approx(made["output_error_gptq"], abs=1e-9)


def plain_gptq(weight: Tensor, matrix: Tensor, fmt: Integer) -> Tensor:
    """The documented rule without blocks: after each column, all that follow are updated. In float64."""
    work, columns = weight.double().clone(), weight.shape[1]
    damped = matrix.double() + 0.01 * matrix.double().diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    shared = spanning(weight if fmt.granularity == "channel" else weight.reshape(1, -1), fmt)
    lattice, result = shared, torch.empty_like(weight)
    for column in range(columns):
        if fmt.granularity == "group" and column % fmt.group == 0:
            lattice = spanning(work[:, column : column + fmt.group].float(), fmt)
        result[:, column : column + 1] = lattice.values(lattice.codes(work[:, column : column + 1].float()))
        error = (work[:, column] - result[:, column].double()) / factor[column, column]
        work[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
    return result


@pytest.mark.parametrize(
    "text",
    ["int4-channel-gptq", "int3-tensor-gptq", "int3-g12-gptq", "int4-g100-asym-gptq", "int3-g150-gptq",
     "int4-g300-full-gptq", "int2-channel-asym-gptq"],
)  # fmt: skip
def test_gptq_in_blocks_is_gptq(text: str) -> None:
    fmt, matrix = integer(text), hessian(300)
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(9))
    found = fake_quantize(weight, fmt, evidence=Evidence(hessian=matrix))
    expected = plain_gptq(weight, matrix, fmt)
    # A weight on a tie may fall to the other side in float32, and takes those that follow with it.
    assert float((found == expected).float().mean()) > 0.97
    assert output_error(found, weight, matrix) == pytest.approx(output_error(expected, weight, matrix), rel=0.02)
    nearest = fake_quantize(weight, integer(text.removesuffix("-gptq")))
    assert output_error(found, weight, matrix) < 0.8 * output_error(nearest, weight, matrix)


@pytest.mark.parametrize("group", [0, 1, 5, 64, 100, 128, 200, 300])
def test_blocks_hold_whole_groups_or_groups_whole_blocks(group: int) -> None:
    blocks = gptq._blocks(600, group)
    assert [n for block in blocks for n in range(*block)] == list(range(600))
    assert all(0 < stop - start <= gptq.BLOCK for start, stop in blocks)
    for start, stop in blocks:
        inside = [n for n in range(start, stop) if group and n % group == 0]
        assert not inside or inside[0] == start


def test_inputs_that_do_not_hang_together_leave_every_weight_at_its_nearest() -> None:
    matrix = torch.diag(torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.1)
    found = fake_quantize(NORMAL, integer("int4-g32-gptq"), evidence=Evidence(hessian=matrix))
    assert torch.equal(found, fake_quantize(NORMAL, integer("int4-g32")))
    found = fake_quantize(NORMAL, integer("int4-g32-gptq"), evidence=Evidence(hessian=torch.zeros(256, 256)))
    assert torch.equal(found, fake_quantize(NORMAL, integer("int4-g32")))


def test_dead_inputs_keep_their_weights_and_change_no_other() -> None:
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 5, 6, 40, 63]] = True
    matrix = hessian(64)
    matrix[dead] = 0
    matrix[:, dead] = 0
    weight = NORMAL[:, :64].clone()
    # A weight that sets the scale of each channel, so that leaving others out does not change it.
    weight[:, 1] = 4.0
    found = fake_quantize(weight, integer("int4-channel-gptq"), evidence=Evidence(hessian=matrix))
    nearest = fake_quantize(weight, integer("int4-channel"))
    assert torch.equal(found[:, dead], nearest[:, dead])
    assert bool((found[:, dead] != 0).any())
    alone = fake_quantize(
        weight[:, ~dead], integer("int4-channel-gptq"), evidence=Evidence(hessian=matrix[~dead][:, ~dead])
    )
    assert torch.equal(found[:, ~dead], alone)


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60])
def test_gptq_does_not_hang_on_the_unit_of_the_inputs(unit: float) -> None:
    matrix = hessian(256)
    found = fake_quantize(NORMAL, integer("int3-g64-gptq"), evidence=Evidence(hessian=matrix * unit))
    assert torch.equal(found, fake_quantize(NORMAL, integer("int3-g64-gptq"), evidence=Evidence(hessian=matrix)))


def test_gptq_damps_more_where_it_must_and_says_when_it_cannot() -> None:
    few = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    found = fake_quantize(NORMAL, integer("int4-g32-gptq"), evidence=Evidence(hessian=few.T @ few))
    assert bool(torch.isfinite(found).all())
    # One eigenvalue is -1, of a mean of 1: 0.01 and 0.1 leave it below 0, 10 does not.
    assert bool(torch.isfinite(gptq.inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))).all())
    with pytest.raises(RangeError, match="not positive definite, not even damped by 10 of its mean"):
        gptq.inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
    with pytest.raises(RangeError):
        gptq.inverse_factor(torch.full((2, 2), math.nan))
    with pytest.raises(InputError, match="not positive definite"):
        fake_quantize(
            torch.ones(1, 2),
            integer("int4-channel-gptq"),
            evidence=Evidence(hessian=torch.tensor([[1.0, 50], [50, 1]])),
        )


def test_gptq_writes_to_neither_weight_nor_matrix() -> None:
    for shape in ((4, 64), (1, 64), (64, 1)):
        weight, matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)), hessian(shape[1])
        before = weight.clone(), matrix.clone()
        made: Quantized = quantize(weight, integer("int4-channel-asym-gptq"), evidence=Evidence(hessian=matrix))
        assert torch.equal(weight, before[0])
        assert torch.equal(matrix, before[1])
        assert all(part.data_ptr() != weight.data_ptr() for part in made.parts.values())


@pytest.mark.parametrize(("kind", "shape"), [("embedding", (10, 64)), ("expert", (2, 10, 64))])
def test_gptq_refuses_layers_without_inputs_of_their_own(kind: str, shape: tuple[int, ...]) -> None:
    layer = Layer("x", kind, shape, out_axis=len(shape) - 2)
    assert "use int4-g32-mse" in integer("int4-g32-gptq").refuses(layer)
    assert not integer("int4-g32-mse").refuses(layer)
