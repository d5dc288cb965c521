"""NormalFloat with an absmax per block, as bitsandbytes stores it.

All in float32. ``c_0 < c_1 < …`` are the numbers that codes stand for, -1, 0 and 1 among them:

- ``absmax = max|w|`` of each block, ``x = w * (1 / absmax)``;
- the code is the number of midpoints ``(c_i + c_(i+1)) / 2`` that lie below ``x``, so ties go down;
- the weight is ``c_code * absmax``.

Double quantization replaces the absmaxes after the codes are made: ``a = absmax - mean(absmax)``, of which
``nested`` ones in a row are rounded in the same way, with ``nested_absmax = max|a|``, to the 256 numbers of
`dynamic_map`. It is read as ``map_code * nested_absmax + mean``.

``c`` of 4 bits are the published constants; of 2 and 3 bits they are the formula those come from,
``Phi^-1(p) / Phi^-1(0.9677083)`` at evenly spaced ``p``: ``2**(b-1) - 1`` of them below 0, 0, and ``2**(b-1)``
above. Codes are not odd: there is one more above 0.

Where this is not bitsandbytes to the bit: a block whose absmax is below 1e-38 becomes zeros (there ``1 / 1e-38`` is
taken in its place, and rounding is not stable); the mean is summed in float64, as the last bit of a float32 sum hangs
on the number of threads; and to round absmaxes, its CPU kernel looks them up in a table of 65536 entries, which may
miss the nearest of the fine numbers about 0. Its GPU kernels use midpoints that differ in the last bit.

Bytes: codes of a row packed like those of integers (bitsandbytes puts the first of two codes into the high half of a
byte), absmaxes row by row.

Sources: Dettmers et al. 2023 (arXiv:2305.14314); bitsandbytes ``quantize_4bit``, ``create_dynamic_map``; the formula:
LQ-LoRA (arXiv:2311.12023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from mpsearch.formats.normal_float import NormalFloat
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, RangeError, all_finite, as_bytes, from_bytes, magnitude

#: The published numbers of 4 bits.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_OUTERMOST = 0.9677083
#: Below this a float32 has no usable inverse.
_SMALLEST = 1e-38


@lru_cache(maxsize=8)
def numbers(bits: int) -> tuple[float, ...]:
    """List the numbers that the codes of NormalFloat stand for.

    >>> [round(x, 4) for x in numbers(3)]
    [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0]
    """
    if bits == 4:
        return NF4
    half, normal = 2 ** (bits - 1), NormalDist().inv_cdf
    above = [normal(0.5 + (_OUTERMOST - 0.5) * n / half) for n in range(1, half + 1)]
    below = [normal(0.5 - (_OUTERMOST - 0.5) * n / (half - 1)) for n in range(half - 1, 0, -1)]
    return tuple(x / above[-1] for x in (*below, 0.0, *above))


@lru_cache(maxsize=1)
def dynamic_map() -> tuple[float, ...]:
    """List the 256 numbers of the dynamic 8-bit type, lowest first.

    They are 0, 1, and for each decade ``10**-6`` to ``10**0`` the centres of ``1, 2, 4, …, 64`` equal parts of its
    span from 0.1 to 1, of both signs, computed in float32.

    >>> numbers = dynamic_map()
    >>> len(numbers), numbers[0], numbers[127:129]
    (256, -0.992968738079071, (0.0, 5.500000384017767e-07))
    """
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(-6, 1):
        ends = torch.linspace(0.1, 1.0, 2 ** (decade + 6) + 1, dtype=torch.float32)
        centres = 10.0**decade * ((ends[:-1] + ends[1:]) / 2)
        found += [centres, -centres]
    return tuple(torch.cat(found).sort().values.tolist())


class NormalFloatCodec(Codec[NormalFloat]):
    """Rounds to NormalFloat; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: NormalFloat, evidence: Evidence) -> dict[str, Tensor]:
        values = rows.reshape(len(rows), -1, fmt.block).to(torch.float32)
        absmax = torch.maximum(values.amax(-1), -values.amin(-1))
        if not all_finite(absmax):
            raise RangeError(f"weights reach {magnitude(rows):.4g}; the float32 absmax of {fmt} ends at 3.403e+38")
        absmax.masked_fill_(absmax < _SMALLEST, 0.0)
        codes = _nearest(values, absmax, numbers(fmt.bits)).reshape(len(rows), -1)
        if not fmt.nested:
            return {"payload": codes, "absmax": absmax}
        mean = absmax.mean(dtype=torch.float64).to(torch.float32).reshape(1)
        centred = (absmax - mean).reshape(-1)
        padding = -len(centred) % fmt.nested
        blocks = torch.nn.functional.pad(centred, (0, padding)).reshape(-1, fmt.nested)
        nested = blocks.abs().amax(-1)
        small = _nearest(blocks, nested, dynamic_map()).reshape(-1)[: len(centred)].reshape(absmax.shape)
        return {"payload": codes, "absmax": small, "nested_absmax": nested, "nested_mean": mean}

    def decode(self, parts: Parts, fmt: NormalFloat, columns: int) -> Tensor:
        absmax = parts["absmax"]
        if fmt.nested:
            scales = parts["nested_absmax"].repeat_interleave(fmt.nested)[: absmax.numel()].reshape(absmax.shape)
            absmax = _looked_up(absmax, dynamic_map()).mul_(scales).add_(parts["nested_mean"])
            # Rounded up, the largest numbers of all would pass the end of float32, and 0 times infinity is NaN.
            absmax.clamp_(max=torch.finfo(torch.float32).max)
        values = _looked_up(parts["payload"], numbers(fmt.bits)).reshape(*absmax.shape, fmt.block)
        # A doubly quantized absmax may end below 0; adding 0 keeps the zeros it is multiplied with from being -0.
        return values.mul_(absmax.unsqueeze(-1)).add_(0.0).reshape(-1, columns)

    def pack(self, parts: Parts, fmt: NormalFloat) -> dict[str, Bytes]:
        packed = {"payload": pack_rows(parts["payload"].cpu().numpy(), fmt.bits)}
        return packed | {name: as_bytes(part) for name, part in parts.items() if name != "payload"}

    def unpack(self, packed: Mapping[str, Bytes], fmt: NormalFloat, layer: Layer) -> dict[str, Tensor]:
        payload = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits))
        shape = (layer.rows, layer.columns // fmt.block)
        lots = math.ceil(fmt.blocks(layer) / fmt.nested) if fmt.nested else 0
        if not fmt.nested:
            return {"payload": payload, "absmax": from_bytes(packed["absmax"], torch.float32, *shape)}
        return {
            "payload": payload,
            "absmax": from_bytes(packed["absmax"], torch.uint8, *shape),
            "nested_absmax": from_bytes(packed["nested_absmax"], torch.float32, lots),
            "nested_mean": from_bytes(packed["nested_mean"], torch.float32, 1),
        }


def _nearest(values: Tensor, absmax: Tensor, table: tuple[float, ...]) -> Tensor:
    """Return the codes (uint8) of values whose last axis shares an absmax."""
    levels = torch.tensor(table, dtype=torch.float32, device=values.device)
    inverse = absmax.clamp(min=_SMALLEST).reciprocal_().masked_fill_(absmax == 0, 0.0).unsqueeze(-1)
    return torch.bucketize(values * inverse, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _looked_up(codes: Tensor, table: tuple[float, ...]) -> Tensor:
    levels = torch.tensor(table, dtype=torch.float32, device=codes.device)
    return levels.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
