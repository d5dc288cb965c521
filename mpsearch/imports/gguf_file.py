"""GGUF: the type of every tensor in the file itself."""

from __future__ import annotations

from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.imports.foreign import Foreign, Options, UnsaidError, gather
from mpsearch.imports.gguf_header import read_gguf
from mpsearch.imports.gguf_modules import GgufModules
from mpsearch.imports.llama_cpp import FORMATS
from mpsearch.layer import Layer, Layers


def read(path: Path, layers: Layers, options: Options) -> Foreign:
    """Read the types of a GGUF file; names are those of llama.cpp's converter, shapes must be the model's.

    A head that shares the embedding's weight here and is a tensor of its own there must have its type.

    Raises:
        InputError: not a whole GGUF file (E307), or a model whose GGUF names are not known (E307).
    """
    if not path.is_file():
        raise InputError("E101", f"'{path}' is no file")
    tensors = read_gguf(path)
    names = GgufModules(layers, options.architecture)

    def say(name: str, layer: Layer) -> str:
        name_there = names.find(name, layer)
        tensor = tensors.get(name_there)
        if tensor is None:
            raise UnsaidError(f"the file has no '{name_there}'")
        if tensor.shape != (layer.rows, layer.columns):
            raise UnsaidError(f"'{name_there}' has shape {tensor.shape} there and {(layer.rows, layer.columns)} here")
        head = tensors.get("output.weight")
        if layer.shared and name_there == "token_embd.weight" and head is not None and head.kind != tensor.kind:
            raise UnsaidError(f"is one tensor in this model; the file has {tensor.kind}, and {head.kind} for its head")
        if tensor.kind.lower() not in FORMATS:
            raise UnsaidError(f"{tensor.kind} has no counterpart here")
        return FORMATS[tensor.kind.lower()]

    return gather(layers, say, options)
