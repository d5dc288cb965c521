"""Ternary weights: codes -1, 0 and 1, scaled by the mean magnitude.

``scale = fp16(mean|w|)`` of a tensor, row or group, the mean summed in float64;
``code = clamp(round(w / scale), -1, 1)`` with halves to the even number: weights up to half the scale become 0.
Weights whose scale is 0 become zeros.

Bytes: ``code + 1`` in 2 bits, four codes to a byte, the first in the lowest bits; then the scales, row by row.

Source: BitNet b1.58 (arXiv:2402.17764), which keeps the scale in the number type of the weight, per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpsearch.formats.ternary import Ternary
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, RangeError, all_finite, as_bytes, from_bytes, magnitude


class TernaryCodec(Codec[Ternary]):
    """Rounds to -1, 0 and 1; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: Ternary, evidence: Evidence) -> dict[str, Tensor]:
        blocks = 1 if fmt.granularity == "tensor" else len(rows)
        groups = rows.shape[1] // fmt.group if fmt.granularity == "group" else 1
        values = rows.reshape(blocks, groups, -1).to(torch.float32)
        scale = values.abs().mean(-1, keepdim=True, dtype=torch.float64).to(torch.float16)
        if not all_finite(scale):
            raise RangeError(f"weights reach {magnitude(rows):.4g}; the fp16 scale of {fmt} ends at 65504")
        step = scale.to(torch.float32).masked_fill_(scale == 0, torch.inf)
        codes = torch.div(values, step).round_().clamp_(-1, 1).to(torch.int8)
        return {"payload": codes.reshape(len(rows), -1), "scales": scale.squeeze(-1)}

    def decode(self, parts: Parts, fmt: Ternary, columns: int) -> Tensor:
        scales = parts["scales"]
        values = parts["payload"].to(torch.float32, copy=True).reshape(*scales.shape, -1)
        return values.mul_(scales.to(torch.float32).unsqueeze(-1)).reshape(-1, columns)

    def pack(self, parts: Parts, fmt: Ternary) -> dict[str, Bytes]:
        codes = (parts["payload"].cpu() + 1).numpy()
        return {"payload": pack_rows(codes, 2), "scales": as_bytes(parts["scales"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: Ternary, layer: Layer) -> dict[str, Tensor]:
        codes = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, 2)).to(torch.int8) - 1
        blocks = 1 if fmt.granularity == "tensor" else layer.rows
        return {"payload": codes, "scales": from_bytes(packed["scales"], torch.float16, blocks, -1)}
