"""Plain number types: a cast that refuses to overflow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpsearch.formats.plain import Plain
from mpsearch.layer import Layer
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, RangeError, all_finite, as_bytes, from_bytes, magnitude

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PlainCodec(Codec[Plain]):
    """Rounds halves to even, as torch's own cast does."""

    def encode(self, rows: Tensor, fmt: Plain, evidence: Evidence) -> dict[str, Tensor]:
        numbers = rows.to(torch.float32).to(_TYPES[fmt.name], copy=True)
        if not all_finite(numbers):
            top = torch.finfo(numbers.dtype).max
            raise RangeError(f"weights reach {magnitude(rows):.4g}; {fmt} ends at {top:.4g}")
        return {"payload": numbers}

    def decode(self, parts: Parts, fmt: Plain, columns: int) -> Tensor:
        return parts["payload"].to(torch.float32, copy=True)

    def pack(self, parts: Parts, fmt: Plain) -> dict[str, Bytes]:
        return {"payload": as_bytes(parts["payload"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: Plain, layer: Layer) -> dict[str, Tensor]:
        return {"payload": from_bytes(packed["payload"], _TYPES[fmt.name], layer.rows, layer.columns)}
