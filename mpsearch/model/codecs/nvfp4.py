"""NVFP4: an fp32 scale for the tensor, an E4M3 scale for 16 weights, each weight to its nearest E2M1 number.

For each block of 16 consecutive columns of a row, all in float32:

- ``g = max|w of the tensor| / (6 * 448)``, at least ``2**-126``; 0 if all are zero;
- ``s = e4m3(clamp(max|w of the block| / (6 g), 2**-9, 448))``, 1 for a block of zeros;
- ``number = e2m1(w / (s g))``, ``weight = number * (s g)``.

``e4m3`` and ``e2m1`` take halves to the even code and what is beyond the largest number to it.

Bytes: codes row by row, two in a byte, the first in its low half; an E4M3 byte per block, row by row; ``g`` as fp32.

Sources: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149); the order of the operations is that
of NVIDIA Model Optimizer. torchao multiplies by ``(1/g)/s`` instead, divides by 6 before ``g``, and ends block scales
at ``2**-6``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpsearch.formats.nvfp4 import BLOCK, NvFp4
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, as_bytes, divided, from_bytes
from mpsearch.model.floats import ELEMENTS, from_codes, peaks, round_to_element_, to_codes

_NUMBERS, _SCALES = ELEMENTS["e2m1"], ELEMENTS["e4m3"]
_TINY = 2.0**-126


class NvFp4Codec(Codec[NvFp4]):
    """Rounds to NVFP4; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: NvFp4, evidence: Evidence) -> dict[str, Tensor]:
        values, scales, tensor_scale = _round(rows)
        payload = to_codes(values.reshape(rows.shape), _NUMBERS)
        return {"payload": payload, "scales": to_codes(scales.squeeze(-1), _SCALES), "tensor_scale": tensor_scale}

    def decode(self, parts: Parts, fmt: NvFp4, columns: int) -> Tensor:
        step = from_codes(parts["scales"], _SCALES).mul_(parts["tensor_scale"]).unsqueeze(-1)
        blocks = from_codes(parts["payload"], _NUMBERS).reshape(*step.shape[:2], BLOCK)
        return blocks.mul_(step).reshape(-1, columns)

    def fake(self, rows: Tensor, fmt: NvFp4, evidence: Evidence) -> Tensor:
        values, scales, tensor_scale = _round(rows)
        return values.mul_(scales.mul_(tensor_scale)).reshape(rows.shape)

    def pack(self, parts: Parts, fmt: NvFp4) -> dict[str, Bytes]:
        return {
            "payload": pack_rows(parts["payload"].cpu().numpy(), fmt.bits),
            "scales": as_bytes(parts["scales"]),
            "tensor_scale": as_bytes(parts["tensor_scale"]),
        }

    def unpack(self, packed: Mapping[str, Bytes], fmt: NvFp4, layer: Layer) -> dict[str, Tensor]:
        return {
            "payload": torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits)),
            "scales": torch.from_numpy(packed["scales"].copy()).reshape(layer.rows, -1),
            "tensor_scale": from_bytes(packed["tensor_scale"], torch.float32, 1),
        }


def _round(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers in memory of their own (rows, blocks, 16), scales (rows, blocks, 1) and the tensor's (1,)."""
    blocks = rows.to(torch.float32).reshape(len(rows), -1, BLOCK)
    top = peaks(blocks, -1, rows)
    whole = top.amax().reshape(1)
    tensor_scale = torch.where(whole > 0, divided(whole, _NUMBERS.largest * _SCALES.largest).clamp_(min=_TINY), 0.0)
    scales = torch.where(top > 0, (top / (_NUMBERS.largest * tensor_scale)).clamp_(min=_SCALES.smallest), 1.0)
    scales = round_to_element_(scales, _SCALES)
    # A step of 0 is that of a tensor of zeros.
    step = (scales * tensor_scale).masked_fill_(whole == 0, 1.0)
    values = torch.div(blocks, step) if rows.dtype == torch.float32 else blocks.div_(step)
    return round_to_element_(values, _NUMBERS), scales, tensor_scale
