"""The K types q2_K to q6_K: 256 weights in groups of 16 or 32, whose scales are codes themselves.

- q4_K, q5_K: groups of 32, value ``d * n * code - m * k`` with 6-bit ``n`` and ``k``, ``d`` and ``m`` in fp16;
  weights ``sqrt(mean(w**2)) + |w|`` in the search;
- q2_K: groups of 16, the same with 4-bit ``n`` and ``k``; weights ``|w|`` and plain distances;
- q3_K: groups of 16, value ``d * (n - 32) * (code - 4)`` with 6-bit ``n``;
- q6_K: groups of 16, value ``d * n * (code - 32)`` with signed 8-bit ``n``.

A first search (`scale_search`) finds each group's own scale; those are rounded to ``n`` and ``k`` (of the largest one),
and every code is made anew with the rounded scale. A group whose rounded scale is 0 keeps the codes of the search.

Layouts in bytes: q2_K ``n and k[16] codes[64] d[2] m[2]``; q3_K ``high bits[32] codes[64] n[12] d[2]``;
q4_K ``d[2] m[2] n and k[12] codes[128]``; q5_K the same with ``high bits[32]`` before ``codes[128]``;
q6_K ``codes[128] high bits[64] n[16] d[2]``.

Source: ``quantize_row_q*_K_ref`` of ggml (``ggml-quants.c``), which ``llama-quantize`` runs without an importance
matrix. The C compiler must not fuse products and sums (``-ffp-contract=off``): fused sums differ in the last bit.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpsearch.model.codec import divided
from mpsearch.model.codecs.gguf_blocks.arithmetic import (
    across,
    exact_root,
    first_largest,
    half_bytes,
    halves,
    nearest,
    ordered_sum,
    quotient,
    together,
)
from mpsearch.model.codecs.gguf_blocks.kind import Kind
from mpsearch.model.codecs.gguf_blocks.scale_search import (
    NOTHING,
    Offsets,
    Steps,
    coordinate_search,
    offset_search,
    signed_search,
)

_STEPS = {2: Steps(3, -0.5, 15, absolute=True), 4: Steps(15, -1.0, 20), 5: Steps(31, -0.5, 15)}


def _stored(numbers: Tensor) -> Tensor:
    """The float32 that the fp16 of a number stands for."""
    return numbers.to(torch.float16).to(torch.float32)


def _shares(found: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round (blocks, groups) numbers to codes of their largest one, and return what a code of 1 stands for too."""
    most = found.amax(1).clamp_(min=0.0).add_(0.0)
    inverse = quotient(top, most).masked_fill_(most <= 0, 0.0)
    # Cast to a byte like ggml: a number below 0, which the search seldom finds, wraps to a large one.
    codes = nearest(inverse.unsqueeze(1) * found).to(torch.int32).bitwise_and_(255)
    return codes, divided(most, top)


def _again(x: Tensor, scale: Tensor, codes: Tensor, low: int, high: int, offset: Tensor | None = None) -> Tensor:
    """Make (blocks, 256) codes anew with the stored (blocks, groups) scales, where those are not 0."""
    scale = scale.reshape(-1)
    moved = x if offset is None else x + offset.reshape(-1)
    new = nearest(moved / scale).clamp_(low, high).sub_(low)
    return torch.where(scale == 0, codes, new).T.to(torch.uint8).reshape(-1, 256)


def _affine(blocks: Tensor, bits: int, group: int, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scale codes, offset codes, and the numbers that those are multiples of."""
    x = blocks.reshape(-1, group).T.contiguous()
    weights = x.abs()
    if not _STEPS[bits].absolute:
        weights.add_(exact_root(divided(ordered_sum(x * x), group)))
    found: Offsets = offset_search(x, weights, _STEPS[bits])
    counts = (len(blocks), 256 // group)
    scales, scale = _shares(found.scales.reshape(counts), top)
    offsets, offset = _shares(found.offsets.reshape(counts), top)
    if bits > 2:
        scales.clamp_(max=top)
        offsets.clamp_(max=top)
        kept, moved = scales, offsets
    else:
        # Both nibbles are or-ed into one byte; what wrapped shows in the offset's as well.
        both = (scales | (offsets << 4)) & 255
        kept, moved = both & 15, both >> 4
    codes = _again(
        x,
        _stored(scale).unsqueeze(1) * kept,
        found.codes,
        0,
        2**bits - 1,
        _stored(offset).unsqueeze(1) * moved,
    )
    return codes, kept, moved, scale, offset


def _encode_2(blocks: Tensor) -> Tensor:
    codes, scales, offsets, scale, offset = _affine(blocks, 2, 16, 15)
    shares = (scales | (offsets << 4)).to(torch.uint8)
    return torch.cat([shares, together(codes, 4, 2, 32), half_bytes(scale), half_bytes(offset)], 1)


def _decode_2(octets: Tensor) -> Tensor:
    numbers = halves(octets[:, 80:])
    scales = (octets[:, :16] & 15).to(torch.float32).mul_(numbers[:, :1]).unsqueeze(2)
    offsets = (octets[:, :16] >> 4).to(torch.float32).mul_(numbers[:, 1:]).unsqueeze(2)
    values = across(octets[:, 16:80], 4, 2, 3, 32).to(torch.float32).reshape(-1, 16, 16)
    return values.mul_(scales).sub_(offsets).reshape(-1, 256)


def _encode_4(blocks: Tensor, bits: int) -> Tensor:
    codes, scales, offsets, scale, offset = _affine(blocks, bits, 32, 63)
    low = [scales[:, :4] | (scales[:, 4:] >> 4 << 6), offsets[:, :4] | (offsets[:, 4:] >> 4 << 6)]
    shares = torch.cat([*low, (scales[:, 4:] & 15) | ((offsets[:, 4:] & 15) << 4)], 1).to(torch.uint8)
    high = [together(codes >> 4, 8, 1, 32)] if bits == 5 else []
    return torch.cat([half_bytes(scale), half_bytes(offset), shares, *high, together(codes & 15, 2, 4, 32)], 1)


def _decode_4(octets: Tensor, bits: int) -> Tensor:
    numbers, shares = halves(octets[:, :4]), octets[:, 4:16]
    first, second, third = shares[:, :4], shares[:, 4:8], shares[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    offsets = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    codes = across(octets[:, -128:], 2, 4, 15, 32)
    if bits == 5:
        codes.bitwise_or_(across(octets[:, 16:48], 8, 1, 1, 32) << 4)
    values = codes.to(torch.float32).reshape(-1, 8, 32)
    values.mul_(scales.to(torch.float32).mul_(numbers[:, :1]).unsqueeze(2))
    return values.sub_(offsets.to(torch.float32).mul_(numbers[:, 1:]).unsqueeze(2)).reshape(-1, 256)


def _encode_3(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 16).T.contiguous()
    found, codes = coordinate_search(x, 4)
    scales = found.reshape(-1, 16)
    widest = first_largest(scales.T)
    inverse = quotient(-32.0, widest).masked_fill_(widest == 0, 0.0)
    numbers = nearest(inverse.unsqueeze(1) * scales).clamp_(-32, 31)
    scale = inverse.reciprocal().masked_fill_(widest == 0, 0.0)
    # Without any scale ggml leaves all the bytes of the scales 0.
    shares = (numbers + 32.0).masked_fill_((widest == 0).unsqueeze(1), 0.0).to(torch.uint8)
    made = _again(x, _stored(scale).unsqueeze(1) * (shares.to(torch.float32) - 32.0), codes, -4, 3)
    low = together(shares & 15, 2, 4, 8)
    parts = [together(made >> 2, 8, 1, 32), together(made & 3, 4, 2, 32), low, together(shares >> 4, 4, 2, 4)]
    return torch.cat([*parts, half_bytes(scale)], 1)


def _decode_3(octets: Tensor) -> Tensor:
    shares = across(octets[:, 96:104], 2, 4, 15, 8) | (across(octets[:, 104:108], 4, 2, 3, 4) << 4)
    scales = shares.to(torch.float32).sub_(32.0).mul_(halves(octets[:, 108:])).unsqueeze(2)
    codes = across(octets[:, 32:96], 4, 2, 3, 32) | (across(octets[:, :32], 8, 1, 1, 32) << 2)
    return codes.to(torch.float32).sub_(4.0).reshape(-1, 16, 16).mul_(scales).reshape(-1, 256)


def _encode_6(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 16).T.contiguous()
    found, codes = signed_search(x, 32)
    scales = found.reshape(-1, 16)
    widest = first_largest(scales.T)
    nothing = widest.abs() < NOTHING
    inverse = quotient(-128.0, widest).masked_fill_(nothing, 0.0)
    numbers = nearest(inverse.unsqueeze(1) * scales).clamp_(max=127)
    scale = inverse.reciprocal().masked_fill_(nothing, 0.0)
    made = _again(x, _stored(scale).unsqueeze(1) * numbers, codes, -32, 31)
    shares = numbers.to(torch.int8).view(torch.uint8)
    parts = [together(made & 15, 2, 4, 64), together(made >> 4, 4, 2, 32), shares, half_bytes(scale)]
    return torch.cat(parts, 1).masked_fill_(nothing.unsqueeze(1), 0)


def _decode_6(octets: Tensor) -> Tensor:
    scales = octets[:, 192:208].view(torch.int8).to(torch.float32).mul_(halves(octets[:, 208:])).unsqueeze(2)
    codes = across(octets[:, :128], 2, 4, 15, 64) | (across(octets[:, 128:192], 4, 2, 3, 32) << 4)
    return codes.to(torch.float32).sub_(32.0).reshape(-1, 16, 16).mul_(scales).reshape(-1, 256)


K_BLOCKS = {
    "q2_K": Kind(_encode_2, _decode_2, (80, 82)),
    "q3_K": Kind(_encode_3, _decode_3, (108,)),
    "q4_K": Kind(partial(_encode_4, bits=4), partial(_decode_4, bits=4), (0, 2)),
    "q5_K": Kind(partial(_encode_4, bits=5), partial(_decode_4, bits=5), (0, 2)),
    "q6_K": Kind(_encode_6, _decode_6, (208,)),
}
