"""What compressed-tensors calls a plan: ``quantization_config``, and what it cannot hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mpsearch.capabilities import capabilities
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.hardware.containers import refuses
from mpsearch.keys import canonical_json
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

#: Version of the library whose layout is written; earlier ones pack 3, 5, 6 and 7 bits with gaps.
VERSION = "0.20.0"
_CONTAINER = "compressed-tensors"
_NAME_OF_MX: Mapping[str, str] = {
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6-e2m3": "mxfp6-pack-quantized",
    "mxfp8-e4m3": "mxfp8-quantized",
}

Scheme = dict[str, Any]


def scheme(fmt: Format) -> Scheme | None:
    """Return how compressed-tensors describes a format that it holds, without its targets; None for a plain one.

    >>> scheme(Format.parse("int4-g64-asym-mse"))["weights"]  # doctest: +NORMALIZE_WHITESPACE
    {'num_bits': 4, 'type': 'int', 'symmetric': False, 'strategy': 'group', 'group_size': 64, 'dynamic': False}
    >>> scheme(Format.parse("bf16")) is None
    True
    """
    if fmt.weight.family == "plain":
        return None
    return {
        "weights": _weights(fmt.weight),
        "input_activations": _inputs(fmt.activation) if isinstance(fmt.activation, Activation) else None,
        "output_activations": None,
        "format": layout(fmt),
    }


def layout(fmt: Format) -> str:
    """Name of the way in which a format's codes are stored, as compressed-tensors chooses it.

    >>> [layout(Format.parse(text)) for text in ("int4-g64", "int8-channel@int8-token", "fp8-e4m3")]
    ['pack-quantized', 'int-quantized', 'naive-quantized']
    """
    weight, rounds_inputs = fmt.weight, fmt.activation is not None
    if weight.family == "int":
        return "int-quantized" if rounds_inputs else "pack-quantized"
    if weight.family == "nvfp4":
        return "nvfp4-pack-quantized"
    return _NAME_OF_MX.get(str(weight), "float-quantized" if rounds_inputs else "naive-quantized")


def quantization_config(plan: BitPlan, left: Collection[str]) -> Scheme:
    """Return the ``quantization_config`` of a plan; empty when nothing is quantised.

    Every module is named, in one group alone, and no name is a pattern: loaders differ in which of two rules wins.

    Args:
        plan: a plan that is not refused.
        left: names of all modules that are left as they are.
    """
    groups: dict[str, Scheme] = {}
    for layer in plan.layers:
        made = scheme(plan.formats[layer.name]) if layer.kind != "kv_cache" else None
        if made is not None:
            groups.setdefault(canonical_json(made), {"targets": [], **made})["targets"] += [layer.name, *layer.shared]
    if not groups:
        return {}
    ordered = sorted(({**group, "targets": sorted(group["targets"])} for group in groups.values()), key=_first)
    layouts = {group["format"] for group in ordered}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(ordered)},
        "ignore": sorted(left),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def violations(plan: BitPlan) -> Iterator[str]:
    """Yield a line for every layer that cannot be held as planned, and for layers that engines cannot fuse."""
    problems = {layer.name: _problem(layer, plan.formats[layer.name]) for layer in plan.layers}
    yield from (f"{name}: {problem}" for name, problem in problems.items() if problem)
    for names in _fused(plan):
        if any(problems[name] for name in names):
            # What has no scheme cannot be compared, and is named already.
            continue
        formats = [plan.formats[name] for name in names]
        if len({canonical_json(scheme(fmt) or {}) for fmt in formats}) > 1:
            given = ", ".join(f"{name} {fmt}" for name, fmt in zip(names, formats, strict=True))
            yield f"{names[0]}: engines load these as one matrix, which has one format: {given}; tie them"


def notes(plan: BitPlan) -> list[str]:
    """Say what transformers 5.23 does not load by itself, and what it computes in another way; empty for nothing.

    Its default fills modules that it built from the scheme, and for these it knows no quantised embeddings, no packed
    zero points, and no blocks of 4 to 8 bit floats in a model that is not in bf16.
    """
    quantised = [layer for layer in plan.layers if layer.kind != "kv_cache" and scheme(plan.formats[layer.name])]
    missing: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for layer in quantised:
        fmt: Any = plan.formats[layer.name]
        if layer.kind == "embedding":
            missing.setdefault("quantised embeddings", layer.name)
        if layout(fmt) == "pack-quantized" and fmt.weight.asymmetric and fmt.weight.granularity != "tensor":
            missing.setdefault("packed zero points", layer.name)
        if fmt.weight.family in ("mx", "nvfp4") and layer.dtype != "bfloat16":
            missing.setdefault(f"{fmt.weight} beside {layer.dtype} weights", layer.name)
        if str(fmt.activation).startswith(("int", "mx")):
            inputs.setdefault(f"inputs in {fmt.activation}", layer.name)
    kinds = {canonical_json(scheme(plan.formats[layer.name]) or {}) for layer in quantised}
    way = "load it with CompressedTensorsConfig(dequantize=True)"
    if len(kinds) > 1:
        way = "compressed-tensors' own convert_checkpoint makes it dense"
    found = [f"transformers 5.23 does not load by default: {_told(missing)}; {way}"] if missing else []
    if inputs:
        found.append(f"transformers 5.23 rounds by rules of its own, so losses differ: {_told(inputs)}")
    return found


def _told(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{reason} ('{name}', …)" for reason, name in reasons.items())


def _problem(layer: Layer, fmt: Format) -> str:
    if layer.kind == "kv_cache":
        if str(fmt) in ("kv-bf16", "kv-fp16"):
            return ""
        return f"{_CONTAINER} has one scheme for all caches, not {fmt} for this one; allowed kv-bf16, kv-fp16"
    problem = refuses(fmt, layer, _CONTAINER)
    if not problem and str(fmt.activation) == "nvfp4":
        return f"{_CONTAINER} stores one scale for all inputs, {fmt} takes it of each input; use nvfp4"
    return problem


def _fused(plan: BitPlan) -> Iterator[list[str]]:
    """Yield the names of layers that are one matrix in engines."""
    found: dict[tuple[str, int], list[str]] = {}
    for layer in plan.layers:
        parent, _, name = layer.name.rpartition(".")
        for place, names in enumerate(capabilities(_CONTAINER).fused):
            if layer.kind == "linear" and name in names:
                found.setdefault((parent, place), []).append(layer.name)
    yield from found.values()


def _weights(weight: Any) -> Scheme:
    if weight.family == "nvfp4":
        return _floats(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    if weight.family == "mx":
        return _floats(weight.bits, "group", group_size=32, scale_dtype="torch.uint8")
    if weight.family == "fp":
        size = {"group": {"group_size": weight.group}, "block": {"block_structure": [weight.height, weight.width]}}
        return _floats(8, weight.granularity, **size.get(weight.granularity, {}))
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": not weight.asymmetric,
        "strategy": weight.granularity,
        "group_size": weight.group or None,
        "dynamic": False,
    }


def _floats(bits: int, strategy: str, **more: Any) -> Scheme:
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}


def _inputs(fmt: Activation) -> Scheme:
    if fmt.grain == "block":
        return {**_floats(fmt.bits, "group", group_size=32, scale_dtype="torch.uint8"), "dynamic": True}
    return {
        "num_bits": fmt.bits,
        "type": "int" if fmt.number.startswith("int") else "float",
        "symmetric": not fmt.asymmetric,
        "strategy": fmt.grain,
        "dynamic": not fmt.static,
    }


def _first(group: Scheme) -> list[tuple[int, str]]:
    """Sort key of a group: its first target, numbers by their size."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", group["targets"][0])]
