"""exllamav2: the strategy inside the job of a conversion (``job_new.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather, in_blocks, nominal, only_linear
from mpsearch.imports.reading import mapping, number, read_json
from mpsearch.layer import Layer, Layers


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read which parameters a conversion of exllamav2 0.3 chose for each layer.

    A layer has several widths, each for a share of its rows. What is read is their mean, which is nominal: it is
    refused unless the user says which format stands for it. The head goes by ``head_bits``, embeddings stay. A file of
    measurements alone holds no choice.

    Raises:
        InputError: not such a file (E307).
    """
    data = read_json(path)
    if "strategy" not in data:
        what = "measurements and no choice" if "measurement" in data else "no strategy of exllamav2"
        raise InputError(
            "E307",
            f"'{path}' holds {what}",
            advice="give the job_new.json of a conversion that has come to its strategy",
        )
    chosen: dict[str, float] = {}
    for module, parts in mapping(data["strategy"], "strategy", path).items():
        for name, parameters in mapping(parts, f"strategy['{module[:60]}']", path).items():
            if isinstance(parameters, dict) and "bits" in parameters:
                chosen[f"{module}.{name}"] = _mean(parameters, f"{module[:60]}.{name[:60]}", path)
    head = number(data.get("head_bits", 6), "head_bits", path)

    def say(name: str, layer: Layer) -> str:
        if not only_linear(layer):
            return ""
        bits = chosen.get(name)
        if bits is None and in_blocks(name):
            raise UnsaidError("the strategy does not name it")
        return nominal(head if bits is None else bits, options)

    found = gather(layers, say, options, list(chosen))
    asked = {name: bits for name, bits in chosen.items() if name in found.formats}
    return Foreign(found.formats, found.problems, found.notes, {"bits": asked, "head_bits": head})


def _mean(parameters: Mapping[str, Any], what: str, path: Path) -> float:
    """Mean bits of a layer's codes by the shares of its rows."""
    bits, shares = parameters["bits"], parameters.get("bits_prop", [1])
    if not isinstance(bits, list) or not isinstance(shares, list) or len(bits) != len(shares) or not bits:
        raise InputError("E307", f"'{path}': {what} has no share for each of its bits")
    pairs = [
        (number(b, f"{what}.bits", path), number(s, f"{what}.bits_prop", path))
        for b, s in zip(bits, shares, strict=True)
    ]
    if any(not 1 <= b <= 16 or s < 0 for b, s in pairs) or abs(sum(s for _, s in pairs) - 1) > 0.01:
        raise InputError("E307", f"'{path}': the bits of {what} are not 1 to 16, or their shares do not add up to 1")
    return sum(b * s for b, s in pairs) / sum(s for _, s in pairs)
