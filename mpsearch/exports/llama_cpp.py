"""llama.cpp: the list of tensor types that ``llama-quantize`` takes, and the command that uses it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpsearch.capabilities import cannot_hold, capabilities
from mpsearch.errors import InputError
from mpsearch.exports.folder import write_folder
from mpsearch.exports.gguf_place import entries
from mpsearch.files import write_file
from mpsearch.plan import BitPlan

TYPES_FILE = "tensor-types.txt"
SCRIPT_FILE = "quantize.sh"
PLAN_FILE = "plan.json"

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
        version: version of the target; the tested one when empty.
        assume: version whose facts count for a version that no table speaks of.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("model.layers.0.mlp.up_proj", "linear", (8, 64)),))
    >>> plan = BitPlan(layers, {"model.layers.0.mlp.up_proj": Format.parse("int3-g64")})
    >>> print(*LlamaCpp("LlamaForCausalLM").refuses(plan))  # doctest: +NORMALIZE_WHITESPACE
    model.layers.0.mlp.up_proj: int3-g64 is no GGUF type;
    allowed q8_0, q4_0, bf16, fp16, fp32
    """

    architecture: str = ""
    force: bool = False
    version: str = ""
    assume: str = ""

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that GGUF cannot hold as planned: its name, what is wanted, what is allowed."""
        capabilities("llama.cpp", self.version, self.assume)
        return [entry.problem for entry in entries(plan, self.architecture) if entry.problem]

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write ``tensor-types.txt`` and ``quantize.sh``, and beside them ``plan.json``.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: not needed; llama.cpp converts the checkpoint itself.

        Returns:
            The files that were written.

        Raises:
            InputError: layers that GGUF cannot hold (E301), or the folder holds files (E303).
        """
        placed = entries(plan, self.architecture)
        violations = [entry.problem for entry in placed if entry.problem]
        if violations:
            raise cannot_hold("llama.cpp", violations)
        listed = [entry for entry in placed if entry.kind]
        lines = [f"^{re.escape(entry.name)}$={entry.kind}\n" for entry in listed]
        base = _base_type({entry.kind for entry in listed})
        writers: dict[str, Callable[[Path], object]] = {
            TYPES_FILE: partial(write_file, content="".join(lines)),
            SCRIPT_FILE: partial(write_file, content=_SCRIPT.replace("BASE", base)),
            PLAN_FILE: plan.save,
        }
        return write_folder(folder, "llama.cpp", writers, self.force)


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


def _base_type(used: Collection[str]) -> str:
    """Choose the type of the command line: quantised, or llama.cpp ignores the list, and none of the list's own.

    Some builds pass over a listed type that equals the base type (llama.cpp pull request 22572). A plan that uses
    every one of them gets the first.
    """
    return next((base for base, kind in _BASES.items() if kind not in used), "Q8_0")
