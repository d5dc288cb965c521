"""GPTQModel: ``quantize_config.json``, whose ``dynamic`` rules say what differs by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, fused, gather, idle, in_blocks, integer, only_linear
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import mapping, read_json, shown, truth, whole
from mpsearch.layer import Layer, Layers

_NOTE = (
    "GPTQModel finds codes column by column, with one code more below zero; "
    "here weights go to their nearest code unless --rounding gptq says so"
)


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what GPTQModel 7 reads: all rules of ``-:`` first, then the first rule that fits, then the common scheme.

    Rules are matched at the beginning of a name. Linear layers in the blocks take the common scheme; the head takes it,
    or 8 bits in groups of 32, only where ``lm_head`` is true.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_json(path)
    config = mapping(data.get("quantization_config", data), "quantization_config", path)
    method = config.get("quant_method", config.get("method", "gptq"))
    if method != "gptq" or "bits" not in config:
        raise InputError("E307", f"'{path}' is no configuration of GPTQ: its method is {shown(method)}")
    rules = _rules(config.get("dynamic"), path)
    head = truth(config.get("lm_head", False), "lm_head", path)
    patterns = Patterns(str(path))
    fitted: set[str] = set()

    def say(name: str, layer: Layer) -> str:
        if not only_linear(layer) or not (in_blocks(name) or head):
            return ""
        found = next((rule for rule in rules if patterns.match(rule[0], name)), None)
        fitted.update([found[0]] if found else [])
        if found and found[1] is None:
            return ""
        base: Mapping[str, Any] = config if in_blocks(name) else {**config, "bits": 8, "group_size": 32}
        return _scheme({**base, **((found[1] or {}) if found else {})}, name, path)

    made = gather(layers, say, options, notes=[_NOTE])
    # Rules for fused names are for engines.
    others = fused(layers)
    unused = [
        pattern for pattern, more in rules
        if more is not None and pattern not in fitted and not any(patterns.match(pattern, name) for name in others)
    ]  # fmt: skip
    return Foreign(made.formats, made.problems, [*made.notes, *idle("rule", unused)], made.says)


def _rules(value: Any, path: Path) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Pairs of a pattern and what it changes, None for layers that are left alone, in the order of precedence."""
    if not value:
        return []
    rules = [(name, mapping(more, f"dynamic['{name[:60]}']", path)) for name, more in
             mapping(value, "dynamic", path).items()]  # fmt: skip
    leaves = [(name[2:], None) for name, _ in rules if name.startswith("-:")]
    return [*leaves, *((name.removeprefix("+:"), more) for name, more in rules if not name.startswith("-:"))]


def _scheme(config: Mapping[str, Any], name: str, path: Path) -> str:
    what = f"rule of '{name[:60]}'"
    bits = whole(config["bits"], f"{what}: bits", path)
    group = whole(config.get("group_size", 128), f"{what}: group_size", path)
    if group == 0:
        raise UnsaidError("a group of 0 weights is impossible")
    return integer(bits, group, truth(config.get("sym", True), f"{what}: sym", path))
