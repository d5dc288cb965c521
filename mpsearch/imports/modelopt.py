"""NVIDIA ModelOpt: ``hf_quant_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, integer, joined, only_linear
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import mapping, read_json, text, texts, whole
from mpsearch.layer import Layer, Layers

_MIXED = "MIXED_PRECISION"
#: Algorithm -> format of weights, and of inputs (empty where they stay).
_ALGORITHMS: Mapping[str, tuple[str, str]] = {
    "FP8": ("fp8-e4m3", "fp8-e4m3-tensor-static"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8-e4m3-channel", "fp8-e4m3-token"),
    "FP8_PB_WO": ("fp8-e4m3-b128x128", ""),
    "W8A16": ("int8-channel", ""),
    "W8A8_SQ_PER_CHANNEL": ("int8-channel", "int8-tensor-static"),
    "W4A16_NVFP4": ("nvfp4", ""),
    "MXFP8": ("mxfp8-e4m3", "mxfp8-e4m3"),
}
#: Algorithms of which the inputs have no counterpart here -> format of weights, and what is wrong with the inputs.
_WEIGHTS_ONLY: Mapping[str, tuple[str, str]] = {
    "NVFP4": ("nvfp4", "in nvfp4 under one scale from calibration"),
    "W4A8_NVFP4_FP8": ("nvfp4", "in fp8 under nvfp4 weights"),
    "W4A8_MXFP4_FP8": ("mxfp4", "in fp8 under mxfp4 weights"),
}
_GROUPS = {"NVFP4": 16, "W4A16_NVFP4": 16, "W4A8_NVFP4_FP8": 16, "W4A8_MXFP4_FP8": 32, "MXFP8": 32, "FP8_PB_WO": 128}
_SCALED = frozenset({"W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"})
_NOTE = (
    "ModelOpt moves scale from inputs into weights (AWQ, SmoothQuant) before it rounds; "
    "here weights are rounded as they are"
)


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what ModelOpt 0.47 wrote: the algorithm of each layer by its exact name, or one for all but some.

    Of one for all, linear layers of the blocks and the head take it but for those that ``exclude_modules`` names, with
    patterns as in a shell.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_json(path)
    config = mapping(data.get("quantization", data.get("quantization_config", data)), "quantization", path)
    if "quant_algo" not in config:
        raise InputError("E307", f"'{path}' is no configuration of ModelOpt: it has no quant_algo")
    algorithm = text(config["quant_algo"] or "", "quant_algo", path)
    apart = texts(config.get("exclude_modules", config.get("ignore")), "exclude_modules", path)
    chosen = {
        name: mapping(value, f"quantized_layers['{name[:60]}']", path)
        for name, value in mapping(config.get("quantized_layers") or {}, "quantized_layers", path).items()
    }
    if algorithm == _MIXED and not chosen:
        raise InputError("E307", f"'{path}': quant_algo is {_MIXED} and quantized_layers names nothing")
    patterns = Patterns(str(path))
    used: set[str] = set()

    def say(name: str, layer: Layer) -> str:
        said = chosen.get(name)
        if said is None:
            if not algorithm or not only_linear(layer) or algorithm == _MIXED:
                return ""
            if any(patterns.glob(pattern, name) for pattern in apart):
                return ""
            said = config
        used.add(text(said.get("quant_algo"), f"quant_algo of '{name[:60]}'", path))
        return _scheme(said, path, options)

    found = gather(layers, say, options, list(chosen))
    notes = [*found.notes, *([_NOTE] if used & _SCALED else [])]
    caches = config.get("kv_cache_quant_algo")
    problems = list(found.problems)
    if caches and "caches" not in options.without:
        problems.append(f"kv caches: {caches!s:.40} has no counterpart here; --without caches leaves them out")
    return Foreign(found.formats, problems, notes)


def _scheme(config: Mapping[str, Any], path: Path, options: Options) -> str:
    name = text(config["quant_algo"], "quant_algo", path)
    size = config.get("group_size")
    group = 0 if size is None else whole(size, f"group_size of {name[:40]}", path)
    if group and name in _GROUPS and group != _GROUPS[name]:
        raise UnsaidError(f"{name} in groups of {group} has no counterpart here")
    if name in _ALGORITHMS:
        weight, inputs = _ALGORITHMS[name]
        return joined(weight, lambda: inputs, options)
    if name in _WEIGHTS_ONLY:
        weight, wrong = _WEIGHTS_ONLY[name]
        return joined(weight, lambda: _no_inputs(wrong), options)
    if name in ("W4A16_AWQ", "W4A8_AWQ") and group > 0:
        inputs = "fp8-e4m3-tensor-static" if name == "W4A8_AWQ" else ""
        return joined(integer(4, group, not config.get("has_zero_point")), lambda: inputs, options)
    raise UnsaidError(f"{name[:40]} has no counterpart here")


def _no_inputs(what: str) -> str:
    raise UnsaidError(f"inputs {what} have no counterpart here; --without inputs leaves them out")
