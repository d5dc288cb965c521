"""What a layer takes in the checkpoint formats of others, to the byte: ``stored_bytes``.

What these checkpoints store beside the codes differs from our own files, and so do the shapes they can hold.
With R output channels of C weights, G groups in each, b bits:

- ``native``: our own file, `Format.itemised_bytes`.
- ``gptq`` (AutoGPTQ, GPTQModel): ``qweight`` int32 (C b / 32, R), ``qzeros`` int32 (G, R b / 32), always stored,
  ``scales`` fp16 (G, R), ``g_idx`` int32 (C). b is 2, 3, 4 or 8; R and C are multiples of 32.
- ``auto-round`` (AutoRound): as gptq without ``g_idx``.
- ``awq`` (AutoAWQ's gemm layout): ``qweight`` int32 (C, R / 8), ``qzeros`` int32 (G, R / 8), ``scales`` fp16 (G, R).
  b is 4; R is a multiple of 8.
- ``compressed-tensors`` 0.19 and later. Integers alone, pack-quantized: ``weight_packed`` int32 (R, ceil(C b / 32)),
  ``weight_scale`` in the weight's own number type, ``weight_shape`` int64 (2), and for asymmetric ones
  ``weight_zero_point``: int32 (ceil(R b / 32), G), or one int8 for a scale per tensor. Integers with rounded inputs,
  int-quantized: a byte for each weight and each zero point, whatever b is. fp8-e4m3: a byte for each weight. mxfp4,
  mxfp6-e2m3, mxfp8-e4m3: packed codes and a byte for each 32. nvfp4: packed codes, a byte for each 16, one fp32.
- ``gguf``: blocks of GGUF types.
- ``onnxruntime``: `mpsearch.hardware.onnx_bytes`.

Where a checkpoint's loader keeps modules apart that share one weight, the weight counts once for each of them.

Sources: GPTQModel 7.7 ``nn_modules/qlinear``, AutoAWQ 0.2 ``WQLinear_GEMM``, compressed-tensors 0.20
``compressors`` and ``quantization/lifecycle/initialize``, gguf 0.19 ``constants``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.hardware import onnx_bytes
from mpsearch.layer import DTYPE_BITS, Excluded, Layer

_GPTQ_BITS = (2, 3, 4, 8)
_MX = {"mxfp4": 4, "mxfp6-e2m3": 6, "mxfp8-e4m3": 8}
_WORD = 32

Parts = dict[str, int]


def stored_bytes(fmt: Format, layer: Layer, container: str = "native") -> Parts:
    """Bytes of a layer's weight by part, in a checkpoint format.

    Args:
        fmt: the format.
        layer: the layer.
        container: one of `CONTAINERS`.

    Raises:
        InputError: no such container (E107), or it cannot hold the layer so (E301).

    >>> stored_bytes(Format.parse("int4-g128"), Layer("fc", "linear", (4096, 4096)), "gptq")
    {'qweight': 8388608, 'qzeros': 65536, 'scales': 262144, 'g_idx': 16384}
    """
    problem = refuses(fmt, layer, container)
    if problem:
        raise InputError("E301", f"layer '{layer.name}': {problem}")
    # No checkpoint holds a KV cache.
    return fmt.itemised_bytes(layer) if layer.kind == "kv_cache" else CONTAINERS[container][1](fmt, layer)


def refuses(fmt: Format, layer: Layer, container: str = "native") -> str:
    """Say why a container cannot hold a layer in a format; empty when it can.

    >>> refuses(Format.parse("int5-g32"), Layer("fc", "linear", (64, 64)), "gptq")
    'gptq holds 2, 3, 4, 8 bits, not int5-g32'
    """
    check_container(container)
    problem = fmt.refuses(layer)
    if problem or layer.kind == "kv_cache":
        return problem
    if layer.is_part and container != "native":
        return f"{container} gives a layer one format; it holds no parts of '{layer.of}'"
    return CONTAINERS[container][0](fmt, layer)


def check_container(container: str) -> None:
    """Refuse a name that is not one of `CONTAINERS`.

    Raises:
        InputError: with the nearest name (E107).
    """
    if container not in CONTAINERS:
        raise InputError(
            "E107",
            f"no container '{container}'{did_you_mean(container, CONTAINERS)}",
            advice=f"there is {', '.join(CONTAINERS)}",
        )


def kept_bytes(kept: Excluded, container: str = "native") -> int:
    """Bytes of a tensor that is left out of the search: as it is stored now, but GGUF keeps vectors in 32 bits.

    A file for ONNX Runtime keeps all floats in 32 bits.

    >>> norm = Excluded("norm.weight", (64,), "bfloat16", "1-D norm or bias vector")
    >>> kept_bytes(norm), kept_bytes(norm, "gguf")
    (128, 256)
    """
    if container == "gguf" and len(kept.shape) < 2:
        return 4 * kept.weights
    if container == "onnxruntime" and kept.dtype in ("bfloat16", "float16"):
        return 4 * kept.weights
    return kept.stored_bytes


def _native(fmt: Format, layer: Layer) -> Parts:
    return fmt.itemised_bytes(layer)


def _anything(fmt: Format, layer: Layer) -> str:
    return ""


def _plain(fmt: Format) -> bool:
    return fmt.weight.family == "plain"


def _linear_only(fmt: Format, layer: Layer, container: str) -> str:
    """The rules that gptq and awq share."""
    weight: Any = fmt.weight
    if fmt.activation is not None:
        return f"{container} rounds no inputs; use {weight}"
    if weight.family != "int":
        return f"{container} holds integers, bf16, fp16 and fp32, not {weight}"
    if layer.kind != "linear":
        return f"{container} holds linear layers, not {layer.kind} layers; use bf16"
    if weight.granularity == "tensor":
        return f"{container} has scales per channel or group, not per tensor; use int{weight.bits}-channel"
    return ""


def _gptq_refuses(fmt: Format, layer: Layer) -> str:
    if _plain(fmt) and fmt.activation is None:
        return ""
    problem = _linear_only(fmt, layer, "gptq")
    if problem:
        return problem
    if fmt.bits not in _GPTQ_BITS:
        return f"gptq holds {', '.join(map(str, _GPTQ_BITS))} bits, not {fmt}"
    if layer.rows % _WORD or layer.columns % _WORD:
        return f"gptq packs 32 rows and columns together; {layer.rows} x {layer.columns} weights do not fit; use bf16"
    return ""


def _gptq(fmt: Format, layer: Layer) -> Parts:
    if _plain(fmt):
        return fmt.itemised_bytes(layer)
    weight: Any = fmt.weight
    scales = weight.scales(layer)
    once = {
        "qweight": layer.weights * fmt.bits // 8,
        "qzeros": scales * fmt.bits // 8,
        "scales": 2 * scales,
        "g_idx": 4 * layer.columns,
    }
    return _each_module(once, layer)


def _autoround(fmt: Format, layer: Layer) -> Parts:
    return {name: size for name, size in _gptq(fmt, layer).items() if name != "g_idx"}


def _awq_refuses(fmt: Format, layer: Layer) -> str:
    if _plain(fmt) and fmt.activation is None:
        return ""
    problem = _linear_only(fmt, layer, "awq")
    if problem:
        return problem
    if fmt.bits != 4:
        return f"awq holds 4 bits, not {fmt}"
    if layer.rows % 8:
        return f"awq packs 8 output channels in a word; {layer.rows} do not fit; use bf16"
    return ""


def _awq(fmt: Format, layer: Layer) -> Parts:
    if _plain(fmt):
        return fmt.itemised_bytes(layer)
    weight: Any = fmt.weight
    scales = weight.scales(layer)
    return _each_module({"qweight": layer.weights // 2, "qzeros": scales // 2, "scales": 2 * scales}, layer)


def _compressed_refuses(fmt: Format, layer: Layer) -> str:
    weight = fmt.weight
    if _plain(fmt) and fmt.activation is None:
        return ""
    if not (weight.family in ("int", "nvfp4") or str(weight) in _MX or str(weight).startswith("fp8-e4m3")):
        return f"compressed-tensors holds integers, fp8-e4m3, {', '.join(_MX)} and nvfp4, not {weight}"
    if fmt.activation is not None and not _compressed_pair(str(weight), str(fmt.activation)):
        return f"compressed-tensors has no scheme for {fmt}"
    if layer.kind not in ("linear", "embedding") or layer.out_axis:
        kind = "transposed linear" if layer.kind == "linear" else layer.kind
        return f"compressed-tensors holds Linear and Embedding modules, not {kind} layers; use bf16"
    return ""


def _compressed_pair(weight: str, activation: str) -> bool:
    """Whether one scheme holds these weights and these inputs."""
    if not weight.startswith(("int", "fp8")):
        return weight == activation
    numbers = "fp8-e4m3" if weight.startswith("fp8") else "int8|int4|fp8-e4m3" if weight.startswith("int4") else "int8"
    return re.fullmatch(f"({numbers})-(token|tensor)(-asym)?(-static)?", activation) is not None


def _compressed(fmt: Format, layer: Layer) -> Parts:
    if _plain(fmt):
        return fmt.itemised_bytes(layer)
    once = _compressed_weight(fmt, layer) | _compressed_inputs(fmt, layer)
    return _each_module(once, layer)


def _compressed_weight(fmt: Format, layer: Layer) -> Parts:
    weight: Any = fmt.weight
    codes = layer.weights
    if weight.family == "int":
        return _compressed_integers(weight, layer, fmt.activation is None)
    if weight.family == "nvfp4":
        return {"weight_packed": codes // 2, "weight_scale": codes // 16, "weight_global_scale": 4}
    if str(weight) in _MX:
        bits = _MX[str(weight)]
        name = "weight" if bits == 8 else "weight_packed"
        return {name: codes * bits // 8, "weight_scale": codes // 32}
    return {"weight": codes, "weight_scale": math.prod(weight.scale_shape(layer)) * _scale_size(layer)}


def _compressed_integers(weight: Any, layer: Layer, packed: bool) -> Parts:
    scales, rows = weight.scales(layer), layer.rows
    found = {"weight_packed": rows * _words(layer.columns * weight.bits)} if packed else {"weight": layer.weights}
    found["weight_scale"] = scales * _scale_size(layer)
    if weight.asymmetric:
        whole = packed and weight.granularity != "tensor"
        found["weight_zero_point"] = _words(rows * weight.bits) * (scales // rows) if whole else scales
    return {**found, "weight_shape": 16} if packed else found


def _compressed_inputs(fmt: Format, layer: Layer) -> Parts:
    """Static scales of inputs, in the weight's number type, and a byte for each of their zero points."""
    if fmt.activation is None:
        return {}
    ours = fmt.activation.itemised_bytes(layer)
    found = {"input_global_scale": 4} if str(fmt.activation) == "nvfp4" else {}
    if "input_scales" in ours:
        found["input_scale"] = ours["input_scales"] // 4 * _scale_size(layer)
    if "input_zero_points" in ours:
        found["input_zero_point"] = ours["input_zero_points"]
    return found


def _gguf_refuses(fmt: Format, layer: Layer) -> str:
    if fmt.activation is not None:
        return f"gguf rounds no inputs; use {fmt.weight}"
    if _plain(fmt):
        return ""
    if fmt.family != "gguf":
        return f"gguf holds its own types (q4_K, q8_0, …), not {fmt}"
    if layer.kind == "conv":
        return "gguf keeps convolutions in 16 or 32 bits; use fp16"
    return ""


def _gguf(fmt: Format, layer: Layer) -> Parts:
    return {"payload": fmt.bytes(layer)}


def _words(bits: int) -> int:
    """Bytes of the 32-bit words that hold some bits."""
    return 4 * -(-bits // _WORD)


def _scale_size(layer: Layer) -> int:
    """Bytes of a compressed-tensors scale: that of the weight's number type."""
    return DTYPE_BITS[layer.dtype] // 8


def _each_module(parts: Parts, layer: Layer) -> Parts:
    return {name: size * (1 + len(layer.shared)) for name, size in parts.items()}


#: Name -> why a layer cannot be held in a format, and its bytes where it can.
CONTAINERS: Mapping[str, tuple[Callable[[Format, Layer], str], Callable[[Format, Layer], Parts]]] = {
    "native": (_anything, _native),
    "gptq": (_gptq_refuses, _gptq),
    "auto-round": (_gptq_refuses, _autoround),
    "awq": (_awq_refuses, _awq),
    "compressed-tensors": (_compressed_refuses, _compressed),
    "gguf": (_gguf_refuses, _gguf),
    "onnxruntime": (onnx_bytes.refuses, onnx_bytes.parts),
}
