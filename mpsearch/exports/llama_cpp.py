"""llama.cpp: the list of tensor types that ``llama-quantize`` takes, and the command that uses it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from mpsearch.capabilities import cannot_hold
from mpsearch.errors import InputError, did_you_mean
from mpsearch.exports.folder import write_folder
from mpsearch.exports.gguf_names import ARCHITECTURES, GgufNames
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.formats.gguf_types import GgufType
from mpsearch.layer import Excluded, Layer
from mpsearch.plan import BitPlan

TYPES_FILE = "tensor-types.txt"
SCRIPT_FILE = "quantize.sh"

#: Plain number type -> what GGUF calls it.
PLAIN_TYPES: Mapping[str, str] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
# What a refusal offers instead, where it fits.
_OFFERED = ("q8_0", "q6_K", "q5_K", "q4_K", "q4_0", *PLAIN_TYPES)
_STORED_TYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# Quantised file types that need no importance matrix -> the type of most of their tensors.
_BASES: Mapping[str, str] = {
    "Q8_0": "q8_0",
    "Q5_0": "q5_0",
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_1": "q5_1",
    "Q6_K": "q6_k",
    "Q5_K_S": "q5_k",
    "Q4_K_S": "q4_k",
    "Q3_K_S": "q3_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
}
# Tensors that llama.cpp keeps in 32 bits whatever is asked for.
_ALWAYS_F32 = re.compile(r"(_norm|^position_embd|^token_types|\.ffn_gate_inp)\.weight$")
_CACHE = "{layer}: {fmt} has no place in GGUF: llama.cpp is told of its caches when it runs; allowed kv-bf16, kv-fp16"
_LINE = re.compile(r"\^((?:[a-z0-9_]|\\\.)+)\$=([a-z0-9_]+)")
_SCRIPT = f"""#!/bin/sh
# Usage: sh {SCRIPT_FILE} MODEL.gguf OUT.gguf
# MODEL.gguf is the model as it was: convert_hf_to_gguf.py --outtype f32 --outfile MODEL.gguf FOLDER
# Every tensor takes its type from {TYPES_FILE}; BASE only has to be a quantised type.
set -eu
if [ "$#" -ne 2 ]; then
    echo "usage: sh {SCRIPT_FILE} MODEL.gguf OUT.gguf" >&2
    exit 2
fi
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
exec "${{LLAMA_QUANTIZE:-llama-quantize}}" --tensor-type-file "$here/{TYPES_FILE}" "$1" "$2" BASE
"""


class _Entry(NamedTuple):
    """What becomes of one tensor: a GGUF name and type, or a problem, or neither when llama.cpp decides alone."""

    owner: str
    name: str = ""
    kind: str = ""
    problem: str = ""


@dataclass(frozen=True)
class LlamaCpp:
    """Writes what ``llama-quantize`` needs to make the plan's GGUF file.

    ``tensor-types.txt`` holds one exact, anchored name per tensor, the blocks in their order;
    ``quantize.sh MODEL.gguf OUT.gguf`` is the ready command. Kept tensors of two axes are listed with their
    stored type, because llama.cpp would quantise what is not listed.

    Formats: all GGUF types (q4_K, q6_K, q8_0, iq4_xs, …), which are rounded here as llama.cpp rounds them, byte for
    byte without an importance matrix; and bf16, fp16, fp32. Integers with groups of 32 have the bytes of q4_0, q5_0 and
    q8_0, but not their rounding, so what was measured is not what llama.cpp would make: they are refused. Types are
    written in lower case (q4_k), as in llama.cpp's own examples; it takes either case.

    Source: llama.cpp ``tools/quantize/quantize.cpp`` and ``src/llama-quant.cpp``, gguf 0.19.

    Attributes:
        architecture: Hugging Face class of the model, such as ``LlamaForCausalLM``, for a plan that does not
            name it.
        force: replace an earlier export in the same folder.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("model.layers.0.mlp.up_proj", "linear", (8, 64)),))
    >>> plan = BitPlan(layers, {"model.layers.0.mlp.up_proj": Format.parse("int3-g64")})
    >>> print(*LlamaCpp("LlamaForCausalLM").refuses(plan))  # doctest: +NORMALIZE_WHITESPACE
    model.layers.0.mlp.up_proj: int3-g64 is no GGUF type;
    allowed q8_0, q4_0, bf16, fp16, fp32
    """

    architecture: str = ""
    force: bool = False

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that GGUF cannot hold as planned: its name, what is wanted, what is allowed."""
        return [entry.problem for entry in self._entries(plan) if entry.problem]

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write ``tensor-types.txt`` and ``quantize.sh``.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: not needed; llama.cpp converts the checkpoint itself.

        Returns:
            The files that were written.

        Raises:
            InputError: layers that GGUF cannot hold (E301), or the folder holds files (E303).
        """
        entries = self._entries(plan)
        violations = [entry.problem for entry in entries if entry.problem]
        if violations:
            raise cannot_hold("llama.cpp", violations)
        listed = [entry for entry in entries if entry.kind]
        lines = [f"^{re.escape(entry.name)}$={entry.kind}\n" for entry in listed]
        base = _base_type({entry.kind for entry in listed})
        writers = {
            TYPES_FILE: partial(write_file, content="".join(lines)),
            SCRIPT_FILE: partial(write_file, content=_SCRIPT.replace("BASE", base)),
        }
        return write_folder(folder, "llama.cpp", writers, self.force)

    def _entries(self, plan: BitPlan) -> list[_Entry]:
        """Place every tensor of a plan, in the order of the GGUF file."""
        architecture = plan.model.get("architecture", "") or self.architecture
        if architecture not in ARCHITECTURES:
            return [_Entry("model", problem=_unknown(architecture))]
        kept = plan.layers.excluded
        weights = [layer for layer in plan.layers if layer.kind != "kv_cache"]
        names = GgufNames(architecture, [*(layer.tensor for layer in weights), *(tensor.name for tensor in kept)])
        entries = [_place(layer, plan.formats[layer.name], names, architecture) for layer in weights]
        entries += [
            _Entry(layer.name, problem=_CACHE.format(layer=layer.name, fmt=plan.formats[layer.name]))
            for layer in plan.layers
            if layer.kind == "kv_cache" and str(plan.formats[layer.name]) not in ("kv-bf16", "kv-fp16")
        ]
        entries += [_place_kept(tensor, names, architecture) for tensor in kept]
        return sorted(_without_doubles(entries), key=lambda entry: names.order(entry.name))


def read_tensor_types(path: Path) -> dict[str, str]:
    """Read a list of tensor types that `LlamaCpp` wrote: GGUF tensor name -> GGUF type.

    Raises:
        InputError: the file is missing (E101); a line is not one exact name, or a name comes twice (E304).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("E101", f"'{path}' cannot be read: {error.strerror}") from error
    types: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        match = _LINE.fullmatch(line)
        name = match[1].replace("\\.", ".") if match else ""
        if match is None or name in types:
            raise InputError("E304", f"{path}:{number}: not one exact name and its type, once: {line!r}")
        types[name] = match[2]
    return types


def _place(layer: Layer, fmt: Format, names: GgufNames, architecture: str) -> _Entry:
    name = _gguf_name(layer, names)
    allowed = [text for text in _OFFERED if not Format.parse(text).refuses(layer)]
    kind = _type_of(fmt)
    if layer.is_part:
        return _Entry(layer.name, problem=f"{layer.name}: is part of a tensor, and GGUF gives a whole tensor one type")
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
    elif fmt.bytes(layer) != _gguf_bytes(layer, kind):
        reason = f"is {fmt.bytes(layer)} bytes here and {_gguf_bytes(layer, kind)} in {kind}"
    else:
        reason = ""
    if not reason:
        return _Entry(layer.name, name, kind)
    return _Entry(layer.name, problem=f"{layer.name}: {fmt} {reason}; allowed {', '.join(allowed) or 'nothing'}")


def _type_of(fmt: Format) -> str:
    """Return the GGUF type that holds a format; empty when none does."""
    return fmt.type_name.lower() if isinstance(fmt, GgufType) else PLAIN_TYPES.get(str(fmt), "")


def _place_kept(kept: Excluded, names: GgufNames, architecture: str) -> _Entry:
    """List what llama.cpp would quantise on its own: tensors of two axes or more that are called a weight."""
    name = names.find(kept.name)
    if len(kept.shape) < 2 or _ALWAYS_F32.search(name) or (name and not name.endswith(".weight")):
        return _Entry(kept.name)
    kind = _STORED_TYPES.get(kept.dtype, "")
    if name and kind:
        return _Entry(kept.name, name, kind)
    reason = f"GGUF has no {kept.dtype}" if name else f"{architecture} has no tensor of this name in GGUF"
    return _Entry(kept.name, problem=f"{kept.name}: cannot be kept as it is: {reason}")


def _gguf_name(layer: Layer, names: GgufNames) -> str:
    """Return the one GGUF name of a layer; empty when it has none, or when GGUF would hold it several times."""
    found = {names.find(f"{module}.weight" if module else "weight") for module in (layer.name, *layer.shared)}
    # A head that shares the embedding's weight is left out of the file, and some architectures know no other head.
    if "token_embd.weight" in found and found <= {"token_embd.weight", "output.weight", ""}:
        return "token_embd.weight"
    return found.pop() if len(found) == 1 else ""


def _without_doubles(entries: Collection[_Entry]) -> Iterator[_Entry]:
    owners: dict[str, str] = {}
    for entry in entries:
        if entry.name in owners:
            problem = f"{entry.owner}: is '{entry.name}' in GGUF, and so is {owners[entry.name]}"
            yield _Entry(entry.owner, problem=problem)
            continue
        if entry.name:
            owners[entry.name] = entry.owner
        yield entry


def _gguf_bytes(layer: Layer, kind: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return layer.rows * (layer.columns // block) * size


def _base_type(used: Collection[str]) -> str:
    """Choose the type of the command line: quantised, or llama.cpp ignores the list, and none of the list's own.

    Some builds pass over a listed type that equals the base type (llama.cpp pull request 22572). A plan that uses
    every one of them gets the first.
    """
    return next((base for base, kind in _BASES.items() if kind not in used), "Q8_0")


def _unknown(architecture: str) -> str:
    if not architecture:
        return "model: the plan does not name the model's architecture; give it, such as LlamaForCausalLM"
    close = did_you_mean(architecture, ARCHITECTURES)
    return f"model: the GGUF names of {architecture!r} are not known{close}; known are {', '.join(ARCHITECTURES)}"
