"""Codes of a few bits packed into bytes, row by row, least significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack_rows(codes: NDArray[Any], bits: int) -> Bytes:
    """Pack (rows, n) codes into rows * ceil(n * bits / 8) bytes; the rest of a row's last byte is 0.

    Eight codes of ``bits`` bits fill exactly ``bits`` bytes: they are put together in one 64-bit word, of which
    the low ``bits`` bytes are kept.

    >>> pack_rows(np.array([[1, 2, 3]], np.uint8), 4).tolist()
    [33, 3]
    """
    rows, count = codes.shape
    words = np.zeros((rows, -(-count // 8)), "<u8")
    for place in range(8):
        column = codes[:, place::8]
        words[:, : column.shape[1]] |= column.astype("<u8") << np.uint64(bits * place)
    kept: Bytes = words.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(kept[:, : -(-count * bits // 8)]).reshape(-1)


def unpack_rows(packed: Bytes, rows: int, count: int, bits: int) -> Bytes:
    """Undo `pack_rows`: (rows, count) codes."""
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
