"""llama.cpp: a file of tensor types, as ``llama-quantize --tensor-type-file`` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.formats.gguf_types import BLOCKS
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, idle
from mpsearch.imports.gguf_modules import GgufModules
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import read_text
from mpsearch.layer import Layer, Layers

#: GGUF type, in lower case -> format here.
FORMATS: Mapping[str, str] = {
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    **{name.removeprefix("gguf-").lower(): name for name in BLOCKS},
}


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read a file of ``pattern=type``, apart by white space: the first pattern that is found in a tensor's name wins.

    Patterns are lower-cased first, as llama.cpp does. Tensors that none fits go by the base type of the command line,
    which only the user knows (``rest``).

    Raises:
        InputError: not such a file (E307), or a model whose GGUF names are not known (E307).
    """
    rules = _rules(path)
    names = GgufModules(layers, options.architecture)
    patterns = Patterns(str(path))
    used: set[str] = set()
    doubtful: list[str] = []

    def say(name: str, layer: Layer) -> str:
        tensor = names.find(name, layer)
        fits = {pattern: kind for pattern, kind in rules if patterns.search(pattern, tensor)}
        used.update(fits)
        if not fits:
            if options.rest:
                return options.rest
            raise UnsaidError(
                f"no pattern fits '{tensor}', and the base type is not in the file; --rest says its format"
            )
        if len(set(fits.values())) > 1:
            doubtful.append(tensor)
        kind = next(iter(fits.values()))
        if kind not in FORMATS:
            raise UnsaidError(f"{kind[:40]} has no counterpart here")
        return FORMATS[kind]

    notes = []
    found = gather(layers, say, options)
    if doubtful:
        notes.append(
            f"the first pattern is taken where several fit ({doubtful[0]}, …); llama.cpp of 2025 took the last"
        )
    kept = [names.kept(tensor.name) for tensor in layers.excluded]
    unused = [p for p, _ in rules if p not in used and not any(name and patterns.search(p, name) for name in kept)]
    return Foreign(found.formats, found.problems, [*found.notes, *notes, *idle("pattern", unused)], found.says)


def _rules(path: Path) -> list[tuple[str, str]]:
    rules = []
    for entry in read_text(path).split():
        pattern, equals, kind = entry.rpartition("=")
        if not equals or not pattern or not kind:
            raise InputError(
                "E307", f"'{path}': {entry[:60]!r} is no pattern and type, such as ^blk\\.0\\.attn_q\\.weight$=q4_k"
            )
        rules.append((pattern.lower(), kind.lower()))
    if not rules:
        raise InputError("E307", f"'{path}' names no tensor")
    return rules
