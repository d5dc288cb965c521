"""Packing a quantized weight into bytes, to the byte that `Format.itemised_bytes` promises.

Each output channel stands on its own: its codes follow each other without gaps, least significant bit first,
and the last byte is filled with zero bits. Its zero points are packed in the same way. Scales follow row by row,
little-endian. Symmetric integer codes are stored offset-binary: ``code + 2**(bits-1)``. Block formats whose layout is
laid down elsewhere (GGUF types) keep that layout. What else a family stores is said in its codec.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.codec import Bytes, codec_of
from mpsearch.model.quantize import TORCH_DTYPES, Quantized


def pack(quantized: Quantized, fmt: Format) -> dict[str, Bytes]:
    """Pack a quantized weight.

    Args:
        quantized: what `quantize` returned.
        fmt: the format it was quantized to.

    Returns:
        The parts of ``fmt.itemised_bytes`` as flat uint8 arrays.

    >>> import torch
    >>> from mpsearch.model.quantize import quantize
    >>> fmt = Format.parse("int4-channel")
    >>> parts = pack(quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), fmt), fmt)
    >>> {name: part.tolist() for name, part in parts.items()}
    {'payload': [24, 140], 'scales': [0, 60]}
    """
    return codec_of(type(fmt.weight)).pack(quantized.parts, fmt.weight)


def unpack(parts: Mapping[str, Bytes], fmt: Format, layer: Layer) -> Quantized:
    """Undo `pack`: the same codes, scales and whatever else is stored.

    Args:
        parts: the parts of ``fmt.itemised_bytes``; one that is empty may be left out.
        fmt: the format.
        layer: the layer that the weight belongs to.

    Raises:
        InputError: a part has another length than the format says (E304).
    """
    expected = fmt.weight.itemised_bytes(layer)
    held = {name: parts.get(name, np.empty(0, np.uint8)) for name in expected}
    for name, size in expected.items():
        if held[name].size != size:
            raise InputError("E304", f"layer '{layer.name}': {name} holds {held[name].size} bytes, {fmt} needs {size}")
    found = codec_of(type(fmt.weight)).unpack(held, fmt.weight, layer)
    return Quantized(found, layer.shape, layer.row_axes, TORCH_DTYPES[layer.dtype], fmt.weight)
