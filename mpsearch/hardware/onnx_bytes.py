"""Bytes of a layer in an ONNX file with ONNX Runtime's own operators, by part.

With R output channels of C weights, b bits and G groups in each:

- integers in groups (MatMulNBits, and GatherBlockQuantized for embeddings): ``codes`` R C b / 8, ``scales`` fp32 R G,
  and ``zero_points`` with G of them in each row, which ends at a whole byte;
- int8 with inputs in 8 bits: ``codes`` R C, ``scales`` fp32, R of them or one; a static input has an fp32 scale and a
  zero point of one byte;
- floats of 16 bits take 32, for so they are multiplied.

Of an embedding that is also the head, the look-up and the product read codes, or floats, in two layouts. Both are
stored; scales and zero points are the same for both and stored once.

Source: ONNX Runtime 1.31 ``docs/ContribOperators.md``.
"""

from __future__ import annotations

from typing import Any

from mpsearch.format import Format
from mpsearch.layer import Layer

BLOCKS = (16, 32, 64, 128, 256)
_INPUTS = ("int8-tensor-asym", "int8-tensor-asym-static")


def refuses(fmt: Format, layer: Layer) -> str:
    """Say why a file cannot hold a layer in a format; empty when it can.

    >>> refuses(Format.parse("int3-g32"), Layer("fc", "linear", (64, 64)))
    'onnxruntime holds 2, 4, 8 bits here, not int3-g32'
    """
    weight: Any = fmt.weight
    if weight.family == "plain" and fmt.activation is None:
        return ""
    if weight.family != "int":
        return f"onnxruntime holds integers, bf16, fp16 and fp32, not {fmt}"
    if layer.kind not in ("linear", "embedding"):
        return f"onnxruntime holds linear layers and embeddings, not {layer.kind} layers; use fp32"
    if fmt.activation is not None:
        return _refuses_inputs(fmt, layer)
    bits = (2, 4, 8) if layer.kind == "linear" else (4, 8)
    if weight.bits not in bits:
        return f"onnxruntime holds {', '.join(map(str, bits))} bits here, not {fmt}"
    if weight.granularity != "group" or weight.group not in BLOCKS:
        return f"onnxruntime holds groups of {', '.join(map(str, BLOCKS))}, not {fmt}"
    return f"onnxruntime's codes are centred or have zero points, not {fmt}" if weight.grid == "full" else ""


def _refuses_inputs(fmt: Format, layer: Layer) -> str:
    weight: Any = fmt.weight
    eight = weight.bits == 8 and weight.granularity != "group" and not weight.asymmetric and weight.grid != "full"
    if layer.kind == "linear" and eight and str(fmt.activation) in _INPUTS:
        return ""
    return f"onnxruntime multiplies rounded inputs as int8-channel or int8-tensor @ {' or '.join(_INPUTS)}, not {fmt}"


def parts(fmt: Format, layer: Layer) -> dict[str, int]:
    """Bytes of each part of a layer that is not refused.

    >>> parts(Format.parse("int4-g32-asym"), Layer("fc", "linear", (64, 96)))
    {'codes': 3072, 'scales': 768, 'zero_points': 128}
    """
    weight: Any = fmt.weight
    if layer.kind not in ("linear", "embedding"):
        return fmt.itemised_bytes(layer)
    layouts = 2 if layer.kind == "embedding" and layer.shared else 1
    if weight.family == "plain":
        return {"payload": 4 * layouts * layer.weights}
    scales = weight.scales(layer)
    if fmt.activation is not None:
        inputs: Any = fmt.activation
        static = {"input_scale": 4, "input_zero_point": 1} if inputs.static else {}
        return {"codes": layer.weights, "scales": 4 * scales, **static}
    found = {"codes": layouts * layer.weights * weight.bits // 8, "scales": 4 * scales}
    if weight.asymmetric:
        found["zero_points"] = layer.rows * -(-scales // layer.rows * weight.bits // 8)
    return found
