"""NVFP4: 4-bit floats in blocks of 16 with two levels of scales."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.mx import block_misfit
from mpsearch.layer import Layer

BLOCK = 16
_NAME = re.compile(r"nvfp\d*(-.*)?")


@dataclass(frozen=True, slots=True)
class NvFp4(Format):
    """E2M1 numbers; 16 consecutive weights of an output channel share an E4M3 scale, and all of them an fp32 one.

    Rounding twice can change the result: small blocks have scales among the subnormals of E4M3, which lie so far apart
    that a block's largest weight may come out as 4 or 5 steps of 6, and then the next scale is another one.

    >>> NvFp4().itemised_bytes(Layer("fc", "linear", (4096, 4096)))
    {'payload': 8388608, 'scales': 1048576, 'tensor_scale': 4}
    """

    family: ClassVar[str] = "nvfp4"
    codec: ClassVar[str] = "mpsearch.model.codecs.nvfp4:NvFp4Codec"
    examples: ClassVar[tuple[str, ...]] = ("nvfp4",)
    purpose: ClassVar[str] = "weights for the 4-bit tensor cores of NVIDIA Blackwell"

    @classmethod
    def read(cls, text: str) -> NvFp4 | None:
        if text == "nvfp4":
            return cls()
        if _NAME.fullmatch(text):
            raise InputError("E110", f"format '{text}': NVIDIA's block format has no variants here; allowed nvfp4")
        return None

    def __str__(self) -> str:
        return "nvfp4"

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def bits(self) -> int:
        return 4

    def misfit(self, layer: Layer) -> str:
        return block_misfit(layer, BLOCK, "fp4-e2m1")

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {"payload": layer.weights // 2, "scales": layer.weights // BLOCK, "tensor_scale": 4}
