"""MLX: the ``quantization`` of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, integer, only_linear
from mpsearch.imports.reading import mapping, read_json, text, whole
from mpsearch.layer import Layer, Layers

_COMMON = ("group_size", "bits", "mode", "quant_method")
#: Mode -> its bits, its group, its format here.
_FLOATS: Mapping[str, tuple[int, int, str]] = {
    "mxfp4": (4, 32, "mxfp4"),
    "nvfp4": (4, 16, "nvfp4"),
    "mxfp8": (8, 32, "mxfp8-e4m3"),
}
_NOTE = "MLX keeps a zero point as a float beside each scale; here it is a whole number of as many bits as the codes"


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read what mlx-lm 0.32 reads: an entry by exact name, else the common scheme where the weights have scales.

    Beside a configuration without weights the common scheme goes for every linear layer and embedding without an entry.
    A head that is the embedding again has no entry of its own.

    Raises:
        InputError: not such a file (E307), or a weights file that is broken (E404, E405).
    """
    data = read_json(path)
    config = mapping(data.get("quantization", data.get("quantization_config", data)), "quantization", path)
    if "group_size" not in config or "bits" not in config:
        raise InputError("E307", f"'{path}' is no configuration of MLX: it has no group_size and bits")
    entries = {name: value for name, value in config.items() if name not in _COMMON}
    scaled = _scaled(path.parent)
    common = {name: config[name] for name in ("group_size", "bits", "mode") if name in config}

    def say(name: str, layer: Layer) -> str:
        if layer.kind == "expert":
            only_linear(layer)
        if layer.kind not in ("linear", "embedding"):
            return ""
        # One module of several that share a weight speaks for all where the others are not named.
        names = [other for other in (name, layer.name, *layer.shared) if other in entries]
        said = entries[names[0]] if names else True
        if said is False or (not names and scaled is not None and not scaled & {layer.name, *layer.shared}):
            return ""
        return _scheme(common if said is True else {**common, **mapping(said, f"'{name[:60]}'", path)}, path)

    return gather(layers, say, options, list(entries), [_NOTE])


def _scaled(folder: Path) -> set[str] | None:
    """Names of the modules whose weights have scales in a folder; None for a folder without weights."""
    if not any(folder.glob("*.safetensors")):
        return None
    from mpsearch.model.checkpoint import read_header

    names = [name for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)]
    found = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    # Without a single scale the weights are the original ones, and the configuration is still to be carried out.
    return found or None


def _scheme(config: Mapping[str, Any], path: Path) -> str:
    bits = whole(config["bits"], "bits", path)
    group = whole(config["group_size"], "group_size", path)
    mode = text(config.get("mode", "affine"), "mode", path)
    if mode == "affine":
        if group < 1:
            raise UnsaidError(f"a group of {group} weights is impossible")
        return integer(bits, group, False)
    if mode in _FLOATS and (bits, group) == _FLOATS[mode][:2]:
        return _FLOATS[mode][2]
    raise UnsaidError(f"{mode[:40]} of {bits} bits in groups of {group} has no counterpart here")
