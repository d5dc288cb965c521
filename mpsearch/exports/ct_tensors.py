"""A quantised weight as compressed-tensors 0.20 stores it: names, number types and shapes, and the numbers.

Codes, scales and zero points are those of our own rounding; nothing is rounded again:

- Integers alone: ``weight_packed`` int32, each row's codes one after the other, lowest bit first, from a fresh word;
  a code is stored as ``code + 2**(bits-1)`` (an asymmetric one as it is). Zero points are packed likewise, each column
  of them from a fresh word.
- Integers with rounded inputs: ``weight`` int8; asymmetric codes and zero points less ``2**(bits-1)``.
- fp8: ``weight`` as E4M3. MX: packed codes (mxfp8: E4M3) and the exponents. NVFP4: packed codes, the E4M3 scales, and
  ``1 / g`` of our tensor scale ``g`` as ``weight_global_scale``: what divides is up to 2**-23 off what multiplies.

**Scales.** They take as many bytes as a number of the weight's own type. Our fp16 scales of integers are stored as they
are, also beside bf16 weights. So nothing changes for a reader that computes in fp16 or fp32; transformers and vLLM
turn them into the type that the model is loaded in, and bf16 moves them, and so the weights, by up to 2**-8 of
themselves. The fp32 scales of fp8, and those of static inputs, are rounded to the weight's type; in 16 bits that again
moves weights by up to 2**-8 of themselves, and more is refused (E421).

Source: compressed-tensors 0.20 ``compressors`` and ``quantization/lifecycle/initialize``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.exports.ct_config import layout
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer
from mpsearch.model.activations import Range, scale_and_zero
from mpsearch.model.bits import pack_rows
from mpsearch.model.codec import Evidence
from mpsearch.model.quantize import TORCH_DTYPES, check_finite, quantize

#: Weights that are rounded at a time, where rows do not hang together: what the processor's cache holds in float32.
CHUNK = 1 << 18
_WORD = 32
_MOST = 2.0**-8
_PLAIN: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Spec(NamedTuple):
    """A tensor of a file before it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def specs(layer: Layer, fmt: Format) -> list[Spec]:
    """List the tensors of a layer; one that several modules share has them under each module's name.

    In a plain format it has its own name, once, and the format's number type.

    >>> layer = Layer("fc", "linear", (8, 64), dtype="bfloat16")
    >>> for spec in specs(layer, Format.parse("int3-g32")):
    ...     print(spec.name, spec.dtype, spec.shape)
    fc.weight_packed torch.int32 (8, 6)
    fc.weight_scale torch.float16 (8, 2)
    fc.weight_shape torch.int64 (2,)
    """
    if fmt.weight.family == "plain":
        return [Spec(layer.tensor, _PLAIN[str(fmt.weight)], layer.shape)]
    parts = _weight_parts(layer, fmt) | _input_parts(layer, fmt)
    return [Spec(f"{name}.{part}", *kind) for name in (layer.name, *layer.shared) for part, kind in parts.items()]


def tensors(
    weight: Tensor, layer: Layer, fmt: Format, evidence: Evidence | None = None, seen: Range | None = None
) -> dict[str, Tensor]:
    """Round a weight and return its tensors, by the names of `specs`.

    Args:
        weight: the weight as it was, in any float type.
        layer: the layer.
        fmt: a format that compressed-tensors holds.
        evidence: what the rounding needs beside the weight.
        seen: range of the inputs, for a static format of them.

    Raises:
        InputError: as `mpsearch.model.quantize.quantize`; or scales that their number type cannot hold (E421).
    """
    found = evidence or Evidence()
    if fmt.weight.family == "plain":
        return {layer.tensor: _plain(weight, fmt, layer)}
    parts = _rounded(weight, fmt, layer, found)
    kinds = _weight_parts(layer, fmt) | _input_parts(layer, fmt)
    numbers = _integers(parts, fmt, kinds) if fmt.weight.family == "int" else _small_floats(parts, fmt)
    numbers["weight_scale"] = parts["scales"]
    if fmt.weight.family in ("int", "fp"):
        numbers["weight_scale"] = _held(parts["scales"], layer, kinds["weight_scale"][0])
    if "weight_shape" in kinds:
        numbers["weight_shape"] = torch.tensor(layer.shape)
    if seen is not None and isinstance(fmt.activation, Activation):
        scale, zero = scale_and_zero(seen, fmt.activation)
        numbers["input_scale"] = _held(scale, layer, kinds["input_scale"][0])
        numbers["input_zero_point"] = zero - 2 ** (fmt.activation.bits - 1)
    ready = {part: _cast(numbers[part].cpu(), dtype).reshape(shape) for part, (dtype, shape) in kinds.items()}
    return {f"{name}.{part}": value for name in (layer.name, *layer.shared) for part, value in ready.items()}


def scale_type(layer: Layer, fmt: Format) -> torch.dtype:
    """Number type of a layer's scales: the weight's own, or of integers fp16 where it is of 16 bits."""
    own = TORCH_DTYPES[layer.dtype]
    return torch.float16 if fmt.weight.family == "int" and own.itemsize == 2 else own


Kind = tuple[torch.dtype, tuple[int, ...]]


def _weight_parts(layer: Layer, fmt: Format) -> dict[str, Kind]:
    weight: Any = fmt.weight
    rows, columns = layer.shape
    if weight.family == "nvfp4":
        scales: Kind = torch.float8_e4m3fn, (rows, columns // 16)
        packed: Kind = torch.uint8, (rows, columns // 2)
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (torch.float32, (1,))}
    if weight.family == "mx":
        exponents: Kind = torch.uint8, (rows, columns // 32)
        if weight.bits == 8:
            return {"weight": (torch.float8_e4m3fn, layer.shape), "weight_scale": exponents}
        return {"weight_packed": (torch.uint8, (rows, columns * weight.bits // 8)), "weight_scale": exponents}
    scale: Kind = scale_type(layer, fmt), _scale_shape(weight, layer)
    if weight.family == "fp":
        return {"weight": (torch.float8_e4m3fn, layer.shape), "weight_scale": scale}
    packs = layout(fmt) == "pack-quantized"
    codes: Kind = (torch.int32, (rows, _words_of(columns, weight.bits))) if packs else (torch.int8, layer.shape)
    found = {"weight_packed" if packs else "weight": codes, "weight_scale": scale}
    if weight.asymmetric:
        whole = packs and weight.granularity != "tensor"
        zeros: Kind = (torch.int32, (_words_of(rows, weight.bits), scale[1][1])) if whole else (torch.int8, scale[1])
        found["weight_zero_point"] = zeros
    return {**found, "weight_shape": (torch.int64, (2,))} if packs else found


def _input_parts(layer: Layer, fmt: Format) -> dict[str, Kind]:
    if not isinstance(fmt.activation, Activation) or not fmt.activation.static:
        return {}
    # Not that of integer weights: a scale of inputs is no fp16 number.
    scale: Kind = TORCH_DTYPES[layer.dtype], (1,)
    return {"input_scale": scale} | ({"input_zero_point": (torch.int8, (1,))} if fmt.activation.asymmetric else {})


def _scale_shape(weight: Any, layer: Layer) -> tuple[int, ...]:
    if weight.granularity == "tensor":
        return (1,)
    if weight.family == "fp":
        return tuple(weight.scale_shape(layer))
    return layer.rows, weight.scales(layer) // layer.rows


def _rounded(weight: Tensor, fmt: Format, layer: Layer, evidence: Evidence) -> dict[str, Tensor]:
    """Round a weight, a few rows at a time where these are rounded by themselves."""
    whole: Any = fmt.weight
    apart = whole.family == "mx" or getattr(whole, "granularity", "") in ("channel", "group", "block")
    height = getattr(whole, "height", 0) or 1
    step = max(1, CHUNK // layer.columns // height) * height if apart and not fmt.weight.needs else layer.rows
    try:
        made = [
            quantize(part, fmt, layer.row_axes, name=layer.name, evidence=evidence).parts
            for part in torch.split(weight, step)
        ]
    except InputError:
        # Tell the place in the whole weight, where it is one.
        check_finite(layer.name, weight)
        raise
    return {name: torch.cat([parts[name] for parts in made]) if len(made) > 1 else made[0][name] for name in made[0]}


def _plain(weight: Tensor, fmt: Format, layer: Layer) -> Tensor:
    check_finite(layer.name, weight)
    made = torch.empty(layer.shape, dtype=_PLAIN[str(fmt.weight)])
    step = max(1, CHUNK * len(weight) // weight.numel())
    for part, place in zip(torch.split(weight, step), torch.split(made, step), strict=True):
        place.copy_(quantize(part, fmt, name=layer.name).parts["payload"].reshape(part.shape))
    return made


def _integers(parts: Mapping[str, Tensor], fmt: Format, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    weight: Any = fmt.weight
    codes, zeros, half = parts["payload"], parts.get("zero_points"), 2 ** (weight.bits - 1)
    found: dict[str, Tensor] = {}
    if "weight_packed" in kinds:
        found["weight_packed"] = _words(codes, weight.bits, 0 if weight.asymmetric else half)
    else:
        found["weight"] = codes.to(torch.int16) - half if weight.asymmetric else codes
    if zeros is not None:
        whole = kinds["weight_zero_point"][0] == torch.int32
        found["weight_zero_point"] = _words(zeros.T, weight.bits, 0).T if whole else zeros.to(torch.int16) - half
    return found


def _small_floats(parts: Mapping[str, Tensor], fmt: Format) -> dict[str, Tensor]:
    weight: Any = fmt.weight
    codes = parts["payload"]
    if weight.bits == 8:
        return {"weight": codes.view(torch.float8_e4m3fn)}
    packed = pack_rows(codes.cpu().numpy(), weight.bits).reshape(len(codes), -1)
    found = {"weight_packed": torch.from_numpy(packed)}
    if weight.family == "nvfp4":
        scale = parts["tensor_scale"]
        # A tensor of zeros has the scale 0, and codes of 0.
        found["weight_global_scale"] = torch.where(scale > 0, 1 / scale, 1.0)
    return found


def _words(codes: Tensor, bits: int, offset: int) -> Tensor:
    """Pack each row's codes into 32-bit words, the lowest bits first."""
    rows, count = codes.shape
    packed = np.zeros((rows, 4 * _words_of(count, bits)), np.uint8)
    step = max(1, CHUNK // count)
    for start in range(0, rows, step):
        # In 8 bits a sum that passes 255 is what it is less 256: a code below zero gets its place above.
        part = (codes[start : start + step].contiguous().view(torch.uint8) + offset).cpu().numpy()
        held = pack_rows(part, bits).reshape(len(part), -1)
        packed[start : start + step, : held.shape[1]] = held
    return torch.from_numpy(packed.view("<i4"))


def _words_of(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)


def _held(scales: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """Return scales in the number type that holds them, refusing one that cannot."""
    held = scales.to(dtype)
    off = (held.double() - scales.double()).abs()
    if bool((off > _MOST * scales.double().abs()).any()):
        worst = float(scales[off > _MOST * scales.double().abs()].min())
        raise InputError(
            "E421",
            f"layer '{layer.name}': a scale of {worst:.3g} is stored as {str(dtype).removeprefix('torch.')} beside "
            f"{layer.dtype} weights, which is too coarse for it",
            advice="give this layer an integer format, or bf16",
        )
    return held


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value.contiguous()
    if dtype == torch.float8_e4m3fn:
        # The bytes of E4M3 scales.
        return value.contiguous().view(dtype) if value.dtype == torch.uint8 else value.to(dtype)
    return value.to(dtype).contiguous()
