"""Rounding weights to a number format: the one rule that scores, measurements and exports share.

A weight is seen as (rows, columns): one row per output channel, the other axes flattened in their order.
The weights that share one scale are a tensor, a row, or ``group`` consecutive columns of a row. With ``b``
bits, all in float32:

- symmetric: ``scale = fp16(max|w| / n)``, ``code = clamp(round(w / scale), -n, n)``, ``n = 2**(b-1) - 1``;
- asymmetric: the range ``low..high`` is widened to hold 0, ``scale = fp16((high - low) / n)``,
  ``zero = clamp(round(-low / scale), 0, n)``, ``code = clamp(round(w / scale) + zero, 0, n)``, ``n = 2**b - 1``;
- a plain float: ``w`` in that type.

``round`` takes halves to the even number. The stored fp16 scale is the one that codes are made with. Weights
whose scale is 0 (all zeros, or below what fp16 can tell from 0) become exact zeros. A code times its scale
has at most 19 bits, so dequantizing is exact in float32.

Source: the uniform affine quantizer of Jacob et al. 2018 (arXiv:1712.05877) with fp16 scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A weight in a format.

    Attributes:
        codes: (rows, columns); int8 for symmetric integers, uint8 for asymmetric ones, the numbers themselves
            for a plain float.
        scales: float16 (rows, groups per row), or (1, 1) for one scale per tensor; ``None`` for a plain float.
        zero_points: uint8 of the shape of ``scales``; ``None`` without.
        shape: shape of the weight.
        out_axis: its axis of the output channels.
        dtype: its number type.
    """

    codes: Tensor
    scales: Tensor | None
    zero_points: Tensor | None
    shape: tuple[int, ...]
    out_axis: int
    dtype: torch.dtype


def quantize(weight: Tensor, fmt: Format, out_axis: int = 0, *, name: str = "") -> Quantized:
    """Round a weight to a format.

    Args:
        weight: any shape with the output channels on ``out_axis``, any float type, any strides; left as it is.
        fmt: the format.
        out_axis: axis of the output channels (1 for a transposed linear).
        name: name of the layer, for messages.

    Raises:
        InputError: a group does not divide the columns (E130); no data (E410); not a plain float weight (E411);
            NaN or infinity (E412); a scale or number passes the largest of its type (E421).

    >>> made = quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), Format.parse("int4-channel"))
    >>> made.codes.tolist(), made.scales.tolist()
    ([[0, -7, 4, 0]], [[1.0]])
    """
    _check_weight(weight, fmt, out_axis, name)
    shape = tuple(weight.shape)
    if fmt.family == "float":
        return Quantized(_to_float(_rows(weight, out_axis), fmt, name), None, None, shape, out_axis, weight.dtype)
    codes, scale, zero = _round(weight, fmt, out_axis, name)
    return Quantized(
        codes.to(torch.int8 if zero is None else torch.uint8).reshape(shape[out_axis], -1),
        scale.squeeze(-1),
        None if zero is None else zero.to(torch.uint8).squeeze(-1),
        shape,
        out_axis,
        weight.dtype,
    )


def dequantize(quantized: Quantized) -> Tensor:
    """Return the weight that the codes stand for, in its own shape and number type.

    Equals `fake_quantize` of the same weight bit for bit.

    >>> weight = torch.tensor([[0.3, -1.0], [2.0, 0.1]])
    >>> fmt = Format.parse("int3-channel-asym")
    >>> torch.equal(dequantize(quantize(weight, fmt)), fake_quantize(weight, fmt))
    True
    """
    values = quantized.codes.to(torch.float32, copy=True)
    if quantized.scales is not None:
        values = values.reshape(*quantized.scales.shape, -1)
        if quantized.zero_points is not None:
            values.sub_(quantized.zero_points.to(torch.float32).unsqueeze(-1))
        values.mul_(quantized.scales.to(torch.float32).unsqueeze(-1))
    return _weight(values, quantized.shape, quantized.out_axis, quantized.dtype)


def fake_quantize(weight: Tensor, fmt: Format, out_axis: int = 0, *, name: str = "") -> Tensor:
    """Return a weight rounded to a format, in its own shape and number type.

    The error of a weight is at most half a step, and what rounding the scale to fp16 adds at the ends of the
    range. Symmetric integers are odd (``Q(-w) = -Q(w)``) and idempotent in float32; asymmetric ones are
    idempotent where their codes span the range. A float16 weight that would pass 65504 by that rounding stays
    at 65504.

    Cost: about six passes over the weight and one float32 copy of it.

    Args, Raises: as `quantize`.

    >>> fake_quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), Format.parse("int4-channel"))
    tensor([[ 0., -7.,  4.,  0.]])
    """
    _check_weight(weight, fmt, out_axis, name)
    if fmt.family == "float":
        return _to_float(weight, fmt, name).to(weight.dtype).contiguous()
    values, scale, zero = _round(weight, fmt, out_axis, name)
    values = values.mul_(scale.to(torch.float32)) if zero is None else values.sub_(zero).mul_(scale.to(torch.float32))
    # Adding 0 turns -0 into the +0 that a stored code of 0 gives.
    return _weight(values.add_(0.0), tuple(weight.shape), out_axis, weight.dtype)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight with NaN or infinity: one of them spoils the scale of its whole group.

    Args:
        name: name of the layer.
        weight: the weight.

    Raises:
        InputError: no data (E410), not a float weight (E411), or not finite (E412, with the count and the first).

    >>> check_finite("fc", torch.tensor([[1.0, float("nan")]]))
    Traceback (most recent call last):
    mpsearch.errors.InputError: error[E412] layer 'fc': 1 of 2 weights is not finite (first [0, 1] = nan)
      try      repair the checkpoint, or leave this layer out
    """
    _check_numbers(weight, name)
    if _all_finite(weight):
        return
    bad = ~torch.isfinite(weight.detach())
    count, first = int(bad.sum()), tuple(int(i) for i in bad.nonzero()[0])
    raise InputError(
        "E412",
        f"{_label(name, weight)}: {count} of {weight.numel()} weights {'is' if count == 1 else 'are'} not finite "
        f"(first {list(first)} = {weight[first].item()})",
        advice="repair the checkpoint, or leave this layer out",
    )


def _round(weight: Tensor, fmt: Format, out_axis: int, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (blocks, groups, size) as float32, fp16 scales and float32 zero points (blocks, groups, 1)."""
    rows = _rows(weight, out_axis)
    blocks = 1 if fmt.granularity == "tensor" else rows.shape[0]
    groups = rows.shape[1] // fmt.group if fmt.granularity == "group" else 1
    values = rows.reshape(blocks, groups, -1).to(torch.float32)
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    if fmt.symmetric:
        top, span = 2 ** (fmt.bits - 1) - 1, torch.maximum(high, -low)
    else:
        top, span = 2**fmt.bits - 1, high.clamp_(min=0) - low.clamp_(max=0)
    # Of zeros the widest may be -0, which would be stored as a scale of -0.
    exact = (span / top).add_(0.0)
    scale = exact.to(torch.float16)
    if not _all_finite(scale):
        check_finite(name, weight)
        raise InputError(
            "E421",
            f"{_label(name, weight)}: weights reach {_magnitude(weight):.4g}, so {fmt} needs a scale of "
            f"{float(exact.max()):.4g}; a stored fp16 scale ends at 65504",
            advice="give this layer bf16 or fp32, or more bits",
        )
    step = scale.to(torch.float32).masked_fill_(scale == 0, 1.0)
    # Only a float32 weight can share its memory with `values`; every other is a copy that may be written.
    codes = torch.div(values, step) if weight.dtype == torch.float32 else values.div_(step)
    codes.round_()
    if fmt.symmetric:
        return codes.clamp_(-top, top), scale, None
    zero = low.neg_().div_(step).round_().clamp_(0, top)
    return codes.add_(zero).clamp_(0, top), scale, zero


def _to_float(weight: Tensor, fmt: Format, name: str) -> Tensor:
    numbers = weight.detach().to(torch.float32).to(TORCH_DTYPES[fmt.dtype], copy=True)
    if not _all_finite(numbers):
        check_finite(name, weight)
        raise InputError(
            "E421",
            f"{_label(name, weight)}: weights reach {_magnitude(weight):.4g}; {fmt} ends at "
            f"{torch.finfo(numbers.dtype).max:.4g}",
            advice="give this layer bf16 or fp32",
        )
    return numbers


def _rows(weight: Tensor, out_axis: int) -> Tensor:
    return weight.detach().movedim(out_axis, 0).reshape(weight.shape[out_axis], -1).contiguous()


def _weight(values: Tensor, shape: tuple[int, ...], out_axis: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        values = values.clamp_(-65504.0, 65504.0)
    others = [size for axis, size in enumerate(shape) if axis != out_axis]
    return values.reshape(shape[out_axis], *others).movedim(0, out_axis).to(dtype).contiguous()


def _check_weight(weight: Tensor, fmt: Format, out_axis: int, name: str) -> None:
    _check_numbers(weight, name)
    if not 0 <= out_axis < weight.dim() or not weight.numel():
        raise InputError("E411", f"{_label(name, weight)}: holds no weights with output channels on axis {out_axis}")
    problem = fmt.refuses(Layer(name, "linear", tuple(weight.shape), out_axis))
    if problem:
        raise InputError("E130", f"{_label(name, weight)}: {problem}")


def _check_numbers(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise InputError(
            "E410",
            f"{_label(name, weight)}: {weight.numel()} weights have no data (meta device)",
            because="the model was built empty and never filled",
            advice="load the weights first",
        )
    if weight.dtype not in TORCH_DTYPES.values() or weight.layout != torch.strided:
        raise InputError(
            "E411",
            f"{_label(name, weight)}: holds {str(weight.dtype).removeprefix('torch.')} numbers; expected dense "
            f"{', '.join(TORCH_DTYPES)}",
            advice="start from the 16- or 32-bit checkpoint",
        )


def _all_finite(values: Tensor) -> bool:
    # The extremes carry every NaN and infinity, and are 10 times quicker than isfinite over all weights.
    if not values.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())


def _magnitude(weight: Tensor) -> float:
    low, high = torch.aminmax(weight.detach())
    return max(float(high), -float(low))


def _label(name: str, weight: Tensor) -> str:
    return f"layer '{name}'" if name else f"weight of shape {tuple(weight.shape)}"
