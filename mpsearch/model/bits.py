"""Codes of a few bits packed into bytes, row by row, least significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


#: Words that are packed at a time, so that they stay in the processor's cache.
_STEP = 1 << 14


def pack_rows(codes: NDArray[Any], bits: int) -> Bytes:
    """Pack (rows, n) codes of ``bits`` bits into rows * ceil(n * bits / 8) bytes; the rest of a row's last byte is 0.

    Eight codes of ``bits`` bits fill exactly ``bits`` bytes: they are read as one 64-bit word, in which neighbours are
    moved together, then pairs, then fours; its low ``bits`` bytes are kept.

    >>> pack_rows(np.array([[1, 2, 3]], np.uint8), 4).tolist()
    [33, 3]
    """
    rows, count = codes.shape
    octets = -(-count // 8)
    whole = codes if codes.dtype == np.uint8 and count % 8 == 0 else np.zeros((rows, 8 * octets), np.uint8)
    if whole is not codes:
        whole[:, :count] = codes
    words = np.ascontiguousarray(whole).reshape(-1).view("<u8")
    packed = np.empty((len(words), bits), np.uint8)
    for start in range(0, len(words), _STEP):
        packed[start : start + _STEP] = _together(words[start : start + _STEP], bits)
    return np.ascontiguousarray(packed.reshape(rows, -1)[:, : -(-count * bits // 8)]).reshape(-1)


def _together(words: NDArray[Any], bits: int) -> NDArray[Any]:
    """Words of eight bytes, the lowest ``bits`` of each byte moved together: (words, bits) bytes."""
    held = bits
    for width in (8, 16, 32):
        low = np.uint64(sum((2**held - 1) << lane for lane in range(0, 64, 2 * width)))
        words = (words & low) | ((words >> np.uint64(width - held)) & (low << np.uint64(held)))
        held *= 2
    return words.view(np.uint8).reshape(-1, 8)[:, :bits]


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
