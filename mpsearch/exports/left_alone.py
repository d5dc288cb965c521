"""What a quantiser is told to leave alone, and names that it cannot be told of."""

from __future__ import annotations

from collections.abc import Iterator

from mpsearch.exports.config_export import natural
from mpsearch.plan import BitPlan

_SUFFIX = ".weight"


def left_alone(plan: BitPlan, shared: bool = True) -> list[str]:
    """Names of all modules with weights of two axes or more that a plan does not quantise, in order.

    Args:
        plan: the plan. What it keeps is taken as well: a quantiser may see a linear layer in it.
        shared: whether to name the further modules of a shared weight.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Excluded, Layer, Layers
    >>> kept = (Excluded("gate.weight", (4, 8), "bfloat16", "router"), Excluded("norm.weight", (8,), "bfloat16", "1-D"))
    >>> layers = Layers((Layer("fc", "linear", (8, 64)), Layer("embed", "embedding", (8, 64), shared=("head",))), kept)
    >>> left_alone(BitPlan(layers, {"fc": Format.parse("int4-g64"), "embed": Format.parse("fp32")}))
    ['embed', 'gate', 'head']
    """
    names = {
        name
        for layer in plan.layers
        if layer.kind != "kv_cache" and plan.formats[layer.name].weight.family == "plain"
        for name in (layer.owner, *(layer.shared if shared else ()))
    }
    names |= {
        kept.name.removesuffix(_SUFFIX)
        for kept in plan.layers.excluded
        if kept.name.endswith(_SUFFIX) and len(kept.shape) >= 2
    }
    return sorted(names, key=natural)


def unspeakable(plan: BitPlan, title: str) -> Iterator[str]:
    r"""Yield a line for every layer whose name cannot be printed: no pattern and no file of settings is sure of it.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> plan = BitPlan(Layers((Layer("fc\n", "linear", (8, 64)),)), {"fc\n": Format.parse("int4-g64")})
    >>> print(*unspeakable(plan, "AutoRound"))
    'fc\n': AutoRound is not told of names that cannot be printed; rename the module
    """
    named = {name for layer in plan.layers for name in (layer.name, *layer.shared)} | set(left_alone(plan))
    for name in sorted(named):
        if not name.isprintable():
            yield f"{name!r}: {title} is not told of names that cannot be printed; rename the module"
