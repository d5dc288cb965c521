"""Packing codes into bytes, to the byte that `Format.itemised_bytes` promises.

Each output channel stands on its own: its codes follow each other without gaps, least significant bit first,
and the last byte is filled with zero bits. Its zero points are packed in the same way. Scales are
little-endian float16, row by row. Symmetric codes are stored offset-binary: ``code + 2**(bits-1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.quantize import TORCH_DTYPES, Quantized

Bytes = NDArray[np.uint8]


def pack(quantized: Quantized, fmt: Format) -> dict[str, Bytes]:
    """Pack a quantized weight.

    Args:
        quantized: what `quantize` returned.
        fmt: the format it was quantized to.

    Returns:
        ``payload``, ``scales`` and ``zero_points`` as flat uint8 arrays, empty where the format has none.

    >>> from mpsearch.model.quantize import quantize
    >>> fmt = Format.parse("int4-channel")
    >>> parts = pack(quantize(torch.tensor([[0.5, -7.0, 3.5, 0.0]]), fmt), fmt)
    >>> {name: part.tolist() for name, part in parts.items()}
    {'payload': [24, 140], 'scales': [0, 60], 'zero_points': []}
    """
    empty = np.empty(0, np.uint8)
    if quantized.scales is None:
        numbers: Bytes = quantized.codes.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
        return {"payload": numbers, "scales": empty, "zero_points": empty}
    codes = quantized.codes.cpu()
    if fmt.symmetric:
        codes = (codes.to(torch.int16) + 2 ** (fmt.bits - 1)).to(torch.uint8)
    scales: Bytes = quantized.scales.cpu().numpy().astype("<f2").reshape(-1).view(np.uint8)
    zeros = quantized.zero_points
    return {
        "payload": _pack_rows(codes.numpy(), fmt.bits).reshape(-1),
        "scales": scales,
        "zero_points": empty if zeros is None else _pack_rows(zeros.cpu().numpy(), fmt.bits).reshape(-1),
    }


def unpack(parts: Mapping[str, Bytes], fmt: Format, layer: Layer) -> Quantized:
    """Undo `pack`: the same codes, scales and zero points.

    Args:
        parts: ``payload``, ``scales``, ``zero_points``; one that is empty may be left out.
        fmt: the format.
        layer: the layer that the weight belongs to.

    Raises:
        InputError: a part has another length than the format says (E304).
    """
    held = {name: parts.get(name, np.empty(0, np.uint8)) for name in ("payload", "scales", "zero_points")}
    for name, expected in fmt.itemised_bytes(layer).items():
        if held[name].size != expected:
            raise InputError(
                "E304", f"layer '{layer.name}': {name} holds {held[name].size} bytes, {fmt} needs {expected}"
            )
    dtype = TORCH_DTYPES[layer.dtype]
    if fmt.family == "float":
        numbers = torch.from_numpy(held["payload"].copy()).view(TORCH_DTYPES[fmt.dtype])
        return Quantized(numbers.reshape(layer.rows, -1), None, None, layer.shape, layer.out_axis, dtype)
    codes = torch.from_numpy(_unpack_rows(held["payload"], layer.rows, layer.columns, fmt.bits))
    if fmt.symmetric:
        codes = (codes.to(torch.int16) - 2 ** (fmt.bits - 1)).to(torch.int8)
    blocks = 1 if fmt.granularity == "tensor" else layer.rows
    groups = fmt.scales(layer) // blocks
    scales = torch.from_numpy(held["scales"].view("<f2").astype(np.float16)).reshape(blocks, groups)
    zeros = None if fmt.symmetric else torch.from_numpy(_unpack_rows(held["zero_points"], blocks, groups, fmt.bits))
    return Quantized(codes, scales, zeros, layer.shape, layer.out_axis, dtype)


def _pack_rows(codes: NDArray[Any], bits: int) -> Bytes:
    """Pack (rows, n) codes into (rows, ceil(n * bits / 8)) bytes.

    Eight codes of ``bits`` bits fill exactly ``bits`` bytes: they are put together in one 64-bit word, of which
    the low ``bits`` bytes are kept.
    """
    rows, count = codes.shape
    words = np.zeros((rows, -(-count // 8)), "<u8")
    for place in range(8):
        column = codes[:, place::8]
        words[:, : column.shape[1]] |= column.astype("<u8") << np.uint64(bits * place)
    kept: Bytes = words.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(kept[:, : -(-count * bits // 8)])


def _unpack_rows(packed: Bytes, rows: int, count: int, bits: int) -> Bytes:
    """Undo `_pack_rows`: (rows, count) codes."""
    octets = -(-count // 8)
    padded = np.zeros((rows, octets * bits), np.uint8)
    padded[:, : -(-count * bits // 8)] = packed.reshape(rows, -1)
    words = np.zeros((rows, octets, 8), np.uint8)
    words[:, :, :bits] = padded.reshape(rows, octets, bits)
    numbers = words.reshape(rows, -1).view("<u8")
    codes = np.empty((rows, octets * 8), np.uint8)
    for place in range(8):
        codes[:, place::8] = (numbers >> np.uint64(bits * place)) & np.uint64(2**bits - 1)
    return np.ascontiguousarray(codes[:, :count])
