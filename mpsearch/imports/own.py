"""Plan files of our own, for another model with the same layers."""

from __future__ import annotations

from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read a plan for another model, such as one before it was tuned: by names of layers, of the same shape.

    Raises:
        InputError: not a whole plan file (E101, E304), or a rounding is given (E113).
    """
    if options.rounding:
        raise InputError("E113", "a plan file says itself how it rounds", advice="leave out --rounding")
    plan = BitPlan.load(path)
    planned = {layer.name: layer for layer in plan.layers}
    parted = {layer.owner for layer in plan.layers if layer.is_part}

    def say(name: str, layer: Layer) -> str:
        if name != layer.name:
            return say(layer.name, layer)
        if name in parted:
            raise UnsaidError("has parts in the plan, which are of its own model alone")
        if name not in planned:
            raise UnsaidError("the plan does not name it")
        if planned[name].shape != layer.shape:
            raise UnsaidError(f"has shape {planned[name].shape} in the plan and {layer.shape} here")
        text = str(plan.formats[name])
        return text.partition("@")[0] if "inputs" in options.without else text

    caches = [layer.name for layer in plan.layers if layer.kind == "kv_cache" and "caches" not in options.without]
    here = {layer.name for layer in layers}
    named = [name for name in planned if planned[name].kind != "kv_cache" and name not in parted]
    problems = [f"{name}: a cache that this model has not" for name in caches if name not in here]
    found = gather(layers, say, options, named)
    source = {"plan": plan.key, **({"study": plan.source["study"]} if "study" in plan.source else {})}
    return Foreign(found.formats, [*found.problems, *problems], found.notes, source)
