"""Which tensor of a GGUF file a layer is, and of which type: what every exporter to GGUF asks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import gguf

from mpsearch.errors import did_you_mean
from mpsearch.exports.gguf_names import ARCHITECTURES, GgufNames
from mpsearch.format import Format
from mpsearch.formats.gguf_types import GgufType
from mpsearch.layer import Excluded, Layer
from mpsearch.plan import BitPlan

#: Plain number type -> what GGUF calls it.
PLAIN_TYPES: Mapping[str, str] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
# What a refusal offers instead, where it fits.
_OFFERED = ("q8_0", "q6_K", "q5_K", "q4_K", "q4_0", *PLAIN_TYPES)
_STORED_TYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# Tensors that llama.cpp keeps in 32 bits whatever is asked for.
_ALWAYS_F32 = re.compile(r"(_norm|^position_embd|^token_types|\.ffn_gate_inp)\.weight$")
_CACHE = "{layer}: {fmt} has no place in GGUF: llama.cpp is told of its caches when it runs; allowed kv-bf16, kv-fp16"


class Entry(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        owner: name of the layer, or of the kept tensor.
        name: its GGUF name; empty when there is none.
        kind: its GGUF type in lower case; empty when llama.cpp decides alone, which is 32 bits.
        problem: why it cannot be held; empty when it can.
        of: the layer or the kept tensor itself; none for the model as a whole.
    """

    owner: str
    name: str = ""
    kind: str = ""
    problem: str = ""
    of: Layer | Excluded | None = None


def entries(plan: BitPlan, architecture: str = "") -> list[Entry]:
    """Place every tensor of a plan, in the order of the GGUF file.

    Args:
        plan: the plan.
        architecture: Hugging Face class of the model, for a plan that does not name it.

    Returns:
        One entry per layer that holds weights and per kept tensor, and one per KV cache that GGUF has no place for.
    """
    architecture = plan.model.get("architecture", "") or architecture
    if architecture not in ARCHITECTURES:
        return [Entry("model", problem=_unknown(architecture))]
    kept = plan.layers.excluded
    weights = [layer for layer in plan.layers if layer.kind != "kv_cache"]
    names = GgufNames(architecture, [*(layer.tensor for layer in weights), *(tensor.name for tensor in kept)])
    found = [_place(layer, plan.formats[layer.name], names, architecture)._replace(of=layer) for layer in weights]
    found += [
        Entry(layer.name, problem=_CACHE.format(layer=layer.name, fmt=plan.formats[layer.name]))
        for layer in plan.layers
        if layer.kind == "kv_cache" and str(plan.formats[layer.name]) not in ("kv-bf16", "kv-fp16")
    ]
    found += [_place_kept(tensor, names, architecture)._replace(of=tensor) for tensor in kept]
    return sorted(_without_doubles(found), key=lambda entry: names.order(entry.name))


def gguf_bytes(layer: Layer, kind: str) -> int:
    """Bytes of a layer's blocks in a GGUF type.

    >>> gguf_bytes(Layer("fc", "linear", (8, 256)), "q4_k")
    1152
    """
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return layer.rows * (layer.columns // block) * size


def _place(layer: Layer, fmt: Format, names: GgufNames, architecture: str) -> Entry:
    name = _gguf_name(layer, names)
    allowed = [text for text in _OFFERED if not Format.parse(text).refuses(layer)]
    kind = _type_of(fmt)
    if layer.is_part:
        return Entry(layer.name, problem=f"{layer.name}: is part of a tensor, and GGUF gives a whole tensor one type")
    if layer.kind not in ("linear", "embedding") or len(layer.shape) != 2:
        reason, allowed = f"has no place in GGUF: the layer is a {layer.kind} of shape {layer.shape}", []
    elif not name:
        reason, allowed = f"has no place in GGUF: {architecture} has no tensor of this name there", []
    elif _ALWAYS_F32.search(name):
        reason, allowed = ("" if kind == "f32" else f"has no place: llama.cpp keeps '{name}' in 32 bits"), ["fp32"]
    elif not kind:
        reason = "is no GGUF type"
    elif fmt.refuses(layer):
        reason = f"does not fit: {fmt.refuses(layer)}"
    elif fmt.bytes(layer) != gguf_bytes(layer, kind):
        reason = f"is {fmt.bytes(layer)} bytes here and {gguf_bytes(layer, kind)} in {kind}"
    else:
        reason = ""
    if not reason:
        return Entry(layer.name, name, kind)
    return Entry(layer.name, problem=f"{layer.name}: {fmt} {reason}; allowed {', '.join(allowed) or 'nothing'}")


def _type_of(fmt: Format) -> str:
    """Return the GGUF type that holds a format; empty when none does."""
    return fmt.type_name.lower() if isinstance(fmt, GgufType) else PLAIN_TYPES.get(str(fmt), "")


def _place_kept(kept: Excluded, names: GgufNames, architecture: str) -> Entry:
    """List what llama.cpp would quantise on its own: tensors of two axes or more that are called a weight."""
    name = names.find(kept.name)
    if len(kept.shape) < 2 or _ALWAYS_F32.search(name) or (name and not name.endswith(".weight")):
        return Entry(kept.name, name)
    kind = _STORED_TYPES.get(kept.dtype, "")
    if name and kind:
        return Entry(kept.name, name, kind)
    reason = f"GGUF has no {kept.dtype}" if name else f"{architecture} has no tensor of this name in GGUF"
    return Entry(kept.name, problem=f"{kept.name}: cannot be kept as it is: {reason}")


def _gguf_name(layer: Layer, names: GgufNames) -> str:
    """Return the one GGUF name of a layer; empty when it has none, or when GGUF would hold it several times."""
    found = {names.find(f"{module}.weight" if module else "weight") for module in (layer.name, *layer.shared)}
    # A head that shares the embedding's weight is left out of the file, and some architectures know no other head.
    if "token_embd.weight" in found and found <= {"token_embd.weight", "output.weight", ""}:
        return "token_embd.weight"
    return found.pop() if len(found) == 1 else ""


def _without_doubles(entries: Collection[Entry]) -> Iterator[Entry]:
    owners: dict[str, str] = {}
    for entry in entries:
        if entry.name in owners:
            problem = f"{entry.owner}: is '{entry.name}' in GGUF, and so is {owners[entry.name]}"
            yield Entry(entry.owner, problem=problem)
            continue
        if entry.name:
            owners[entry.name] = entry.owner
        yield entry


def _unknown(architecture: str) -> str:
    if not architecture:
        return "model: the plan does not name the model's architecture; give it, such as LlamaForCausalLM"
    close = did_you_mean(architecture, ARCHITECTURES)
    return f"model: the GGUF names of {architecture!r} are not known{close}; known are {', '.join(ARCHITECTURES)}"
