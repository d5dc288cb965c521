"""Blocks of FP4 (E2M1) codes: gguf-mxfp4 and gguf-nvfp4.

The values 0, 0.5, 1, 1.5, 2, 3, 4, 6 of E2M1 are kept doubled, with half the scale. Each weight goes to the nearest
value, of two equally near ones to the smaller.

- gguf-mxfp4: 32 weights, ``e[1] codes[16]``; scale ``2**(e - 127)``, ``e = floor(log2(max|w|)) - 2 + 127``, with the
  logarithm rounded to float32 as in C. ``e`` is stored modulo 256, so that blocks below 2**-125 get a huge scale, and
  codes of 0.
- gguf-nvfp4: 64 weights in 4 groups of 16, ``scales[4] codes[32]``; scale: unsigned E4M3 of ``max|w| / 6``, rounded
  by the first bit dropped (halves up), what is then 256 or more to 448; there is no scale of the whole tensor.

Source: ``quantize_row_mxfp4_ref`` and ``quantize_row_nvfp4_ref`` of ggml, which would cut numbers beyond 448 * 6; here
they are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.model.codec import divided
from mpsearch.model.codecs.gguf_blocks.arithmetic import across, together
from mpsearch.model.codecs.gguf_blocks.kind import Kind

_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Above it the logarithm rounds to 128 in float32, and the block would be read back as infinite.
_TOP_MX = 2.0**128 * (1 - 2.0**-18)
# Where the nearest doubled value changes. A scale has at most 4 significant bits, so the products are exact.
_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """Codes of (…, n) weights with scales (…, 1)."""
    size = groups.abs()
    codes = torch.zeros_like(groups, dtype=torch.uint8)
    for middle in _MIDDLES:
        codes.add_(size > scale * middle)
    codes.masked_fill_(scale == 0, 0)
    return codes.add_(((groups < 0) & (codes > 0)).to(torch.uint8), alpha=8)


def _values(codes: Tensor) -> Tensor:
    table = torch.tensor(_VALUES, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def _power(exponents: Tensor) -> Tensor:
    """Half of ``2**(e - 127)`` for bytes ``e``."""
    whole = exponents.to(torch.int32)
    bits = torch.where(whole < 2, 0x00200000 << whole, (whole - 1) << 23)
    return bits.view(torch.float32)


def _encode_mx(blocks: Tensor) -> Tensor:
    size = blocks.abs().amax(1, keepdim=True)
    # Rounding the exact logarithm to float32 may reach the next integer, as C's log2f does.
    power = size.to(torch.float64).log2_().to(torch.float32).floor_().add_(125.0)
    exponents = power.masked_fill_(size == 0, 0.0).to(torch.int32).bitwise_and_(255).to(torch.uint8)
    return torch.cat([exponents, together(_codes(blocks, _power(exponents)), 2, 4, 16)], 1)


def _decode_mx(octets: Tensor) -> Tensor:
    return _values(across(octets[:, 1:], 2, 4, 15, 16)).mul_(_power(octets[:, :1]))


def _to_e4m3(scales: Tensor) -> Tensor:
    """Codes of numbers from 0 to 448 in unsigned E4M3, halves up."""
    bits = scales.view(torch.int32)
    # Exponent and 3 fraction bits; adding the first dropped bit carries into the exponent by itself.
    normal = (bits >> 20) - (120 << 3) + ((bits >> 19) & 1)
    small = (scales * 512.0 + 0.5).to(torch.int32).clamp_(max=7)
    # ggml has no code between 240 and 448.
    normal.masked_fill_(normal >= 15 << 3, 0x7E)
    return torch.where(bits >> 23 <= 120, small, normal).to(torch.uint8)


def _half_of_e4m3(code: int) -> float:
    if code == 0x7F:
        return 0.0
    power, fraction = (code >> 3) & 15, code & 7
    return 0.5 * (fraction * 2.0**-9 if power == 0 else (8 + fraction) * 2.0 ** (power - 10))


_E4M3 = tuple(_half_of_e4m3(code) for code in range(256))


def _from_e4m3(codes: Tensor) -> Tensor:
    """Half of the numbers that unsigned E4M3 codes stand for."""
    table = torch.tensor(_E4M3, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def _encode_nv(blocks: Tensor) -> Tensor:
    groups = blocks.reshape(-1, 4, 16)
    scales = _to_e4m3(divided(groups.abs().amax(2), 6.0))
    codes = _codes(groups, _from_e4m3(scales).unsqueeze(2))
    return torch.cat([scales, together(codes.reshape(len(blocks), -1), 2, 4, 8)], 1)


def _decode_nv(octets: Tensor) -> Tensor:
    values = _values(across(octets[:, 4:], 2, 4, 15, 8)).reshape(-1, 4, 16)
    return values.mul_(_from_e4m3(octets[:, :4]).unsqueeze(2)).reshape(len(octets), 64)


FP4_BLOCKS = {
    "gguf-mxfp4": Kind(_encode_mx, _decode_mx, top=_TOP_MX),
    "gguf-nvfp4": Kind(_encode_nv, _decode_nv, top=448.0 * 6.0),
}
