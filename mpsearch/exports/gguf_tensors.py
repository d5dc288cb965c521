"""Tensors of a GGUF file, made one at a time while it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.exports.gguf_place import Entry
from mpsearch.exports.original import Original
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer
from mpsearch.model.quantize import quantize
from mpsearch.plan import BitPlan

Octets = NDArray[np.uint8]
#: Given the rows of the checkpoint, which of them stands in each row of the file.
Order = Callable[[Tensor], NDArray[np.int64]]
#: GGUF type of plain numbers -> torch's.
TORCH_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Piece(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: its GGUF name.
        shape: rows first, as in a checkpoint.
        kind: its GGUF type, such as ``Q4_K``.
        make: makes its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Octets]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor without padding.

        >>> Piece("a", (2, 256), "Q4_K", lambda: np.zeros(288, np.uint8)).bytes
        288
        """
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // block * size

    @classmethod
    def of(cls, entry: Entry, plan: BitPlan, original: Original, order: Order | None) -> Piece:
        """Return the tensor of a layer or a kept tensor.

        Args:
            entry: where it stands.
            plan: the plan.
            original: the model.
            order: of its rows; None for that of the checkpoint.
        """
        kind = entry.kind or "f32"
        if isinstance(entry.of, Layer):
            layer = entry.of
            make = partial(_rounded, layer, plan.formats[layer.name], original, order)
            return cls(entry.name, (layer.rows, layer.columns), kind.upper(), make)
        if not isinstance(entry.of, Excluded):
            raise ValueError(f"'{entry.owner}' is no tensor")
        make = partial(_kept, entry.of, kind, original, order)
        return cls(entry.name, entry.of.shape, kind.upper(), make)


def write_gguf(stream: BinaryIO, writer: gguf.GGUFWriter, pieces: Iterable[Piece]) -> None:
    """Write a file; one tensor is in memory at a time.

    Args:
        stream: a new file.
        writer: with the metadata, of no file yet.
        pieces: the tensors, in their order.
    """
    pieces = list(pieces)
    for piece in pieces:
        kind = gguf.GGMLQuantizationType[piece.kind]
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.bytes, raw_dtype=kind)
    writer.fout = [stream]  # type: ignore[list-item]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in pieces:
        made = piece.make()
        if made.nbytes != piece.bytes:
            raise ValueError(f"'{piece.name}' has {made.nbytes} bytes, announced as {piece.bytes}")
        writer.write_tensor_data(made)


def _rounded(layer: Layer, fmt: Format, original: Original, order: Order | None) -> Octets:
    weight = original.read(layer.tensor)
    made = quantize(weight, fmt, layer.row_axes, name=layer.name).parts["payload"]
    if order is None:
        return octets(made)
    rows = weight.detach().movedim(layer.out_axis, 0).reshape(layer.rows, layer.columns).cpu()
    return octets(made[torch.from_numpy(order(rows))])


def _kept(kept: Excluded, kind: str, original: Original, order: Order | None) -> Octets:
    numbers = original.kept(kept).to(TORCH_TYPES[kind])
    return octets(numbers if order is None else numbers[torch.from_numpy(order(numbers))])


def octets(numbers: Tensor) -> Octets:
    """Return a tensor's bytes, row after row.

    >>> octets(torch.tensor([1.0])).tolist()
    [0, 0, 128, 63]
    """
    found: Octets = numbers.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
