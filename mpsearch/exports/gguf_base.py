"""A GGUF file of llama.cpp's own converter, of which a plan replaces some tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.exports.gguf_tensors import TORCH_TYPES, Octets, octets

_READABLE: Mapping[str, tuple[Any, torch.dtype]] = {
    "F32": (np.int32, torch.float32), "F16": (np.int16, torch.float16), "BF16": (np.int16, torch.bfloat16),
}  # fmt: skip
# What the new file says for itself, and what goes by how a file is cut into pieces.
_OWN = ("GGUF.", "mpsearch.", "split.", "general.architecture", "general.alignment", "general.file_type")


class BaseFile:
    """A GGUF file of the model as it was.

    Its numbers are mapped, not read: tensors are taken one at a time.

    Args:
        path: the file, as ``convert_hf_to_gguf.py --outtype f32`` writes it.

    Raises:
        InputError: there is no such file (E101), or it is no GGUF file (E404).

    Attributes:
        path: the file.
        tensors: GGUF name -> tensor as the gguf package reads it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError("E101", f"base: there is no file '{path}'", advice="give a GGUF file of the model")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError, OverflowError, MemoryError) as error:
            raise InputError("E404", f"base: '{path}' is no GGUF file ({type(error).__name__}: {error})") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as ``llama``."""
        field = self._reader.get_field("general.architecture")
        return str(field.contents()) if field else ""

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Copy all that the file says of its model and its tokenizer."""
        for name, field in self._reader.fields.items():
            if name.startswith(_OWN) or not field.data:
                continue
            kind, inner = field.types[0], field.types[-1]
            if gguf.GGUFValueType.STRING in (kind, inner):
                # Bytes, because tokens need not be whole characters.
                texts = [field.parts[place].tobytes() for place in field.data]
                value: Any = texts if kind == gguf.GGUFValueType.ARRAY else texts[0]
            else:
                value = field.contents()
            writer.add_key_value(name, value, kind, inner if kind == gguf.GGUFValueType.ARRAY else None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def octets(self, name: str, kind: str = "") -> Octets:
        """Return the bytes of a tensor as it stands, or of its numbers in another plain type."""
        if kind:
            return octets(self.numbers(name).to(TORCH_TYPES[kind]))
        return np.ascontiguousarray(self.tensors[name].data).view(np.uint8).reshape(-1)

    def numbers(self, name: str) -> Tensor:
        """Return a tensor of plain numbers, a copy.

        Raises:
            InputError: the tensor is not there (E302), or it is quantised (E301).
        """
        if name not in self.tensors:
            raise InputError("E302", f"base: '{self.path}' has no tensor '{name}': it is of another model")
        found = self.tensors[name]
        if found.tensor_type.name not in _READABLE:
            raise InputError(
                "E301",
                f"base: '{name}' is {found.tensor_type.name} there; rounding starts from plain numbers",
                advice="make the base with convert_hf_to_gguf.py --outtype f32",
            )
        whole, dtype = _READABLE[found.tensor_type.name]
        return torch.from_numpy(self.octets(name).view(whole).copy()).view(dtype).reshape(self.shape(name))

    def row_order(self, name: str, rows: Tensor) -> NDArray[np.int64]:
        """Find which row of the checkpoint stands in each row of the file.

        So no rule of the converter has to be known here, and a file of another model is found out. The converter may
        leave rows out, as it does with unused tokens of Gemma.

        Args:
            name: GGUF name of the tensor.
            rows: the weight of the checkpoint, (rows, columns).

        Raises:
            InputError: a row of the file is not in the checkpoint, or could be several that differ (E302).
        """
        held = self.numbers(name)
        if held.ndim != 2 or held.shape[1] != rows.shape[1] or len(held) > len(rows):
            raise InputError(
                "E302", f"base: '{name}' has shape {tuple(held.shape)} there, in the model {tuple(rows.shape)}"
            )
        places: dict[bytes, int] = {}
        for number, row in enumerate(rows):
            key = _digest(row.to(held.dtype))
            first = places.setdefault(key, number)
            if first != number and not torch.equal(rows[first], row):
                raise InputError(
                    "E302",
                    f"base: rows {first} and {number} of '{name}' are alike in {held.dtype} and not in the model",
                    advice="make the base with convert_hf_to_gguf.py --outtype f32",
                )
        found = [places.get(_digest(row), -1) for row in held]
        if -1 in found:
            raise InputError(
                "E302",
                f"base: row {found.index(-1)} of '{name}' is not in the model: the file is of another one, or its "
                "converter changed the numbers",
            )
        return np.array(found, np.int64)


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
