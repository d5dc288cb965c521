"""exllamav3: a recipe (``--recipe``), which says bits by tensor."""

from __future__ import annotations

from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, in_blocks, nominal, only_linear
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.reading import mapping, number, read_yaml
from mpsearch.layer import Layer, Layers

_RATES = {*range(1, 9), 1.5, 2.5, 3.5, 16}


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read a recipe of exllamav3 1.6: patterns as in a shell, of which the last that fits wins.

    Its bits are those of a trellis code, which has neither groups nor scales: they are refused unless the user says
    which format stands for them. Every linear layer of the blocks must be named; the head goes by ``head_bits``, and
    embeddings stay.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_yaml(path)
    if not isinstance(data.get("tensors"), dict):
        raise InputError("E307", f"'{path}' is no recipe of exllamav3: it has no tensors")
    rules = {
        name: _rate(bits, f"tensors['{name[:60]}']", path)
        for name, bits in mapping(data["tensors"], "tensors", path).items()
    }
    head = data.get("head_bits")
    head_bits = None if head is None else _rate(head, "head_bits", path)
    patterns = Patterns(str(path))
    asked: dict[str, float] = {}

    def say(name: str, layer: Layer) -> str:
        if not only_linear(layer):
            return ""
        fits = [bits for rule, bits in rules.items() if rule == name or patterns.glob(rule, name)]
        if in_blocks(name) and not fits:
            return _rest(options, "no pattern of the recipe fits it")
        bits = fits[-1] if in_blocks(name) else head_bits
        if bits is None:
            return _rest(options, "the recipe leaves the head to the command line (--head_bits)")
        asked[name] = bits
        return nominal(bits, options)

    found = gather(layers, say, options, [name for name in rules if not any(mark in name for mark in "*?[")])
    return Foreign(found.formats, found.problems, found.notes, {"bits": asked})


def _rest(options: Options, why: str) -> str:
    if not options.rest:
        raise UnsaidError(f"{why}; --rest says its format")
    return options.rest


def _rate(value: object, what: str, path: Path) -> float:
    bits = number(value, what, path)
    if bits not in _RATES:
        raise InputError("E307", f"'{path}': {what} is {bits:g}; exllamav3 has 1 to 8, 1.5, 2.5, 3.5 and 16 bits")
    return bits
