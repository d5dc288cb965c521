"""Microscaling: a power of two for 32 weights, each weight to its nearest element.

For each block of 32 consecutive columns of a row, with ``emax`` the exponent of the element's largest number:

``scale = 2**max(floor(log2(max|w|)) - emax, -127)``, ``element = round(w / scale)``, ``weight = element * scale``.

``round`` takes halves to the even code and what is beyond the largest element to it (``127/64`` for int8, so that its
range is symmetric). All zeros get scale code 0, ``2**-127``; the standard leaves this open, torchao does the same.
Scaling is exact, so nothing else is rounded.

Bytes: codes row by row, least significant bit first (two FP4 codes in a byte, the first in its low half; four FP6 codes
in three bytes); one E8M0 byte per block, row by row.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3; Rouhani et al. 2023 (arXiv:2310.10537). Halves go
to even as in torchao; microxcaling's default takes them away from zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpsearch.formats.mx import BLOCK, Microscaling
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, as_bytes
from mpsearch.model.floats import from_codes, peaks, round_to_element_, to_codes

# One of an MXINT8 code, which has six bits behind the point.
_ONE = 64.0


class MicroscalingCodec(Codec[Microscaling]):
    """Rounds to the formats of the MX standard; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: Microscaling, evidence: Evidence) -> dict[str, Tensor]:
        values, exponents = _round(rows, fmt)
        flat = values.reshape(rows.shape)
        payload = flat.to(torch.int8) if fmt.numbers is None else to_codes(flat, fmt.numbers)
        return {"payload": payload, "scales": exponents.to(torch.uint8).squeeze(-1)}

    def decode(self, parts: Parts, fmt: Microscaling, columns: int) -> Tensor:
        codes, exponents = parts["payload"], parts["scales"].to(torch.int32).unsqueeze(-1)
        values = codes.to(torch.float32).div_(_ONE) if fmt.numbers is None else from_codes(codes, fmt.numbers)
        return values.reshape(len(codes), -1, BLOCK).mul_(_power(exponents)).reshape(-1, columns)

    def fake(self, rows: Tensor, fmt: Microscaling, evidence: Evidence) -> Tensor:
        values, exponents = _round(rows, fmt)
        if fmt.numbers is None:
            # Adding 0 turns -0 into the +0 that a stored code of 0 gives.
            values.div_(_ONE).add_(0.0)
        return values.mul_(_power(exponents)).reshape(rows.shape)

    def pack(self, parts: Parts, fmt: Microscaling) -> dict[str, Bytes]:
        codes = parts["payload"].cpu()
        payload = as_bytes(codes) if fmt.bits == 8 else pack_rows(codes.numpy(), fmt.bits)
        return {"payload": payload, "scales": as_bytes(parts["scales"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: Microscaling, layer: Layer) -> dict[str, Tensor]:
        payload = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits))
        scales = torch.from_numpy(packed["scales"].copy()).reshape(layer.rows, -1)
        return {"payload": payload.view(torch.int8) if fmt.numbers is None else payload, "scales": scales}


def _round(rows: Tensor, fmt: Microscaling) -> tuple[Tensor, Tensor]:
    """Return elements (of int8: codes) in memory of their own, (rows, blocks, 32), and int32 exponent codes."""
    blocks = rows.to(torch.float32).reshape(len(rows), -1, BLOCK)
    top = peaks(blocks, -1, rows)
    # The exponent bits of a float32 are floor(log2) + 127; of zeros and subnormals they are 0.
    exponents = (top.view(torch.int32) >> 23).sub_(fmt.top_exponent).clamp_(min=0)
    inverse = _power(254 - exponents)
    values = torch.mul(blocks, inverse) if rows.dtype == torch.float32 else blocks.mul_(inverse)
    if fmt.numbers is None:
        return values.mul_(_ONE).round_().clamp_(-127, 127), exponents
    return round_to_element_(values, fmt.numbers), exponents


def _power(codes: Tensor) -> Tensor:
    """Return the powers of two that E8M0 codes from 0 to 254 stand for, the first of which is a float32 subnormal."""
    return torch.where(codes == 0, 1 << 22, codes << 23).view(torch.float32)
