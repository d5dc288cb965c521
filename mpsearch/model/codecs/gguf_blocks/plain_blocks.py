"""Blocks with one scale (and one offset): q4_0, q4_1, q5_0, q5_1, q8_0, and the ternary tq1_0, tq2_0.

All in float32; the scale ``d`` is stored in fp16, codes are made with its float32 reciprocal:

- q4_0, q5_0: ``d = w / -8`` (``-16``) of the weight ``w`` of largest magnitude, sign included;
  ``code = floor(w / d + 8.5)``, value ``d * (code - 8)``;
- q4_1, q5_1: ``d = (max - min) / 15`` (``31``), value ``d * code + min``, ``min`` in fp16;
- q8_0: ``d = max|w| / 127``, halves away from zero;
- tq1_0, tq2_0: ``d = max|w|``, codes -1, 0, 1; tq1_0 keeps five of them in a byte, as the fraction ``n / 243``.

Layouts in bytes: q4_0 ``d[2] codes[16]``; q4_1 ``d[2] min[2] codes[16]``; q5_0 and q5_1 have the fifth bits ``[4]``
before the codes; q8_0 ``d[2] codes[32]``; tq1_0 ``codes[52] d[2]``; tq2_0 ``codes[64] d[2]``. A byte of 4-bit codes
holds weight j in its low and weight j + 16 in its high half.

Source: ``quantize_row_*_ref`` of ggml (``ggml-quants.c``) and gguf 0.19 (``gguf.quants``).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpsearch.model.codec import divided
from mpsearch.model.codecs.gguf_blocks.arithmetic import across, half_away, half_bytes, halves, together
from mpsearch.model.codecs.gguf_blocks.kind import Kind


def _reciprocal(scale: Tensor) -> Tensor:
    return scale.reciprocal().masked_fill_(scale == 0, 0.0)


def _codes(positions: Tensor, top: int) -> Tensor:
    # Of a scale that has no finite reciprocal, positions may be infinite or NaN; the stored scale is 0 then.
    return positions.nan_to_num_(0.0, 0.0, 0.0).trunc_().clamp_(0, top).to(torch.uint8)


def _split(codes: Tensor, bits: int) -> Tensor:
    """Bytes of 32 codes: for 5 bits the high bits, then the low halves."""
    low = together(codes & 15, 2, 4, 16)
    return low if bits == 4 else torch.cat([together(codes >> 4, 8, 1, 1), low], 1)


def _joined(octets: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return across(octets, 2, 4, 15, 16)
    return across(octets[:, 4:], 2, 4, 15, 16) | (across(octets[:, :4], 8, 1, 1, 1) << 4)


def _encode_signed(blocks: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    widest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = divided(widest + 0.0, -half)
    codes = _codes((blocks * _reciprocal(scale)).add_(half + 0.5), 2 * half - 1)
    return torch.cat([half_bytes(scale).flatten(1), _split(codes, bits)], 1)


def _decode_signed(octets: Tensor, bits: int) -> Tensor:
    codes = _joined(octets[:, 2:], bits).to(torch.float32)
    return codes.sub_(2 ** (bits - 1)).mul_(halves(octets[:, :2]))


def _encode_offset(blocks: Tensor, bits: int) -> Tensor:
    # Which of 0 and -0 is the lowest hangs on the compiler of the C code; here it is 0.
    low, high = blocks.amin(1, keepdim=True).add_(0.0), blocks.amax(1, keepdim=True)
    scale = divided(high - low, 2**bits - 1)
    codes = _codes((blocks - low).mul_(_reciprocal(scale)).add_(0.5), 2**bits - 1)
    return torch.cat([half_bytes(scale).flatten(1), half_bytes(low).flatten(1), _split(codes, bits)], 1)


def _decode_offset(octets: Tensor, bits: int) -> Tensor:
    numbers = halves(octets[:, :4])
    return _joined(octets[:, 4:], bits).to(torch.float32).mul_(numbers[:, :1]).add_(numbers[:, 1:])


def _encode_octet(blocks: Tensor) -> Tensor:
    scale = divided(blocks.abs().amax(1, keepdim=True), 127)
    codes = half_away(blocks * _reciprocal(scale)).nan_to_num_(0.0, 0.0, 0.0).to(torch.int8)
    return torch.cat([half_bytes(scale).flatten(1), codes.view(torch.uint8)], 1)


def _decode_octet(octets: Tensor) -> Tensor:
    return octets[:, 2:].view(torch.int8).to(torch.float32).mul_(halves(octets[:, :2]))


def _trits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = blocks.abs().amax(1, keepdim=True)
    codes = half_away(blocks * _reciprocal(scale)).nan_to_num_(0.0, 0.0, 0.0).add_(1.0).to(torch.uint8)
    return codes, half_bytes(scale).flatten(1)


# Where the five trits of a byte lie: 32 bytes over 160 weights, 16 over 80, and 4 over the last 16, with four each.
_RUNS = ((0, 160, 32), (160, 240, 16), (240, 256, 4))


def _encode_ternary(blocks: Tensor) -> Tensor:
    codes, scale = _trits(blocks)
    octets = []
    for start, end, width in _RUNS:
        run = codes[:, start:end].reshape(len(codes), -1, width).to(torch.int32)
        number = sum(run[:, place] * 3 ** (4 - place) for place in range(run.shape[1]))
        octets.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat([*octets, scale], 1)


def _decode_ternary(octets: Tensor) -> Tensor:
    codes = []
    for start, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        run = octets[:, start:end]
        # The product is taken modulo 256: what is left is the fraction behind the trits already read.
        codes += [((run * 3**place).to(torch.int16) * 3) >> 8 for place in range(count)]
    return torch.cat(codes, 1).to(torch.float32).sub_(1.0).mul_(halves(octets[:, 52:]))


def _encode_pairs(blocks: Tensor) -> Tensor:
    codes, scale = _trits(blocks)
    return torch.cat([together(codes, 4, 2, 32), scale], 1)


def _decode_pairs(octets: Tensor) -> Tensor:
    codes = across(octets[:, :64], 4, 2, 3, 32).to(torch.float32)
    return codes.sub_(1.0).mul_(halves(octets[:, 64:]))


PLAIN_BLOCKS = {
    "q4_0": Kind(partial(_encode_signed, bits=4), partial(_decode_signed, bits=4), (0,)),
    "q5_0": Kind(partial(_encode_signed, bits=5), partial(_decode_signed, bits=5), (0,)),
    "q4_1": Kind(partial(_encode_offset, bits=4), partial(_decode_offset, bits=4), (0, 2)),
    "q5_1": Kind(partial(_encode_offset, bits=5), partial(_decode_offset, bits=5), (0, 2)),
    "q8_0": Kind(_encode_octet, _decode_octet, (0,)),
    "tq1_0": Kind(_encode_ternary, _decode_ternary, (52,)),
    "tq2_0": Kind(_encode_pairs, _decode_pairs, (64,)),
}
