"""compressed-tensors: the ``quantization_config`` of llm-compressor's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, idle, integer, joined, only_linear
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import mapping, read_json, text, texts, truth, whole
from mpsearch.layer import Layer, Layers

_CLASSES: Mapping[str, tuple[str, ...]] = {"linear": ("Linear",), "embedding": ("Embedding",)}
_FLOATS: Mapping[int, str] = {4: "mxfp4", 6: "mxfp6-e2m3", 8: "mxfp8-e4m3"}
_NOTE = (
    "compressed-tensors gives symmetric integers one code more below zero; "
    "here they go from the largest weight unless --rounding full says so"
)


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what compressed-tensors 0.20 reads: exact names, then patterns by their text, then classes of modules.

    A pattern (``re:…``) is matched at the beginning of a name. What ``ignore`` names, in the same three ways, and what
    no group names, is left alone. Linear layers and embeddings alone are quantised.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_json(path)
    nested = data.get("quantization_config", data.get("compression_config"))
    config = mapping(data if nested is None else nested, "quantization_config", path)
    if "config_groups" not in config or config.get("quant_method", "compressed-tensors") != "compressed-tensors":
        raise InputError("E307", f"'{path}' is no configuration of compressed-tensors: no config_groups")
    targets: dict[str, Mapping[str, Any]] = {}
    for name, group in mapping(config["config_groups"], "config_groups", path).items():
        scheme = mapping(group, f"config_groups['{name[:60]}']", path)
        # A later group takes a target over, as it does there.
        targets |= dict.fromkeys(texts(scheme.get("targets"), f"config_groups['{name[:60]}'].targets", path), scheme)
    ignored = texts(config.get("ignore"), "ignore", path)
    rules = _Rules(sorted(targets, key=lambda target: ("re:" in target, target)), str(path))
    apart = _Rules(ignored, str(path))

    def say(name: str, layer: Layer) -> str:
        if layer.kind == "expert":
            only_linear(layer)
        target = rules.first(name, layer)
        if not target or apart.first(name, layer):
            return ""
        return _scheme(targets[target], path, options)

    found = gather(layers, say, options, [name for name in [*targets, *ignored] if _exact(name)], [_NOTE])
    unused = [target for target in targets if target not in rules.used and not _exact(target)]
    caches = config.get("kv_cache_scheme") is not None and "caches" not in options.without
    problems = ["kv caches: one scale for all tokens of a cache is no format here; --without caches leaves them out"]
    return Foreign(
        found.formats, [*found.problems, *(problems if caches else [])], [*found.notes, *idle("target", unused)]
    )


class _Rules:
    """Targets in their order: names and patterns before classes."""

    def __init__(self, targets: list[str], where: str) -> None:
        self._targets = targets
        self._patterns = Patterns(where)
        self.used: set[str] = set()

    def first(self, name: str, layer: Layer) -> str:
        """Return the first target that fits a module; empty when none does."""
        classes = () if layer.out_axis else _CLASSES.get(layer.kind, ())
        quantised = layer.kind in _CLASSES and not layer.out_axis
        fitting = [target for target in self._targets if quantised and self._fits(target, name)]
        fitting += [target for target in self._targets if target in classes]
        self.used.update(fitting)
        return fitting[0] if fitting else ""

    def _fits(self, target: str, name: str) -> bool:
        if target.startswith("re:"):
            return self._patterns.match(target.removeprefix("re:"), name)
        return target == name


def _exact(target: str) -> bool:
    """Whether a target is the name of a module: no pattern, and no class."""
    return not target.startswith("re:") and not (target[:1].isupper() and "." not in target)


def _scheme(scheme: Mapping[str, Any], path: Path, options: Options) -> str:
    if scheme.get("output_activations") is not None:
        raise UnsaidError("outputs are rounded, which is no format here")
    inputs = scheme.get("input_activations")
    weights = scheme.get("weights")
    if weights is None:
        if inputs is None or "inputs" in options.without:
            return ""
        raise UnsaidError("inputs alone are rounded, which is no format here; --without inputs leaves that out")
    weight = _weights(mapping(weights, "weights", path), path)
    if inputs is None:
        return weight
    return joined(weight, lambda: _inputs(mapping(inputs, "input_activations", path), path), options)


def _weights(args: Mapping[str, Any], path: Path) -> str:
    bits, kind, strategy, group = _common(args, "weights", path)
    symmetric = truth(args.get("symmetric", True), "weights.symmetric", path)
    grain = {"tensor": 0, "channel": -1, "group": group or -2}
    if kind == "int" and strategy in grain:
        return integer(bits, grain[strategy], symmetric)
    if kind == "float" and bits == 4 and strategy == "tensor_group" and group == 16:
        return "nvfp4"
    if kind == "float" and strategy == "group" and group == 32 and "uint8" in str(args.get("scale_dtype")):
        if bits in _FLOATS:
            return _FLOATS[bits]
    elif kind == "float" and bits == 8:
        if strategy == "block":
            height, width = _block(args.get("block_structure"), path)
            return f"fp8-e4m3-b{height}x{width}"
        grains = {"tensor": "fp8-e4m3", "channel": "fp8-e4m3-channel", "group": f"fp8-e4m3-g{group}"}
        if strategy in grains:
            return grains[strategy]
    raise UnsaidError(f"{kind} of {bits} bits by {strategy} ({group or 'no group'}) has no counterpart here")


def _inputs(args: Mapping[str, Any], path: Path) -> str:
    bits, kind, strategy, group = _common(args, "input_activations", path)
    dynamic = args.get("dynamic", False)
    number = f"int{bits}" if kind == "int" else "fp8-e4m3" if bits == 8 else ""
    asym = "" if truth(args.get("symmetric", True), "input_activations.symmetric", path) else "-asym"
    if kind == "float" and strategy == "group" and group == 32 and "uint8" in str(args.get("scale_dtype")):
        if bits in _FLOATS:
            return _FLOATS[bits]
    elif number and strategy == "token" and dynamic is True:
        return f"{number}-token{asym}"
    elif number and strategy == "tensor":
        return f"{number}-tensor{asym}{'' if dynamic is True else '-static'}"
    elif number and strategy == "group" and dynamic is True and group:
        return f"{number}-g{group}{asym}"
    raise UnsaidError(
        f"inputs in {kind} of {bits} bits by {strategy} have no counterpart here; --without inputs leaves them out"
    )


def _common(args: Mapping[str, Any], what: str, path: Path) -> tuple[int, str, str, int]:
    """Bits, kind of number, what shares a scale, and the group (0 for none), by the library's defaults."""
    bits = whole(args.get("num_bits", 8), f"{what}.num_bits", path)
    kind = text(args.get("type", "int"), f"{what}.type", path)
    size = args.get("group_size")
    group = 0 if size is None else whole(size, f"{what}.group_size", path)
    dynamic = "token" if args.get("dynamic") is True and what != "weights" else "tensor"
    unsaid = {0: dynamic, -1: "channel"}.get(group, "group")
    strategy = args.get("strategy")
    return bits, kind, unsaid if strategy is None else text(strategy, f"{what}.strategy", path), max(group, 0)


def _block(value: Any, path: Path) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError("E307", f"'{path}': block_structure is no pair of sizes")
    height, width = (whole(side, "block_structure", path) for side in value)
    return height, width
