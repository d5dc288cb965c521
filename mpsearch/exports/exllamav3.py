"""ExLlamaV3: a recipe of bits for every layer, and the command that converts a model with it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.exports.config_export import ConfigExporter, weights_of
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

RECIPE = "recipe.yaml"
SCRIPT = "run.sh"
#: What a recipe says of a layer that stays in 16 bits.
LEFT = 16
# A recipe's names with these are patterns of a shell.
_GLOB = re.compile(r"[*?\[]")
_HEADS = ("lm_head", "output")

_SCRIPT = """#!/bin/sh
# Convert MODEL, the original model, to OUT with {recipe}; WORK is an empty folder for its checkpoints:
#     sh {name} MODEL OUT WORK [more arguments of the conversion]
set -eu
if [ "$#" -lt 3 ]; then
    echo "usage: sh {name} MODEL OUT WORK" >&2{known}
    exit 2
fi
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
model=$1 out=$2 work=$3
shift 3
exec "${{PYTHON:-python}}" -m exllamav3.conversion.convert_model -i "$model" -o "$out" -w "$work" \\
    --recipe "$here/{recipe}" --head_bits {head} --embed_bits {embed} "$@"
"""


@dataclass(frozen=True)
class ExLlamaV3(ConfigExporter):
    """Writes ``recipe.yaml``, bits of every layer, and ``run.sh``, which converts a model with them.

    ExLlamaV3 has trellis codes, and none of the formats here is one. What was measured is not what it makes, so every
    quantised layer is refused, unless ``nominal`` says that the bits alone are taken over: 2 to 8 whole bits of a
    weight's code, whatever its scales are. The formats of inputs have no place in either case.

    Source: exllamav3 1.6.5, ``conversion/convert_model.py``.

    Attributes:
        nominal: take over the bits alone.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("fc", "linear", (128, 128)),))
    >>> plan = BitPlan(layers, {"fc": Format.parse("int3-g64")})
    >>> print(*ExLlamaV3().refuses(plan))
    fc: int3-g64 is not held by ExLlamaV3, whose codes of 3 bits are others; allowed bf16, fp16, or set nominal=true
    >>> ExLlamaV3(nominal=True).refuses(plan)
    []
    """

    target: ClassVar[str] = "exllamav3"

    nominal: bool = False

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that a recipe cannot hold: its name, what is wanted, what is allowed."""
        found = []
        tables: dict[str, str] = {}
        for layer in plan.layers:
            fmt = plan.formats[layer.name]
            cache = layer.kind == "kv_cache"
            why = self.able.refuses(layer, fmt) if cache or fmt.family == "plain" else self._why(layer, fmt)
            why = why or ("" if cache else _unnamed(layer))
            if layer.kind == "embedding" and not why and tables.setdefault("first", str(fmt)) != str(fmt):
                why = f"ExLlamaV3 has one number of bits for all embeddings; allowed {tables['first']}"
            if why:
                found.append(f"{layer.name}: {why}")
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what bites, and that the bits are nominal."""
        taken = [x for x in weights_of(plan) if plan.formats[x.name].weight.family != "plain"]
        more = [f"the bits of {len(taken)} layers are taken over; codes, scales and losses are not"] if taken else []
        return [*more, *super().notes(plan)]

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the recipe and the command.

        Raises:
            InputError: no layer of the decoder is in the plan (E301).
        """
        layers = weights_of(plan)
        decoder = [x for x in layers if x.kind == "linear" and not _is_head(x)]
        if not decoder:
            raise InputError("E301", "ExLlamaV3 needs a layer that is neither head nor embedding")
        bits = {layer.name: nominal_bits(plan.formats[layer.name]) for layer in decoder}
        head = next((nominal_bits(plan.formats[x.name]) for x in layers if any(map(_head, _names(x)))), LEFT)
        embed = next((nominal_bits(plan.formats[x.name]) for x in layers if x.kind == "embedding"), LEFT)
        counted = [x for x in decoder if bits[x.name] != LEFT]
        mean = sum(bits[x.name] * x.weights for x in counted) / sum(x.weights for x in counted) if counted else LEFT
        lines = [f"target_bpw: {mean:.4f}", f"head_bits: {head}", "tensors:"]
        # JSON texts are YAML's double-quoted ones, for printable names.
        lines += [f"  {json.dumps(key(name), ensure_ascii=False)}: {value}" for name, value in bits.items()]
        known = f"\n    printf '%s\\n' {shlex.quote('MODEL was ' + self.source)} >&2" if self.source else ""
        command = _SCRIPT.format(recipe=RECIPE, name=SCRIPT, head=head, embed=embed, known=known)
        return {RECIPE: "\n".join(lines) + "\n", SCRIPT: command}

    def _why(self, layer: Layer, fmt: Format) -> str:
        if problem := fmt.refuses(layer):
            return problem
        if layer.is_part:
            return "a whole layer has one number of bits, and its parts none"
        if layer.kind not in ("linear", "embedding"):
            return f"{fmt} is not held by ExLlamaV3 for this {layer.kind} layer; allowed bf16, fp16"
        if fmt.activation:
            return f"{fmt} is not held by ExLlamaV3, which does not round inputs; allowed bf16, fp16"
        bits = fmt.weight.bits
        if bits != int(bits) or not 1 <= bits <= 8:
            return f"{fmt} has {bits} bits, and ExLlamaV3 has 1 to 8; allowed bf16, fp16"
        if not self.nominal:
            return (
                f"{fmt} is not held by ExLlamaV3, whose codes of {bits} bits are others; allowed bf16, fp16, "
                "or set nominal=true"
            )
        return ""


def nominal_bits(fmt: Format) -> int:
    """Return the bits of a weight's code, 16 for what is not quantised.

    >>> nominal_bits(Format.parse("nf4-b64")), nominal_bits(Format.parse("bf16"))
    (4, 16)
    """
    return LEFT if fmt.weight.family == "plain" else int(fmt.weight.bits)


def key(name: str) -> str:
    """Return a key of a recipe that matches one name alone.

    >>> key("layers.0.fc"), key("a[0]*")
    ('layers.0.fc', 'a[[]0][*]')
    """
    return _GLOB.sub(lambda found: f"[{found[0]}]", name)


def _names(layer: Layer) -> Iterator[str]:
    yield from (layer.name, *layer.shared)


def _head(name: str) -> bool:
    return name.rpartition(".")[2] in _HEADS


def _is_head(layer: Layer) -> bool:
    return any(map(_head, _names(layer)))


def _unnamed(layer: Layer) -> str:
    """Say what of a layer's name a recipe cannot hold; empty when it can."""
    if not layer.name:
        return "a recipe names modules inside a model, and the model itself has no name"
    return "" if layer.name.isprintable() else "its name holds characters that YAML does not take"
