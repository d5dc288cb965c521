"""AutoRound: the ``quantization_config`` of a checkpoint, whose ``extra_config`` says what differs by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import (
    Foreign,
    Options,
    UnsaidError,
    gather,
    in_blocks,
    integer,
    joined,
    module,
    only_linear,
)
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import mapping, read_json, shown, text, truth, whole
from mpsearch.layer import Layer, Layers

_MX = {4: "mxfp4", 8: "mxfp8-e4m3"}
_NOTE = "AutoRound moves weights before it rounds them; here they are rounded as the format's name says"


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what AutoRound 0.16 wrote: exact names first, then the first pattern that fits, then the common scheme.

    Patterns are searched in names, those in the blocks that are quantised first, as AutoRound's own loader does. What
    lies outside of the blocks (the head, embeddings) is left alone unless it is named.

    A ``layer_config`` names layers exactly.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_json(path)
    if data and not {"bits", "quantization_config", "quant_method"} & set(data):
        return _layer_config(data, path, layers, options)
    config = _config(data, path)
    extra = {
        name: mapping(value, f"extra_config['{name[:60]}']", path)
        for name, value in mapping(config.get("extra_config") or {}, "extra_config", path).items()
    }
    modules = [name for layer in layers for name in (layer.name, *layer.shared) if module(layer, name).kind == "linear"]
    blocks = _blocks(config.get("block_name_to_quantize", config.get("to_quant_block_names")), path)
    inside = [name for name in modules if (name.startswith(tuple(blocks)) if blocks else in_blocks(name))]
    common = {key: value for key, value in config.items() if key != "extra_config"}
    chosen: dict[str, Mapping[str, Any]] = dict.fromkeys(inside, common)
    chosen |= {name: {**common, **more} for name, more in _patterned(extra, modules, inside, path)}
    chosen |= {name: {**common, **extra[name]} for name in modules if name in extra}

    def say(name: str, layer: Layer) -> str:
        if only_linear(layer) and name in chosen:
            return _scheme(chosen[name], f"scheme of '{name[:60]}'", path, options)
        return ""

    exact = [name for name in extra if not _is_pattern(name)]
    return gather(layers, say, options, exact, [_NOTE])


def _layer_config(data: Mapping[str, Any], path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what AutoRound takes as ``layer_config``: schemes by exact names; what is not named has the command's."""
    entries = {name: mapping(value, f"'{name[:60]}'", path) for name, value in data.items()}
    modules = {name for layer in layers for name in (layer.name, *layer.shared)}
    patterns = Patterns(str(path))
    for name in entries:
        if name not in modules and any(patterns.search(name, other) for other in modules):
            raise InputError(
                "E307",
                f"'{path}': {shown(name)} is no layer of the model, and a pattern to AutoRound that overwrites others",
                advice="name the layers exactly",
            )

    def say(name: str, layer: Layer) -> str:
        if not only_linear(layer) or (name not in entries and not in_blocks(name)):
            return ""
        if name in entries:
            return _scheme(entries[name], f"'{name[:60]}'", path, options)
        if options.rest:
            return options.rest
        raise UnsaidError(
            "the file does not name it, and leaves it to the scheme of the command; --rest says its format"
        )

    return gather(layers, say, options, list(entries), [_NOTE])


def _config(data: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    config = mapping(data.get("quantization_config", data), "quantization_config", path)
    method = config.get("quant_method", "auto-round")
    if method not in ("auto-round", "intel/auto-round", "auto_round") or "bits" not in config:
        raise InputError("E307", f"'{path}' is no configuration of AutoRound: its quant_method is {shown(method)}")
    return config


def _blocks(value: Any, path: Path) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    found = []
    for each in value if isinstance(value, list) else [value]:
        # A list of all blocks of one kind stands for what their names begin with.
        names = [text(name, "block_name_to_quantize", path) for name in (each if isinstance(each, list) else [each])]
        found.append(_beginning(names) if isinstance(each, list) else names[0])
    return [name for name in found if name]


def _beginning(names: Sequence[str]) -> str:
    shortest = min(names, key=len, default="")
    length = next((i for i, letter in enumerate(shortest) if any(name[i] != letter for name in names)), len(shortest))
    return shortest[:length].rstrip(".")


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*^$|()[]?+\\")


def _patterned(
    extra: Mapping[str, Mapping[str, Any]], modules: Sequence[str], inside: Sequence[str], path: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what patterns say; an earlier pattern comes later, and so wins."""
    patterns = Patterns(str(path))
    found = []
    for pattern, more in extra.items():
        # A plain name is a pattern to AutoRound too, and fits every longer name that holds it.
        if pattern in modules or not more:
            continue
        fits = [name for name in inside if patterns.search(pattern, name)]
        fits = fits or [name for name in modules if patterns.search(pattern, name)]
        found += [(name, more) for name in fits]
    yield from reversed(found)


def _scheme(config: Mapping[str, Any], what: str, path: Path, options: Options) -> str:
    bits = whole(config.get("bits"), f"{what}: bits", path)
    if bits >= 16:
        return ""
    kind = text(config.get("data_type") or "int", f"{what}: data_type", path)
    return joined(_weights(config, kind, bits, what, path), lambda: _inputs(config, kind, what, path), options)


def _weights(config: Mapping[str, Any], kind: str, bits: int, what: str, path: Path) -> str:
    group = config.get("group_size", -1)
    if isinstance(group, list) and len(group) == 2 and kind.startswith("fp") and bits == 8:
        height, width = (whole(side, f"{what}: group_size", path) for side in group)
        return f"fp8-e4m3-b{height}x{width}"
    group = whole(group, f"{what}: group_size", path)
    if kind == "int":
        sym = config.get("sym")
        return integer(bits, group, True if sym is None else truth(sym, f"{what}: sym", path))
    if kind in ("fp", "fp8", "fp8_e4m3") and bits == 8 and group in (-1, 0):
        return "fp8-e4m3" if group == 0 else "fp8-e4m3-channel"
    if kind == "mx_fp" and bits in _MX and group == 32:
        return _MX[bits]
    if kind == "nv_fp" and bits == 4 and group == 16:
        return "nvfp4"
    raise UnsaidError(f"{kind} of {bits} bits with groups of {group} has no counterpart here")


def _inputs(config: Mapping[str, Any], kind: str, what: str, path: Path) -> str:
    """What inputs are rounded to; empty for nothing."""
    bits = config.get("act_bits")
    bits = 16 if bits is None else whole(bits, f"{what}: act_bits", path)
    if bits >= 16:
        return ""
    kind = text(config.get("act_data_type") or kind, f"{what}: act_data_type", path)
    group = config.get("act_group_size")
    group = -1 if group is None else whole(group, f"{what}: act_group_size", path)
    dynamic = config.get("act_dynamic")
    dynamic = True if dynamic is None else truth(dynamic, f"{what}: act_dynamic", path)
    sym = config.get("act_sym")
    asym = "" if sym is None or truth(sym, f"{what}: act_sym", path) else "-asym"
    number = f"int{bits}" if kind == "int" else "fp8-e4m3" if kind.startswith("fp") and bits == 8 else ""
    if number and group == -1 and dynamic:
        return f"{number}-token{asym}"
    if number and group == 0:
        return f"{number}-tensor{asym}{'' if dynamic else '-static'}"
    if kind == "mx_fp" and bits in _MX and group == 32:
        return _MX[bits]
    raise UnsaidError(
        f"inputs in {kind} of {bits} bits in groups of {group} have no counterpart; --without inputs leaves them out"
    )
