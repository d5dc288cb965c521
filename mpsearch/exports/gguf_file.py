"""GGUF: the model as one file that llama.cpp runs, with the plan's own blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.capabilities import cannot_hold, capabilities
from mpsearch.errors import InputError
from mpsearch.exports.folder import write_folder
from mpsearch.exports.gguf_base import BaseFile
from mpsearch.exports.gguf_metadata import KNOWN, add_metadata, problems, rope_factors, row_order
from mpsearch.exports.gguf_names import ARCHITECTURES
from mpsearch.exports.gguf_place import Entry, entries
from mpsearch.exports.gguf_tensors import Piece, write_gguf
from mpsearch.exports.gguf_tokenizer import add_tokenizer
from mpsearch.exports.original import Original
from mpsearch.files import write_file
from mpsearch.layer import Excluded, Layer
from mpsearch.plan import BitPlan

MODEL_FILE = "model.gguf"
SCRIPT_FILE = "run.sh"
PLAN_FILE = "plan.json"
_EMBEDDING = "token_embd.weight"
# Buffers that llama.cpp computes by itself, as its converter leaves them out.
_COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
_SCRIPT = f"""#!/bin/sh
# Usage: sh {SCRIPT_FILE} --prompt TEXT, or any other arguments of llama-completion
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
exec "${{LLAMA_COMPLETION:-llama-completion}}" --model "$here/{MODEL_FILE}" "$@"
"""


@dataclass(frozen=True)
class GgufFile:
    """Writes ``model.gguf``, which llama.cpp runs as it is, ``run.sh``, the command that does, and ``plan.json``.

    The blocks are those of the plan's own rounding, byte for byte what ``llama-quantize`` makes without an importance
    matrix. For Llama, Mistral, Qwen2 and Qwen3 everything is written from the model's folder: metadata from
    ``config.json``, byte-level BPE from ``tokenizer.json``, and rows of queries and keys in the order that llama.cpp
    turns them in. For every other architecture and tokenizer give ``base``, a GGUF file of llama.cpp's converter: what
    it says and the tensors that stay are taken from it, and the order of its rows is found by comparing them with the
    model's.

    Bytes: tensors take those of ``bytes@gguf``: blocks, and 32 bits for norms and biases. On top come the header (the
    tokenizer is most of it), up to 31 bytes of padding behind each tensor, and for Llama 3 a vector of rotary factors.

    Memory, beside a model that was given: about two tensors.

    Source: llama.cpp 0c1e57098 and its converter, gguf 0.19.

    Attributes:
        architecture: Hugging Face class of the model, such as ``LlamaForCausalLM``, for a plan that does not name it.
        base: GGUF file of the model as it was, from ``convert_hf_to_gguf.py --outtype f32``; none when empty.
        tokenizer: ``none`` writes no tokenizer: such a file takes token numbers alone.
        source: folder of the model, read tensor by tensor, for when no model is given to `write`.
        force: replace an earlier export in the same folder.
        version: version of the target; the tested one when empty.
        assume: version whose facts count for a version that no table speaks of.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("model.layers.0.mlp.up_proj", "linear", (8, 64)),))
    >>> plan = BitPlan(layers, {"model.layers.0.mlp.up_proj": Format.parse("int3-g64")})
    >>> print(*GgufFile("LlamaForCausalLM").refuses(plan))
    model.layers.0.mlp.up_proj: int3-g64 is no GGUF type; allowed q8_0, q4_0, bf16, fp16, fp32
    """

    reads: ClassVar[str] = "folder"

    architecture: str = ""
    base: str = ""
    tokenizer: str = ""
    source: str = ""
    force: bool = False
    version: str = ""
    assume: str = ""

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that GGUF cannot hold as planned: its name, what is wanted, what is allowed."""
        capabilities("gguf", self.version, self.assume)
        placed = entries(plan, self.architecture)
        found = [entry.problem for entry in placed if entry.problem]
        architecture = self._architecture(plan)
        if self.base or architecture not in ARCHITECTURES:
            return found
        if architecture not in KNOWN:
            why = f"what GGUF says of {architecture} is not known here; give a GGUF file of the model: base=FILE"
            return [f"model: {why}", *found]
        found += [
            f"{kept.name}: cannot be kept as it is: {architecture} has no tensor of this name in GGUF"
            for entry in placed
            if isinstance(kept := entry.of, Excluded)
            and not (entry.name or entry.problem or kept.name.endswith(_COMPUTED))
        ]
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what of llama.cpp a user should know."""
        return capabilities("gguf").defaults

    def bound(self, plan: BitPlan) -> float:
        """How far logits may be from our simulation's: llama.cpp rounds the inputs of its products to 8 bits."""
        return 0.06

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write the file and the command that runs it.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: anything whose ``module`` is a Hugging Face model with the original weights; they are left as they
                are.

        Returns:
            The files that were written.

        Raises:
            InputError: layers, a configuration or a tokenizer that cannot be held (E301), the model or the base is not
                the plan's (E302), the folder holds files (E303), there is no model (E101), the base is no GGUF file
                (E404), or weights that cannot be stored (E410, E411, E412, E421).
        """
        if violations := self.refuses(plan):
            raise cannot_hold("gguf", violations)
        if self.tokenizer not in ("", "none"):
            raise InputError("E113", f"tokenizer: '{self.tokenizer}' is not known; it is 'none' or left out")
        original = Original.of(plan, model, self.source)
        original.check(plan)
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[self._kind(plan)])
        placed = entries(plan, self.architecture)
        pieces = self._based(plan, placed, original, writer) if self.base else self._own(plan, placed, original, writer)
        writer.add_string("mpsearch.plan", plan.key)
        writers: dict[str, Callable[[Path], object]] = {
            MODEL_FILE: partial(write_file, content=partial(write_gguf, writer=writer, pieces=pieces)),
            SCRIPT_FILE: partial(write_file, content=_SCRIPT),
            PLAN_FILE: plan.save,
        }
        return write_folder(folder, "gguf", writers, self.force)

    def _architecture(self, plan: BitPlan) -> str:
        return plan.model.get("architecture", "") or self.architecture

    def _kind(self, plan: BitPlan) -> gguf.MODEL_ARCH:
        return gguf.MODEL_ARCH[ARCHITECTURES[self._architecture(plan)]]

    def _own(self, plan: BitPlan, placed: Sequence[Entry], original: Original, writer: gguf.GGUFWriter) -> list[Piece]:
        """Everything from the model's folder."""
        architecture, config = self._architecture(plan), original.config(plan)
        if found := problems(config, architecture):
            raise InputError(
                "E301", f"gguf cannot hold this model: {'; '.join(found)}", advice="give a GGUF file of it: base=FILE"
            )
        size = next((entry.of.shape[0] for entry in placed if entry.name == _EMBEDDING and entry.of), 0)
        if not size:
            raise InputError("E302", "the plan has no embedding of tokens, without which llama.cpp loads no model")
        writer.add_name(plan.model.get("name", "") or architecture)
        add_metadata(writer, config, architecture, size)
        if self.tokenizer == "none":
            writer.add_tokenizer_model("none")
        else:
            add_tokenizer(writer, original.folder, size)
        pieces = []
        for entry in placed:
            if not entry.name or entry.of is None:
                continue
            order = row_order(entry.name, entry.of.shape[0], config, architecture)
            pieces.append(Piece.of(entry, plan, original, None if order is None else partial(_given, order)))
        factors = rope_factors(config)
        if factors is not None:
            pieces.append(Piece("rope_freqs.weight", factors.shape, "F32", lambda: factors.view(np.uint8)))
        return pieces

    def _based(
        self, plan: BitPlan, placed: Sequence[Entry], original: Original, writer: gguf.GGUFWriter
    ) -> list[Piece]:
        """The base's metadata and tensors, those of the plan in their place."""
        base = BaseFile(Path(self.base).expanduser())
        if base.architecture != writer.arch:
            raise InputError("E302", f"base: '{self.base}' is of {base.architecture}, the plan of {writer.arch}")
        decided = {entry.name: entry for entry in placed if isinstance(entry.of, Layer)}
        kept = {entry.name: entry for entry in placed if isinstance(entry.of, Excluded) and entry.kind}
        if missing := sorted({*decided, *kept} - {*base.tensors}):
            raise InputError("E302", f"base: '{self.base}' has no tensor '{missing[0]}': it is of another model")
        tied = decided.get(_EMBEDDING)
        if tied and isinstance(tied.of, Layer) and tied.of.shared and "output.weight" in base.tensors:
            raise InputError(
                "E302", f"base: '{self.base}' holds a head of its own, and the plan ties it to the embedding"
            )
        base.add_metadata(writer)
        pieces = []
        for name, held in base.tensors.items():
            if name in decided:
                piece = Piece.of(decided[name], plan, original, partial(base.row_order, name))
                pieces.append(piece._replace(shape=base.shape(name)))
            elif name in kept:
                pieces.append(
                    Piece(name, base.shape(name), kept[name].kind.upper(), partial(base.octets, name, kept[name].kind))
                )
            else:
                pieces.append(Piece(name, base.shape(name), held.tensor_type.name, partial(base.octets, name)))
        return pieces


def _given(order: NDArray[np.int64], rows: Tensor) -> NDArray[np.int64]:
    """Order of rows that is known before they are read."""
    return order
