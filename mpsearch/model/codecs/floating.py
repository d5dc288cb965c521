"""Small floats: scales from the largest weight, each weight to its nearest number.

The weights that share one scale are a tensor, a row, ``group`` consecutive columns of a row, or a block of rows and
columns. All in float32:

``scale = max|w| / largest``, of groups rounded to bf16, ``number = round(w / scale)``, ``weight = number * scale``.

``round`` takes halves to the even code and what is beyond the largest number to it. The stored scale is the one that
numbers are made with. A scale of weights that are not all zero is at least ``2**-126``, so that it keeps its precision;
that of zeros is 0. With ``mse`` the scales ``scale * k / 32`` for k from 32 down to 16 are tried, and each set of
weights keeps the one of least squared error, the largest of equals.

Bytes: codes row by row, each row packed least significant bit first (two FP4 codes in a byte, the first in its low
half); scales row by row.

Sources: Micikevicius et al. 2022 (arXiv:2209.05433); fp32 scales as in compressed-tensors and vLLM; blocks of 128 by
128 as in DeepSeek-V3 (arXiv:2412.19437), whose ``weight_scale_inv`` is ``scales``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpsearch.formats.floating import FloatingPoint
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, as_bytes, divided, from_bytes
from mpsearch.model.floats import from_codes, peaks, round_to_element, round_to_element_, to_codes

_TINY = 2.0**-126
_TRIALS = 32


class FloatingPointCodec(Codec[FloatingPoint]):
    """Rounds to small floats; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: FloatingPoint, evidence: Evidence) -> dict[str, Tensor]:
        values, scale = _round(rows, fmt)
        payload = to_codes(_flat(values, fmt, *rows.shape), fmt.numbers)
        return {"payload": payload, "scales": scale.reshape(scale.shape[0], -1)}

    def decode(self, parts: Parts, fmt: FloatingPoint, columns: int) -> Tensor:
        numbers, scales = from_codes(parts["payload"], fmt.numbers), parts["scales"].to(torch.float32)
        rows = len(numbers)
        cells = _cells(numbers, fmt)
        scales = scales[:, None, :, None] if fmt.granularity == "block" else scales[:, :, None]
        return _flat(cells.mul_(scales), fmt, rows, columns)

    def fake(self, rows: Tensor, fmt: FloatingPoint, evidence: Evidence) -> Tensor:
        values, scale = _round(rows, fmt)
        return _flat(values.mul_(scale.to(torch.float32)), fmt, *rows.shape)

    def pack(self, parts: Parts, fmt: FloatingPoint) -> dict[str, Bytes]:
        payload = pack_rows(parts["payload"].cpu().numpy(), fmt.bits)
        return {"payload": payload, "scales": as_bytes(parts["scales"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: FloatingPoint, layer: Layer) -> dict[str, Tensor]:
        kind = torch.float32 if fmt.scale_bytes == 4 else torch.bfloat16
        payload = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits))
        return {"payload": payload, "scales": from_bytes(packed["scales"], kind, *fmt.scale_shape(layer))}


def _round(rows: Tensor, fmt: FloatingPoint) -> tuple[Tensor, Tensor]:
    """Return numbers in memory of their own, shaped as `_cells` does, and the scales that go with them."""
    values = rows.to(torch.float32)
    cells = _cells(values, fmt)
    top = peaks(cells, _axes(fmt), rows)
    if fmt.granularity == "group":
        # A scale rounded up to bf16 must not take the largest number beyond float32.
        top.clamp_(max=torch.finfo(torch.bfloat16).max)
    scale = _stored(divided(top, fmt.numbers.largest), top, fmt)
    if fmt.rule:
        scale = _least_error(cells, top, scale, fmt)
    step = _divisor(scale)
    # A float32 weight may share its memory with `cells`; all else is a copy that may be written.
    quotient = torch.div(cells, step) if cells.data_ptr() == rows.data_ptr() else cells.div_(step)
    return round_to_element_(quotient, fmt.numbers), scale


def _least_error(cells: Tensor, top: Tensor, scale: Tensor, fmt: FloatingPoint) -> Tensor:
    """Try smaller scales, at which the largest weights saturate; keep the best of each set of weights."""
    whole, kept, least = scale.to(torch.float32), scale, torch.full_like(top, torch.inf)
    largest = fmt.numbers.largest
    for k in range(_TRIALS, _TRIALS // 2 - 1, -1):
        # Through the weight that it makes the largest, so that this scale is found again when rounding a second time.
        trial = _stored(divided((whole * (k / _TRIALS)).mul_(largest), largest), top, fmt)
        quotient = cells / _divisor(trial)
        off = round_to_element(quotient, fmt.numbers).sub_(quotient).square_().sum(_axes(fmt), keepdim=True)
        # In units of the first scale, so that squares of very large or small weights stay within float32.
        error = off.mul_((_divisor(trial) / _divisor(scale)).square_())
        kept = torch.where(error < least, trial, kept)
        least = torch.minimum(error, least)
    return kept


def _stored(scale: Tensor, top: Tensor, fmt: FloatingPoint) -> Tensor:
    """Round scales to what is stored."""
    found = torch.where(top > 0, scale.clamp(min=_TINY), 0.0)
    return found.to(torch.bfloat16) if fmt.granularity == "group" else found


def _divisor(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).masked_fill(scale == 0, 1.0)


def _axes(fmt: FloatingPoint) -> int | tuple[int, ...]:
    """Axes of `_cells` that share a scale."""
    return (1, 3) if fmt.granularity == "block" else -1


def _cells(values: Tensor, fmt: FloatingPoint) -> Tensor:
    """Cut (rows, columns) into what shares a scale: the last axis, or axes 1 and 3 of blocks, padded with zeros."""
    rows, columns = values.shape
    if fmt.granularity == "block":
        below, right = -rows % fmt.height, -columns % fmt.width
        if below or right:
            values = pad(values, (0, right, 0, below))
        return values.reshape(-1, fmt.height, (columns + right) // fmt.width, fmt.width)
    if fmt.granularity == "group":
        return values.reshape(rows, -1, fmt.group)
    return values.reshape(rows if fmt.granularity == "channel" else 1, 1, -1)


def _flat(cells: Tensor, fmt: FloatingPoint, rows: int, columns: int) -> Tensor:
    """Undo `_cells`."""
    if fmt.granularity != "block":
        return cells.reshape(rows, columns)
    return cells.reshape(cells.shape[0] * fmt.height, -1)[:rows, :columns].contiguous()
