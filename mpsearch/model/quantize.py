"""Rounding weights to a number format: the one rule that scores, measurements and exports share.

A weight is seen as (rows, columns): one row per output channel (of stacked experts: per expert and output channel),
the other axes flattened in their order. What happens to the rows is said in the codec of the format's family
(`mpsearch.model.codecs`). The result depends on the weight, the format and the evidence only, not on strides. Rules
that take the largest weight are the same on every device; those that add up errors (``-mse``, ``-gptq``, code books)
may pick another scale where two are equally good up to float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.codec import Codec, Evidence, RangeError, all_finite, codec_of
from mpsearch.model.threads import one_thread

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NOTHING = Evidence()


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A weight in a format.

    Attributes:
        parts: what is stored: ``payload`` (codes, one number per weight) and what goes with it (``scales``,
            ``zero_points``, …), as the family's codec says.
        shape: shape of the weight.
        row_axes: its axes of the output channels.
        dtype: its number type.
        fmt: the format of the weight.
    """

    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]
    row_axes: tuple[int, ...]
    dtype: torch.dtype
    fmt: Format


def quantize(
    weight: Tensor,
    fmt: Format,
    row_axes: int | Sequence[int] = 0,
    *,
    name: str = "",
    evidence: Evidence = _NOTHING,
) -> Quantized:
    """Round a weight to a format.

    Args:
        weight: any shape with the output channels on ``row_axes``, any float type, any strides; left as it is.
        fmt: the format; of a joined one, the format of the weight.
        row_axes: axis of the output channels (1 for a transposed linear), or axes for stacked experts.
        name: name of the layer, for messages.
        evidence: what the format's rounding must know beside the weight.

    Raises:
        InputError: the shape does not take the format (E130); no data (E410); not a plain float weight (E411); NaN
            or infinity (E412); a scale or number passes the largest of its type (E421); evidence is missing (E422).

    >>> made = quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), Format.parse("int4-channel"))
    >>> made.parts["payload"].tolist(), made.parts["scales"].tolist()
    ([[0, -7, 4, 0]], [[1.0]])
    """
    axes = _checked(weight, fmt, row_axes, name, evidence)
    codec: Codec[Format] = codec_of(type(fmt.weight))
    try:
        with one_thread() if fmt.needs else nullcontext():
            parts = codec.encode(_rows(weight, axes), fmt.weight, evidence)
    except RangeError as error:
        raise _out_of_range(error, weight, name) from error
    return Quantized(parts, tuple(weight.shape), axes, weight.dtype, fmt.weight)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the weight that the codes stand for, in its own shape and number type.

    Equals `fake_quantize` of the same weight bit for bit.

    >>> weight = torch.tensor([[0.3, -1.0], [2.0, 0.1]])
    >>> fmt = Format.parse("int3-channel-asym")
    >>> torch.equal(dequantize(quantize(weight, fmt)), fake_quantize(weight, fmt))
    True
    """
    columns = math.prod(quantized.shape) // math.prod(quantized.shape[axis] for axis in quantized.row_axes)
    values = codec_of(type(quantized.fmt)).decode(quantized.parts, quantized.fmt, columns)
    return _weight(values, quantized.shape, quantized.row_axes, quantized.dtype)


def fake_quantize(
    weight: Tensor,
    fmt: Format,
    row_axes: int | Sequence[int] = 0,
    *,
    name: str = "",
    evidence: Evidence = _NOTHING,
) -> Tensor:
    """Return a weight rounded to a format, in its own shape and number type.

    A float16 weight that would pass 65504 by that rounding stays at 65504.

    Cost for integers: about six passes over the weight and one float32 copy of it.

    Args, Raises: as `quantize`.

    >>> fake_quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), Format.parse("int4-channel"))
    tensor([[ 0., -7.,  4.,  0.]])
    """
    axes = _checked(weight, fmt, row_axes, name, evidence)
    codec: Codec[Format] = codec_of(type(fmt.weight))
    try:
        with one_thread() if fmt.needs else nullcontext():
            values = codec.fake(_rows(weight, axes), fmt.weight, evidence)
    except RangeError as error:
        raise _out_of_range(error, weight, name) from error
    return _weight(values, tuple(weight.shape), axes, weight.dtype)


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
    if all_finite(weight):
        return
    bad = ~torch.isfinite(weight.detach())
    count, first = int(bad.sum()), tuple(int(i) for i in bad.nonzero()[0])
    raise InputError(
        "E412",
        f"{_label(name, weight)}: {count} of {weight.numel()} weights {'is' if count == 1 else 'are'} not finite "
        f"(first {list(first)} = {weight[first].item()})",
        advice="repair the checkpoint, or leave this layer out",
    )


def _rows(weight: Tensor, axes: Sequence[int]) -> Tensor:
    count = math.prod(weight.shape[axis] for axis in axes)
    return weight.detach().movedim(tuple(axes), tuple(range(len(axes)))).reshape(count, -1).contiguous()


def _weight(values: Tensor, shape: Sequence[int], axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        values = values.clamp_(-65504.0, 65504.0)
    sizes = [*(shape[axis] for axis in axes), *(size for axis, size in enumerate(shape) if axis not in axes)]
    return values.reshape(sizes).movedim(tuple(range(len(axes))), tuple(axes)).to(dtype).contiguous()


def _checked(
    weight: Tensor, fmt: Format, row_axes: int | Sequence[int], name: str, evidence: Evidence
) -> tuple[int, ...]:
    _check_numbers(weight, name)
    axes = (row_axes,) if isinstance(row_axes, int) else tuple(row_axes)
    if not all(0 <= axis < weight.dim() for axis in axes) or not weight.numel():
        raise InputError("E411", f"{_label(name, weight)}: holds no weights with output channels on axis {row_axes}")
    kind = "expert" if len(axes) > 1 else "linear"
    problem = fmt.weight.refuses(Layer(name, kind, tuple(weight.shape), axes[-1]))
    if problem:
        raise InputError("E130", f"{_label(name, weight)}: {problem}")
    check_finite(name, weight)
    if fmt.needs and getattr(evidence, fmt.needs) is None:
        what = {"hessian": "the layer's inputs", "importance": "gradients of the loss"}[fmt.needs]
        raise InputError(
            "E422",
            f"{_label(name, weight)}: {fmt} rounds by {what}, and none were given",
            advice="give calibration data",
        )
    return axes


def _out_of_range(error: RangeError, weight: Tensor, name: str) -> InputError:
    return InputError("E421", f"{_label(name, weight)}: {error}", advice="give this layer bf16 or fp32, or more bits")


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


def _label(name: str, weight: Tensor) -> str:
    return f"layer '{name}'" if name else f"weight of shape {tuple(weight.shape)}"
