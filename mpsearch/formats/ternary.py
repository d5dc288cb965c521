"""Ternary weights: -1, 0 or 1 times a scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.integer import SCALE_BYTES, Granularity, group_misfit
from mpsearch.layer import Layer

_NAME = re.compile(r"ternary-(?P<grain>tensor|channel|g(?P<group>\d+))")


@dataclass(frozen=True, slots=True)
class Ternary(Format):
    """Codes -1, 0 and 1, printed ``ternary-<granularity>``.

    A code takes 2 bits, four to a byte (five to a byte, log2(3) bits each, would need a table to read). There is one
    fp16 scale per tensor, output channel or group: the mean magnitude, after BitNet b1.58 (arXiv:2402.17764). Each
    output channel's codes are padded to a whole byte.

    Rounding twice is not rounding once: the zeros that the first makes lower the mean that the second takes.

    Attributes:
        granularity: what shares one scale.
        group: weights that share one scale, for ``granularity="group"``.

    >>> Ternary("channel").itemised_bytes(Layer("fc", "linear", (2, 5)))
    {'payload': 4, 'scales': 4}
    """

    family: ClassVar[str] = "ternary"
    codec: ClassVar[str] = "mpsearch.model.codecs.ternary:TernaryCodec"
    examples: ClassVar[tuple[str, ...]] = ("ternary-channel", "ternary-tensor", "ternary-g128")
    purpose: ClassVar[str] = "models trained to three values, as BitNet b1.58"

    granularity: Granularity
    group: int = 0

    @classmethod
    def read(cls, text: str) -> Ternary | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        group = int(match["group"] or 0)
        if match["group"] and group < 1:
            raise InputError("E110", f"format '{text}': a group of 0 weights is impossible; allowed 1 and more")
        if match["grain"] == "tensor":
            return cls("tensor")
        return cls("group", group) if group else cls("channel")

    def __str__(self) -> str:
        return f"ternary-g{self.group}" if self.granularity == "group" else f"ternary-{self.granularity}"

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def bits(self) -> int:
        return 2

    def misfit(self, layer: Layer) -> str:
        return group_misfit(layer, self.group) if self.granularity == "group" else ""

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        groups = layer.columns // self.group if self.granularity == "group" else 1
        scales = groups * (1 if self.granularity == "tensor" else layer.rows)
        return {"payload": layer.rows * math.ceil(layer.columns / 4), "scales": scales * SCALE_BYTES}
